"""Ranks that disagree, fail, vanish or wait too long end the run on all ranks, and are named."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finemask_ds.engine.guard import check_agreement, check_ranks, describe_ranks
from finemask_ds.engine.join import join
from finemask_ds.engine.world import World
from finemask_ds.errors import UserError
from tests.conftest import REPOSITORY
from tests.engine import jobs
from tests.pool import RankPool, free_port


def disagreeing(world: World, odd_rank: int) -> str:
    digests = {"a": "1", "b": "2" if world.rank == odd_rank else "0"}
    try:
        check_agreement(world, digests, 7)
    except UserError as error:
        return str(error)
    return ""


def test_ranks_that_disagree_stop_and_name_the_odd_one(two_ranks: RankPool) -> None:
    assert two_ranks.run(disagreeing, -1) == ["", ""]
    for said in two_ranks.run(disagreeing, 1):
        assert "the mask of b on rank 1 is not that of rank 0 at step 7 (1 of 2 matrices differ)" in said


def test_another_number_of_ranks_than_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing hostfile otherwise trains on one node with exit code 0."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    check_ranks(0)
    check_ranks(1)
    with pytest.raises(UserError, match=rf"--ranks 2 but 1 started \({socket.gethostname()}.* --hostfile"):
        check_ranks(2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_ranks(2)
    with pytest.raises(UserError, match="--ranks 1 but 2 started"):
        check_ranks(1)


def test_the_ranks_and_their_hosts_are_told(two_ranks: RankPool) -> None:
    assert set(two_ranks.run(describe_ranks)) == {f"2 rank(s) on 1 host(s): {socket.gethostname()} (2)"}
    assert describe_ranks(World()).startswith("1 rank(s) on 1 host(s)")


def time_outs(world: World, stage: int, folder: Path) -> list[float]:
    """Seconds that each process group waits, once an engine runs."""
    jobs.make(world, stage, folder, micro=6)
    groups = torch.distributed.distributed_c10d._world.pg_map
    return [
        group._get_backend(torch.device("cpu")).options._timeout.total_seconds()  # type: ignore[attr-defined]
        for group in groups
    ]


@pytest.mark.parametrize("stage", [2, 3])
def test_the_time_out_reaches_the_groups_that_zero_makes(two_ranks: RankPool, tmp_path: Path, stage: int) -> None:
    for seconds in two_ranks.run(time_outs, stage, tmp_path):
        assert len(seconds) > 1
        assert set(seconds) == {1800.0}


RANK = """
import os, signal, sys, time
from pathlib import Path
from finemask_ds.engine.zero import distributed
from finemask_ds.session import leave
import torch
from tests.engine import jobs

def main():
    how, folder = sys.argv[1], Path(sys.argv[2])
    with distributed(silence_sec=5, time_out_sec=7 if how == "stall" else 600) as world:
        engine = jobs.run_steps(world, 2, folder, micro=12 // world.size, last=2)[2]
        if world.rank == int(sys.argv[3]):
            if how == "raise":
                raise ValueError("out of luck")
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(60)
        jobs.run_steps(world, 2, folder, micro=12 // world.size, first=3, engine=engine)
    return 0

main()
leave(0)
"""


def start_ranks(how: str, folder: Path, size: int = 3, failing: int = -1) -> list[subprocess.Popen[str]]:
    """Plain processes without a launcher that would end them."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANK, how, str(folder), str(failing)], cwd=REPOSITORY, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(size)
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "failing", "told"),
    [
        ("raise", 2, "failed (ValueError: out of luck)"),
        ("kill", 2, "failed (no sign of life for"),
        ("stop", 2, "failed (no sign of life for"),
        ("kill", 0, "failed (the ranks' store went with it)"),
        ("stop", 0, "failed (no sign of life for"),
    ],
)
def test_a_rank_that_fails_ends_all_and_is_named(tmp_path: Path, how: str, failing: int, told: str) -> None:
    """It raises, is killed, or is stopped while the others wait for it in a collective; with the first goes the store.

    There is no launcher here that would end any of them.
    """
    processes = start_ranks(how, tmp_path, failing=failing)
    try:
        said = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert all(process.returncode for process in processes)
    assert f"rank {failing} on {socket.gethostname()} {told}" in said[0 if failing else 1]
    if how == "stop":
        assert processes[failing].returncode == -signal.SIGKILL
        assert f"rank {failing} on {socket.gethostname()} gave no sign of life" in said[failing]


@pytest.mark.slow
def test_a_collective_that_waits_longer_than_the_time_out_ends_the_run(tmp_path: Path) -> None:
    """The last rank lives and beats but never comes."""
    processes = start_ranks("stall", tmp_path, size=2, failing=1)
    try:
        _, said = processes[0].communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert processes[0].returncode != 0
    assert "imed out" in said


@pytest.mark.slow
def test_a_rank_that_never_comes_is_waited_for_a_bounded_time_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the ranks that are there, whichever is missing."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for rank, missing in ((0, "1, 2"), (1, "0")):
        monkeypatch.setenv("MASTER_PORT", str(free_port()))
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(
            RuntimeError, match=rf"rank\(s\) {missing} did not come; rank {rank} on {socket.gethostname()}"
        ):
            join(rank, 3, wait_sec=2)


def test_the_ranks_store_listens_on_the_clusters_interface_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    store = join(0, 1, wait_sec=20)
    port = int(os.environ["MASTER_PORT"])
    listening = [
        line.split()[1]
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and int(line.split()[1].split(":")[1], 16) == port
    ]
    assert listening == [f"0100007F:{port:04X}"]
    del store


RESTARTED = """
import os, sys
from finemask_ds.engine.zero import distributed
from finemask_ds.session import leave

with distributed(silence_sec=5) as world:
    if world.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        raise ValueError("out of luck")
    print(world.gather(world.rank), flush=True)
leave(0)
"""


@pytest.mark.slow
def test_ranks_that_torchrun_starts_again_hear_nothing_of_the_start_before(tmp_path: Path) -> None:
    """torchrun's store, which the ranks use, outlives them."""
    script = tmp_path / "ranks.py"
    script.write_text(RESTARTED)
    options = ["--nproc_per_node=2", "--max_restarts=1", "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"]
    told = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options, str(script)], cwd=REPOSITORY, text=True,
        capture_output=True, timeout=150, check=False, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert "ValueError: out of luck" in told.stderr
    assert told.stdout.count("[0, 1]") == 2
