"""A recipe as a list of launcher commands: what is done is not done again, and all results end in one table."""

from __future__ import annotations

import os
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finemask_ds import hostprocess
from finemask_ds.config import Config, ImpConfig, MagnitudeConfig, PretrainConfig, SweepConfig, TamtConfig
from finemask_ds.errors import OtherConfigError, UserError
from finemask_ds.options import parse
from finemask_ds.report.table import aligned, markdown
from finemask_ds.run import Run, read_json, write_json
from finemask_ds.search.dense import builtin_folder
from finemask_ds.signals import Interrupted, Interruption, tell

CONFIGS: Mapping[str, type[Config]] = {
    "dispatch.py": SweepConfig,
    "imp.py": ImpConfig,
    "magnitude.py": MagnitudeConfig,
    "pretrain.py": PretrainConfig,
    "tamt.py": TamtConfig,
}
"""Launcher -> what its options make."""
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Stage:
    """One command of a recipe."""

    name: str
    launcher: str
    options: tuple[str, ...] = ()
    ranks: int = 2
    """Processes under the deepspeed launcher; 0: one plain process without DeepSpeed."""
    zero: int = 2
    """ZeRO stage."""

    def command(self, root: Path, shared: Sequence[str], port: int) -> list[str]:
        """What a user would type, with a free port."""
        script = str(REPOSITORY / "launcher" / self.launcher)
        options = [*self.options, *(shared if self.searches else ())]
        if self.launcher != "pretrain.py":
            options += ["--run", str(self.run(root).folder)]
        if not self.ranks:
            return ["python", script, *options]
        start = ["deepspeed", "--log_level", "error", "--num_gpus", str(self.ranks), "--master_port", str(port)]
        return [*start, script, "--deepspeed", str(REPOSITORY / f"configs/ds/zero{self.zero}.json"), *options]

    @property
    def searches(self) -> bool:
        """Whether it finds a mask."""
        return self.launcher not in ("pretrain.py", "dispatch.py")

    def check(self, root: Path, shared: Sequence[str], folder: str = "--root") -> Config:
        """The configuration that its options make; ``folder`` is the recipe's option of ``root``.

        Raises:
            UserError: for an unknown option or a value that cannot be; for a search whose run directory, which only its
                name tells, was made by other options.
        """
        config = parse(CONFIGS[self.launcher], [*self.options, *(shared if self.searches else ())])
        if self.searches:
            try:
                config.open_run(self.run(root).folder, begin=False)
            except OtherConfigError as error:
                raise UserError(f"stage {self.name}: {error.what}: type another {folder} DIR") from error
        return config

    def run(self, root: Path) -> Run:
        """The stage's run directory (the built-in model is in the cache, for all runs of this machine)."""
        return Run(root / self.name)

    def is_done(self, root: Path) -> bool:
        """Whether the stage has left its result."""
        if self.launcher == "pretrain.py":
            return builtin_folder(PretrainConfig()).exists()
        # A sweep looks itself what is missing.
        return self.searches and self.run(root).done("search")


def run_stages(
    stages: Sequence[Stage], root: Path, shared: Sequence[str], folder: str = "--root"
) -> dict[str, dict[str, Any]]:
    """Run what is not done yet under ``root``; the searches' results by stage, also in
    ``root/results.json``.

    Args:
        stages: in order.
        root: folder of the run directories.
        shared: options of every search.
        folder: the recipe's option of ``root``.

    Raises:
        UserError: before the first stage for what `Stage.check` refuses of any; where a stage fails, and the same
            command goes on from there.
    """
    for stage in stages:
        stage.check(root, shared, folder)
    for number, stage in enumerate(stages, 1):
        run_stage(stage, root, shared, f"[{number}/{len(stages)}] ")
    found = {stage.name: read_json(stage.run(root).result) for stage in stages if stage.searches}
    write_json(root / "results.json", found)
    return found


def run_stage(stage: Stage, root: Path, shared: Sequence[str] = (), label: str = "") -> None:
    """Run one stage unless it is done.

    Raises:
        UserError: where it fails.
        Interrupted: where this process was asked to end meanwhile.
    """
    if stage.is_done(root):
        print(f"{label}{stage.name}: done", flush=True)
        return
    command = stage.command(root, shared, hostprocess.free_port("127.0.0.1"))
    print(f"{label}{stage.name}: {shlex.join(command)}", flush=True)
    if (code := _run(command, _environment(stage.ranks), stage.ranks)) != 0:
        raise UserError(f"stage {stage.name} ended with code {code}, see above; start the same command to go on")


def _run(command: Sequence[str], environment: Mapping[str, str], ranks: int) -> int:
    """Run a command to its end; its exit code.

    It lives in a session of its own: a Ctrl-C would reach DeepSpeed's launcher too, which then ends other runs as well.

    Raises:
        Interrupted: where this process was asked to end, once the command has saved and ended; a further signal ends it
            at once.
    """
    launch = secrets.token_hex(16)
    with Interruption().watching() as interruption:
        process = subprocess.Popen(command, env={**environment, hostprocess.VARIABLE: launch}, start_new_session=True)
        asked = False
        try:
            while process.poll() is None:
                if interruption.asked and not asked:
                    asked = True
                    _ask(process, launch, ranks)
                    tell("asked to end, once the stage has saved; Ctrl-C again ends it at once")
                if interruption.insists:
                    hostprocess.end(launch, 0)
                time.sleep(0.05)
        finally:
            if not asked and process.poll() is None:  # Nobody would look after it any more.
                _ask(process, launch, ranks)
    if interruption.asked:
        raise Interrupted(interruption.signal)
    return process.returncode


def _ask(process: subprocess.Popen[bytes], launch: str, ranks: int) -> None:
    """Ask a command to end, so that it saves."""
    if not ranks:
        process.terminate()
    elif not hostprocess.ask(launch):
        hostprocess.end(launch, 0)  # There is nothing to save yet.


def table(results: dict[str, dict[str, Any]], *, as_markdown: bool = False) -> str:
    """Dev figures of each method with theta_0's head, the MLM loss with its own head beside; the dense model first."""
    header = ["method", "MLM loss", "accuracy", "KD loss", "own head", "sparsity", "from OMP", "steps", "seconds"]
    first = next(iter(results.values()))
    rows = [["dense", *_losses(first["dev_dense"]), "-", "0.0000", "-", "-", "-"]]
    for name, result in results.items():
        own = result["dev_trained_head"]
        measured = [f"{result['sparsity']:.4f}", f"{result['distance_from_omp']:.4f}"]
        spent = [str(result["steps"]), f"{result['seconds']:.0f}"]
        rows.append([name, *_losses(result["dev"]), _losses(own)[0] if own else "-", *measured, *spent])
    return markdown(header, rows) if as_markdown else aligned(header, rows)


def _losses(dev: dict[str, float | None]) -> list[str]:
    names = ("mlm_loss", "mlm_accuracy", "kd_loss")
    return ["-" if (value := dev[name]) is None else f"{value:.4f}" for name in names]


def _environment(ranks: int) -> dict[str, str]:
    """This interpreter's commands first; the cores shared out among the ranks."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    threads = str(max(1, len(os.sched_getaffinity(0)) // max(ranks, 1)))
    environment = {"OMP_NUM_THREADS": threads, **os.environ, "PATH": path}
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"  # Otherwise DeepSpeed warns at every start that it found none.
    return environment
