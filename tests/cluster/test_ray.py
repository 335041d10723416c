"""Plans on a real Ray cluster over two hosts, which lose workers, dispatchers, files and power."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from finemask_ds.dispatch.plan import Plan
from finemask_ds.dispatch.ray import RayExecutor
from finemask_ds.dispatch.survey import State, survey
from finemask_ds.errors import UserError
from tests.cluster.hosts import pid_namespace
from tests.cluster.networks import wait_until
from tests.cluster.ray_cluster import RayCluster
from tests.dispatch.toys import cell, diary, failure, result, starts, workers_of, write_mask

pytestmark = pytest.mark.slow
PYTHON = [sys.executable, "-m", "tests.cluster.ray_dispatch"]


def start(cluster: RayCluster, plan: Plan, log: Path, host: str = "node1") -> subprocess.Popen[bytes]:
    """A dispatcher on a host."""
    return cluster.hosts.start(host, [*PYTHON, str(plan.root), cluster.address], log, cluster.environment)


def dispatch(cluster: RayCluster, plan: Plan, *needs: str, code: int = 0) -> str:
    """Dispatch until it ends as expected; what it says."""
    done = cluster.hosts.run("node1", [*PYTHON, str(plan.root), cluster.address, *needs], 90, cluster.environment)
    assert done.returncode == code, done.stdout + done.stderr
    assert (done.stderr == "") == (code == 0), "Ray's own chatter stays away"
    return done.stdout + done.stderr


def host_of(plan: Plan, name: str, attempt: int) -> str:
    path = plan.root / "cells" / name / f"attempt-{attempt}" / "attempt.json"
    return json.loads(path.read_text())["host"] if path.exists() else ""


def dispatcher_of(plan: Plan) -> int:
    """The dispatcher itself, not the nsenter that waits for it."""
    (pid,) = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if path.read_bytes().split(b"\0")[1:4] == [b"-m", b"tests.cluster.ray_dispatch", str(plan.root).encode()]
    ]
    return pid


def wait_for_no_worker(plan: Plan) -> None:
    wait_until(lambda: not [pid for pid in workers_of(plan) if is_worker(pid)], 40, "the workers are gone")


def is_worker(pid: int) -> bool:
    try:
        return b"fake_worker.py" in Path(f"/proc/{pid}/cmdline").read_bytes() and pid_namespace(pid) is not None
    except OSError:
        return False


def test_twenty_cells_are_done_once_and_whole_though_a_node_loses_its_power(
    ray_cluster: RayCluster, tmp_path: Path
) -> None:
    names = [f"cell-{number}" for number in range(20)]
    plan = Plan.write(tmp_path / "plan", [cell(name, seconds=1) for name in names])
    process = start(ray_cluster, plan, tmp_path / "log")

    def ran_on(host: str) -> list[str]:
        return [name for name in names if host_of(plan, name, 1) == host]

    wait_until(lambda: ran_on("node1") and len(ran_on("node2")) > 2, 60, "both nodes run cells")
    ray_cluster.hosts.power_off("node2")
    lost = [name for name in ran_on("node2") if len(diary(plan, name)) < 2]
    here = ran_on("node1")
    assert process.wait(90) == 0, (tmp_path / "log").read_text()
    assert "on 4 workers of the Ray cluster at 198." in (tmp_path / "log").read_text()
    assert (tmp_path / "log").read_text().endswith("20 of 20 cells are done, 0 failed\n")
    assert all(state.state is State.DONE for state in survey(plan).standings.values())
    for name in names:
        told = result(plan, name)
        assert told["environment"]["OMP_NUM_THREADS"] == "1"
        assert not told["torch"]
        if name in lost:
            assert failure(plan, name, 1)["error"].startswith("the worker was lost: ")
            assert told["attempt"] == 2
            assert host_of(plan, name, 2) == "node1"
        elif name in here:
            assert [word for word, _, _ in diary(plan, name)] == ["start", "end"]
    assert lost


def test_dead_workers_vanished_masks_and_errors_leave_the_rest_alone(ray_cluster: RayCluster, tmp_path: Path) -> None:
    mask = write_mask(tmp_path / "mask.safetensors")
    cells = [
        cell("killed", do="die", on=[1]), cell("left", do="leave", on=[1]), cell("bad", do="fail"),
        cell("masked", mask=str(mask)), *(cell(f"good-{number}") for number in range(3)),
    ]  # fmt: skip
    plan = Plan.write(tmp_path / "plan", cells, retries=1)
    mask.unlink()
    output = dispatch(ray_cluster, plan, "num_cpus=0.5")
    # Four for each host; of one that was off a moment ago Ray may still, or not yet, know.
    assert re.search(r"7 cells, 0 done, 7 to run on (4|8|12) workers", output)
    standings = survey(plan).standings
    failed = {name for name, standing in standings.items() if standing.state is State.FAILED}
    assert failed == {"bad", "masked"}
    assert failure(plan, "killed", 1)["error"].startswith(("the worker on node", "the worker was ended by"))
    assert "signal 9" in failure(plan, "killed", 1)["error"] or "fell silent" in failure(plan, "killed", 1)["error"]
    assert starts(plan, "killed") == starts(plan, "left") == starts(plan, "bad") == ["1", "2"]
    assert f"there is no mask file {mask}" in standings["masked"].error
    assert len(list(plan.logs.glob("ray-*.log"))) <= 14, "no worker is started for a cell that another will take"


def test_interrupted_or_killed_dispatchers_leave_no_worker_and_the_same_command_goes_on(
    ray_cluster: RayCluster, tmp_path: Path
) -> None:
    names = ["one", "two", "three"]
    plan = Plan.write(tmp_path / "plan", [cell(name, do="hold") for name in names], stale_sec=4)
    for attempt, how in enumerate([signal.SIGKILL, signal.SIGINT], start=1):
        process = start(ray_cluster, plan, tmp_path / "log")
        wait_until(lambda count=attempt: all(len(starts(plan, name)) == count for name in names), 60, "all run")
        os.kill(dispatcher_of(plan), how)
        code = process.wait(40)
        wait_for_no_worker(plan)
    assert code == 130, (tmp_path / "log").read_text()
    assert "finemask: interrupted, 0 of 3 cells are done; the same command goes on: " in (tmp_path / "log").read_text()
    assert not [name for name in names if (plan.root / "cells" / name / "attempt-2" / "failed.json").exists()]
    (plan.root / "go").touch()
    assert dispatch(ray_cluster, plan).endswith("3 of 3 cells are done, 0 failed\n")
    assert {tuple(starts(plan, name)) for name in names} == {("1", "2", "3")}


def test_workers_save_before_they_end_unless_ctrl_c_comes_again(ray_cluster: RayCluster, tmp_path: Path) -> None:
    cells = [cell("quick", do="save", seconds=0), cell("slow", do="save", seconds=900)]
    plan = Plan.write(tmp_path / "plan", cells)
    process, log = start(ray_cluster, plan, tmp_path / "log"), tmp_path / "log"
    wait_until(lambda: all(starts(plan, one.id) for one in cells), 60, "both run")
    os.kill(dispatcher_of(plan), signal.SIGINT)
    wait_until(lambda: "until the workers have saved; Ctrl-C again" in log.read_text(), 20, "told")
    assert [path.parent.parent.name for path in plan.root.glob("cells/*/attempt-1/saved")] == ["quick"]
    os.kill(dispatcher_of(plan), signal.SIGINT)
    assert process.wait(40) == 130, log.read_text()
    wait_for_no_worker(plan)
    assert {standing.state for standing in survey(plan).standings.values()} == {State.WAITING}


def test_a_sweep_of_a_real_model_ends_in_a_page_and_torch_is_in_no_process_of_ray(
    ray_cluster: RayCluster, toy_bert: Path, toy_tasks: Path, toy_mask: Path, tmp_path: Path
) -> None:
    options = [
        *(
            "--model",
            str(toy_bert),
            "--data",
            str(toy_tasks),
            "--masks",
            str(toy_mask),
            "--tasks",
            "cola",
            "--seeds",
            "1",
        ),
        *("--steps", "4", "--batch_size", "8", "--seq_len", "32", "--lr", "1e-3", "--run", str(tmp_path / "s")),
        *("--executor", "ray", "--slots", "2"),
    ]  # fmt: skip
    hosts, told = ray_cluster.hosts, {**ray_cluster.environment, "RAY_ADDRESS": ray_cluster.address}
    done = hosts.run("node1", [sys.executable, "launcher/dispatch.py", *options], 240, told)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 cells are done, 0 failed" in done.stdout
    assert "<table" in (tmp_path / "s/report/index.html").read_text()
    every = [Path("/proc", str(pid)) for name in hosts.names for pid in hosts.pids(name)]
    ours = [path for path in every if (path / "cmdline").read_bytes().startswith(b"ray::")]
    assert ours
    assert not [path for path in ours if "libtorch" in (path / "maps").read_text()]


def test_a_token_in_its_usual_place_lets_the_dispatcher_in(ray_cluster: RayCluster, tmp_path: Path) -> None:
    """Without a word in the environment, which ranks that ssh has started do not get."""
    told, plan = ray_cluster.environment, Plan.write(tmp_path / "plan", [cell("one")])
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").symlink_to(str(told["RAY_AUTH_TOKEN_PATH"]))
    environment = {**told, "RAY_AUTH_MODE": None, "RAY_AUTH_TOKEN_PATH": None, "HOME": str(tmp_path)}
    words = [*PYTHON, str(plan.root), ray_cluster.address]
    done = ray_cluster.hosts.run("node1", words, 90, environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("1 of 1 cells are done, 0 failed\n")


def test_a_node_that_does_not_see_the_plan_is_named(ray_cluster: RayCluster, tmp_path: Path) -> None:
    plan = Plan.write(tmp_path / "plan", [cell(f"cell-{number}", do="hold") for number in range(4)])
    ray_cluster.hosts.run("node2", ["mount", "-t", "tmpfs", "none", str(tmp_path)])
    try:
        said = dispatch(ray_cluster, plan, code=1)
    finally:
        ray_cluster.hosts.run("node2", ["umount", str(tmp_path)])
    assert f"finemask: node2 does not see {plan.root}: mount the shared file system there, or type --run with" in said


@pytest.mark.parametrize(
    ("needs", "sentence"),
    [
        (["num_cpus=3"], "no node of the Ray cluster at ADDRESS has num_cpus=3: ask for less by --job_options"),
        (
            ["tpu=1"],
            "--job_options tpu=1 names nothing that a node of the Ray cluster at ADDRESS has; type one of memory",
        ),
        (["num_cpus=many"], "--job_options num_cpus=many is no amount of a resource; type a number, as in num_cpus=4"),
        (["num_cpus=0"], "--job_options asks for nothing; type for instance num_cpus=1"),
    ],
)
def test_needs_that_no_node_can_meet_are_one_sentence(
    ray_cluster: RayCluster, tmp_path: Path, needs: list[str], sentence: str
) -> None:
    plan = Plan.write(tmp_path / "plan", [cell("one")])
    said = dispatch(ray_cluster, plan, *needs, code=1)
    assert said.startswith(f"finemask: {sentence.replace('ADDRESS', ray_cluster.address)}")
    assert said.count("\n") == 1


def test_without_ray_one_sentence_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r'^--executor ray needs Ray: type pip install "finemask_ds\[ray\]"$'):
        RayExecutor()


def test_what_listens_and_is_no_ray_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finemask_ds.dispatch.ray_connect.PROBE_SEC", 4.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(
            UserError, match=rf"^no Ray cluster at {address} can be used \(it has not answered within 4 s"
        ):
            RayExecutor(address)


def test_a_cluster_that_is_not_there_is_one_sentence(ray_cluster: RayCluster, tmp_path: Path) -> None:
    """Asked on a host that is no node: of a cluster of others, of a port where nobody listens."""
    hosts = ray_cluster.hosts
    asked = {
        ray_cluster.address: "can be used",
        f"{hosts.address(0)}:1": "Connection refused",
        "local": "it is not given as HOST:PORT",
        "": "no Ray cluster of this machine can be used (Could not find any running Ray instance",
    }
    logs = [tmp_path / f"{number}.log" for number in range(len(asked))]
    environment = {**ray_cluster.environment, "RAY_TMPDIR": str(tmp_path)}
    processes = [
        hosts.start("head", [*PYTHON, str(tmp_path), address], log, environment)
        for address, log in zip(asked, logs, strict=True)
    ]
    for process, log, (address, reason) in zip(processes, logs, asked.items(), strict=True):
        assert process.wait(60) == 1
        (line,) = log.read_text().splitlines()
        assert line.startswith(f"finemask: no Ray cluster {f'at {address}' if address else 'of this machine'} can be")
        assert reason in line
        assert line.endswith("--ray_address HOST:PORT of a cluster that runs")


def test_a_head_that_is_gone_ends_the_dispatcher_with_a_sentence(ray_cluster: RayCluster, tmp_path: Path) -> None:
    """Before Ray itself would end it without one."""
    plan = Plan.write(tmp_path / "plan", [cell(f"cell-{number}", do="hold") for number in range(4)])
    process = start(ray_cluster, plan, tmp_path / "log", "node2")
    wait_until(lambda: all(starts(plan, one.id) for one in plan.cells), 60, "all run")
    ray_cluster.hosts.power_off("node1")
    assert process.wait(60) == 1
    assert (tmp_path / "log").read_text().endswith(": start it again, then type the same command\n")
    wait_for_no_worker(plan)
