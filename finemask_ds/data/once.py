"""Build a folder once, however many processes ask for it, on one host or on a file system shared by many."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from finemask_ds.errors import UserError
from finemask_ds.lock import HEARTBEAT_SEC, STALE_SEC, Lock
from finemask_ds.run import disk_full_is_user_error, read_json, write_json

DONE = "done"
SECONDS_BEFORE_SAYING_SO = 5.0


def build_once(
    folder: Path, build: Callable[[Path], None], *, stale_sec: float = STALE_SEC, poll_sec: float = 0.2
) -> Path:
    """Return `folder`, built by whichever process asked first; the others wait for it.

    The builder holds `folder.lock` and touches it every few seconds from a thread, calls `build` with a
    temporary folder beside `folder`, marks that as done and renames it. Waiting is polling the file system,
    never a collective, so a slow build cannot run into a collective's time limit. A lock silent for
    `stale_sec` seconds, or of a process of this host that is gone, is taken over. Should two processes ever
    build at the same time (a builder that was suspended and woke up), each has its own temporary folder and
    the first rename counts, so the result is whole in any case.

    Raises:
        UserError: the one `build` raised, in the builder and in every process that waited for it (where
            `build` raised something else, the waiting processes raise a UserError that quotes it); or the
            folder cannot be written.
    """
    lock = Lock(folder.with_name(folder.name + ".lock"), advice="set FINEMASK_CACHE to another folder")
    failure = folder.with_name(folder.name + ".failed.json")
    awaited: set[str] = set()
    start, said = time.monotonic(), False
    while not (folder / DONE).exists():
        if lock.acquire():
            try:
                _raise_failure(failure, awaited)
                if not (folder / DONE).exists():  # it may have been finished between the look and the lock
                    _build(folder, build, lock, failure, min(HEARTBEAT_SEC, stale_sec / 4))
            finally:
                lock.release()
            continue
        _raise_failure(failure, awaited)
        holder = lock.holder()
        if holder is None:
            continue
        awaited.add(holder.name)
        if holder.is_dead(stale_sec):
            if lock.break_if_held_by(holder.name) and holder.name:
                shutil.rmtree(_temporary(folder, holder.name), ignore_errors=True)
            continue
        if not said and time.monotonic() - start > SECONDS_BEFORE_SAYING_SO:
            said = True
            sentence = f"waiting for {folder}, which {holder.name} builds (taken over if silent for {stale_sec:g} s)"
            print(sentence, file=sys.stderr, flush=True)
        time.sleep(poll_sec)
    return folder


def _temporary(folder: Path, holder: str) -> Path:
    """The folder in which a process builds."""
    return folder.with_name(f"{folder.name}.tmp-{holder}")


def _build(folder: Path, build: Callable[[Path], None], lock: Lock, failure: Path, heartbeat_sec: float) -> None:
    temporary = _temporary(folder, lock.me)
    try:
        with lock.heartbeat(heartbeat_sec), disk_full_is_user_error(folder):
            temporary.mkdir()
            build(temporary)
            (temporary / DONE).touch()
            _publish(temporary, folder)
    except Exception as error:  # whereas an interrupted builder is simply replaced by one of those who wait
        sentence = str(error) if isinstance(error, UserError) else f"building {folder} failed: {error!r}"
        with contextlib.suppress(Exception):
            write_json(failure, {"holder": lock.me, "error": sentence})
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
