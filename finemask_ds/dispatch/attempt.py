"""One attempt at a cell: claimed by a rename, alive while its lock beats, over with a result or a failure.

attempt-K/lock            while it runs: who runs it, touched every few seconds; released at a tidy end
attempt-K/attempt.json    who started it, where and when
attempt-K/failed.json     why it failed; an attempt without it, without lock and without result was interrupted
attempt-K/result.json     what becomes the cell's result
attempt-K/...             everything else is the run directory of the fine-tuning
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finemask_ds.errors import UserError
from finemask_ds.lock import HEARTBEAT_SEC, Holder, Lock, host_of, new_name, process_name
from finemask_ds.run import Run, disk_full_is_user_error, read_json, write_json

_OWN = {"lock", "attempt.json", "failed.json", "result.json", "done"}
"""What stays with an attempt; the rest goes over to the next one."""
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY)
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES)


@dataclass(frozen=True)
class Attempt:
    """One attempt's folder."""

    folder: Path

    @property
    def number(self) -> int:
        """1, 2, ..."""
        return int(self.folder.name.removeprefix("attempt-"))

    @property
    def run(self) -> Run:
        """The folder as the run directory of the fine-tuning."""
        return Run(self.folder)

    @property
    def failed(self) -> Path:
        """Why it failed."""
        return self.folder / "failed.json"

    def holder(self) -> Holder | None:
        """Who runs it, dead or alive; None after a tidy end."""
        return Lock(self.folder / "lock").holder()

    def facts(self) -> dict[str, Any]:
        """Host, pid, start (seconds since 1970) and log."""
        return _dict(self.folder / "attempt.json")

    @property
    def job(self) -> str | None:
        """What its executor calls the process that began it, where it was given a name."""
        return self.facts().get("job")

    def has_saved(self) -> bool:
        """Whether it has left a checkpoint of its own, not only one that it took over."""
        try:
            began = (self.folder / "attempt.json").stat().st_mtime
            return any(path.stat().st_mtime > began for path in self.run.checkpoints.rglob("*"))
        except FileNotFoundError:
            return False

    def failure(self) -> dict[str, Any] | None:
        """Its failed.json, if it failed; a broken one says so."""
        if not self.failed.exists():
            return None
        return _dict(self.failed) or {"error": f"{self.failed} is broken"}

    def fail(self, error: str, trace: str = "", seconds: float | None = None) -> None:
        """Leave failed.json; the first one stays.

        Args:
            error: one line.
            trace: the traceback, "" for an attempt whose process died.
            seconds: that it lasted, None where no one knows.
        """
        if self.failed.exists():
            return
        facts = self.facts()
        record: dict[str, Any] = {"error": " ".join(error.split()) or "no reason was given", "traceback": trace}
        for key in ("host", "pid", "log"):
            record[key] = facts.get(key)
        write_json(self.failed, {**record, "seconds": seconds, "attempt": self.number})

    def bury(self) -> None:
        """Leave failed.json for an attempt whose process was found dead."""
        holder = self.holder()
        if holder is not None:  # else it has just ended tidily
            self.fail(f"the worker on {host_of(holder.name)} fell silent: it was killed, or its host is gone")

    def excuse(self) -> None:
        """Its failure counts no longer: the cell was asked for again."""
        write_json(self.failed, {**(self.failure() or {}), "excused": True})

    def let_go(self) -> None:
        """End it in the name of its process, which is known to be gone: neither a result nor a failure."""
        (self.folder / "lock").unlink(missing_ok=True)

    def publish(self, task: str) -> bool:
        """Make its result the cell's, unless that has a whole one: the first wins.

        Returns:
            Whether it has a whole result itself.
        """
        mine, theirs = self.run.result, self.folder.parent / "result.json"
        if whole_result(mine, task) is None:
            return False
        with disk_full_is_user_error(theirs):
            try:
                _link(mine, theirs)
            except FileExistsError:
                if whole_result(theirs, task) is None:  # cut off by a crash of the file system
                    spare = self.folder / ".result"
                    spare.unlink(missing_ok=True)
                    _link(mine, spare)
                    os.replace(spare, theirs)
        shutil.rmtree(self.run.checkpoints, ignore_errors=True)
        return True


@dataclass(frozen=True)
class Claim:
    """An attempt that this process has just begun."""

    attempt: Attempt
    lock: Lock
    before: tuple[Attempt, ...]
    """The earlier attempts at the cell, none of them alive."""

    @contextlib.contextmanager
    def held(self, stale_sec: float) -> Iterator[None]:
        """Beat while the block runs, then release the lock."""
        try:
            with self.lock.heartbeat(min(HEARTBEAT_SEC, stale_sec / 4)):
                yield
        finally:
            self.lock.release()

    def take_over(self) -> None:
        """Move what the last of the attempts before can go on from into this one.

        After two errors in a row it starts afresh, as it may be the checkpoint that fails.
        """
        errors = [failure for one in self.before if (failure := one.failure()) is not None]
        if len(errors) >= 2 and all(failure.get("traceback") for failure in errors[-2:]):
            for one in self.before:
                shutil.rmtree(one.run.checkpoints, ignore_errors=True)
            return
        for one in reversed(self.before):
            # The checkpoints move last: where they are, everything that belongs to them is.
            names = sorted(os.listdir(one.folder), key=lambda name: name == one.run.checkpoints.name)
            for name in names:
                if name not in _OWN and not name.startswith(".") and not (self.attempt.folder / name).exists():
                    os.rename(one.folder / name, self.attempt.folder / name)
            if self.attempt.run.checkpoints.exists():
                return


def attempts_of(cell: Path) -> list[Attempt]:
    """The attempts at a cell, by number."""
    try:
        names = os.listdir(cell)
    except FileNotFoundError:
        return []
    return sorted(
        (Attempt(cell / name) for name in names if re.fullmatch(r"attempt-[1-9]\d*", name)), key=lambda one: one.number
    )


def claim(cell: Path, task: str, attempts: Sequence[Attempt], log: str = "", job: str = "") -> Claim | None:
    """A new attempt at a cell; None where another process was faster.

    The folder of the new attempt appears under its number at once with its lock, by a rename that only one
    process can win.

    Args:
        cell: the cell's folder.
        task: for the check of a result that may have come meanwhile.
        attempts: as seen when the cell was found free (none of them alive).
        log: the file that this process prints to.
        job: what its executor calls this process, "" where the process id is enough.

    Raises:
        UserError: where the folder cannot be written or the disk is full.
    """
    number = attempts[-1].number + 1 if attempts else 1
    attempt = Attempt(cell / f"attempt-{number}")
    me = new_name()
    claimed = cell / f".claim-{me}"
    with disk_full_is_user_error(claimed):
        Lock(claimed / "lock", me).acquire()
        try:
            facts = {"host": socket.gethostname(), "pid": os.getpid(), "start": time.time(), "log": log}
            write_json(claimed / "attempt.json", facts | ({"job": job} if job else {}))
            os.rename(claimed, attempt.folder)
        except OSError as error:
            if error.errno in _TAKEN:
                return None
            raise
        finally:
            shutil.rmtree(claimed, ignore_errors=True)
    if whole_result(cell / "result.json", task) is not None:
        shutil.rmtree(attempt.folder)
        return None
    return Claim(attempt, Lock(attempt.folder / "lock", me), tuple(attempts))


def end_attempts(cells: Sequence[Path], who: int | str, error: str = "") -> None:
    """End what a worker, now gone, has left unfinished: failed with an error, else interrupted.

    Args:
        cells: folders of the cells it may have run.
        who: the process id of one of this machine, or what its executor calls its job.
        error: why it has failed.
    """
    for attempt in [attempt for cell in cells for attempt in attempts_of(cell)]:
        holder = attempt.holder()
        if holder is None:
            continue
        if attempt.job == who if isinstance(who, str) else holder.name.startswith(process_name(who)):
            if error:
                attempt.fail(error)
            else:  # It may have ended between the result and its publication.
                attempt.publish(str(_dict(attempt.run.result).get("task")))
            attempt.let_go()


def whole_result(path: Path, task: str) -> dict[str, Any] | None:
    """A cell's result, None where it is missing, half-written or of something else."""
    value = _dict(path)
    return value if value.get("task") == task and "score" in value else None


def _dict(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is missing or broken."""
    with contextlib.suppress(OSError, UserError):
        value = read_json(path)
        return value if isinstance(value, dict) else {}
    return {}


def _link(source: Path, target: Path) -> None:
    """Give a file a second name that must not exist; a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with open(target, "xb") as stream:
            stream.write(source.read_bytes())
            stream.flush()
            os.fsync(stream.fileno())
