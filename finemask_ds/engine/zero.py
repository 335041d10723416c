"""DeepSpeed's ZeRO behind the engine surface: the only module that imports deepspeed.

Most of the obvious calls are silently undone in some stage; what is written here was tried in all of them, and
tests/engine/test_traps.py tells when upstream mends a trap.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finemask_ds.engine.base import Batching, Engine, Group, optimizer_for, set_learning_rates
from finemask_ds.engine.precision import resolve_precision
from finemask_ds.engine.world import World
from finemask_ds.errors import UserError


@contextlib.contextmanager
def distributed() -> Iterator[World]:
    """Join the ranks that the launcher started; leave them on the way out (otherwise some exits abort)."""
    deepspeed = _import_deepspeed()
    accelerator = deepspeed.get_accelerator()
    if accelerator.device_name() == "cpu":
        # The shared-memory extension takes a minute to build and gloo is as fast.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized():
        if "RANK" not in os.environ:
            # A plain `python launcher/tamt.py --deepspeed ...`: one rank, on a port the kernel picks.
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        backend = "gloo" if accelerator.device_name() == "cpu" else accelerator.communication_backend_name()
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    device = torch.device(accelerator.device_name(int(os.environ.get("LOCAL_RANK", "0"))))
    if device.type != "cpu":
        accelerator.set_device(device.index or 0)
    try:
        with warnings.catch_warnings():
            # DeepSpeed calls collectives by names that torch has deprecated; a user can do nothing about it.
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
            yield World(rank, size, device)
    finally:
        deepspeed.comm.destroy_process_group()


def read_settings(file: str | Path) -> dict[str, Any]:
    """A DeepSpeed JSON file as a dict.

    Raises:
        UserError: where it is missing or no JSON object.
    """
    try:
        settings = json.loads(Path(file).read_text())
    except FileNotFoundError as error:
        raise UserError(f"DeepSpeed file {file} does not exist; type --deepspeed configs/ds/zero2.json") from error
    except (OSError, ValueError) as error:
        raise UserError(f"DeepSpeed file {file} is no JSON ({error})") from error
    if not isinstance(settings, dict):
        raise UserError(f"DeepSpeed file {file} must hold one JSON object")
    return settings


def check_settings(settings: Mapping[str, Any], ours: Mapping[str, tuple[str, Any]], file: str) -> None:
    """One source for each number: refuse a file that fixes another value than the command line's.

    Args:
        settings: the parsed file.
        ours: DeepSpeed key -> (our option, its value).
        file: the file's name, for messages.

    Raises:
        UserError: naming both places.
    """
    for key, (option, value) in ours.items():
        theirs = settings.get(key, "auto")
        if theirs not in ("auto", value):
            raise UserError(
                f'{file} fixes "{key}" to {theirs} but {option} is {value}; remove the key or type {option} {theirs}'
            )
    for key, options in {
        "optimizer": "--lr, --mask_lr, --head_lr and --weight_decay",
        "scheduler": "--schedule_steps",
    }.items():
        if key in settings:
            raise UserError(f'{file} has a "{key}" block, whose numbers come from {options}; remove the block')


class ZeroEngine(Engine):
    """ZeRO stages 0 to 3 through ``deepspeed.initialize``."""

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[Group],
        world: World,
        *,
        batching: Batching,
        max_grad_norm: float,
        file: str,
    ):
        self.module, self.groups, self.world = module, groups, world
        self._deepspeed = _import_deepspeed()
        settings = read_settings(file)
        numbers: dict[str, tuple[str, Any]] = {
            "train_batch_size": (
                "--batch_size",
                batching.micro_batch_size * batching.num_micro_batches * world.size,
            ),
            "train_micro_batch_size_per_gpu": ("--micro_batch_size", batching.micro_batch_size),
            "gradient_accumulation_steps": (
                "--batch_size / (ranks * --micro_batch_size)",
                batching.num_micro_batches,
            ),
            "gradient_clipping": ("--max_grad_norm", max_grad_norm),
        }
        check_settings(settings, numbers, file)
        settings, self._precision = resolve_precision(settings, world.device, file)
        # Clipping is always written: DeepSpeed's own default is 1.0, not "off".
        settings |= {key: value for key, (_, value) in numbers.items()} | {"steps_per_print": 10**9}
        settings.setdefault("zero_force_ds_cpu_optimizer", False)
        self.stage = int(settings.get("zero_optimization", {}).get("stage", 0))
        self._batching = batching
        self._micro_batch = 0
        module.to(world.device)
        optimizer = optimizer_for(groups, fused=world.device.type == "cuda")
        with _quiet():
            self._engine, *_ = self._deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        self.check_precision()

    def describe(self) -> str:
        """See :class:`Engine`."""
        return f"ZeRO-{self.stage}, {self._precision}"

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`Engine`."""
        return self._engine({key: tensor.to(self.world.device) for key, tensor in batch.items()})

    def backward(self, loss: Tensor) -> None:
        """See :class:`Engine`; DeepSpeed averages over ranks, hence the factor."""
        self._engine.backward(loss * self.world.size, scale_wrt_gas=False)
        self._micro_batch += 1
        if self._micro_batch < self._batching.num_micro_batches:
            self._engine.step()  # Only counts: DeepSpeed updates at its own accumulation boundary.

    def step(self, learning_rates: Mapping[str, float]) -> float:
        """See :class:`Engine`."""
        set_learning_rates(self._optimizer, learning_rates)
        norm = self._stage_0_norm() if self.stage == 0 else None
        self._engine.step()
        self._micro_batch = 0
        return float(norm if norm is not None else self._engine.get_global_grad_norm())

    def gathered(self, parameters: Iterable[nn.Parameter]) -> Any:
        """See :class:`Engine`; only stage 3 has anything to gather."""
        if self.stage < 3:
            return contextlib.nullcontext()
        return self._deepspeed.zero.GatheredParameters(list(parameters))

    def edit(self, values: Mapping[str, Tensor]) -> None:
        """See :class:`Engine`; copied on all ranks under GatheredParameters, then the fp32 masters are refreshed."""
        parameters = self.parameters
        for name, value in values.items():
            with (
                torch.no_grad(),
                self._deepspeed.zero.GatheredParameters([parameters[name]], modifier_rank=0),
            ):
                parameters[name].copy_(value)
        if hasattr(self._optimizer, "refresh_fp32_params"):
            self._optimizer.refresh_fp32_params()

    def optimizer_leaves(self) -> list[Tensor]:
        """See :class:`Engine`; the flat fp32 partitions in stages 1 to 3."""
        for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
            if hasattr(self._optimizer, attribute):
                return list(getattr(self._optimizer, attribute))
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def optimizer_state(self) -> dict[Any, dict[str, Tensor]]:
        """See :class:`Engine`."""
        return getattr(self._optimizer, "optimizer", self._optimizer).state

    @property
    def _optimizer(self) -> Any:
        return self._engine.optimizer

    def _stage_0_norm(self) -> Tensor:
        """Stage 0 clips but does not tell the norm; at this point its gradients are already reduced."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)


def _import_deepspeed() -> Any:
    """Import on first use: it takes seconds, prints a banner and picks the accelerator from the environment."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with _quiet():
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel(logging.ERROR)
    return deepspeed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep DeepSpeed's prints on stdout out of ours."""
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        yield
