"""What every configuration is: frozen, strict fields that carry their own documentation to ``--help``."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from finemask_ds.errors import UserError
from finemask_ds.run import Run

VOLATILE = frozenset({
    "run", "deepspeed", "precision", "ranks", "time_out_sec", "silence_sec", "hostfile", "max_restarts", "log_every",
    "watch_every", "keep_every", "eval_every", "save_every", "agree_every", "micro_batch_size", "eval_batch_size",
    "save_model", "predict", "dispatch", "tasks", "task_data", "finetune_seeds", "slots", "job_options", "job_setup",
    "ray_address", "wait", "after", "preset",
})  # fmt: skip
"""Knobs that change what is watched, or how and in what precision the work is done, but not what is asked for: not part
of a run's identity. How it is done moves last bits, dropout's draws and with 16 bit more than that; ``result.json``
tells it. A preset only fills in others, which are."""


_MOST = 2**63
"""Whole numbers are below it, so that seeds fit where they go."""
_LOGIN = re.compile(r"://[^/\s@]+@")
"""As in https://name:password@host."""


def knob(
    default: Any, help: str, *, unit: str = "", source: str = "", choices: tuple[str, ...] = (), least: float = 0
) -> Any:
    """A dataclass field that carries its own documentation to ``--help``, and the values that it may have."""
    metadata = {"help": help, "unit": unit, "source": source, "choices": choices, "least": least}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Config(ABC):
    """A command's knobs."""

    volatile: ClassVar[frozenset[str]] = VOLATILE

    def __post_init__(self) -> None:
        """Check each value by itself, and refuse impossible numbers and secrets.

        Raises:
            UserError: naming the option, its value and what it may be.
        """
        for field in dataclasses.fields(self):
            value, choices, least = getattr(self, field.name), field.metadata["choices"], field.metadata["least"]
            if choices and value not in choices:
                raise UserError(f"--{field.name} {value!r} is unknown; type one of {', '.join(choices)}")
            values = value if isinstance(value, tuple) else (value,)
            for number in (one for one in values if isinstance(one, int | float) and not isinstance(one, bool)):
                if not number >= least:
                    raise UserError(f"--{field.name} {number} must be at least {least}")
                if number == math.inf or (isinstance(number, int) and number >= _MOST):
                    raise UserError(f"--{field.name} {number} is too large")
            if any(isinstance(text, str) and _LOGIN.search(text) for text in values):
                raise UserError(
                    f"--{field.name} holds a login before the @ of an address, which would stand in config.json and "
                    "logs: type the address without it and give the secret in the environment or ~/.netrc"
                )

    @property
    @abstractmethod
    def method(self) -> str:
        """The method's readable name, e.g. ``tamt-mlm``; part of the run's identity."""

    def identity(self) -> dict[str, Any]:
        """All knobs as JSON values."""
        return dataclasses.asdict(self)

    def result_identity(self) -> dict[str, Any]:
        """The knobs that a result depends on, as JSON values."""
        return {key: value for key, value in self.identity().items() if key not in self.volatile}

    def open_run(self, folder: str | os.PathLike[str] | None, *, begin: bool = True) -> Run:
        """The run directory of these knobs; without a folder (None, "") it is named after them. See `Run.open`."""
        return Run.open(
            folder or None, self.identity(), self.defaults(), self.method, volatile=self.volatile, begin=begin
        )

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The defaults of all knobs as JSON values."""
        return {field.name: field.default for field in dataclasses.fields(cls)}


def check_schedule(schedule_steps: int, num_steps: int, option: str) -> None:
    """Refuse a decay that ends before the training does.

    Raises:
        UserError: naming the option that says how long the training is.
    """
    if schedule_steps < num_steps:
        raise UserError(
            f"--schedule_steps {schedule_steps} would let the rates be 0 from there on; type at least the {num_steps} "
            f"of {option}"
        )


def check_warmup(warmup_steps: int, num_steps: int, option: str) -> None:
    """Refuse a rise of the rate that lasts as long as the training.

    Raises:
        UserError: naming the option that says how long the training is.
    """
    if 0 < num_steps <= warmup_steps:
        raise UserError(
            f"--warmup_steps {warmup_steps} would let the rate never reach its peak; type less than the {num_steps} "
            f"steps of {option}"
        )


EXECUTORS = ("local", "slurm", "ray", "elsewhere")
"""Where the cells of a plan can run."""


@dataclass(frozen=True, kw_only=True)
class DispatchKnobs(Config):
    """How cells reach the machines that run them, the same after a search and for a sweep by itself."""

    slots: int = knob(0, "cells at a time; 0: local one for each GPU, or without any for each core, slurm as many as "
                      "its limits allow, ray as many as its resources hold")  # fmt: skip
    job_options: tuple[str, ...] = knob((), "what a worker asks for, as NAME=VALUE; slurm: options of sbatch, as "
                                        "partition=gpu account=me gres=gpu:1 time=02:00:00; ray: resources, as "
                                        "num_gpus=1 num_cpus=4")  # fmt: skip
    job_setup: str = knob("", "file of shell lines that every job of slurm runs first, as module load cuda")
    ray_address: str = knob("", "address of a running Ray cluster, as 10.0.0.1:6379; empty: RAY_ADDRESS, or the one of "
                            "this machine")  # fmt: skip

    def __post_init__(self) -> None:
        """Check the numbers; see the base class."""
        super().__post_init__()
        for option in self.job_options:
            name, equals, _ = option.partition("=")
            if not equals or not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
                raise UserError(f"--job_options {option!r} is not NAME=VALUE, as in partition=gpu")
