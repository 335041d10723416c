"""A sweep as a plan: cells whose ids follow from their contents, in one file of one folder.

ROOT/plan.json                         the cells, how often a failed one is tried again
ROOT/cells/ID/result.json              the first whole result of a cell
ROOT/cells/ID/attempt-1/ ...           one folder for each attempt (`dispatch.attempt`)
ROOT/logs/                             what the workers print
ROOT/estimate.json                     measured costs (`dispatch.estimate`)
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from finemask_ds.config import FinetuneConfig
from finemask_ds.data.tasks import task_named
from finemask_ds.errors import UserError
from finemask_ds.lock import STALE_SEC, Lock
from finemask_ds.run import Run, content_hash, file_sha256, mask_file, read_json, write_json

PLAN_VERSION = 1
RETRIES = 2


class MaskFacts(NamedTuple):
    """What a mask file's header tells; its bits are verified where they are used."""

    method: str
    """As in its provenance."""
    sha256: str | None
    """Of the file's bytes."""
    bits: str | None
    """16 hex of a hash over names, shapes and bits: the same for the same mask, whenever and wherever it was made."""


FULL = MaskFacts("full", None, None)
"""Those of no mask."""


@dataclass(frozen=True)
class Cell:
    """One fine-tuning: (backbone, mask or none, task, data fraction, seed)."""

    id: str
    """A readable start and 8 hex of a hash of what the result depends on; the mask counts by its bits."""
    options: Mapping[str, Any]
    """Options of launcher/finetune.py that differ from their defaults, as JSON values; always ``task`` and ``seed``."""
    method: str = "full"
    """As in the mask's provenance; ``full`` without a mask."""
    mask_sha256: str | None = None
    """Of the mask's file when the cell was planned."""
    mask_bits: str | None = None
    """`MaskFacts.bits` of the mask."""

    @classmethod
    def of(cls, options: Mapping[str, Any], described: MaskFacts | None = None) -> Cell:
        """The cell of some options; those at their defaults and those that change no result count nothing.

        Args:
            options: of launcher/finetune.py.
            described: `describe_mask` of the mask, where it is known.

        Raises:
            UserError: for an unknown task or option, a value that cannot be, a mask that is missing or no mask file.
        """
        defaults = FinetuneConfig.defaults()
        asked = {"seed": defaults["seed"], **options, "task": task_named(str(options.get("task", ""))).name}
        if unknown := sorted(asked.keys() - defaults.keys()):
            raise UserError(f"--{unknown[0]} is no option of a fine-tuning; valid are {' '.join(sorted(defaults))}")
        FinetuneConfig(**asked)
        told = {key: value for key, value in asked.items() if key in ("task", "seed") or value != defaults[key]}
        content = {key: value for key, value in told.items() if key not in FinetuneConfig.volatile}
        facts = FULL
        if told.get("mask"):
            told["mask"] = str(mask_file(told["mask"]))
            facts = described or describe_mask(told["mask"])
            content["mask"] = facts.bits
        start = re.sub(r"[^\w.+-]+", "-", f"{told['task']}-{facts.method}-seed{told['seed']}")
        digest = content_hash(json.dumps(content, sort_keys=True))[:8]
        return cls(f"{start}-{digest}", told, *facts)

    @property
    def task(self) -> str:
        """The task's name."""
        return str(self.options["task"])


@dataclass(frozen=True)
class Plan:
    """The cells under one folder."""

    root: Path
    cells: tuple[Cell, ...]
    retries: int = RETRIES
    """A failed cell is tried again so often."""
    stale_sec: float = STALE_SEC
    """An attempt that is silent for so long is given up."""

    @classmethod
    def write(cls, root: Path, cells: Iterable[Cell], *, retries: int = RETRIES, stale_sec: float = STALE_SEC) -> Plan:
        """Make the plan, or extend the one that is there; nothing else under the folder is touched.

        Cells that were asked for before stay (delete plan.json to drop them: results on disk are found again).
        A cell asked for again takes its new options, so that files may move.

        Raises:
            UserError: where the folder cannot be written or the plan there is broken.
        """
        if retries < 0:
            raise UserError(f"--retries {retries} must not be negative")
        root = Path(root)
        if Run(root).config.exists():
            raise UserError(
                f"{root} is the run directory of a search or a fine-tuning; type another --run for the plan"
            )
        with Lock(root / "plan.lock").held():
            before = cls.read(root).cells if (root / "plan.json").exists() else ()
            merged = {cell.id: cell for cell in (*before, *cells)}
            plan = cls(root, tuple(merged.values()), retries, stale_sec)
            listed = [
                {"id": cell.id, "method": cell.method, "mask_sha256": cell.mask_sha256, "mask_bits": cell.mask_bits,
                 "options": dict(cell.options)}
                for cell in plan.cells
            ]  # fmt: skip
            head = {"plan_version": PLAN_VERSION, "retries": retries, "stale_sec": stale_sec}
            write_json(root / "plan.json", {**head, "cells": listed})
        return plan

    @classmethod
    def read(cls, root: Path) -> Plan:
        """The plan of a folder.

        Raises:
            UserError: where there is none, or it is broken or of another version.
        """
        root = Path(root)
        path = root / "plan.json"
        try:
            value = read_json(path)
            if value["plan_version"] != PLAN_VERSION:
                raise UserError(f"{path} is of version {value['plan_version']}, this program reads {PLAN_VERSION}: "
                                "install the version of finemask_ds that wrote it")  # fmt: skip
            cells = tuple(
                Cell(_folder_name(one["id"]), _with_task(one["options"]), str(one["method"]), one["mask_sha256"],
                     one["mask_bits"])
                for one in value["cells"]
            )  # fmt: skip
            return cls(root, cells, int(value["retries"]), float(value["stale_sec"]))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(f"{root} holds no plan.json: type the folder of a plan, such as runs/sweep") from error
        except OSError as error:
            raise UserError(f"cannot read {path} ({error.strerror}): type the folder of a plan") from error
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path} is no plan ({type(error).__name__}: {error}): restore it, or delete it and dispatch again"
            ) from error

    def folder(self, cell: Cell) -> Path:
        """Where the cell's result and attempts are."""
        return self.root / "cells" / cell.id

    @property
    def folders(self) -> list[Path]:
        """The folders of all cells."""
        return [self.folder(cell) for cell in self.cells]

    @property
    def logs(self) -> Path:
        """The folder of the workers' logs."""
        return self.root / "logs"


def sweep(
    masks: Sequence[str | os.PathLike[str]],
    tasks: Sequence[str],
    seeds: Sequence[int],
    num_samples: Sequence[int] = (0,),
    *,
    with_full: bool = True,
    **shared: Any,
) -> list[Cell]:
    """Masks x tasks x seeds x fractions, and the full model; each cell once.

    The first seed of everything comes first, so that a sweep that is cut short compares all methods already.

    Args:
        masks: mask files, or run directories of searches.
        tasks: names of `data.tasks.TASKS`.
        seeds: of fine-tuning.
        num_samples: training rows to use; 0: all.
        with_full: whether the full model is fine-tuned too.
        shared: further options of launcher/finetune.py, the same for all cells.

    Raises:
        UserError: as `Cell.of`.
    """
    described = {str(mask_file(mask)): describe_mask(mask_file(mask)) for mask in masks}
    candidates = [*([""] if with_full else []), *described]
    cells = [
        Cell.of({**shared, "task": task, "mask": mask, "seed": seed, "num_samples": number}, described.get(mask))
        for seed in seeds
        for number in num_samples
        for task in tasks
        for mask in candidates
    ]
    return list({cell.id: cell for cell in cells}.values())


def describe_mask(path: str | os.PathLike[str]) -> MaskFacts:
    """What a mask file tells of itself.

    Raises:
        UserError: where it is missing or no mask file.
    """
    try:
        with safe_open(path, framework="numpy") as stream:
            found = stream.metadata() or {}
        if found.get("format") == "finemask":
            method = json.loads(found["provenance"]).get("method")
            bits = content_hash(found["shapes"], found["sha256"])
            return MaskFacts(str(method or "imported"), file_sha256(path), bits)
    except FileNotFoundError as error:
        raise UserError(f"there is no mask file {path}: type the path of one, such as RUN/mask.safetensors") from error
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError):
        pass  # what cannot be read is no mask file either
    raise UserError(f"{path} is no mask file: type the path of a file such as RUN/mask.safetensors")


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise ValueError(f"{name!r} is no id of a cell")
    return name


def _with_task(options: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(options["task"], str):
        raise ValueError(f"{options['task']!r} is no task")
    return dict(options)
