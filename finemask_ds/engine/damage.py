"""Which checkpoints are whole: by the hashes that were written with them; a damaged one is put aside, not trusted."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finemask_ds.engine.world import World
from finemask_ds.errors import UserError
from finemask_ds.run import content_hash, read_json


def complete_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints, oldest first."""
    names = (path.parent.name for path in folder.glob("step-*/state.json"))
    return sorted(int(name.removeprefix("step-")) for name in names if re.fullmatch(r"step-\d+", name))


def newest_step(folder: Path) -> int:
    """Step of the newest whole checkpoint, 0 where there is none."""
    return max(complete_steps(folder), default=0)


def shard_name(rank: int) -> str:
    """The file of what a rank has written."""
    return f"shard-{rank}.safetensors"


def sealed(state: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's state as JSON keeps it, with a hash of itself."""
    kept = json.loads(json.dumps(state))
    return {**kept, "hash": _hash_of(kept)}


def drop_damaged(folder: Path, world: World) -> Path | None:
    """The newest checkpoint whose files are what was written; damaged ones are put aside, with a line for each.

    Collective: each rank reads its share of the shards. What is put aside is named ``.step-N.damaged``.

    Raises:
        UserError: where there are checkpoints but none is whole.
    """
    steps, damage = world.on_first(lambda: complete_steps(folder)), ""
    for step in reversed(steps):
        newest = folder / f"step-{step}"
        if damage:
            told = f"{damage}; going on from step {step}"
            world.on_first(lambda told=told: print(f"finemask: {told}", file=sys.stderr, flush=True))  # type: ignore[misc]
        damage = _find_damage(newest, world)
        if not damage:
            return newest
        if step != steps[0]:
            world.on_first(lambda newest=newest: _put_aside(newest))  # type: ignore[misc]
    if damage:
        raise UserError(f"{damage}, and no other checkpoint is whole; delete {folder} to start over")
    return None


def _find_damage(folder: Path, world: World) -> str:
    """What is wrong with a checkpoint, on all ranks alike; "" where nothing is."""
    state = world.on_first(lambda: _read_state(folder))
    if not state:
        return f"{folder / 'state.json'} is damaged"
    hashes, found = state.get("shard_hashes", []), ""
    for shard in range(world.rank, len(hashes), world.size):
        path = folder / shard_name(shard)
        try:
            is_whole = content_hash(path) == hashes[shard]
        except OSError:
            is_whole = False
        if not is_whole:
            found = f"{path} is missing or damaged"
            break
    return next((said for said in world.gather(found) if said), "")


def _read_state(folder: Path) -> dict[str, Any]:
    """``state.json``, empty where it is not what was written."""
    try:
        state = dict(read_json(folder / "state.json"))
    except (OSError, TypeError, ValueError):  # A UserError is a ValueError.
        return {}
    written = state.pop("hash", None)
    return state if written in (None, _hash_of(state)) else {}


def _hash_of(state: Mapping[str, Any]) -> str:
    return content_hash(json.dumps(state, sort_keys=True))


def _put_aside(folder: Path) -> None:
    aside = folder.with_name(f".{folder.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
