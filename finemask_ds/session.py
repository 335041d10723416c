"""One search from its configuration to its files: what the launchers and the Python API call."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from shlex import quote
from typing import Any, NoReturn, TypeVar

from finemask_ds.config import (
    Config,
    ImpConfig,
    MagnitudeConfig,
    PretrainConfig,
    SearchConfig,
    TamtConfig,
    TrainingConfig,
)
from finemask_ds.data.sources import find_text
from finemask_ds.engine.guard import check_ranks, describe_ranks
from finemask_ds.engine.launched import join_launch
from finemask_ds.engine.settings import check_numbers, check_settings, numbers_of, read_settings
from finemask_ds.engine.shared import at_work_in
from finemask_ds.engine.termination import Terminated, Termination
from finemask_ds.engine.world import World, launched_rank, this_process
from finemask_ds.errors import UserError, printable
from finemask_ds.options import parse
from finemask_ds.report.heatmap import distance_map
from finemask_ds.search import imp, magnitude, tamt
from finemask_ds.search.conclude import conclude
from finemask_ds.search.dense import builtin_corpus, builtin_folder, builtin_model, resolve_model, trained_head
from finemask_ds.search.outcome import Outcome
from finemask_ds.search.setting import Setting, batching_of, open_setting
from finemask_ds.signals import Interrupted, tell

C = TypeVar("C", bound=Config)

METHODS: Mapping[type[SearchConfig], Callable[[Setting], Outcome]] = {
    TamtConfig: tamt.find_mask,
    ImpConfig: imp.find_mask,
    MagnitudeConfig: magnitude.find_mask,
}
"""Configuration -> the method that it configures."""


def search(config: SearchConfig, world: World | None = None) -> dict[str, Any]:
    """Find a subnetwork and leave it in the run directory; a search that is done returns its result at once.

    Args:
        config: of the method; its class says which.
        world: the ranks; None lets the configuration say (its DeepSpeed file, or one plain process).

    Returns:
        The result as in ``result.json``, with the run directory as ``run``.

    Raises:
        UserError: for bad input.
    """
    if world is None:
        with ranks_of(config) as world:
            return search(config, world)
    world.on_first(lambda: _look_before(config, world))
    model, data = (
        resolve_model(config.model, world, config.deepspeed),
        str(builtin_corpus()) if config.data == "builtin" else config.data,
    )
    setting = open_setting(config, world, model=model, data=data)
    done = world.on_first(lambda: setting.run.result_of("search") if setting.run.done("search") else None)
    if done is None:
        with at_work_in(setting.run, world):
            setting.begin()
            setting = replace(setting, head=trained_head(setting), draw=distance_map)
            done = conclude(setting, METHODS[type(config)](setting))
    return {**done, "run": str(setting.run.folder)}


def _look_before(config: TrainingConfig, world: World) -> None:
    """Refuse what is missing, and numbers that do not fit together, before minutes are spent on what is there.

    Raises:
        UserError: where the text or the DeepSpeed file is not to be found, the ranks cannot share a step's sequences,
            or the file fixes another number than the command line or asks for what it cannot have.
    """
    batching = batching_of(config, world)
    if config.data != "builtin":
        find_text(config.data)
    if config.deepspeed:
        settings, ours = read_settings(config.deepspeed), numbers_of(batching, world.size, config.max_grad_norm)
        check_settings(settings, config.deepspeed)
        check_numbers(settings, ours, config.deepspeed)


@contextlib.contextmanager
def ranks_of(config: TrainingConfig) -> Iterator[World]:
    """The ranks that the launcher started for a DeepSpeed run, or this single process.

    Raises:
        UserError: where other than ``--ranks`` ranks have started, or several for a run without DeepSpeed.
    """
    check_ranks(config.ranks)
    if not config.deepspeed:
        if (started := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
            raise UserError(f"each of the {started} ranks would train alone; type --deepspeed configs/ds/zero2.json")
        yield this_process()
        return
    from finemask_ds.engine.zero import distributed

    with distributed(time_out_sec=config.time_out_sec, silence_sec=config.silence_sec) as world:
        told = describe_ranks(world)
        if world.is_first:
            print(told, flush=True)
        yield world


def pretrain(config: PretrainConfig) -> str:
    """Make the built-in model where it is missing; its folder."""
    with ranks_of(config) as world:
        if not world.on_first(builtin_folder(config).exists):
            world.on_first(lambda: _look_before(config, world))
        return str(builtin_model(config, world))


def launch(config_class: type[C], action: Callable[[C], object], argv: Sequence[str] | None = None) -> int:
    """What every launcher does: parse, call, exit code. The first rank speaks; every rank exits alike.

    Returns:
        0, or the outcome's own ``exit_code``; 2 after a user's error, which is one sentence on the first rank's
        standard error, or 75 where it may go well the next time; 143 after SIGTERM and 130 after Ctrl-C; 1 after any
        other error, with its trace and the rank that it happened on.
    """
    termination = Termination()
    try:
        join_launch(os.environ)
        config = parse(config_class, sys.argv[1:] if argv is None else argv)
        if isinstance(config, TrainingConfig) and (config.hostfile or config.max_restarts):
            return _supervise(config, [sys.argv[0], *(sys.argv[1:] if argv is None else argv)])
        with termination.handling() if isinstance(config, TrainingConfig) else contextlib.nullcontext():
            outcome = action(config)
    except Terminated as ended:
        if launched_rank() == 0:
            tell(f"{termination.signal.name}: {ended}")
        return termination.exit_code
    except Interrupted as ended:
        tell("asked to end; the same command goes on")
        return ended.exit_code
    except UserError as error:
        if launched_rank() == 0:
            print(f"finemask: {printable(str(error))}", file=sys.stderr, flush=True)
        return error.exit_code
    except Exception:
        traceback.print_exc()
        print(f"finemask: rank {launched_rank()} on {socket.gethostname()} failed, see above", file=sys.stderr)
        return 1
    if launched_rank() == 0:
        print(summary(outcome) if isinstance(outcome, dict) else outcome, flush=True)
    return getattr(outcome, "exit_code", 0)


def _supervise(config: TrainingConfig, command: Sequence[str]) -> int:
    from finemask_ds.supervise import supervise  # Only the process in front of the launcher needs it.

    return supervise(config, command)


def leave(code: int) -> NoReturn:
    """End this rank with an exit code, now, without Python's own finalisation.

    Gloo's threads let go of their last tensors a moment after the collective has returned, and one that needs the
    interpreter for it while that shuts down aborts the process (exit code 134 of a run that was done).
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # Nobody reads it any more; the code still tells.
            stream.flush()
    os._exit(code)


def summary(result: Mapping[str, Any]) -> str:
    """A result in two lines."""
    if result.get("kind") == "finetune":
        return _cell_summary(result)
    dev = result["dev"]
    figures = [f"{name} {value:.4f}" for name, value in dev.items() if value is not None]
    return (
        f"{result['method']}: sparsity {result['sparsity']:.6f}, dev {', '.join(figures)}, "
        f"distance from OMP {result['distance_from_omp']:.4f}, {result['steps']} steps in {result['seconds']:.0f} s\n"
        f"mask {result['run']}/mask.safetensors; watch with: tensorboard --logdir {quote(result['run'] + '/tb')}"
    )


def _cell_summary(result: Mapping[str, Any]) -> str:
    figures = [
        f"{name} {'undefined' if value is None else f'{value:.4f}'}" for name, value in result["metrics"].items()
    ]
    why = f" ({result['undefined']})" if result["undefined"] else ""
    return (
        f"{result['task']}, {result['method']}: dev {', '.join(figures)}{why} at step {result['best_step']} of "
        f"{result['steps']}, sparsity {result['sparsity']:.6f}, {result['seconds']:.0f} s\n"
        f"result {result['run']}/result.json; watch with: tensorboard --logdir {quote(result['run'] + '/tb')}"
    )
