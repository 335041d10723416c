"""TAMT: the same masks on any ranks and in any stage, exact restarts, exact counts, and it learns."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
import torch

from finemask_ds.config import TamtConfig
from finemask_ds.errors import UserError
from finemask_ds.masks.files import load_mask
from finemask_ds.run import Run
from finemask_ds.session import search
from tests.pool import RankPool
from tests.search import jobs
from tests.search.jobs import mask_of

STAGES = tuple(stage if stage == 2 else pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 2, 3))
"""ZeRO stages; the quick part of the suite looks at stage 2 only."""


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("objective", ["mlm", "kd", "mlm+kd"])
@pytest.mark.slow
def test_two_ranks_equal_one_plain_process(
    two_ranks: RankPool, toy_bert: Path, toy_text: Path, tmp_path: Path, stage: int, objective: str
) -> None:
    """2 ranks x b sees exactly what 1 rank x 2b sees, in every stage, with accumulation too."""
    plain = jobs.tamt(tmp_path / "plain", toy_bert, toy_text, objective=objective)
    shared = jobs.tamt(tmp_path / "ranks", toy_bert, toy_text, stage, objective=objective, micro_batch_size=2)
    expected, result = jobs.find(plain), jobs.find(shared, two_ranks)
    for name, value in jobs.last_values(plain).items():
        torch.testing.assert_close(jobs.last_values(shared)[name], value, rtol=0, atol=2e-6)
    assert mask_of(shared) == mask_of(plain)
    assert mask_of(shared).distance(load_mask(Run(tmp_path / "plain").start_mask)) > 0
    assert result["dev"] == pytest.approx(expected["dev"], rel=1e-5)


@pytest.mark.parametrize("stage", [None, *STAGES])
@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(
    two_ranks: RankPool, toy_bert: Path, toy_text: Path, tmp_path: Path, stage: int | None
) -> None:
    """With dropout, and fixed thresholds between selections: everything that a restart must bring back."""
    more = {"dropout": 0.1, "objective": "mlm+kd", "threshold_every": 4}
    whole = jobs.tamt(tmp_path / "whole", toy_bert, toy_text, stage, **more)
    broken = jobs.tamt(tmp_path / "broken", toy_bert, toy_text, stage, **more)
    pool = None if stage is None else two_ranks
    jobs.find(whole, pool)
    if pool is None:
        jobs.killed_after(jobs.World(), broken, 10)
    else:
        pool.run(jobs.killed_after, broken, 10)
    assert not Run(Path(broken.run)).mask.exists()
    jobs.find(broken, pool)
    assert jobs.same(jobs.last_values(whole), jobs.last_values(broken))
    assert mask_of(whole) == mask_of(broken)
    losses = [_losses(Run(Path(config.run)).metrics) for config in (whole, broken)]
    assert losses[0] == losses[1]


def _losses(metrics: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [(line["step"], line["train/mlm_loss"]) for line in lines]


def test_a_finished_run_is_not_run_again(toy_bert: Path, toy_text: Path, tmp_path: Path) -> None:
    config = jobs.tamt(tmp_path / "run", toy_bert, toy_text, steps=3)
    first = jobs.find(config)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert jobs.find(config) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == written, "nor written to"


@pytest.mark.parametrize("factor", [0.5, 4.0])
@pytest.mark.slow
def test_only_the_ratio_of_rate_to_score_matters(toy_bert: Path, toy_text: Path, tmp_path: Path, factor: float) -> None:
    """(c * scores, c * phi, c * mask_lr) gives the same masks, bit for bit for c a power of two."""
    base = jobs.tamt(tmp_path / "base", toy_bert, toy_text, objective="kd", max_grad_norm=0.0)
    scaled = jobs.tamt(
        tmp_path / "scaled", toy_bert, toy_text, objective="kd", max_grad_norm=0.0,
        phi=0.01 * factor, mask_lr=1e-3 * factor,
    )  # fmt: skip
    jobs.find(base)
    jobs.find(scaled)
    assert mask_of(base) == mask_of(scaled)
    values, larger = jobs.last_values(base), jobs.last_values(scaled)
    assert all(torch.equal(values[name] * factor, larger[name]) for name in values)


@pytest.mark.parametrize(
    "more",
    [
        {"init": "binary"},
        {"init": "random"},
        {"scope": "global"},
        {"targets": "authors"},
        {"targets": "bert-tickets"},
        {"sparsity": 0.0, "steps": 4},
        {"threshold_every": 1000},
    ],
    ids=lambda more: "-".join(f"{key}={value}" for key, value in more.items()),
)
def test_the_saved_mask_is_exact(toy_bert: Path, toy_text: Path, tmp_path: Path, more: dict[str, object]) -> None:
    config = jobs.tamt(tmp_path / "run", toy_bert, toy_text, **more)
    result = jobs.find(config)
    mask = mask_of(config)
    counted = [None] if config.scope == "global" else list(mask)
    for name in counted:
        num_weights = mask.num_weights(name)
        assert mask.num_kept(name) == num_weights - round(config.sparsity * num_weights)
    roles = {"paper": 13, "authors": 14, "bert-tickets": 13}
    assert len(mask) == roles[config.targets]
    assert result["sparsity"] == mask.sparsity()
    if config.targets != "paper":
        start = load_mask(Run(tmp_path / "run").start_mask)
        assert torch.equal(mask["bert.pooler.dense.weight"], start["bert.pooler.dense.weight"])


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.slow
def test_a_pooler_that_gets_no_gradient_keeps_its_mask_in_zero(
    two_ranks: RankPool, toy_bert: Path, toy_text: Path, tmp_path: Path, stage: int
) -> None:
    """The pooler is not on the loss path: its mask stays OMP's, in the sharded stages too."""
    config = jobs.tamt(tmp_path / "run", toy_bert, toy_text, stage, targets="authors")
    jobs.find(config, two_ranks)
    mask, start = mask_of(config), load_mask(Run(tmp_path / "run").start_mask)
    moved = {name for name in mask if not torch.equal(mask[name], start[name])}
    assert moved
    assert "bert.pooler.dense.weight" not in moved


def test_the_masks_learn_and_nothing_else_moves(toy_bert: Path, toy_text: Path, tmp_path: Path) -> None:
    """KD loss falls below OMP's; only scores are trained under KD, scores and head under MLM."""
    config = jobs.tamt(tmp_path / "kd", toy_bert, toy_text, objective="kd", steps=60)
    result = jobs.find(config)
    start = jobs.find(jobs.tamt(tmp_path / "still", toy_bert, toy_text, objective="kd", steps=1, mask_lr=0.0))
    assert start["distance_from_omp"] == 0
    assert result["dev"]["kd_loss"] < 0.8 * start["dev"]["kd_loss"]
    assert all(name.endswith(".scores") for name in jobs.last_values(config))
    mlm = jobs.tamt(tmp_path / "mlm", toy_bert, toy_text, objective="mlm", steps=5)
    jobs.find(mlm)
    heads = {name for name in jobs.last_values(mlm) if not name.endswith(".scores")}
    assert heads
    assert all(name.startswith("cls.") for name in heads)


@pytest.mark.parametrize("missing", ["data", "deepspeed"])
def test_what_is_missing_is_told_before_anything_is_made(toy_text: Path, tmp_path: Path, missing: str) -> None:
    """The built-in model would be trained for minutes first."""
    typed = {"model": "builtin", "data": str(toy_text), "run": str(tmp_path / "run")}
    config = TamtConfig(**{**typed, missing: str(tmp_path / "none.json")})
    with pytest.raises(UserError, match=r"none\.json"):
        search(config, jobs.World())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_search_with_nothing_kept_of_a_matrix_goes_on(toy_bert: Path, toy_text: Path, tmp_path: Path) -> None:
    """Its threshold is infinite, which a checkpoint must hold too."""
    whole, broken = (
        jobs.tamt(tmp_path / name, toy_bert, toy_text, sparsity=0.9997, steps=12) for name in ("whole", "broken")
    )
    jobs.find(whole)
    jobs.killed_after(jobs.World(), broken, 5)
    jobs.find(broken)
    assert mask_of(whole) == mask_of(broken)
    assert 0 in [mask_of(whole).num_kept(name) for name in mask_of(whole)]


@pytest.mark.parametrize("watch_every", [2, 3])
def test_a_killed_run_records_no_other_flips(toy_bert: Path, toy_text: Path, tmp_path: Path, watch_every: int) -> None:
    """A checkpoint has the mask of its step: the one looked at last, or one that flips are not counted from."""
    more = {"steps": 8, "save_every": 4, "watch_every": watch_every, "log_every": 1}
    whole, broken = (jobs.tamt(tmp_path / name, toy_bert, toy_text, **more) for name in ("whole", "broken"))
    jobs.find(whole)
    jobs.killed_after(jobs.World(), broken, 4)
    jobs.find(broken)
    flips, again = (
        {line["step"]: line["mask/flips/total"] for line in lines if "mask/flips/total" in line}
        for lines in ([json.loads(one) for one in Run(Path(config.run)).metrics.read_text().splitlines()]
                      for config in (whole, broken))
    )  # fmt: skip
    assert again == {step: number for step, number in flips.items() if watch_every == 2 or step != 6}
    assert all(number > 0 for number in flips.values())


@pytest.mark.slow
def test_a_search_that_goes_on_keeps_its_start(
    toy_bert: Path, toy_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint has the scores, so that the start, whose search may take minutes, is not searched again."""
    config, other = (
        jobs.tamt(tmp_path / name, toy_bert, toy_text, init="reconstruction", steps=12) for name in ("run", "other")
    )
    jobs.killed_after(jobs.World(), config, 5)
    assert "layer 2/2" in capsys.readouterr().out
    jobs.find(config)
    assert "layer" not in capsys.readouterr().out
    jobs.find(other)
    for name in ("mask", "start_mask"):
        again, undisturbed = (load_mask(getattr(Run(Path(one.run)), name)) for one in (config, other))
        assert again == undisturbed


@pytest.mark.parametrize("method", ["tamt", pytest.param("imp", marks=pytest.mark.slow)])
def test_a_search_that_dies_while_it_is_scored_is_not_trained_again(
    toy_bert: Path, toy_text: Path, tmp_path: Path, method: str
) -> None:
    config, other = (
        jobs.either(method, tmp_path / name, toy_bert, toy_text, save_every=0) for name in ("run", "other")
    )
    with mock.patch("finemask_ds.session.conclude", side_effect=jobs.KilledError), pytest.raises(jobs.KilledError):
        jobs.find(config)
    trained = jobs.losses(config)
    result = jobs.find(config)
    assert jobs.losses(config) == trained
    undisturbed = jobs.find(other)
    assert mask_of(config) == mask_of(other)
    assert [result[name] for name in ("dev", "dev_trained_head")] == [
        undisturbed[name] for name in ("dev", "dev_trained_head")
    ]


@pytest.mark.parametrize("stage", [None, 2, 3])
def test_a_loss_that_is_not_finite_stops_at_the_last_good_state(
    two_ranks: RankPool, toy_bert: Path, toy_text: Path, tmp_path: Path, stage: int | None
) -> None:
    """A head rate of 1e30 makes the second step's loss overflow."""
    config = jobs.tamt(tmp_path / "run", toy_bert, toy_text, stage, objective="mlm", head_lr=1e30, save_every=0)
    said = two_ranks.run(jobs.failed, config) if stage is not None else [jobs.failed(jobs.World(), config)]
    assert all("is kept" in sentence or "are kept" in sentence for sentence in said)
    assert all(torch.isfinite(value).all() for value in jobs.last_values(config).values())
