"""What ends a run that has gone wrong on some rank: agreement of the ranks, and a watchdog on each of them."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from finemask_ds.engine.join import of_this_start
from finemask_ds.engine.sidecar import Sidecar
from finemask_ds.engine.termination import Terminated
from finemask_ds.engine.world import World
from finemask_ds.errors import TransientError, UserError

SILENCE_SEC = 30.0
"""A rank that has given no sign of life for so long is given up."""
LOST_SHARE = 0.3
"""The share of that time which is enough once some rank has lost the connection to another."""
_FAILED, _LOST = "finemask/failed", "finemask/lost"


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
        TransientError: on all ranks, naming the first rank and the first thing that differ from the first rank's.
    """
    if odd := world.first_to_differ(digests):
        rank, differing = odd
        raise TransientError(
            f"the mask of {differing[0]} on rank {rank} is not that of rank 0 at step {step} ({len(differing)} of "
            f"{len(digests)} matrices differ); start the same command again from the last checkpoint, and look at "
            "the memory of that rank's host if it comes back"
        )


@dataclass
class Watchdog:
    """Tells the other ranks of this rank's failure, and ends this rank when another has failed or fallen silent.

    Two threads on every rank. One talks with the ranks' store over a connection of its own: a rank that waits in a
    collective for one that is gone would otherwise wait for the process group's time-out, or for ever. The other never
    waits for anything: where the store has stopped answering, its host is gone or the first rank is stopped. It also
    keeps the sidecar quiet, which ends this rank where it is stopped itself.
    """

    rank: int
    size: int
    silence_sec: float = SILENCE_SEC
    with_sidecar: bool = True
    """Whether somebody waits for this rank, who would do so for ever if it were stopped."""
    _ended: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _store: Any = None
    _rounds: int = 0
    _first_host: str = "an unknown host"
    _sidecar: Sidecar | None = None

    @property
    def beat_sec(self) -> float:
        """From one sign of life to the next."""
        return self.silence_sec / 10

    @property
    def grace_sec(self) -> float:
        """Ranks that fail for the same reason get so long to say so themselves."""
        return self.silence_sec / 6

    def start(self) -> None:
        """Begin to watch; a single rank has only its sidecar."""
        if self.with_sidecar:
            # So long that the other ranks have named it first.
            limit_sec = self.silence_sec + self.grace_sec + 2 * self.beat_sec
            self._sidecar = Sidecar(f"rank {self.rank} on {socket.gethostname()}", limit_sec)
        if self.size > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            own = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=20))
            self._store = of_this_start(own)
            self._beat(0)
            self._first_host = self._store.get(_beat_key(0)).decode().split("\n")[0]
        works = [self._pulse] if self.size == 1 else [self._pulse, self._watch]
        self._threads = [threading.Thread(target=work, name="finemask-watchdog", daemon=True) for work in works]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """This rank is done: no longer watched, no longer watching."""
        self._ended.set()
        for thread in self._threads:
            thread.join(self.silence_sec)
        if self._store is not None:
            with contextlib.suppress(dist.DistError):
                self._beat("done")
        if self._sidecar is not None:
            self._sidecar.close()

    def dismiss(self) -> None:
        """This rank ends itself, now: nobody need say that it has ended without a word."""
        if self._sidecar is not None:
            self._sidecar.dismiss()

    def report(self, error: BaseException) -> None:
        """Tell the others why this rank ends; where it only saw a peer vanish, let that one be named first."""
        if self._store is None or isinstance(error, Terminated):
            return
        if is_lost_peer(error):
            with contextlib.suppress(dist.DistError):
                self._store.set(_LOST, "")
            self._threads[-1].join(self.silence_sec + self.grace_sec + 4 * self.beat_sec)
        self._announce(self.rank, f"{type(error).__name__}: {error}".splitlines()[0])

    def _announce(self, rank: int, reason: str) -> str:
        """Tell the store that a rank has failed; what it is told first, and stays: later ones fail because of it."""
        # Where the store went down with the first rank, every watchdog sees that by itself.
        with contextlib.suppress(dist.DistError):
            told = f"{rank}\nrank {rank} on {self._host_of(rank)} failed ({reason})"
            return self._store.compare_set(_FAILED, "", told).decode()
        return ""

    def _host_of(self, rank: int) -> str:
        beat = self._seen(rank)
        return beat.split("\n")[0] if beat else "an unknown host"

    def _seen(self, rank: int) -> str:
        return self._asked(_beat_key(rank))

    def _asked(self, key: str) -> str:
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _beat(self, sign: object) -> None:
        self._store.set(_beat_key(self.rank), f"{socket.gethostname()}\n{sign}")

    def _watch(self) -> None:
        """Beat, and look for the beats of others."""
        silent: dict[int, tuple[str, int]] = {}
        while not self._ended.wait(self.beat_sec):
            self._rounds += 1
            try:
                self._beat(self._rounds)
                told = self._asked(_FAILED) or self._look_for_silence(silent)
            except dist.DistError:
                told = f"0\nrank 0 on {self._first_host} failed (the ranks' store went with it)"
            if told:
                self._end(told)

    def _pulse(self) -> None:
        """Tell the sidecar that this rank lives, and see whether the store still answers."""
        answered, unanswered = self._rounds, 0
        while not self._ended.wait(self.beat_sec):
            if self._sidecar is not None:
                self._sidecar.beat()
            if self._store is None:
                continue
            answered, unanswered = self._rounds, unanswered + 1 if answered == self._rounds else 0
            if unanswered * self.beat_sec > self.silence_sec:
                self._end(f"0\nrank 0 on {self._first_host} failed ({self._no_sign_of_life(unanswered)})")

    def _look_for_silence(self, silent: dict[int, tuple[str, int]]) -> str:
        """The first rank looks at all others; they look at the first.

        Looks are counted, not seconds: where all ranks were stopped for a while and go on, none has been silent.

        Args:
            silent: rank -> its last beat and the number of looks since.

        Returns:
            What was announced of one that has been silent for too long.
        """
        for rank in range(1, self.size) if self.rank == 0 else (0,):
            beat = self._seen(rank)
            before, looks = silent.get(rank, ("", 0))
            silent[rank] = (beat, looks + 1 if beat == before else 0)
            if beat.endswith("\ndone"):
                continue
            # A rank that has lost the connection to another knows already that some rank is gone.
            patience_sec = self.silence_sec * (LOST_SHARE if self._store.check([_LOST]) else 1)
            if silent[rank][1] * self.beat_sec > patience_sec:
                return self._announce(rank, self._no_sign_of_life(silent[rank][1]))
        return ""

    def _no_sign_of_life(self, beats: int) -> str:
        return f"no sign of life for {beats * self.beat_sec:.0f} s; killed or stopped, or its host is gone"

    def _end(self, told: str) -> None:
        """Leave at once: the main thread may hang in a collective that nothing else ends."""
        if self._ended.wait(self.grace_sec):
            return
        failed, sentence = told.split("\n", 1)
        if self.rank == (1 if failed == "0" else 0):
            # The main thread may have turned sys.stderr elsewhere, as while a library is kept quiet.
            print(f"finemask: {sentence}; all ranks end", file=sys.__stderr__, flush=True)
        self.dismiss()
        os._exit(1)


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank went away."""
    text = str(error).lower()
    signs = ("connection closed by peer", "connection reset by peer", "broken pipe", "connectfullmesh", "timed out")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def _beat_key(rank: int) -> str:
    return f"finemask/beat/{rank}"
