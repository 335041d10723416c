"""On real hosts: what the ranks listen on, and what of a command line the hosts' shells get to obey."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from finemask_ds.engine.world import World
from finemask_ds.pdsh import for_pdsh
from tests.cluster.hosts import Hosts
from tests.cluster.ranks import HostRankPool

pytestmark = pytest.mark.slow


def process(world: World) -> int:
    world.barrier()
    return os.getpid()


def test_ranks_listen_on_the_clusters_interface_only(hosts: Hosts, host_ranks: HostRankPool) -> None:
    for name, pid in zip(hosts.names, host_ranks.run(process), strict=True):
        lines = hosts.run(name, ["ss", "-Hltnp"]).stdout.splitlines()
        listening = {line.split()[3].rpartition(":")[0] for line in lines if f"pid={pid}," in line}
        assert listening == {hosts.address(name)}


def test_what_a_shell_would_obey_reaches_the_ranks_as_it_is(hosts: Hosts, tmp_path: Path) -> None:
    """And what is not quoted they run: where DeepSpeed mends that, for_pdsh would quote twice, and this test fails."""
    touch = f"touch${{IFS}}{tmp_path}/obeyed"
    words = [
        f"a;{touch}", f"a b; {touch}", f"a $({touch}) `{touch}` $HOME", "runs/%h-%u-%n-100%", 'it\'s "so" \\ \\\\', "'",
        '"', "a\tb", "", "*", "~", "é ü", "a %h b", "--run=x",
    ]  # fmt: skip
    script = tmp_path / "show.py"
    script.write_text(
        "import json, os, pathlib, sys\n"
        "pathlib.Path(sys.argv[0]).with_name('rank' + os.environ['RANK']).write_text(json.dumps(sys.argv[1:]))\n"
    )
    start = ["deepspeed", "--log_level", "error", "--hostfile", str(hosts.hostfile), "--no_local_rank", str(script)]
    unquoted = f"b;touch${{IFS}}{tmp_path}/mended-not"
    assert hosts.run("head", [*start, *for_pdsh(words), unquoted], timeout=60).returncode == 0
    assert [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in range(2)] == [[*words, "b"]] * 2
    assert not (tmp_path / "obeyed").exists()
    assert (tmp_path / "mended-not").exists()
