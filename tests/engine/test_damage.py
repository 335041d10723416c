"""A checkpoint that is not what was written is put aside, and the one before is loaded, by all ranks alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from finemask_ds.engine.checkpoint import load_checkpoint, save_checkpoint
from finemask_ds.engine.damage import complete_steps, newest_step
from finemask_ds.engine.world import World
from finemask_ds.errors import UserError
from tests.engine import jobs
from tests.pool import RankPool


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 16
    file.write_bytes(content)


def change_a_number(file: Path) -> None:
    """Still the JSON of a state."""
    file.write_text(json.dumps(json.loads(file.read_text()) | {"data_position": 7}))


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "half a shard": ("shard-0.safetensors", halve),
    "a bit of a shard": ("shard-{last}.safetensors", flip_a_bit),
    "no shard": ("shard-{last}.safetensors", Path.unlink),
    "half a state": ("state.json", halve),
    "no state to speak of": ("state.json", lambda file: file.write_text("[1]")),
    "another number": ("state.json", change_a_number),
}


def saved_twice(world: World, stage: int | None, folder: Path) -> None:
    _, _, engine = jobs.run_steps(world, stage, folder, micro=jobs.BATCH // world.size, last=2)
    save_checkpoint(folder / "checkpoints", engine, 1, {"told": "first"})
    engine.edit((name, value + 1) for name, value in jobs.values(engine).items())
    save_checkpoint(folder / "checkpoints", engine, 2, {"told": "second"})


def loaded(world: World, stage: int | None, folder: Path) -> tuple[str, dict[str, Tensor]]:
    """What the newest whole checkpoint tells and holds; then step 2 is saved once more."""
    engine = jobs.make(world, stage, folder, micro=jobs.BATCH // world.size)
    state = load_checkpoint(folder / "checkpoints", engine)
    assert state is not None
    values = jobs.values(engine)
    save_checkpoint(folder / "checkpoints", engine, 2, {"told": "again"})
    return state["told"], values


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("stage", [None, 2])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    two_ranks: RankPool, tmp_path: Path, capfd: pytest.CaptureFixture[str], stage: int | None, kind: str
) -> None:
    def run(action: Callable[..., object]) -> list:  # type: ignore[type-arg]
        return [action(World(), stage, tmp_path)] if stage is None else two_ranks.run(action, stage, tmp_path)

    run(saved_twice)
    name, damage = DAMAGES[kind]
    name = name.format(last=0 if stage is None else 1)
    damage(tmp_path / "checkpoints/step-2" / name)
    before = run(loaded)
    assert {told for told, _ in before} == {"first"}
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("finemask: ")]
    if stage is None:  # The ranks of a pool speak elsewhere.
        assert len(said) == 1
        assert f"step-2/{name} is " in said[0]
        assert said[0].endswith("damaged; going on from step 1")
    assert (tmp_path / "checkpoints/.step-2.damaged").is_dir()
    after = run(loaded)
    assert {told for told, _ in after} == {"again"}
    for (_, first), (_, second) in zip(before, after, strict=True):
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_where_no_checkpoint_is_whole_the_run_does_not_silently_start_over(tmp_path: Path) -> None:
    saved_twice(World(), None, tmp_path)
    for step in (1, 2):
        halve(tmp_path / f"checkpoints/step-{step}/shard-0.safetensors")
    for _ in range(2):
        with pytest.raises(UserError, match=r"no other checkpoint is whole; delete .*checkpoints to start over"):
            loaded(World(), None, tmp_path)
    assert newest_step(tmp_path / "checkpoints") == 1


def test_what_somebody_has_put_beside_checkpoints_is_none(tmp_path: Path) -> None:
    for name in ("step-10", "step-10.bak", "step-x", "step-9"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").touch()
    assert complete_steps(tmp_path) == [9, 10]
