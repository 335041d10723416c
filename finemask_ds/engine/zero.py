"""DeepSpeed's ZeRO behind the engine surface: the only module that imports deepspeed.

Most of the obvious calls are silently undone in some stage; what is written here was tried in all of them, and
tests/engine/test_traps.py tells when upstream mends a trap.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from finemask_ds.engine.base import (
    Batching,
    Engine,
    GradientNorms,
    Group,
    Piece,
    Update,
    optimizer_for,
    set_learning_rates,
    shapes_of,
    to_device,
    whole_pieces,
)
from finemask_ds.engine.guard import SILENCE_SEC, Watchdog, is_lost_peer
from finemask_ds.engine.join import START_SEC, join
from finemask_ds.engine.launched import choose_interface
from finemask_ds.engine.memory import keep_freed_memory
from finemask_ds.engine.precision import resolve_precision
from finemask_ds.engine.scaling import DeepSpeedScaler
from finemask_ds.engine.settings import (
    accumulate_in_fp32,
    check_settings,
    known_settings,
    numbers_of,
    read_settings,
    set_communication,
    size_buckets,
)
from finemask_ds.engine.termination import Terminated
from finemask_ds.engine.world import World
from finemask_ds.silence import silent_output

_ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@contextlib.contextmanager
def distributed(*, time_out_sec: float = 1800, silence_sec: float = SILENCE_SEC) -> Iterator[World]:
    """Join the ranks that the launcher started; leave them on the way out (otherwise some exits abort).

    Args:
        time_out_sec: how long a collective may wait for the slowest rank.
        silence_sec: a rank that has given no sign of life for so long is given up, and all others end.
    """
    deepspeed = _import_deepspeed()
    accelerator = deepspeed.get_accelerator()
    time_out = timedelta(seconds=time_out_sec)
    if accelerator.device_name() == "cpu":
        # The shared-memory extension takes a minute to build and gloo is as fast.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # A plain `python launcher/tamt.py --deepspeed ...` is one rank, on a port the kernel picks.
    is_launched = "RANK" in os.environ
    os.environ.update({} if is_launched else _ALONE)
    choose_interface(os.environ)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device(accelerator.device_name(int(os.environ.get("LOCAL_RANK", "0"))))
    if device.type != "cpu":
        accelerator.set_device(device.index or 0)
    store = join(rank, size, silence_sec + START_SEC)
    watchdog = Watchdog(rank, size, silence_sec, with_sidecar=is_launched)
    watchdog.start()
    world = World(rank, size, device, time_out)
    world.termination.before_end = watchdog.dismiss
    try:
        backend = "gloo" if device.type == "cpu" else accelerator.communication_backend_name()
        torch.distributed.init_process_group(
            backend, timeout=time_out, store=torch.distributed.PrefixStore("torch", store), rank=rank, world_size=size,
            device_id=device if device.type == "cuda" and size > 1 else None,
        )  # fmt: skip
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        with warnings.catch_warnings():
            # DeepSpeed calls collectives by names that torch has deprecated; a user can do nothing about it.
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
            yield world
            torch.distributed.barrier()  # None leaves while another still needs it or its store.
    except BaseException as error:
        if world.termination.asked and is_lost_peer(error):
            raise Terminated("other ranks were gone before the step was done; the same command goes on") from error
        watchdog.report(error)
        raise
    finally:
        watchdog.stop()
        deepspeed.comm.destroy_process_group()
        for name in () if is_launched else _ALONE:
            del os.environ[name]


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
        as_asked: bool = False,
    ):
        self.module, self.groups, self.world, self.shapes = module, groups, world, shapes_of(groups)
        self._batching, self._max_grad_norm, self._micro_batch = batching, max_grad_norm, 0
        self._deepspeed = _import_deepspeed()
        settings = self._resolve(read_settings(file), file, as_asked)
        self.stage = int((settings.get("zero_optimization") or {}).get("stage", 0))
        self.is_sharded, self.is_partitioned = self.stage > 0, self.stage == 3
        keep_freed_memory(world.device)
        module.to(world.device)
        cast_frozen(module, self.precision.compute)
        set_communication(settings, self.stage, self.parameters.values(), file)
        accumulate_in_fp32(settings, file)
        size_buckets(settings, self.parameters.values())
        # DeepSpeed keeps for the whole process whether any engine of it has computed in autocast.
        self._deepspeed.runtime.torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
        optimizer = optimizer_for(groups)
        self._norms = GradientNorms(self, optimizer)
        with silent_output(), known_settings(file, self._deepspeed.DeepSpeedConfigError):
            self._engine, *_ = self._deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        self._scaler = DeepSpeedScaler(self.loss_scale)
        self._install_scaler()
        set_time_out(world.time_out)
        self.check_precision()

    def _resolve(self, settings: dict[str, Any], file: str, as_asked: bool) -> dict[str, Any]:
        """The file with its precision made ours and every number from the command line."""
        check_settings(settings, file)
        settings, self.precision = resolve_precision(settings, self.world.device, file, as_asked=as_asked)
        self.loss_scale = self.precision.loss_scale
        numbers = numbers_of(self._batching, self.world.size, self._max_grad_norm)
        # Clipping is always written: DeepSpeed's own default is 1.0, not "off".
        settings |= {key: value for key, (_, value) in numbers.items()} | {"steps_per_print": 10**9}
        settings.setdefault("zero_force_ds_cpu_optimizer", False)
        return settings

    def _install_scaler(self) -> None:
        """Put our loss scale where DeepSpeed has its own, which in stages 1 to 3 under autocast never backs off."""
        if self.stage == 0:
            self._engine.torch_autocast_z0_gradscaler = self._scaler
            return
        self._optimizer.torch_autocast_gradscaler = None
        if self.loss_scale.is_on:
            self._optimizer.loss_scaler, self._optimizer.dynamic_loss_scale = self._scaler, True

    def describe(self) -> str:
        """See :class:`Engine`."""
        return f"ZeRO-{self.stage}, {self.precision.told}"

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`Engine`."""
        return self._engine(to_device(batch, self.world.device))

    def backward(self, loss: Tensor) -> None:
        """See :class:`Engine`; DeepSpeed averages over ranks, hence the factor."""
        self._engine.backward(loss * self.world.size, scale_wrt_gas=False)
        self._micro_batch += 1
        if self._micro_batch < self._batching.num_micro_batches:
            self._engine.step()  # Only counts: DeepSpeed updates at its own accumulation boundary.

    def step(self, learning_rates: Mapping[str, float], watched: Mapping[str, Sequence[str]] | None = None) -> Update:
        """See :class:`Engine`."""
        set_learning_rates(self._optimizer, learning_rates)
        self._norms.watch(watched or {})
        norm = self._stage_0_norm() if self.stage == 0 else None
        self._scaler.skips = norm is not None and not math.isfinite(norm)
        self._engine.step()
        self._micro_batch = 0
        norm = norm if norm is not None else float(self._engine.get_global_grad_norm())
        update = Update(norm, self._norms.norms(norm, self._max_grad_norm))
        if self.loss_scale.is_on:
            self.loss_scale.update(overflow=not update.applied)
        return update

    def gathered(self, parameters: Iterable[nn.Parameter]) -> Any:
        """See :class:`Engine`; only stage 3 has anything to gather."""
        if self.stage < 3:
            return contextlib.nullcontext()
        return self._deepspeed.zero.GatheredParameters(list(parameters))

    def edit(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """See :class:`Engine`; copied on all ranks under GatheredParameters, then the fp32 masters are refreshed."""
        parameters = self.parameters
        for name, value in values:
            with (
                torch.no_grad(),
                self._deepspeed.zero.GatheredParameters([parameters[name]], modifier_rank=0),
            ):
                parameters[name].copy_(value)
        if hasattr(self._optimizer, "refresh_fp32_params"):
            self._optimizer.refresh_fp32_params()

    def find_pieces(self) -> list[Piece]:
        """See :class:`Engine`; the parts of the flat fp32 partitions of stages 1 to 3."""
        names = {id(value): name for name, value in self.parameters.items()}
        if self.stage == 0:
            return whole_pieces(self.parameters)
        return list(self._runs_of_parameters(names) if self.stage == 3 else self._runs_of_groups(names))

    def _runs_of_parameters(self, names: Mapping[int, str]) -> Iterator[Piece]:
        """Stage 3 cuts each parameter into as many equal runs as there are ranks, the last ones padded."""
        optimizer = self._optimizer
        for leaf, members in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
            offset = 0
            for parameter in members:
                size = parameter.ds_tensor.ds_numel
                start = min(self.world.rank * size, parameter.ds_numel)
                length = min(size, parameter.ds_numel - start)
                yield Piece(names[id(parameter)], start, leaf, slice(offset, offset + length))
                offset += size

    def _runs_of_groups(self, names: Mapping[int, str]) -> Iterator[Piece]:
        """Stages 1 and 2 lay a group's parameters end to end and cut that into as many equal runs as ranks."""
        optimizer = self._optimizer
        for index, leaf in enumerate(optimizer.single_partition_of_fp32_groups):
            first = self.world.rank * leaf.numel()
            members = optimizer.round_robin_bit16_groups[index]
            for parameter, offset in zip(members, optimizer.round_robin_bit16_offsets[index], strict=True):
                start, stop = max(first, offset), min(first + leaf.numel(), offset + parameter.numel())
                if start < stop:
                    yield Piece(names[id(parameter)], start - offset, leaf, slice(start - first, stop - first))

    def optimizer_state(self) -> dict[Any, dict[str, Tensor]]:
        """See :class:`Engine`."""
        return getattr(self._optimizer, "optimizer", self._optimizer).state

    @property
    def _optimizer(self) -> Any:
        return self._engine.optimizer

    def _stage_0_norm(self) -> float:
        """Stage 0 clips but does not tell the norm; at this point its gradients are reduced, and scaled still."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients)) / self.loss_scale.scale


def cast_frozen(module: nn.Module, dtype: torch.dtype) -> None:
    """Keep the matrices that are not trained in the type they are computed in; vectors as they are.

    All are copied, the trained ones too: one that still lay in a mapped checkpoint file would hold all of the file.
    """
    for parameter in module.parameters():
        is_frozen_matrix = not parameter.requires_grad and parameter.dim() > 1
        parameter.data = parameter.data.to(dtype if is_frozen_matrix else parameter.dtype, copy=True)


def set_time_out(time_out: timedelta | None) -> None:
    """Give every process group, ZeRO's own ones too, the run's time-out; torch gives new groups its default."""
    if time_out is None:
        return
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        torch.distributed.distributed_c10d._set_pg_timeout(time_out, group)


def _import_deepspeed() -> Any:
    """Import on first use: it takes seconds, prints a banner and picks the accelerator from the environment."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with silent_output():
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel(logging.ERROR)
    return deepspeed
