"""The run directory: the one place for every file name of a run, and the way every file is written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from finemask_ds.errors import OtherConfigError, UserError
from finemask_ds.provenance import collect, refuse_other_config

CONFIG_VERSION = 1  # raise it when an old config would mean something else under the same names
ON_THE_WAY = re.compile(r"(?:step-)?(\d+(?:\.\d+)?)\.safetensors")
"""Names of the masks in masks/, but for the first."""
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_ENTRY = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


@contextlib.contextmanager
def disk_full_is_user_error(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn a full disk or a spent quota inside the block into a UserError that names the file."""
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        # safetensors has an error of its own, which tells the number in words only.
        if number not in _DISK_FULL and not any(f"(os error {code})" in str(error) for code in _DISK_FULL):
            raise
        raise UserError(f"the disk is full at {path}: free space and start the same command again") from error


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that appears under its name only once it is whole.

    The bytes go to a uniquely named temporary file in the same folder (made if missing), reach the disk, and
    are then renamed over `path`. Any error leaves the old file untouched and no temporary file. `mode` is "w"
    (UTF-8) or "wb". Raises UserError when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    if mode not in ("w", "wb"):
        raise ValueError(f"mode must be 'w' or 'wb', not {mode!r}")
    temporary = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    with disk_full_is_user_error(path):
        try:
            with _open_for_writing(temporary, path, mode) as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _open_for_writing(temporary: Path, path: Path, mode: str) -> IO[Any]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(temporary, mode, encoding=None if "b" in mode else "utf-8")
    except OSError as error:
        if error.errno not in _NO_ENTRY:
            raise
        raise UserError(f"cannot write {path} ({error.strerror}): name a folder you may write") from error


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut; some network file systems refuse it, and then it cannot be done."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _plain(value: object) -> object:
    """Turn what JSON does not know (paths, numpy and torch scalars) into what it does."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not JSON serializable")


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write a value as indented JSON, atomically; NaN and infinities are a ValueError."""
    text = json.dumps(value, indent=2, default=_plain, allow_nan=False, ensure_ascii=False)
    with atomic_write(path) as stream:
        stream.write(text + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file; a broken one is a UserError that names it, a missing one is FileNotFoundError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise UserError(f"{path} is not valid JSON ({error}): restore it, or delete it to start over") from error


def cache_dir() -> Path:
    """The folder of everything that can be made again: $FINEMASK_CACHE, else ~/.cache/finemask_ds."""
    return Path(os.environ.get("FINEMASK_CACHE") or "~/.cache/finemask_ds").expanduser()


def existing(folder: Path) -> Path:
    """The folder, or the nearest place above it that there is: looking must not make any."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())


def content_hash(*parts: str | bytes | Path) -> str:
    """Return 16 hex characters of SHA-256 over the parts, each preceded by its length in bytes.

    A str counts as its UTF-8 bytes and a Path as the bytes of its file, which are read in pieces.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with open(part, "rb") as stream:
                digest.update(os.fstat(stream.fileno()).st_size.to_bytes(8, "little"))
                while piece := stream.read(1 << 20):
                    digest.update(piece)
        else:
            data = part.encode() if isinstance(part, str) else part
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
    return digest.hexdigest()[:16]


def file_sha256(path: str | os.PathLike[str]) -> str:
    """sha256 of a file's bytes, in hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def mask_file(path: str | os.PathLike[str]) -> Path:
    """The mask file that a path names: itself, or the mask of a search's run directory."""
    path = Path(path).expanduser()
    return Run(path).mask if path.is_dir() else path


@dataclass(frozen=True)
class Run:
    """One run directory: where each of its files is, which stages are done, what made it."""

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))

    @property
    def config(self) -> Path:
        """Every knob of the run, with the method's name and the config's version."""
        return self.folder / "config.json"

    @property
    def provenance(self) -> Path:
        """Versions, commit, hardware, data and model hashes, core- or GPU-hours."""
        return self.folder / "provenance.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per logged step."""
        return self.folder / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard events."""
        return self.folder / "tb"

    @property
    def mask(self) -> Path:
        """The mask the run found."""
        return self.folder / "mask.safetensors"

    def rung_mask(self, sparsity: float) -> Path:
        """The mask of one rung of IMP, named by its sparsity: masks/0.1.safetensors ... 0.9.safetensors."""
        return self.folder / "masks" / f"{sparsity:g}.safetensors"

    @property
    def start_mask(self) -> Path:
        """The mask before the first step."""
        return self.folder / "masks" / "start.safetensors"

    def snapshot(self, step: int) -> Path:
        """The mask along a search after a step: masks/step-100.safetensors."""
        return self.folder / "masks" / f"step-{step}.safetensors"

    def masks_on_the_way(self) -> list[Path]:
        """The snapshots by step, or the rungs by sparsity."""
        found = {path: ON_THE_WAY.fullmatch(path.name) for path in self.start_mask.parent.glob("*.safetensors")}
        return [path for _, path in sorted((float(place[1]), path) for path, place in found.items() if place)]

    @property
    def head(self) -> Path:
        """The trained masked-language-model head."""
        return self.folder / "head.safetensors"

    @property
    def checkpoints(self) -> Path:
        """The folder from which a killed run goes on."""
        return self.folder / "checkpoints"

    def best_weights(self, step: int) -> Path:
        """Weights of a fine-tuning's best evaluation so far, while somebody will want them."""
        return self.folder / "best" / f"step-{step}.safetensors"

    @property
    def lock(self) -> Path:
        """Who is at work in the folder, while somebody is."""
        return self.folder / ".lock"

    @property
    def result(self) -> Path:
        """The figures of the run; written last."""
        return self.folder / "result.json"

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str] | None,
        config: Mapping[str, Any],
        defaults: Mapping[str, Any],
        method: str,
        root: str | os.PathLike[str] = "runs",
        volatile: Iterable[str] = (),
        begin: bool = True,
    ) -> Run:
        """Open the run of this config: its folder is made on the first call and found again on the next ones.

        Without `folder` it is root/<readable name>-<8 hex>, the hash being of the method, CONFIG_VERSION and
        what differs from `defaults`, so that a knob added later does not move old runs. Keys in `volatile`
        change no result: they are left out of the hash and may differ. Raises UserError when another config made
        the folder, or when it has no config but holds a run's files. Nothing is written where `begin` is False.
        """
        current = json.loads(json.dumps(dict(config), default=_plain))
        base = json.loads(json.dumps(dict(defaults), default=_plain))
        ignored = frozenset(volatile)
        if folder is None:
            folder = Path(root) / _run_name(method, current, base, ignored)
        run = cls(Path(folder))
        current = {"config_version": CONFIG_VERSION, "method": method, **current}
        if run.config.exists():
            refuse_other_config(run.folder, read_json(run.config), current, base, ignored)
            return run
        for path in (run.mask, run.start_mask.parent, run.metrics, run.result, run.checkpoints, run.head):
            if path.exists():
                raise OtherConfigError(f"{run.folder} holds {path.name} but no config.json")
        if begin:
            write_json(run.config, current)
        return run

    def _record(self, stage: str) -> Path:
        if not re.fullmatch(r"\w[\w.-]*", stage):
            raise ValueError(f"a stage's name is letters, digits, '.', '_' and '-', not {stage!r}")
        return self.folder / "done" / f"{stage}.json"

    def done(self, stage: str) -> bool:
        """Whether the stage has left its result, which it does last of all."""
        return self._record(stage).exists()

    def mark_done(self, stage: str, result: Mapping[str, Any] | None = None) -> None:
        """Write the stage's result, atomically; call it after everything the stage leaves is on the disk."""
        write_json(self._record(stage), dict(result or {}))

    def result_of(self, stage: str) -> dict[str, Any]:
        """Return what `mark_done` was given; FileNotFoundError where the stage is not done."""
        return dict(read_json(self._record(stage)))

    def write_provenance(self, extra: Mapping[str, Any] | None = None) -> None:
        """Record what made this run, `extra` (hashes, ranks) beside it; a restart is appended to "restarts"."""
        facts = collect() | dict(extra or {})
        if self.provenance.exists():
            first = read_json(self.provenance)
            facts = first | {"restarts": [*first.get("restarts", []), facts]}
        write_json(self.provenance, facts)

    def update_provenance(self, extra: Mapping[str, Any]) -> None:
        """Merge values into the provenance at the top level, such as core_hours once they are known."""
        write_json(self.provenance, read_json(self.provenance) | dict(extra))


def _run_name(method: str, config: dict[str, Any], defaults: dict[str, Any], ignored: frozenset[str]) -> str:
    """Return for instance tamt-mlm-s0.7-3fa91c22; the parts before the hash are for the reader only."""
    missing = object()
    chosen = {k: v for k, v in config.items() if k not in ignored and defaults.get(k, missing) != v}
    words = [method]
    if isinstance(config.get("sparsity"), (int, float)):
        words.append(f"s{config['sparsity']:g}")
    readable = re.sub(r"[^\w.+-]+", "-", "-".join(words))
    return f"{readable}-{content_hash(method, str(CONFIG_VERSION), json.dumps(chosen, sort_keys=True))[:8]}"
