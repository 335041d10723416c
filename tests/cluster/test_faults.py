"""Faults of a training run on hosts: all end within a minute and are named, nobody else is touched, the run goes on.

One trial of the most telling kinds, with a shorter silence than the default; benchmarks/soak.py does many of each.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from finemask_ds.engine.termination import Termination
from finemask_ds.masks.files import load_mask
from finemask_ds.models.masked import scores_name
from finemask_ds.run import read_json
from tests.cluster.faults import Scene, bystanders, try_fault, words_of
from tests.cluster.hosts import Hosts
from tests.cluster.test_equality import otherwise
from tests.search import jobs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scene(hosts: Hosts, toy_bert: Path, toy_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A search of a few seconds, and what it finds undisturbed."""
    options = ("--steps", "80", "--silence_sec", "6")
    scene = Scene(hosts, toy_bert, toy_text, tmp_path_factory.mktemp("faults"), options)
    scene.find_undisturbed()
    yield scene
    hosts.forward()


@pytest.mark.parametrize("kind", ["stop", "cable cut", "SIGTERM"])
def test_a_fault_ends_the_run_and_the_same_command_goes_on(scene: Scene, tmp_path: Path, kind: str) -> None:
    """A rank is stopped; cut off; asked to end by its scheduler.

    A stopped rank is what DeepSpeed's launcher would wait for; the others are without it, as under srun.
    """
    with_launcher = kind == "stop"
    outcome = try_fault(scene, kind, 1, tmp_path / "log", at_step=20, with_launcher=with_launcher)
    assert outcome is not None
    assert outcome.good, (outcome, (tmp_path / "log").read_text())


def scores_of(run: Path) -> dict[str, np.ndarray]:
    """The scores of the last step, by matrix."""
    folder = run / "checkpoints/step-80"
    values = jobs.checkpoint_values(folder)
    return {name: values[scores_name(name)].numpy() for name in load_mask(run / "mask.safetensors")}


def is_supervisor(pid: int) -> bool:
    """Not what has entered the host to start it."""
    words = words_of(pid)
    return words.startswith(f"{sys.executable}\0".encode()) and b"--max_restarts" in words


def is_pending(pid: int, number: int) -> bool:
    """Whether a stopped process will hear a signal when it goes on."""
    (pending,) = re.findall(r"^ShdPnd:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.M)
    return bool(int(pending, 16) & 1 << (number - 1))


def test_a_supervised_run_loses_a_host_and_gets_it_back(scene: Scene, tmp_path: Path) -> None:
    """Two ranks in ZeRO-2, power-off, one rank by itself, the scheduler ends it, the host is back: two in ZeRO-3."""
    hosts, run, log = scene.hosts, tmp_path / "run", tmp_path / "log"
    command = [sys.executable, *scene.search(run), "--hostfile", str(hosts.hostfile), "--max_restarts", "2"]
    with bystanders(hosts, tmp_path) as others:
        started = scene.start(run, command, log)
        started.wait_for_step(10)
        hosts.power_off("node2")
        started.wait_for(lambda: "going on with 1 of 2 rank(s) on node1 (node2 not answering)" in started.told(), "1")
        started.wait_for(lambda: "1 rank(s) on 1 host(s): node1 (1)" in started.told(), "one rank")
        step = started.steps()[-1]
        (supervisor,), rank = filter(is_supervisor, started.pids()), started.ranks()[0]
        started.wait_for_step(step + 10)
        assert "1 rank(s) x 2 micro-batch(es) x 4 sequence(s) = 8 per step" in started.told()
        os.kill(rank, signal.SIGSTOP)  # Otherwise it may be done before the supervisor has reached its host.
        os.kill(supervisor, signal.SIGTERM)
        started.wait_for(lambda: is_pending(rank, signal.SIGTERM), "the supervisor's word")
        os.kill(rank, signal.SIGCONT)
        assert started.gone_after() is not None
        assert started.process.returncode == Termination().exit_code
        kept = started.steps()[-1]
        assert f"finemask: SIGTERM: checkpoint at step {kept} in {run}" in started.told()
        assert "ZeRO-2" in read_json(run / f"checkpoints/step-{kept}/state.json")["engine"]
        hosts.power_on("node2")
        command[command.index("configs/ds/zero2.json")] = "configs/ds/zero3.json"
        again = scene.start(run, command, log)
        assert again.process.wait(300) == 0, again.told()
        assert again.gone_after() is not None
        assert others["node1"].poll() is None
    assert "2 rank(s) on 2 host(s): node1 (1), node2 (1)" in again.told()
    assert "ZeRO-3" in read_json(run / "checkpoints/step-80/state.json")["engine"]
    whole = scene.folder / "undisturbed"
    masks = [load_mask(folder / "mask.safetensors") for folder in (whole, run)]
    flipped, could = otherwise(masks[0], scores_of(whole), masks[1], scores_of(run))
    print(f"{flipped} weights fell otherwise than on two ranks all along, {could} could")
    assert flipped <= could < 0.01 * sum(map(masks[0].num_weights, masks[0]))


def test_a_supervisor_that_cannot_start_as_asked_says_so(scene: Scene, tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node1 slots=1\nnode7 slots=1\n")
    supervised = [*scene.search(tmp_path / "run"), "--hostfile", str(hostfile)]
    told = scene.hosts.run("head", [sys.executable, *supervised], 100)
    assert told.returncode == 2
    assert "finemask: node7 of " in told.stderr
    hostfile.write_text("node1 slots=1\n")
    told = scene.hosts.run("head", [sys.executable, *supervised], 100)
    assert told.returncode == 2
    assert f"finemask: --ranks 2 but {hostfile} has 1 slots" in told.stderr
    assert not (tmp_path / "run").exists()
