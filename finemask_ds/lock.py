"""A lock file that tells who holds it and whether they live: on one host, or on a file system shared by many."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from finemask_ds.errors import UserError
from finemask_ds.run import content_hash, disk_full_is_user_error

HEARTBEAT_SEC = 5.0
STALE_SEC = 60.0
"""A holder that is silent for so long is given up."""


class Holder(NamedTuple):
    """Who holds a lock."""

    name: str
    """As in `Lock.me`; "" while unknown."""
    silent_sec: float
    """How long ago the lock was last touched."""

    def is_dead(self, stale_sec: float) -> bool:
        """Whether the holder is silent for too long, or a process of this machine that is gone."""
        return self.silent_sec > stale_sec or (self.is_here and not lives(int(self.pid)))

    @property
    def pid(self) -> str:
        """Its process id."""
        return self.name.partition("@")[0]

    @property
    def is_here(self) -> bool:
        """Whether it is, or was, a process of this machine."""
        return self.name.partition("@")[2].rpartition("-")[0] == _this_place() and self.pid.isdecimal()


class Lock:
    """A lock file: its content names the holder, its modification time is the heartbeat."""

    def __init__(self, path: Path, me: str | None = None, advice: str = "name a folder you may write") -> None:
        """Name the lock file; nothing is locked yet.

        Args:
            path: the lock file.
            me: the holder's name; None for a new one of this process.
            advice: what to type where the folder cannot be written.
        """
        self.path = path
        self.me = me or new_name()
        self.advice = advice

    def acquire(self) -> bool:
        """Create the lock file; False where it exists.

        Raises:
            UserError: where the folder cannot be written or the disk is full.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except OSError as error:
            if isinstance(error, FileExistsError) and self.path.parent.is_dir():
                return False
            raise UserError(f"cannot write {self.path.parent} ({error.strerror}): {self.advice}") from error
        try:
            with disk_full_is_user_error(self.path), open(descriptor, "w", encoding="utf-8") as stream:
                stream.write(self.me)
        except BaseException:
            self.path.unlink(missing_ok=True)
            raise
        return True

    def holder(self) -> Holder | None:
        """Who holds the lock; None where nobody does."""
        for _ in range(2):
            # The lock is opened rather than stat-ed because network file systems only then fetch its true time.
            try:
                with open(self.path, encoding="utf-8") as stream:
                    return Holder(stream.read(), self._now() - os.fstat(stream.fileno()).st_mtime)
            except FileNotFoundError:
                return None
            except OSError as error:  # removed by another host since it was opened; somebody may have taken it anew
                if error.errno != errno.ESTALE:
                    raise
        return None

    def _now(self) -> float:
        """The time of the file system's own clock, as those of hosts differ; in a folder of others, of this host's."""
        probe = self.path.with_name(f".{self.path.name}.{self.me}")
        try:
            probe.touch()
            return probe.stat().st_mtime
        except OSError:
            return time.time()
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)

    def break_if_held_by(self, name: str) -> bool:
        """Remove a dead process's lock; False where another has just taken it over."""
        holder = self.holder()
        if holder is not None and holder.name != name:
            return False
        # Moved aside before it is removed, as others may break it and take it over at any moment.
        aside = self.path.with_name(f".{self.path.name}.{self.me}.broken")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return True
        try:
            if aside.read_text(encoding="utf-8") == name:
                return True
            with contextlib.suppress(FileExistsError):
                os.link(aside, self.path)
            return False
        finally:
            aside.unlink()

    def release(self) -> None:
        """Remove the lock, unless it was taken over meanwhile."""
        holder = self.holder()
        if holder is not None and holder.name == self.me:
            self.break_if_held_by(self.me)

    @contextlib.contextmanager
    def held(self, stale_sec: float = STALE_SEC, poll_sec: float = 0.05) -> Iterator[None]:
        """Hold the lock while the block runs, which takes no time to speak of; a dead holder's is broken."""
        self._take(stale_sec, poll_sec)
        try:
            yield
        finally:
            self.release()

    def _take(self, stale_sec: float, poll_sec: float, look_at: Callable[[Holder], None] = lambda holder: None) -> None:
        """Acquire the lock, however long its holder lives, who is looked at meanwhile; a dead one's is broken."""
        while not self.acquire():
            holder = self.holder()
            if holder is not None and holder.is_dead(stale_sec):
                self.break_if_held_by(holder.name)
                continue
            if holder is not None:
                look_at(holder)
            time.sleep(poll_sec)

    @contextlib.contextmanager
    def owned(self, what: str, *, wait: bool, stale_sec: float = STALE_SEC, poll_sec: float = 1.0) -> Iterator[None]:
        """Hold the lock, beating, while the block runs, however long; a dead holder's is broken.

        Args:
            what: is held, for messages.
            wait: for a holder that lives, instead of refusing.
            stale_sec: a holder that is silent for so long is dead.
            poll_sec: from one look to the next.

        Raises:
            UserError: where a holder lives and `wait` is False. Whether one of another host does is known when it
                beats, or has been silent for too long.
        """
        first: Holder | None = None

        def look_at(holder: Holder) -> None:
            nonlocal first
            who = f"process {holder.pid} on {host_of(holder.name)}"
            has_beaten = first is not None and (holder.name != first.name or holder.silent_sec < first.silent_sec)
            if not wait and (holder.is_here or has_beaten):
                raise UserError(f"{what} is in use by {who}; wait for its end, or type another --run")
            if first is None:
                first = holder
                print(f"{what} is held by {who}: waiting for its end", flush=True)

        self._take(stale_sec, poll_sec, look_at)
        try:
            with self.heartbeat(min(HEARTBEAT_SEC, stale_sec / 4)):
                yield
        finally:
            self.release()

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


def new_name() -> str:
    """A holder's name of this process, never given before."""
    return f"{process_name(os.getpid())}{secrets.token_hex(4)}"


def process_name(pid: int) -> str:
    """How the names of all holders begin that are this process of this machine."""
    return f"{pid}@{_this_place()}-"


def host_of(name: str) -> str:
    """The host in a holder's name."""
    return name.partition("@")[2].rsplit("-", 2)[0] or "an unknown host"


def _this_place() -> str:
    """This host, its boot and its process table: containers may share a host's name, yet not its process ids."""
    signs = []
    with contextlib.suppress(OSError):
        signs = [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return f"{socket.gethostname()}-{content_hash(*signs)[:8]}"


def lives(pid: int) -> bool:
    """Whether a process of this machine runs; one that has ended and whose parent has not asked for it does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    return True
