"""What the hosts of a run share: its directory must be one and the same to all of them, caches need not be."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from finemask_ds.engine.world import World
from finemask_ds.errors import UserError
from finemask_ds.lock import Lock
from finemask_ds.run import Run, disk_full_is_user_error

PATIENCE_SEC = 20.0
"""A network file system may show a new file to other hosts only after a while."""


def check_shared(world: World, folder: Path, patience_sec: float = PATIENCE_SEC) -> None:
    """Whether every rank sees what the first one writes into a run directory, as checkpoints need it; collective.

    Raises:
        UserError: on all ranks, naming a host that does not.
    """
    blind = hosts_without(world, folder, patience_sec)
    if blind:
        first = world.on_first(socket.gethostname)
        raise UserError(
            f"{blind[0]} does not see the run directory {folder.absolute()} of rank 0 on {first}; type --run DIR with "
            "a folder on a file system that all hosts share"
        )


@contextlib.contextmanager
def at_work_in(run: Run, world: World, *, wait: bool = False) -> Iterator[None]:
    """Keep a run directory to this process and its ranks, as a second one would mix its files with theirs; collective.

    Args:
        run: which one.
        world: the ranks.
        wait: for another process's end, where what it leaves is wanted, instead of refusing.

    Raises:
        UserError: on all ranks, where another process is at work in it.
    """
    with contextlib.ExitStack() as held:
        world.on_first(lambda: held.enter_context(Lock(run.lock).owned(str(run.folder), wait=wait)))
        yield


def check_same(world: World, told: Mapping[str, str]) -> None:
    """Refuse to start where a host has other content under the same name; collective.

    Args:
        world: the ranks.
        told: what it is, for the message -> hash of what this rank has.

    Raises:
        UserError: on all ranks, naming a host and what differs there.
    """
    if odd := world.first_to_differ(told):
        rank, differing = odd
        hosts = world.gather(socket.gethostname())
        raise UserError(
            f"{differing[0]} on {hosts[rank]} is not the same as on {hosts[0]}, under the same name; copy it there, or "
            "name one on a file system that all hosts share"
        )


def hosts_without(world: World, folder: Path, patience_sec: float = PATIENCE_SEC) -> list[str]:
    """The hosts on which a folder is not that of the first rank; collective."""
    if world.size == 1:
        return []
    token = folder.absolute() / world.on_first(lambda: f".seen-{secrets.token_hex(8)}")
    world.on_first(lambda: _touch(token))
    seen = world.gather((socket.gethostname(), _appears(token, patience_sec)))
    world.on_first(lambda: token.unlink(missing_ok=True))
    return sorted({host for host, sees in seen if not sees})


def _touch(path: Path) -> None:
    with disk_full_is_user_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def _appears(path: Path, patience_sec: float) -> bool:
    deadline = time.monotonic() + patience_sec
    while True:
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # Lets a network file system ask its server again.
        if path.exists():
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def hand_out(world: World, folder: Path) -> None:
    """Copy a folder of plain files from the first rank to every host that has none of its name; collective."""
    if all(world.gather(folder.exists())):
        return
    files = world.on_first(lambda: {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
    if folder.exists():
        return
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        with disk_full_is_user_error(folder):
            temporary.mkdir(parents=True)
            for name, content in files.items():
                (temporary / name).write_bytes(content)
            temporary.rename(folder)
    except OSError:
        if not folder.exists():  # Else another rank of this host was first.
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
