"""The DeepSpeed file: sharding, precision and communication; every other number has its source elsewhere."""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn

from finemask_ds.engine.base import Batching
from finemask_ds.engine.precision import DTYPES
from finemask_ds.engine.scaling import LOSS_SCALE_KEYS
from finemask_ds.errors import UserError

_BLOCKS = ("zero_optimization", "fp16", "bf16", "torch_autocast", "data_types")
KEYS = frozenset({
    "activation_checkpointing", "aio", "autotuning", "bf16", "checkpoint", "comet", "comms_logger",
    "communication_data_type", "compile", "csv_monitor", "data_efficiency", "data_types", "dataloader_drop_last",
    "datastates_ckpt", "disable_allgather", "disable_python_gc", "dump_state", "expert_parallel", "flops_profiler",
    "fp16", "gradient_accumulation_steps", "gradient_allreduce_op", "gradient_clipping", "gradient_predivide_factor",
    "hybrid_engine", "log_level", "managed_gradient_accumulation", "memory_breakdown", "optimizer", "pipeline",
    "prescale_gradients", "scheduler", "seq_parallel_communication_data_type", "steps_per_print", "tensor_parallel",
    "tensorboard", "timers", "torch_autocast", "train_batch_size", "train_micro_batch_size_per_gpu",
    "use_data_before_expert_parallelism", "vocabulary_size", "wall_clock_breakdown", "wandb", "weight_quantization",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
})  # fmt: skip
"""What DeepSpeed 0.19.8 reads of a file, in today's spelling, but for a key of sequence parallelism, which is none of a
file's; it ignores any other (tests/engine/test_settings.py)."""

REMOVED = frozenset({
    "amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity", "graph_harvesting", "nebula",
    "progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients",
})  # fmt: skip
"""What it once read, and now refuses."""

_INEXACT = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")

_HONOURED: Mapping[str, tuple[str, ...]] = {
    "fp16": ("enabled", *LOSS_SCALE_KEYS),
    "bf16": ("enabled", *LOSS_SCALE_KEYS, "check_grad_overflow"),
    "torch_autocast": ("enabled", "dtype"),
    "data_types": ("grad_accum_dtype",),
}
"""Block that DeepSpeed gets made anew -> the keys that are read of the file's, or ask for what is done in any case."""


def read_settings(file: str | Path) -> dict[str, Any]:
    """A DeepSpeed JSON file as a dict.

    Raises:
        UserError: where it is missing, no JSON object, holds something else where it should hold a block, or has a key
            that would be ignored.
    """
    try:
        settings = json.loads(Path(file).read_text())
    except FileNotFoundError as error:
        raise UserError(f"DeepSpeed file {file} does not exist; type --deepspeed configs/ds/zero2.json") from error
    except (OSError, ValueError) as error:
        raise UserError(f"DeepSpeed file {file} is no JSON ({error})") from error
    if not isinstance(settings, dict):
        raise UserError(f"DeepSpeed file {file} must hold one JSON object")
    for key in _BLOCKS:
        if not isinstance(settings.get(key) or {}, dict):
            raise UserError(f'{file} has "{key}": {json.dumps(settings[key])}; it must be a block in braces')
    _check_keys(settings, file)
    return settings


def _check_keys(settings: Mapping[str, Any], file: str | Path) -> None:
    """Refuse keys that would be ignored, at the top and in the blocks of which we make our own.

    Raises:
        UserError: naming the first one, and the key it is most like.
    """
    if "amp" in settings:
        raise UserError(f'{file} has an "amp" block; remove it and type "torch_autocast" (as configs/ds/zero2.json)')
    if removed := [key for key in settings if key in REMOVED]:
        raise UserError(f'{file} has "{removed[0]}", which DeepSpeed has removed; remove the key')
    for key in settings:
        _check_key(key, KEYS, str(file))
    for block, known in _HONOURED.items():
        asked = settings.get(block) or {}
        for key, value in asked.items():
            if not _is_off(value) and not _is_off(asked.get("enabled", True)):
                _check_key(key, known, f'{file}, in its "{block}" block,')


def _check_key(key: str, known: Collection[str], where: str) -> None:
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        instead = f'type "{near[0]}" or ' if near else ""
        raise UserError(f'{where} has "{key}", which would be ignored; {instead}remove the key')


def _is_off(value: Any) -> bool:
    """Whether a value asks for nothing: what is off, or left to us."""
    return value is False or value in ("auto", None, [])


def numbers_of(batching: Batching, num_ranks: int, max_grad_norm: float) -> dict[str, tuple[str, Any]]:
    """DeepSpeed key -> (our option, its value): every number that DeepSpeed is told."""
    batch_size = batching.micro_batch_size * batching.num_micro_batches * num_ranks
    return {
        "train_batch_size": ("--batch_size", batch_size),
        "train_micro_batch_size_per_gpu": ("--micro_batch_size", batching.micro_batch_size),
        "gradient_accumulation_steps": ("--batch_size / (ranks * --micro_batch_size)", batching.num_micro_batches),
        "gradient_clipping": ("--max_grad_norm", max_grad_norm),
    }


def check_numbers(settings: Mapping[str, Any], ours: Mapping[str, tuple[str, Any]], file: str) -> None:
    """Refuse a file that fixes another number than the command line's, which is the one source.

    The command's own, that is: what a command trains before its own work (the built-in model) has numbers of its own.

    Args:
        settings: the parsed file.
        ours: as of `numbers_of`.
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


def check_settings(settings: Mapping[str, Any], file: str) -> None:
    """Refuse a file that has numbers of the training at all where no option is the same, or asks for less than exact
    values.

    Raises:
        UserError: naming the key and what to do with it.
    """
    for key, options in {
        "optimizer": "--lr, --mask_lr, --head_lr and --weight_decay",
        "scheduler": "--schedule_steps",
    }.items():
        if key in settings:
            raise UserError(f'{file} has a "{key}" block, whose numbers come from {options}; remove the block')
    zero = settings.get("zero_optimization") or {}
    if (stage := zero.get("stage", 0)) not in (0, 1, 2, 3):
        raise UserError(f"{file} asks for ZeRO stage {json.dumps(stage)}; type 0, 1, 2 or 3")
    if inexact := [key for key in _INEXACT if zero.get(key)]:
        raise UserError(f'{file} has "{inexact[0]}", which would round the scores or theta_0; remove the key')
    for key in ("offload_optimizer", "offload_param"):
        if isinstance(block := zero.get(key), dict) and block.get("device") == "nvme":
            raise UserError(f'{file} has "{key}" to "nvme", from which no checkpoint can be written; type "cpu"')
    if zero.get("compute_grad_norm") is False:
        raise UserError(f'{file} has "compute_grad_norm": false, but every step needs the norm; remove the key')
    if (asked := settings.get("gradient_allreduce_op", "mean")) != "mean":
        raise UserError(f'{file} has "gradient_allreduce_op": {json.dumps(asked)}; type "mean", or remove the key')


@contextlib.contextmanager
def known_settings(file: str, refusal: type[Exception]) -> Iterator[None]:
    """Turn DeepSpeed's refusal of a key of the file, or of its value, into a UserError that names it.

    Args:
        file: the file's name.
        refusal: what DeepSpeed itself raises.
    """
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f'{file}: DeepSpeed refuses "{key}" ({first["msg"]}); mend or remove the key') from error
    except refusal as error:
        raise UserError(f"{file}: DeepSpeed refuses a key ({error}); mend or remove it") from error


def accumulate_in_fp32(settings: dict[str, Any], file: str) -> None:
    """Let DeepSpeed add gradients up in fp32, in which small ones of scores do not vanish.

    Raises:
        UserError: where the file asks for another type.
    """
    asked = (settings.get("data_types") or {}).get("grad_accum_dtype") or "auto"
    if asked not in ("auto", "fp32", "float32"):
        raise UserError(f'{file} has "grad_accum_dtype": {json.dumps(asked)}; type "fp32", or remove the key')
    settings["data_types"] = {"grad_accum_dtype": "fp32"}


def set_communication(settings: dict[str, Any], stage: int, parameters: Iterable[nn.Parameter], file: str) -> None:
    """Make "communication_data_type" hold for the trained values, in fp32 by default.

    Gradients of scores are summed over ranks in fp32: a sum in bf16 keeps 8 bits, which loses whole ranks' shares once
    many ranks add up, and the bytes saved are few beside the computation of a step. Under autocast DeepSpeed ignores
    the key and takes a parameter's own ``comm_dtype``, in which stage 3 would also gather the scores for the forward.

    Raises:
        UserError: for an unknown type, or 16-bit communication in stage 3 under autocast.
    """
    asked = settings["communication_data_type"] = settings.get("communication_data_type") or "fp32"
    if asked not in ("fp32", "fp16", "bf16"):
        raise UserError(f'{file} has "communication_data_type": {asked!r}; type "fp32", "fp16" or "bf16"')
    if not settings.get("torch_autocast") or asked == "fp32":
        return
    if stage == 3:
        raise UserError(
            f'{file}: in stage 3 "communication_data_type": "{asked}" would gather the scores in 16 bit; '
            'type "fp32", or stage 2'
        )
    for parameter in parameters:
        parameter.comm_dtype = DTYPES[asked]  # type: ignore[attr-defined]


BUCKETS = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")
"""DeepSpeed's buffers, in elements: 500 million each by default, 2 GB of fp32."""


def size_buckets(settings: dict[str, Any], parameters: Iterable[nn.Parameter]) -> None:
    """Let the buckets that the file leaves out or to "auto" hold the largest trained parameter, once."""
    zero = settings.setdefault("zero_optimization", {})
    largest = max(parameter.numel() for parameter in parameters)
    for key in BUCKETS:
        if zero.get(key, "auto") == "auto":
            zero[key] = largest + largest % 2  # DeepSpeed wants them even.
