"""Who is a rank, and of what: from the environments that Slurm, Open MPI and MPICH give a process."""

from __future__ import annotations

import os
import socket

import psutil
import pytest

from finemask_ds.dispatch.local import Slot, environment
from finemask_ds.engine.launched import choose_interface, first_host, join_launch
from finemask_ds.errors import UserError

STEP = {
    "SLURM_JOB_ID": "41", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_TASKS_PER_NODE": "2(x2)", "SLURM_NTASKS": "4", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1", "SLURM_JOB_NODELIST": "gpu[001-008]",
}  # fmt: skip
"""Of the last task of a step (srun of Slurm 22.05)."""
PLACE = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu007", "MASTER_PORT": "23979"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}


def joined(environ: dict[str, str]) -> dict[str, str]:
    """What is set beside what was."""
    after = dict(environ)
    join_launch(after)
    assert after.items() >= environ.items()
    return {name: value for name, value in after.items() if name not in environ}


def test_a_task_of_a_step_is_a_rank() -> None:
    assert joined(STEP) == PLACE


def test_what_a_launcher_or_a_user_has_set_stays() -> None:
    assert joined({**STEP, "RANK": "0"}) == {}
    told = joined({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    assert told.keys() == {"RANK", "WORLD_SIZE", "LOCAL_RANK"}


@pytest.mark.parametrize(
    "other",
    [
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"SLURM_STEP_ID": str(0xFFFFFFFA)},  # the interactive step of salloc
        {"SLURM_STEP_ID": str(0xFFFFFFFB)},  # the batch step
        {"SLURM_STEP_ID": ""},
        {"SLURM_PROCID": "4"},
        {"SLURM_TASKS_PER_NODE": "1"},  # a batch script submitted from within the step
    ],
    ids=str,
)
def test_who_is_no_task_of_a_step_is_alone(other: dict[str, str]) -> None:
    assert joined({**STEP, **other}) == {}


def test_jobs_and_steps_of_the_same_time_meet_at_other_ports() -> None:
    times = [(job, step) for job in range(1000, 1060) for step in range(60)]
    ports = [
        int(joined({**STEP, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})["MASTER_PORT"])
        for job, step in times
    ]
    assert len(set(ports)) == len(times)
    assert min(ports) >= 20000
    assert max(ports) < 30000


@pytest.mark.parametrize(("devices", "local_rank"), [("5", "0"), ("0,1", "1"), ("", "1")])
def test_a_task_bound_to_its_own_device_counts_among_what_it_sees(devices: str, local_rank: str) -> None:
    assert joined({**STEP, "CUDA_VISIBLE_DEVICES": devices})["LOCAL_RANK"] == local_rank


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[1-3,7]", "node1"),
        ("gpu[003-017,20],login", "gpu003"),
        ("login,gpu[003-017]", "login"),
        ("rack[2-3]node[04,06]-ib.site,x", "rack2node04-ib.site"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_ranks_of_mpi_on_one_host_meet_there() -> None:
    here = {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert joined(OPEN_MPI) == {"RANK": "1", **here}


def test_ranks_of_mpi_on_several_hosts_must_be_told_where_the_first_is() -> None:
    with pytest.raises(UserError, match="mpirun -x MASTER_ADDR=HOST"):
        joined(MPICH)
    assert joined({**MPICH, "MASTER_ADDR": "a"}) == {
        "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "29500",
    }  # fmt: skip


@pytest.mark.parametrize("launched", [STEP, OPEN_MPI, MPICH])
def test_a_worker_of_cells_is_alone_whatever_started_its_driver(launched: dict[str, str]) -> None:
    assert joined(environment(launched, Slot((0,)))) == {}


def interface(**environ: str) -> str | None:
    variables = {"WORLD_SIZE": "2", **environ}
    choose_interface(variables)
    return variables.get("GLOO_SOCKET_IFNAME")


def address_of(name: str) -> str:
    return next(one.address for one in psutil.net_if_addrs()[name] if one.family == socket.AF_INET)


def test_ranks_that_meet_at_the_loopback_stay_there() -> None:
    assert interface(MASTER_ADDR="127.0.0.1") == interface(MASTER_ADDR="localhost") == "lo"


def test_an_interface_is_chosen_for_several_ranks_only_and_never_over_a_users() -> None:
    assert interface(MASTER_ADDR="127.0.0.1", WORLD_SIZE="1") is None
    assert interface() is None
    assert interface(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="ib0") == "ib0"


def test_the_interface_is_the_one_with_the_address_of_the_rendezvous() -> None:
    """Every one that is up, in turn: its own address is reached by itself."""
    states = psutil.net_if_stats()
    names = [name for name, found in psutil.net_if_addrs().items() if states[name].isup and name != "lo"]
    names = [name for name in names if any(one.family == socket.AF_INET for one in psutil.net_if_addrs()[name])]
    if not names:
        pytest.skip("this machine has the loopback only")
    assert [interface(MASTER_ADDR=address_of(name)) for name in names] == names


def test_nothing_is_set_in_this_process() -> None:
    before = dict(os.environ)
    joined({**before, **STEP})
    interface(MASTER_ADDR="127.0.0.1")
    assert dict(os.environ) == before
