"""The executor that a sweep asks for by name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

from finemask_ds.config import SweepConfig
from finemask_ds.dispatch.executor import Executor


def executor_of(config: SweepConfig) -> Executor:
    """Where the cells of a sweep run.

    Raises:
        UserError: where that cannot be had here.
    """
    return EXECUTOR[config.executor](config)


def check_executor(config: SweepConfig) -> None:
    """Refuse what `executor_of` would, and connect to nothing.

    Raises:
        UserError: where that cannot be had here.
    """
    if config.executor == "ray":
        from finemask_ds.dispatch.ray import RayExecutor

        RayExecutor.check(config.ray_address, config.job_options)
    else:
        executor_of(config)  # which starts nothing before it is told to


def _local(config: SweepConfig) -> Executor:
    from finemask_ds.dispatch.local import LocalExecutor

    return LocalExecutor(config.slots)


def _slurm(config: SweepConfig) -> Executor:
    from finemask_ds.dispatch.slurm import SlurmExecutor

    leaves = config.wait != "yes"
    return SlurmExecutor(
        config.slots, config.job_options, config.job_setup,
        again=(sys.executable, *sys.orig_argv[1:], "--wait", "tidy") if leaves else (),
        after="" if config.wait == "tidy" else config.after,  # of which Slurm may know nothing any more
    )  # fmt: skip


def _ray(config: SweepConfig) -> Executor:
    from finemask_ds.dispatch.ray import RayExecutor

    return RayExecutor(config.ray_address, config.slots, config.job_options)


def _elsewhere(config: SweepConfig) -> Executor:
    from finemask_ds.dispatch.elsewhere import ElsewhereExecutor

    return ElsewhereExecutor()


EXECUTOR: Mapping[str, Callable[[SweepConfig], Executor]] = {
    "local": _local, "slurm": _slurm, "ray": _ray, "elsewhere": _elsewhere,
}  # fmt: skip
"""--executor -> what makes it; imports what it needs only then."""
