"""What is known of a mask from the search that found it: method, steps, seconds, pre-training losses, distance."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finemask_ds.config import VOLATILE
from finemask_ds.errors import UserError
from finemask_ds.masks.files import load_mask
from finemask_ds.run import Run, file_sha256, read_json

_NOT_SETTINGS = VOLATILE | {"method", "config_version", "model", "seed", "sparsity", "steps", "schedule_steps",
                            "interval_steps"}  # fmt: skip
"""Knobs in which masks of one method may differ: by these it is varied, and they are axes of the figures; the model is
told by its weights, whatever its name."""


@dataclass(frozen=True)
class MaskOrigin:
    """One mask file as its search describes it; figures are None where the search is not finished."""

    folder: Path
    """The search's run directory."""
    path: Path
    method: str
    seed: int | None
    target_sparsity: float | None
    steps: int | None = None
    seconds: float | None = None
    distance_from_omp: float | None = None
    mlm_loss: float | None = None
    """Dev loss in nats per masked token, with theta_0's own head."""
    kd_loss: float | None = None
    settings: tuple[tuple[str, str], ...] = ()
    """The other knobs of the search, written as text."""


class Origins:
    """Searches met so far, and the way from a cell's mask to its search."""

    def __init__(self) -> None:
        self.searches: list[MaskOrigin] = []
        self.left_out: list[str] = []
        self._masks: dict[Path, MaskOrigin] = {}
        self._read: set[Path] = set()
        self._hashes: dict[Path, str] = {}
        self._fingerprints: dict[Path, str] = {}

    def read(self, folder: Path) -> None:
        """Read a search's run directory, once; what is wrong with it goes to ``left_out``."""
        folder = folder.resolve()
        if folder in self._read:
            return
        self._read.add(folder)
        run = Run(folder)
        try:
            config = self.json(run.config)
            result = read_json(run.result) if run.result.is_file() else {}
            settings = tuple((k, str(v)) for k, v in sorted(config.items()) if k not in _NOT_SETTINGS)
            shared: dict[str, Any] = {
                "folder": folder,
                "method": str(result.get("method") or config.get("method") or folder.name),
                "seed": config.get("seed"),
                "target_sparsity": result.get("target_sparsity", config.get("sparsity")),
                "settings": settings,
            }
            final = MaskOrigin(path=run.mask, **shared, **_figures(result))
            along = [
                MaskOrigin(path=folder / shot["mask"], **shared | _target(shot), **_figures(shot))
                for shot in result.get("snapshots") or ()
            ]
        except (UserError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            self.left_out.append(f"the search in {folder} could not be read ({error})")
            return
        self._masks.update({origin.path: origin for origin in (*along, final)})
        if result:
            self.searches.append(final)

    def of(self, mask: str, near: Path, sha256: str | None, fingerprint: str = "") -> MaskOrigin | None:
        """The origin of a mask named by a cell, by its path and, if they are known, the hash of its file and its bits.

        A path that leads nowhere any more (results copied from another machine) is found again by its hash or its
        bits among the searches that were read.
        """
        path = find_mask(mask, near)
        if path is not None:
            home = path.parent.parent if path.parent.name == "masks" else path.parent
            if (home / "config.json").is_file() or (home / "result.json").is_file():
                self.read(home)
            if sha256 and path.is_file() and not self._holds(path, sha256, fingerprint):
                self.left_out.append(f"{path} is not the mask that {near} was fine-tuned with any more")
            else:
                return self._masks.get(path)
        if sha256:
            known = (origin for origin in self._masks.values() if origin.path.is_file())
            return next((origin for origin in known if self._holds(origin.path, sha256, fingerprint)), None)
        return None

    def json(self, path: Path) -> dict[str, Any]:
        """A JSON object, empty where there is none; a broken file goes to ``left_out``."""
        try:
            value = read_json(path) if path.is_file() else {}
        except (UserError, OSError) as error:
            self.left_out.append(str(error))
            return {}
        return value if isinstance(value, dict) else {}

    def _holds(self, path: Path, sha256: str, fingerprint: str) -> bool:
        """Whether a file is the mask: the same bytes, or the same bits that another search has found."""
        return self._hash(path) == sha256 or (bool(fingerprint) and self._fingerprint(path) == fingerprint)

    def _fingerprint(self, path: Path) -> str:
        if path not in self._fingerprints:
            try:
                self._fingerprints[path] = load_mask(path).fingerprint()
            except UserError as error:
                self.left_out.append(str(error))
                self._fingerprints[path] = ""
        return self._fingerprints[path]

    def _hash(self, path: Path) -> str:
        if path not in self._hashes:
            self._hashes[path] = file_sha256(path)
        return self._hashes[path]


def find_mask(mask: str, near: Path) -> Path | None:
    """Where a cell's mask is, or would be: as written from here, else from a folder above the cell."""
    for start in _above(near):
        path = Path(os.path.normpath(start / mask))
        if path.is_file() or (path.parent / "config.json").is_file():
            return path.resolve()
    return None


def _above(folder: Path) -> Iterator[Path]:
    yield Path.cwd()
    yield from folder.resolve().parents


def _target(shot: Mapping[str, Any]) -> dict[str, Any]:
    """A rung of IMP has a target of its own."""
    return {"target_sparsity": shot["target_sparsity"]} if "target_sparsity" in shot else {}


def _figures(result: Mapping[str, Any]) -> dict[str, Any]:
    dev = result.get("dev") or {}
    plain = {name: result.get(name) for name in ("steps", "seconds", "distance_from_omp")}
    return {**plain, **{name: dev.get(name) for name in ("mlm_loss", "kd_loss")}}
