"""The same launcher script over pdsh, under srun and under mpirun: two hosts, one mask; and who is no rank."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from finemask_ds.masks.files import load_mask
from tests.cluster.hosts import Hosts
from tests.cluster.networks import lacking
from tests.cluster.slurm import Slurm

TELL = (
    "import json, os; before = dict(os.environ); from finemask_ds.engine.launched import join_launch; "
    "join_launch(os.environ); told = {k: v for k, v in os.environ.items() if k not in before}; "
    "print(json.dumps(told) + chr(10), end='')"  # In one piece: tasks may print at once.
)
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
UNTOLD = {"GLOO_SOCKET_IFNAME": None}
"""Of the environment: each rank must choose the interface by itself."""


@contextmanager
def debian_names(hosts: Hosts, folder: Path) -> Iterator[None]:
    """On each host its own name is 127.0.1.1, as Debian's installer writes it."""
    for name in hosts.names:
        known = [("127.0.1.1" if other == name else hosts.address(other), other) for other in hosts.names]
        lines = [("127.0.0.1", "localhost"), *known, (hosts.address("head"), "head")]
        (folder / f"{name}.hosts").write_text("".join(f"{address} {other}\n" for address, other in lines))
        hosts.run(name, ["mount", "--bind", str(folder / f"{name}.hosts"), "/etc/hosts"])
    try:
        yield
    finally:
        for name in hosts.names:
            hosts.run(name, ["umount", "/etc/hosts"])


@pytest.fixture
def search(toy_bert: Path, toy_text: Path) -> list[str]:
    """A launcher script and its options, without a run directory."""
    return [
        *("launcher/tamt.py", "--deepspeed", "configs/ds/zero2.json", "--ranks", "2", "--model", str(toy_bert)),
        *("--data", str(toy_text), "--seq_len", "16", "--batch_size", "8", "--steps", "10", "--eval_every", "0"),
        *("--init", "ranked", "--mask_lr", "1e-3", "--dropout", "0"),
    ]


@pytest.mark.slow
def test_a_hostfile_and_srun_and_mpirun_find_the_same_mask(
    hosts: Hosts, slurm: Slurm, search: list[str], tmp_path: Path
) -> None:
    """The command of the template, on a rank of each of its hosts, whose own names are loopback addresses."""
    if why := lacking("mpirun"):
        pytest.skip(why)
    (tmp_path / "env").write_text("OMP_NUM_THREADS=1")
    deepspeed = ["deepspeed", "--hostfile", "jobs/hostfile", "--include", "node1:0@node2:0"]
    srun = ["srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", sys.executable]
    mpirun = ["mpirun", "--allow-run-as-root", "--host", "node1,node2", "-x", "MASTER_ADDR=node1", "-x", "PYTHONPATH"]
    with debian_names(hosts, tmp_path):
        told = {
            "pdsh": hosts.run(
                "node1", [*deepspeed, *search, "--run", f"{tmp_path}/pdsh"], 150,
                {**UNTOLD, "DS_ENV_FILE": f"{tmp_path}/env"},
            ),
            "srun": slurm.run([*srun, *search, "--run", f"{tmp_path}/srun"], 150, UNTOLD),
            "mpirun": hosts.run(
                "node1", [*mpirun, sys.executable, *search, "--run", f"{tmp_path}/mpirun"], 150, UNTOLD
            ),
        }  # fmt: skip
    for how, done in told.items():
        assert done.returncode == 0, (how, done.stdout, done.stderr)
        assert "2 rank(s) on 2 host(s): node1 (1), node2 (1)" in done.stdout, how
    masks = [load_mask(tmp_path / how / "mask.safetensors") for how in told]
    assert masks[0] == masks[1] == masks[2]


@pytest.mark.slow
def test_a_missing_hostfile_is_no_run_on_one_host(hosts: Hosts, search: list[str], tmp_path: Path) -> None:
    command = ["deepspeed", "--hostfile", f"{tmp_path}/none", "--num_gpus", "1", *search, "--run", f"{tmp_path}/run"]
    told = hosts.run("node1", command, 60)
    assert told.returncode != 0
    assert "finemask: --ranks 2 but 1 started (node1 is one of their hosts)" in told.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_every_task_of_a_step_is_told_its_place(slurm: Slurm) -> None:
    told = slurm.run(["srun", "-N", "2", "-n", "4", sys.executable, "-c", TELL])
    places = sorted((json.loads(line) for line in told.stdout.splitlines()), key=lambda place: place["RANK"])
    assert [[place[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] for place in places] == [
        [str(rank), "4", str(rank % 2)] for rank in range(4)
    ]
    assert len({(place["MASTER_ADDR"], place["MASTER_PORT"]) for place in places}) == 1
    assert {place["MASTER_ADDR"] for place in places} == {"node1"}
    on_one = slurm.run(["srun", "-w", "node2", "-n", "2", sys.executable, "-c", TELL]).stdout.splitlines()
    there = [json.loads(line) for line in on_one]
    assert {place["MASTER_ADDR"] for place in there} == {"node2"}
    assert {place["MASTER_PORT"] for place in there}.isdisjoint(place["MASTER_PORT"] for place in places)


@pytest.mark.slow
def test_who_is_alone_in_a_slurm_job_is_no_rank(slurm: Slurm, tmp_path: Path) -> None:
    """A single task, a batch script, a shell under salloc; and a batch script submitted from within a step of two."""
    python = [sys.executable, "-c", TELL]
    assert slurm.run(["srun", "-n", "1", *python]).stdout == "{}\n"
    assert slurm.run(["salloc", "-N", "2", "-n", "2", *python]).stdout == "{}\n"
    script = tmp_path / "job.sh"
    script.write_text(f'#!/bin/sh\nenv | grep ^SLURM_STEP_ID\nexec {sys.executable} -c "{TELL}"\n')
    told = slurm.run(["sbatch", "--wait", "-N", "2", "-n", "2", "-o", f"{tmp_path}/plain", str(script)])
    assert told.returncode == 0, told.stderr
    within = f"[ $SLURM_PROCID = 1 ] || sbatch --wait -N 1 -o {tmp_path}/within {script}"
    told = slurm.run(["srun", "-N", "2", "-n", "2", "sh", "-c", within])
    assert told.returncode == 0, told.stderr
    assert (tmp_path / "plain").read_text() == "{}\n"
    assert (tmp_path / "within").read_text() == "SLURM_STEP_ID=0\n{}\n"  # Of the step that it was submitted from.


@pytest.mark.slow
def test_one_rank_for_each_task_of_mpirun(hosts: Hosts) -> None:
    if why := lacking("mpirun"):
        pytest.skip(why)
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe"]
    told = hosts.run("node1", [*mpirun, "-n", "2", sys.executable, "-c", TELL], env=UNTOLD)
    places = sorted((json.loads(line) for line in told.stdout.splitlines()), key=lambda place: place["RANK"])
    assert [[place[name] for name in PLACE] for place in places] == [
        [str(rank), "2", str(rank), "127.0.0.1", "29500"] for rank in range(2)
    ]
    spread = [*mpirun, "--host", "node1,node2", "-x", "PYTHONPATH", sys.executable, "-c", TELL]
    told = hosts.run("node1", spread, env=UNTOLD)
    assert told.returncode != 0
    assert "type mpirun -x MASTER_ADDR=HOST" in told.stderr
