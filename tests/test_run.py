import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from finemask_ds.errors import UserError
from finemask_ds.provenance import code_state, command_line
from finemask_ds.run import Run, atomic_write, cache_dir, content_hash, read_json, write_json

DEFAULTS = {"objective": "mlm", "sparsity": 0.7, "lr": 5e-5, "seed": 0, "log_every": 50}
ROOT = Path(__file__).parents[1]
VOLATILE = ("log_every", "run")


def open_run(folder, root, method="tamt", defaults=DEFAULTS, **changes):
    return Run.open(folder, defaults | changes, defaults, method, root=root, volatile=VOLATILE)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(("mode", "old", "new"), [("w", "old", "new: ä"), ("wb", b"old", b"\x00new")])
def test_atomic_write_replaces_the_file_and_leaves_nothing_else(tmp_path, mode, old, new):
    path = tmp_path / "a" / "file"
    for content in (old, new):
        with atomic_write(path, mode) as stream:
            stream.write(content)
        assert (path.read_text("utf-8") if mode == "w" else path.read_bytes()) == content
    assert os.listdir(path.parent) == ["file"]


def test_an_error_in_the_body_keeps_the_old_file_and_leaves_no_temporary_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as stream:
        stream.write("half of the n" * (1 // 0 if stream.write("half") else 1))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_nobody_sees_the_file_before_it_is_whole(tmp_path):
    path = tmp_path / "file"
    with atomic_write(path) as stream:
        stream.write("new")
        stream.flush()
        assert not path.exists()
    assert path.read_text() == "new"


def test_a_file_gets_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    write_json(tmp_path / "ours", {})
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_is_a_sentence_that_names_the_file(tmp_path):
    path = tmp_path / "mask"
    path.write_text("old")
    # The kernel's own ENOSPC, met while the body of the block writes.
    with pytest.raises(UserError, match=r"disk is full at .*mask"), atomic_write(path):
        with open("/dev/full", "w") as full:
            full.write("x" * 100_000)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["mask"]


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*name a folder"):
        write_json(tmp_path / "file" / "config.json", {})


def test_kill_9_in_the_middle_of_writes_leaves_a_whole_file(tmp_path):
    path = tmp_path / "file"
    code = f"""
        from finemask_ds.run import atomic_write
        for number in range(10**9):
            with atomic_write({str(path)!r}, "wb") as stream:
                for _ in range(64):
                    stream.write(bytes([number % 256]) * 4096)
    """
    lengths = set()
    for wait in (0.02, 0.051, 0.083):
        writer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT)
        while not path.exists():
            assert writer.poll() is None
            time.sleep(0.005)
        time.sleep(wait)
        os.kill(writer.pid, signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
        content = path.read_bytes()
        assert len(set(content)) == 1
        lengths.add(len(content))
        path.unlink()
    assert lengths == {64 * 4096}


def test_json_round_trip_and_broken_json(tmp_path):
    path = tmp_path / "value.json"
    value = {"a": [1, 2.5, None, True, "ä"], "b": {"c": "d"}}
    write_json(path, value)
    assert read_json(path) == value
    path.write_text('{"a": 1')
    with pytest.raises(UserError, match=r"value\.json is not valid JSON"):
        read_json(path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


def test_what_json_cannot_say_is_refused_and_the_old_file_stays(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, 1)
    for value in (float("nan"), float("inf"), object()):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, value)
    assert read_json(path) == 1


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FINEMASK_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("FINEMASK_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "finemask_ds"


def test_content_hash_reads_files_and_tells_where_a_part_ends(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * (3 << 20))
    assert content_hash(path) == content_hash(b"x" * (3 << 20)) == content_hash("x" * (3 << 20))
    assert len({content_hash(*parts) for parts in (["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""], [])}) == 5
    assert len(content_hash()) == 16
    assert int(content_hash(), 16) >= 0


# ---------------------------------------------------------------- runs


def test_file_names_that_scripts_rely_on():
    run = Run(Path("d"))
    names = [run.mask, run.metrics, run.tensorboard, *(run.rung_mask(k / 10) for k in (1, 5, 9))]
    expected = ["mask.safetensors", "metrics.jsonl", "tb", "masks/0.1.safetensors", "masks/0.5.safetensors"]
    assert names == [Path("d") / name for name in [*expected, "masks/0.9.safetensors"]]
    assert run.rung_mask(1 - 0.9) == Path("d/masks/0.1.safetensors")  # 0.09999999999999998


def test_a_run_is_named_by_its_content(tmp_path):
    run = open_run(None, tmp_path, method="tamt-mlm")
    assert run.folder.parent == tmp_path
    assert run.folder.name.startswith("tamt-mlm-s0.7-")
    assert len(run.folder.name.removeprefix("tamt-mlm-s0.7-")) == 8
    assert open_run(None, tmp_path, method="tamt-mlm").folder == run.folder
    assert open_run(None, tmp_path, method="tamt-mlm", log_every=7, run="elsewhere").folder == run.folder
    others = [{"lr": 1e-4}, {"lr": 2e-5}, {"seed": 1}, {"sparsity": 0.5}, {"method": "imp"}]
    folders = {open_run(None, tmp_path, **{"method": "tamt-mlm"} | other).folder for other in others}
    assert len(folders | {run.folder}) == 6


def test_a_knob_added_later_moves_no_old_run(tmp_path):
    run = open_run(None, tmp_path, seed=3)
    assert open_run(None, tmp_path, defaults=DEFAULTS | {"knob": True}, seed=3).folder == run.folder
    with pytest.raises(UserError, match="knob was true, now false"):
        open_run(run.folder, tmp_path, defaults=DEFAULTS | {"knob": True}, seed=3, knob=False)


def test_a_folder_made_by_another_config_is_refused_and_stays_as_it_is(tmp_path):
    run = open_run(tmp_path / "d", tmp_path, lr=1e-4)
    before = run.config.read_bytes()
    with pytest.raises(UserError) as caught:
        open_run(tmp_path / "d", tmp_path, seed=1, log_every=3)
    sentence = str(caught.value)
    assert "lr was 0.0001, now 5e-05" in sentence
    assert "seed was 0, now 1" in sentence
    assert "another --run DIR" in sentence
    assert "--lr 0.0001, no --seed" in sentence
    assert "log_every" not in sentence
    assert "objective" not in sentence
    assert run.config.read_bytes() == before
    with pytest.raises(UserError, match="method was tamt, now imp"):
        open_run(tmp_path / "d", tmp_path, method="imp", lr=1e-4)
    assert open_run(tmp_path / "d", tmp_path, lr=1e-4, log_every=3) == run
    assert run.config.read_bytes() == before


def test_a_path_may_be_spelled_otherwise(tmp_path, monkeypatch):
    (tmp_path / "models" / "bert").mkdir(parents=True)
    (tmp_path / "models" / "other").mkdir()
    (tmp_path / "bert").mkdir()
    monkeypatch.chdir(tmp_path)
    made = open_run("d", tmp_path, objective="models/bert")
    for same in ("./models/bert", "models/bert/", "models/other/../bert", str(tmp_path / "models" / "bert")):
        assert open_run("d", tmp_path, objective=same) == made
    for other in ("models/other", "./bert", "models/none", "bert"):
        with pytest.raises(UserError, match=f"objective was models/bert, now {other}"):
            open_run("d", tmp_path, objective=other)
    open_run("e", tmp_path, objective="bert")
    with pytest.raises(UserError, match=r"objective was bert, now \./bert"):
        open_run("e", tmp_path, objective="./bert")


def test_config_json_holds_every_knob(tmp_path):
    run = open_run(tmp_path / "d", tmp_path, seed=5)
    config = read_json(run.config)
    assert config.items() >= (DEFAULTS | {"seed": 5, "method": "tamt"}).items()


def test_a_folder_that_holds_a_mask_but_no_config_is_refused(tmp_path):
    (tmp_path / "mask.safetensors").write_text("dear")
    with pytest.raises(UserError, match=r"holds mask.safetensors but no config.json"):
        open_run(tmp_path, tmp_path)
    assert os.listdir(tmp_path) == ["mask.safetensors"]


def test_a_stage_is_done_once_its_result_is_written(tmp_path):
    run = open_run(tmp_path / "d", tmp_path)
    assert not run.done("search")
    with pytest.raises(FileNotFoundError):
        run.result_of("search")
    with pytest.raises(ValueError):
        run.mark_done("search", {"loss": float("nan")})
    assert not run.done("search")
    run.mark_done("search", {"loss": 1.5})
    assert run.done("search")
    assert run.result_of("search") == {"loss": 1.5}
    assert not run.done("rung-0.1")
    for stage in ("", "..", "a/b", "../config"):
        with pytest.raises(ValueError, match="stage"):
            run.mark_done(stage, {})


# ---------------------------------------------------------------- provenance


def test_provenance_names_versions_and_hardware_but_no_host(tmp_path):
    run = open_run(tmp_path / "d", tmp_path)
    run.write_provenance({"data_hash": "1234"})
    first = read_json(run.provenance)
    assert first["versions"]["torch"]
    assert first["versions"]["python"].count(".") == 2
    assert first["hardware"]["cores"] >= 1
    assert first["hardware"]["memory_gib"] > 0
    assert first["data_hash"] == "1234"
    assert os.uname().nodename not in run.provenance.read_text()
    run.write_provenance({"data_hash": "1234", "ranks": 2})
    run.update_provenance({"core_hours": 0.5})
    again = read_json(run.provenance)
    assert [restart["ranks"] for restart in again.pop("restarts")] == [2], "each start tells its own"
    assert again == first | {"core_hours": 0.5}


def test_code_state_is_of_the_repository_that_tracks_the_code(tmp_path):
    def git(*words):
        identity = ["-c", "user.name=x", "-c", "user.email=x@x.x", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    unknown = {"commit": None, "dirty": None}
    assert code_state(package) == unknown
    git("init")
    (tmp_path / "other").write_text("")
    git("add", "other")
    git("commit", "-m", "somebody else's repository")
    assert code_state(package) == unknown
    git("add", ".")
    git("commit", "-m", "ours")
    (tmp_path / "results").mkdir()
    (tmp_path / "results/figures.json").write_text("{}")  # A plan keeps these as it goes.
    assert code_state(package) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (package / "__init__.py").write_text("changed = True")
    assert code_state(package)["dirty"] is True


def test_command_line_is_as_typed():
    typed = ["launcher/tamt.py", "--data", "my texts"]
    assert command_line(["launcher/tamt.py", "--local_rank=1", *typed[1:]]) == "launcher/tamt.py --data 'my texts'"
    assert command_line(typed) == "launcher/tamt.py --data 'my texts'"


def test_run_imports_nothing_heavy():
    code = "import sys, finemask_ds.run; print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(answer.stdout) == []


def test_masks_on_the_way_are_those_of_steps_and_rungs(tmp_path):
    run = Run(tmp_path)
    run.start_mask.parent.mkdir()
    for path in (
        run.start_mask,
        run.snapshot(100),
        run.snapshot(20),
        run.rung_mask(0.3),
        tmp_path / "masks/mine.safetensors",
    ):
        path.touch()
    assert run.masks_on_the_way() == [run.rung_mask(0.3), run.snapshot(20), run.snapshot(100)]
