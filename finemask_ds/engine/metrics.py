"""Metrics are recorded, not printed: record -> one reduction per interval -> JSONL, TensorBoard, console."""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from finemask_ds.errors import UserError
from finemask_ds.run import atomic_write, disk_full_is_user_error

if TYPE_CHECKING:
    import numpy
    from torch.utils.tensorboard import SummaryWriter

Number = float | torch.Tensor


class Destination:
    """A place where metrics go; a subclass overrides what it takes and ignores the rest."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take the reduced values of one logging interval that ended at `step`."""

    def image(self, step: int, name: str, pixels: numpy.ndarray) -> None:
        """Take an image, uint8 [height, width, channels]."""

    def histogram(self, step: int, name: str, values: torch.Tensor) -> None:
        """Take the values a histogram is to be made of, any shape."""

    def close(self) -> None:
        """Write what is left and let go of files."""


class Recorder:
    """Gathers values between two flushes, on whatever device they are, and sends their means on.

    `reduce` sums a float64 vector over the ranks (an all-reduce; it moves the vector to the device its
    backend wants and may return it there); None means one process. Only the first rank has destinations.
    """

    def __init__(
        self,
        destinations: Sequence[Destination] = (),
        reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self._destinations = list(destinations)
        self._reduce = reduce
        self._sums: dict[str, tuple[Number, Number]] = {}
        self._last: dict[str, Number] = {}
        self._images: dict[str, numpy.ndarray] = {}
        self._histograms: dict[str, torch.Tensor] = {}

    @property
    def writes(self) -> bool:
        """Whether this rank has destinations: what is only for them need not be computed elsewhere."""
        return bool(self._destinations)

    def record(self, name: str, value: Number, weight: Number = 1.0) -> None:
        """Add a value to the weighted mean of `name` over the interval and over all ranks.

        Every rank must record the same names between two flushes. The value stays on its device, so that
        nothing waits for the accelerator. A name with total weight 0 (no masked token anywhere) is left out.
        """
        value, weight = _scalar(name, value), _scalar(name, weight)
        total, weights = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (total + value * weight, weights + weight)

    def record_last(self, name: str, value: Number) -> None:
        """Keep the last value of the interval of something equal on all ranks, or known to the first alone.

        It is not reduced, so ranks may differ in the names they give here.
        """
        self._last[name] = _scalar(name, value)

    def image(self, name: str, pixels: numpy.ndarray) -> None:
        """Keep an image, uint8 [height, width, channels], for the next flush."""
        if self.writes:
            self._images[name] = pixels

    def histogram(self, name: str, values: torch.Tensor) -> None:
        """Keep the values of a histogram, any shape, for the next flush; they are not copied."""
        if self.writes:
            self._histograms[name] = values.detach()

    def flush(self, step: int) -> dict[str, float]:
        """Reduce the interval that ends at `step`, send it to the destinations and start a new one.

        Returns name -> value, sorted by name, on every rank; what was given to `record` is equal on all of
        them. Costs one all-reduce. Raises RuntimeError where the ranks recorded equally many, but other,
        names.
        """
        values = self._reduced_means() | dict(zip(self._last, _to_floats(self._last.values()), strict=True))
        values = dict(sorted(values.items()))
        for destination in self._destinations:
            destination.write(step, values)
            for name, pixels in self._images.items():
                destination.image(step, name, pixels)
            for name, sample in self._histograms.items():
                destination.histogram(step, name, sample)
        for gathered in (self._sums, self._last, self._images, self._histograms):
            gathered.clear()
        return values

    def _reduced_means(self) -> dict[str, float]:
        names = sorted(self._sums)
        # Sums are added entry by entry, so other names on another rank would mix silently: the same reduction
        # carries a checksum of the names and a one, and both stay exact in float64.
        checksum = float(zlib.crc32("\n".join(names).encode()))
        vector = _stack([1.0, checksum, *(number for name in names for number in self._sums[name])])
        ranks, checksums, *numbers = (self._reduce(vector) if self._reduce else vector).tolist()
        if checksums != ranks * checksum:
            raise RuntimeError(f"the ranks recorded different metrics; this one: {', '.join(names)}")
        pairs = zip(names, numbers[::2], numbers[1::2], strict=True)
        return {name: total / weight for name, total, weight in pairs if weight != 0}

    def close(self) -> None:
        """Close the destinations; what was recorded since the last flush is dropped."""
        for destination in self._destinations:
            destination.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _scalar(name: str, value: Number) -> Number:
    if not isinstance(value, torch.Tensor):
        return float(value)
    if value.numel() != 1:
        raise ValueError(f"{name} must be one number, not a tensor of shape {tuple(value.shape)}")
    return value.detach().to(torch.float64, copy=True).reshape(())


def _stack(numbers: Sequence[Number]) -> torch.Tensor:
    """Stack floats and scalars into one float64 vector, on the accelerator if one of them is there."""
    devices = {number.device for number in numbers if isinstance(number, torch.Tensor)}
    device = next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
    return torch.stack([torch.as_tensor(number, dtype=torch.float64, device=device) for number in numbers])


def _to_floats(numbers: Sequence[Number] | Any) -> list[float]:
    numbers = list(numbers)
    return _stack(numbers).tolist() if numbers else []


class Jsonl(Destination):
    """One JSON object per logged step: "step", "time" (seconds since the epoch) and the values; appended.

    A value that is not finite is written as null, since JSON has no word for it.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._stream: Any = None

    def rewind(self, step: float = math.inf) -> None:
        """Drop, atomically, lines of later steps and the torn last line of a killed run; for a resume."""
        self.close()
        if not self.path.is_file():
            return
        *lines, torn = self.path.read_bytes().split(b"\n")
        kept = [line for number, line in enumerate(lines, 1) if self._step(number, line) <= step]
        if torn or len(kept) < len(lines):
            with atomic_write(self.path, "wb") as stream:
                stream.writelines(line + b"\n" for line in kept)

    def _step(self, number: int, line: bytes) -> int:
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"line {number} of {self.path} is no logged step: delete that line and start again"
            ) from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line and hand it to the system, so that it outlives a killed process."""
        line: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        line |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        with disk_full_is_user_error(self.path):
            if self._stream is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.rewind()
                self._stream = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
            self._stream.write(json.dumps(line, allow_nan=False) + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Close the file; a later write opens it again."""
        stream, self._stream = self._stream, None
        if stream is not None:
            with disk_full_is_user_error(self.path):  # what could not be flushed is tried once more
                stream.close()


class TensorBoardWriter(Destination):
    """TensorBoard events in a folder: scalars, images and histograms.

    On resume `purge_step` is the first step that will be written again: TensorBoard then hides what a killed
    run had logged from that step on.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        self.folder = Path(folder)
        self._purge_step = purge_step
        self._opened: SummaryWriter | None = None

    @property
    def _writer(self) -> SummaryWriter:
        if self._opened is None:
            from torch.utils.tensorboard import SummaryWriter  # a second to import, and only here needed

            self._opened = SummaryWriter(str(self.folder), purge_step=self._purge_step)
        return self._opened

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the scalars and flush: a checkpoint must not be ahead of the curves that a kill leaves."""
        with disk_full_is_user_error(self.folder):  # which each call may hear from the writer's own thread
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def image(self, step: int, name: str, pixels: numpy.ndarray) -> None:
        """Write an image, uint8 [height, width, channels]."""
        with disk_full_is_user_error(self.folder):
            self._writer.add_image(name, pixels, step, dataformats="HWC")

    def histogram(self, step: int, name: str, values: torch.Tensor) -> None:
        """Write a histogram of the finite values; its bins grow exponentially from zero, for any scale."""
        values = values.detach().reshape(-1).float().cpu()
        values = values[torch.isfinite(values)]
        if values.numel():
            with disk_full_is_user_error(self.folder):
                self._writer.add_histogram(name, values, step)

    def close(self) -> None:
        """Flush and close the event file."""
        opened, self._opened = self._opened, None
        if opened is not None:
            with disk_full_is_user_error(self.folder):
                opened.close()


def write_hyperparameters(folder: Path, knobs: Mapping[str, object], figures: Mapping[str, float]) -> None:
    """Add a run's knobs and final figures to its TensorBoard folder, for the HPARAMS page that compares runs."""
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    plain = {
        name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in knobs.items()
    }
    with disk_full_is_user_error(folder):
        writer = SummaryWriter(str(folder))
        for summary in hparams(plain, {f"final/{name}": value for name, value in figures.items()}):
            # Not add_hparams, which would start a run of its own.
            writer.file_writer.add_summary(summary)  # type: ignore[attr-defined]
        for name, value in figures.items():
            writer.add_scalar(f"final/{name}", value)
        writer.close()
