"""Build a folder once, however many processes ask for it, on one host or on a file system shared by many."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from finemask_ds.errors import UserError
from finemask_ds.run import disk_full_is_user_error, read_json, write_json

DONE = "done"
HEARTBEAT_SEC = 5.0
SECONDS_BEFORE_SAYING_SO = 5.0


def build_once(folder: Path, build: Callable[[Path], None], *, stale_sec: float = 60.0, poll_sec: float = 0.2) -> Path:
    """Return `folder`, built by whichever process asked first; the others wait for it.

    The builder holds `folder.lock` and touches it every few seconds from a thread, calls `build` with a
    temporary folder beside `folder`, marks that as done and renames it. Waiting is polling the file system,
    never a collective, so a slow build cannot run into a collective's time limit. A lock silent for
    `stale_sec` seconds belongs to a killed process and is taken over. Should two processes ever build at the
    same time (a builder that was suspended and woke up), each has its own temporary folder and the first
    rename counts, so the result is whole in any case.

    Raises:
        UserError: the one `build` raised, in the builder and in every process that waited for it (where
            `build` raised something else, the waiting processes raise a UserError that quotes it); or the
            folder cannot be written.
    """
    lock = _Lock(folder)
    awaited: set[str] = set()
    start, said = time.monotonic(), False
    while not (folder / DONE).exists():
        if lock.acquire():
            try:
                _raise_failure(lock.failure, awaited)
                if not (folder / DONE).exists():  # it may have been finished between the look and the lock
                    _build(folder, build, lock, min(HEARTBEAT_SEC, stale_sec / 4))
            finally:
                lock.release()
            continue
        _raise_failure(lock.failure, awaited)
        holder, silent_sec = lock.holder()
        awaited.add(holder)
        if silent_sec > stale_sec:
            lock.break_if_held_by(holder)
            continue
        if not said and time.monotonic() - start > SECONDS_BEFORE_SAYING_SO:
            said = True
            sentence = f"waiting for {folder}, which {holder} builds (taken over if silent for {stale_sec:g} s)"
            print(sentence, file=sys.stderr, flush=True)
        time.sleep(poll_sec)
    return folder


class _Lock:
    """The lock file of one folder: its content names the holder, its modification time is the heartbeat."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder.with_name(folder.name + ".lock")
        self.failure = folder.with_name(folder.name + ".failed.json")
        self.me = f"{os.getpid()}@{socket.gethostname()}-{secrets.token_hex(4)}"

    def acquire(self) -> bool:
        """Create the lock file; False where it exists."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except OSError as error:
            if isinstance(error, FileExistsError) and self.path.parent.is_dir():
                return False
            sentence = f"cannot write {self.path.parent} ({error.strerror}): set FINEMASK_CACHE to another folder"
            raise UserError(sentence) from error
        with open(descriptor, "w", encoding="utf-8") as stream:
            stream.write(self.me)
        return True

    def holder(self) -> tuple[str, float]:
        """Who holds the lock ("" while unknown) and for how many seconds it has been silent."""
        # The clocks of hosts differ, so the file system's own is asked, by touching a file; and the lock is
        # opened rather than stat-ed because network file systems only then fetch its true time.
        probe = self.path.with_name(f".{self.path.name}.{self.me}")
        try:
            with open(self.path, encoding="utf-8") as stream:
                holder, beat = stream.read(), os.fstat(stream.fileno()).st_mtime
            probe.touch()
            return holder, probe.stat().st_mtime - beat
        except FileNotFoundError:
            return "", 0.0
        finally:
            probe.unlink(missing_ok=True)

    def temporary(self, holder: str) -> Path:
        """The folder `holder` builds in."""
        return self.folder.with_name(f"{self.folder.name}.tmp-{holder}")

    def break_if_held_by(self, holder: str) -> None:
        """Remove a dead process's lock and half-built folder, unless another has just taken it over."""
        if self.holder()[0] == holder:
            self.path.unlink(missing_ok=True)
            if holder:
                shutil.rmtree(self.temporary(holder), ignore_errors=True)

    def release(self) -> None:
        """Remove the lock, unless it was taken over meanwhile."""
        if self.holder()[0] == self.me:
            self.path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def heartbeat(self, every_sec: float) -> Iterator[None]:
        """Touch the lock every so often while the block runs."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(every_sec):
                with contextlib.suppress(OSError):  # taken over, or a network file system stutters
                    os.utime(self.path)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _build(folder: Path, build: Callable[[Path], None], lock: _Lock, heartbeat_sec: float) -> None:
    temporary = lock.temporary(lock.me)
    try:
        with lock.heartbeat(heartbeat_sec), disk_full_is_user_error(folder):
            temporary.mkdir()
            build(temporary)
            (temporary / DONE).touch()
            _publish(temporary, folder)
    except Exception as error:  # whereas an interrupted builder is simply replaced by one of those who wait
        sentence = str(error) if isinstance(error, UserError) else f"building {folder} failed: {error!r}"
        with contextlib.suppress(Exception):
            write_json(lock.failure, {"holder": lock.me, "error": sentence})
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, folder: Path) -> None:
    if folder.exists() and not (folder / DONE).exists():
        shutil.rmtree(folder)  # someone deleted half of it
    try:
        os.rename(temporary, folder)
    except OSError:
        if not (folder / DONE).exists():  # else another was first, and its folder is as good
            raise


def _raise_failure(path: Path, awaited: set[str]) -> None:
    """Raise the error of the builder that was waited for; those of earlier runs are no concern of ours."""
    with contextlib.suppress(FileNotFoundError):
        failure = read_json(path)
        if failure["holder"] in awaited:
            raise UserError(failure["error"])
