"""Where a run's metrics go."""

from __future__ import annotations

from finemask_ds.engine.damage import drop_damaged, newest_step
from finemask_ds.engine.metrics import Destination, Jsonl, Recorder, TensorBoardWriter
from finemask_ds.engine.progress import Console
from finemask_ds.engine.world import World
from finemask_ds.run import Run


def run_recorder(run: Run, world: World, total_steps: int) -> Recorder:
    """Metrics to the run's JSONL and TensorBoard files and to the console, from the first rank.

    What a killed run logged after its last checkpoint is dropped.
    """
    drop_damaged(run.checkpoints, world)
    start_step = newest_step(run.checkpoints)
    destinations: list[Destination] = []
    lines = Jsonl(run.metrics)
    world.on_first(lambda: lines.rewind(start_step))
    if world.is_first:
        board = TensorBoardWriter(run.tensorboard, purge_step=start_step + 1)
        destinations = [lines, board, Console(total_steps=total_steps, start_step=start_step)]
    return Recorder(destinations, reduce=lambda vector: world.sum(vector.to(world.device)))
