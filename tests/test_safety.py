"""Who can reach a run, what it lets out, and what it takes for code; on hosts of a cluster: tests/cluster."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from finemask_ds.config import FinetuneConfig, SweepConfig, TamtConfig
from finemask_ds.dispatch.plan import Cell, Plan
from finemask_ds.engine.world import World
from finemask_ds.errors import UserError
from finemask_ds.masks.files import save_mask
from finemask_ds.masks.mask import Mask
from finemask_ds.models.load import load_pretrained
from finemask_ds.options import parse
from tests.pool import RankPool
from tests.test_cli import finemask
from tests.test_house import sources


def pid(world: World) -> int:
    world.barrier()
    return os.getpid()


def listening(process: int) -> set[str]:
    """The addresses that a process listens on, as the kernel tells them."""
    sockets = {os.readlink(link) for link in Path(f"/proc/{process}/fd").iterdir() if link.is_symlink()}
    found = set()
    for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            local, state, inode = (line.split()[field] for field in (1, 3, 9))
            if state == "0A" and f"socket:[{inode}]" in sockets:
                words = bytes.fromhex(local.partition(":")[0])
                turned = b"".join(words[start : start + 4][::-1] for start in range(0, len(words), 4))
                found.add(socket.inet_ntop(family, turned))
    return found


@pytest.mark.slow
def test_ranks_of_one_host_listen_on_its_loopback_only(one_rank: RankPool, two_ranks: RankPool) -> None:
    with socket.create_server(("127.0.0.1", 0)), socket.create_server(("::", 0), family=socket.AF_INET6):
        assert listening(os.getpid()) >= {"127.0.0.1", "::"}, "the test can see"
    for pool in (one_rank, two_ranks):
        for process in pool.run(pid):
            assert listening(process) == {"127.0.0.1"}


@pytest.mark.parametrize("address", ["https://me:pa55word@example.org/text", "ray://t0ken@10.0.0.1:10001"])
def test_a_login_in_an_option_is_refused_and_not_repeated(address: str) -> None:
    for config, option in ((TamtConfig, "--data"), (FinetuneConfig, "--mask"), (SweepConfig, "--ray_address"),
                           (SweepConfig, "--masks")):  # fmt: skip
        with pytest.raises(UserError, match=f"{option} holds a login") as error:
            parse(config, ["--task", "cola", option, address] if config is FinetuneConfig else [option, address])
        assert "pa55word" not in str(error.value)
        assert "t0ken" not in str(error.value)
    assert TamtConfig(data="user@host").data == "user@host", "which is no secret"


def test_nothing_goes_through_a_shell() -> None:
    for path in sources():
        found = re.search(r"shell=True|os\.system\(|os\.popen\(|getoutput\(|(?<![.\w])(eval|exec)\(", path.read_text())
        assert not found, f"{found} in {path}"


@pytest.mark.parametrize("model_type", ["bert", "evil"])
def test_code_beside_a_model_is_never_run(toy_bert: Path, tmp_path: Path, model_type: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(toy_bert, folder)
    config = json.loads((folder / "config.json").read_text())
    code = {name: f"evil.{name}" for name in ("AutoConfig", "AutoModel", "AutoModelForMaskedLM", "AutoTokenizer")}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type, "auto_map": code}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\n")
    if model_type == "evil":
        with pytest.raises(UserError, match="could not be loaded"):
            load_pretrained(str(folder))
    else:
        assert load_pretrained(str(folder)).digest() == load_pretrained(str(toy_bert)).digest()
    assert not (tmp_path / "trace").exists()


@pytest.mark.slow
def test_what_a_file_says_is_no_command_to_a_terminal(tmp_path: Path) -> None:
    evil = "\x1b[2J\u202eevil"
    save_mask(tmp_path / "mask.safetensors", Mask.full_like({evil: (8, 8)}).with_provenance({"method": evil}))
    Plan.write(tmp_path / "plan", [Cell("cell-1", {"task": "mrpc", "seed": 1}, method=evil)])
    for arguments in (["mask", "show", tmp_path / "mask.safetensors"], ["status", tmp_path / "plan", "--once"],
                      ["mask", "compare", tmp_path / "mask.safetensors", tmp_path / "mask.safetensors"]):  # fmt: skip
        told = finemask(*arguments)
        assert told.returncode == 0, told.stderr
        assert "\\x1b[2J\\u202eevil" in told.stdout
        assert not {"\x1b", "\u202e"} & set(told.stdout + told.stderr)
    told = finemask("mask", "show", tmp_path / evil)
    assert told.returncode == 2
    assert "\x1b" not in told.stderr


def test_a_repositorys_remote_is_nobodys_business(tmp_path: Path) -> None:
    """A token in the address that the code was cloned from does not reach a provenance file."""
    package = tmp_path / "finemask_ds"
    shutil.copytree(Path(sys.modules["finemask_ds"].__path__[0]), package, ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=me", "-c", "user.email=me@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "code"],
                    ["remote", "add", "origin", "https://me:ghp_t0ken@example.org/code"]):  # fmt: skip
        subprocess.run([*git, *command], check=True, timeout=60)
    script = "import json; from finemask_ds.provenance import collect; print(json.dumps(collect()))"
    told = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "HF_TOKEN": "hf_t0ken"}, cwd=tmp_path,
    )  # fmt: skip
    assert len(json.loads(told.stdout)["code"]["commit"]) == 40
    assert "t0ken" not in told.stdout
