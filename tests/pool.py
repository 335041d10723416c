"""Real ranks for tests: processes that stay up, joined by gloo, and run one function after another.

A hang is a failure that shows every rank's stack; a pool that failed is replaced by a fresh one.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import socket
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("spawn")


class RanksFailedError(AssertionError):
    """Some rank raised, died or hung; the message holds what each of them said."""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def serve(rank: int, size: int, master: tuple[str, int], link: Connection, stacks: str, device: str) -> None:
    """Be one rank: join the others, then call what comes over ``link`` until that is None."""
    if device == "cpu":
        # Also on a machine with an accelerator, of which several ranks could not share one.
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR=master[0],
        MASTER_PORT=str(master[1]), OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false",
    )  # fmt: skip
    faulthandler.register(signal.SIGUSR1, file=open(stacks, "w"), all_threads=True)  # noqa: SIM115
    import torch

    torch.set_num_threads(1)
    from finemask_ds.engine.zero import distributed

    with distributed() as world:
        while (task := link.recv()) is not None:
            function, arguments = task
            try:
                link.send((True, function(world, *arguments)))
            except Exception:
                link.send((False, traceback.format_exc()))


class RankPool:
    """``size`` ranks; ``run`` calls a module-level function as ``function(world, *arguments)`` on each."""

    def __init__(self, size: int, device: str = "cpu"):
        self.size, self._device = size, device
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._processes: list[Any] = []
        self._links: list[Connection] = []

    def _start(self) -> None:
        port = free_port()
        for rank in range(self.size):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(
                target=serve,
                args=(rank, self.size, ("127.0.0.1", port), theirs, str(self._stacks(rank)), self._device),
                daemon=True,
            )
            process.start()
            self._processes.append(process)
            self._links.append(ours)

    def _stacks(self, rank: int) -> Path:
        return Path(self._folder.name) / f"stacks-{rank}"

    def run(self, function: Callable[..., Any], *arguments: Any, timeout_sec: float = 180) -> list[Any]:
        """The function's results, one for each rank."""
        if not all(process.is_alive() for process in self._processes):
            self.close()  # Somebody has ended one since, as by switching its host off.
        if not self._processes:
            self._start()
        for link in self._links:
            link.send((function, arguments))
        replies: list[tuple[bool, Any]] = []
        for rank, link in enumerate(self._links):
            try:
                replies.append(link.recv() if link.poll(timeout_sec) else (False, self._hung(rank, timeout_sec)))
            except EOFError:
                replies.append((False, "died without a word"))
            if not replies[-1][0]:
                timeout_sec = 5  # The others can hardly come through once one has failed.
        if all(good for good, _ in replies):
            return [value for _, value in replies]
        self.close()
        said = "\n".join(f"rank {rank}: {value}" for rank, (good, value) in enumerate(replies) if not good)
        raise RanksFailedError(said)

    def _hung(self, rank: int, timeout_sec: float) -> str:
        process = self._processes[rank]
        os.kill(process.pid, signal.SIGUSR1)
        process.join(1)
        return f"hung for {timeout_sec} s at\n{self._stacks(rank).read_text()}"

    def close(self) -> None:
        """End the ranks, gently where they answer."""
        for link in self._links:
            try:
                link.send(None)
            except OSError:
                continue
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._links = [], []
