"""Selection over an engine's values: in ZeRO-3 on the shards, without gathering a matrix, and as on whole matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from finemask_ds.config import TamtConfig
from finemask_ds.engine.base import Engine
from finemask_ds.engine.world import World
from finemask_ds.masks.select import select
from finemask_ds.models.patch import read_mask
from finemask_ds.search import tamt
from finemask_ds.search.objectives import Objective
from finemask_ds.search.selection import ScoreMasks, select_trained
from finemask_ds.search.setting import open_setting
from tests.pool import RankPool
from tests.search import jobs


def masks_in_training(world: World, config: TamtConfig, scope: str) -> tuple[ScoreMasks, Engine, Any]:
    """Learnt scores under an engine, moved to random values with many ties."""
    setting = open_setting(config, world, model=config.model, data=config.data)
    theta0, start, groups = tamt.freeze(setting, config)
    engine = setting.engine(Objective(theta0.model, "kd"), groups)
    draw = torch.Generator().manual_seed(0)
    engine.edit((name, torch.randint(-9, 9, shape, generator=draw) / 1000) for name, shape in engine.shapes.items())
    masks = ScoreMasks(engine, theta0.model, 0.7, scope, 1000, dict.fromkeys(start, 0.0))
    return masks, engine, theta0.model


def selected(world: World, config: TamtConfig, scope: str) -> Any:
    """Masks and thresholds selected without a gather, and what was expected, from gathered scores."""
    masks, engine, model = masks_in_training(world, config, scope)
    names = masks._names
    scores = {name: values.clone() for name, (_, values) in zip(names, engine.read(names.values()), strict=True)}
    with (
        mock.patch.object(Engine, "read", side_effect=AssertionError),
        mock.patch("deepspeed.zero.GatheredParameters", side_effect=AssertionError),
    ):
        masks.select_exactly()
        exact, thresholds = read_mask(model), dict(masks.thresholds)
        exact = {name: mask.clone() for name, mask in exact.items()}
        within = {name: values > -0.005 for name, values in scores.items()}
        magnitudes = select_trained(engine, names, 0.8, scope, score=torch.abs, within=within)
        masks.thresholds = dict.fromkeys(names, 0.002)
        masks.binarize()
    expected = select(scores, 0.7, scope)
    expected_within = select({name: values.abs() for name, values in scores.items()}, 0.8, scope, within=within)
    return {
        "masks": all(torch.equal(exact[name], expected[name].mask) for name in names),
        "thresholds": thresholds == {name: selection.threshold for name, selection in expected.items()},
        "within": all(torch.equal(magnitudes[name].mask, expected_within[name].mask) for name in names),
        "binarized": all(torch.equal(mask, scores[name] >= 0.002) for name, mask in read_mask(model).items()),
    }


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_in_stage_3_selection_gathers_nothing_and_is_that_of_whole_matrices(
    pools: dict[int, RankPool], toy_bert: Path, toy_text: Path, tmp_path: Path, ranks: int, scope: str
) -> None:
    config = jobs.tamt(tmp_path / "run", toy_bert, toy_text, 3, objective="kd", batch_size=12)
    right = {"masks": True, "thresholds": True, "within": True, "binarized": True}
    assert pools[ranks].run(selected, config, scope) == [right] * ranks
