"""What ends a run that has gone wrong on some rank: agreement of the ranks, and a watchdog on each of them."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from finemask_ds.engine.world import World
from finemask_ds.errors import UserError

BEAT_SEC = 3.0
SILENCE_SEC = 40.0
"""A rank that has given no sign of life for so long is given up."""
GRACE_SEC = 5.0
"""Ranks that fail for the same reason get so long to say so themselves."""
_FAILED = "finemask/failed"


def check_ranks(asked: int) -> None:
    """Compare ``--ranks`` with what the launcher started; 0 asks for nothing. Before anything distributed starts.

    Raises:
        UserError: where they differ, as when a hostfile is missing and one node trains alone.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if asked and asked != started:
        raise UserError(
            f"--ranks {asked} but {started} started ({socket.gethostname()} is one of their hosts); check the "
            "launcher's --hostfile, --num_nodes and --num_gpus"
        )


def describe_ranks(world: World) -> str:
    """How many ranks there are and on which hosts; collective."""
    hosts = Counter(world.gather(socket.gethostname()))
    listed = ", ".join(f"{host} ({number})" for host, number in hosts.items())
    return f"{world.size} rank(s) on {len(hosts)} host(s): {listed}"


def check_agreement(world: World, digests: Mapping[str, str], step: int) -> None:
    """Compare what must be equal on all ranks; collective.

    Args:
        world: the ranks.
        digests: name -> hash of this rank's copy.
        step: for the message.

    Raises:
        UserError: on all ranks, naming the first rank and the first thing that differ from the first rank's.
    """
    everyone = world.gather(dict(digests))
    for rank, theirs in enumerate(everyone):
        differing = [name for name, digest in everyone[0].items() if theirs.get(name) != digest]
        if differing:
            raise UserError(
                f"the mask of {differing[0]} on rank {rank} is not that of rank 0 at step {step} ({len(differing)} of "
                f"{len(digests)} matrices differ); start the same command again from the last checkpoint, and look at "
                "the memory of that rank's host if it comes back"
            )


@dataclass
class Watchdog:
    """Tells the other ranks of this rank's failure, and ends this rank when another has failed or fallen silent.

    A thread on every rank, over a connection of its own to the ranks' store: a rank that waits in a collective for one
    that is gone would otherwise wait for the process group's time-out, or for ever.
    """

    rank: int
    size: int
    silence_sec: float = SILENCE_SEC
    beat_sec: float = BEAT_SEC
    grace_sec: float = GRACE_SEC
    _ended: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _store: Any = None

    def start(self) -> None:
        """Begin to watch; with a single rank there is nobody to watch."""
        if self.size == 1:
            return
        self._store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=20)
        )
        self._beat(0)
        self._thread = threading.Thread(target=self._watch, name="finemask-watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """This rank is done: no longer watched, no longer watching."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            with contextlib.suppress(dist.DistError):
                self._beat("done")

    def report(self, error: BaseException) -> None:
        """Tell the others why this rank ends; where it only saw a peer vanish, let the silent one be named first."""
        if self._thread is None:
            return
        if _is_lost_peer(error):
            self._thread.join(self.silence_sec + self.grace_sec + 4 * self.beat_sec)
        self._announce(self.rank, f"{type(error).__name__}: {error}".splitlines()[0])

    def _announce(self, rank: int, reason: str) -> None:
        # The first announcement stays: what fails afterwards fails because of it.
        # Where the store went down with the first rank, every watchdog sees that by itself.
        with contextlib.suppress(dist.DistError):
            told = f"{rank}\nrank {rank} on {self._host_of(rank)} failed ({reason})"
            self._store.compare_set(_FAILED, "", told)

    def _host_of(self, rank: int) -> str:
        beat = self._seen(rank)
        return beat.split("\n")[0] if beat else "an unknown host"

    def _seen(self, rank: int) -> str:
        key = f"finemask/beat/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _beat(self, sign: object) -> None:
        self._store.set(f"finemask/beat/{self.rank}", f"{socket.gethostname()}\n{sign}")

    def _watch(self) -> None:
        last: dict[int, tuple[str, float]] = {}
        number = 0
        while not self._ended.wait(self.beat_sec):
            number += 1
            try:
                self._beat(number)
                told = self._store.get(_FAILED).decode() if self._store.check([_FAILED]) else ""
                if not told:
                    self._look_for_silence(last)
            except dist.DistError:
                told = f"0\nrank 0 on {os.environ['MASTER_ADDR']} failed (the ranks' store went with it)"
            if told:
                self._end(told)

    def _look_for_silence(self, last: dict[int, tuple[str, float]]) -> None:
        """The first rank looks at all others; they look at the first."""
        now = time.monotonic()
        for rank in range(1, self.size) if self.rank == 0 else (0,):
            beat = self._seen(rank)
            if beat.endswith("\ndone"):
                continue
            if last.get(rank, ("", 0.0))[0] != beat or rank not in last:
                last[rank] = (beat, now)
            elif now - last[rank][1] > self.silence_sec:
                self._announce(rank, f"no sign of life for {self.silence_sec:.0f} s; killed, or its host is gone")

    def _end(self, told: str) -> None:
        """Leave at once: the main thread may hang in a collective that nothing else ends."""
        if self._ended.wait(self.grace_sec):
            return
        failed, sentence = told.split("\n", 1)
        if self.rank == (1 if failed == "0" else 0):
            print(f"finemask: {sentence}; all ranks end", file=sys.stderr, flush=True)
        os._exit(1)


def _is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank went away."""
    text = str(error).lower()
    signs = ("connection closed by peer", "connection reset by peer", "broken pipe", "connectfullmesh", "timed out")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)
