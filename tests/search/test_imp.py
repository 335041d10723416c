"""IMP: rungs are exact and nested, zeros stay zero, the rewind is right in every stage."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finemask_ds.masks.files import load_mask
from finemask_ds.masks.mask import Mask
from finemask_ds.models.export import apply_mask
from finemask_ds.models.load import load_pretrained, save_pretrained
from finemask_ds.run import Run, read_json
from finemask_ds.search import imp
from finemask_ds.search.setting import open_setting
from tests.pool import RankPool
from tests.search import jobs

STAGES = tuple(stage if stage == 2 else pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 2, 3))
"""ZeRO stages; the quick part of the suite looks at stage 2 only."""


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("to_theta0", [True, False], ids=["theta0", "none"])
def test_a_rewind_is_exact(
    two_ranks: RankPool, toy_bert: Path, toy_text: Path, tmp_path: Path, stage: int, to_theta0: bool
) -> None:
    """Weights equal theta_0 * M bit for bit, the head stays as trained, moments and step are zero, zeros stay zero."""
    config = jobs.imp_config(tmp_path / "run", toy_bert, toy_text, stage, weight_decay=0.01)
    for seen in two_ranks.run(jobs.rewound, config, to_theta0):
        origin = seen["theta0"] if to_theta0 else seen["trained"]
        for name in seen["theta0"]:
            keep = seen["mask"].get(name, torch.ones_like(origin[name], dtype=torch.bool))
            expected = torch.where(keep, origin[name], 0.0) if to_theta0 or name in seen["mask"] else origin[name]
            assert torch.equal(seen["after"][name], expected)
            assert not seen["later"][name][~keep].any()
        heads = seen["after"].keys() - seen["theta0"].keys()
        assert heads
        assert all(torch.equal(seen["after"][name], seen["trained"][name]) for name in heads)
        assert seen["moments"]
        assert set(seen["moments"]) == {0.0}
        assert not jobs.same(seen["after"], seen["later"])


@pytest.mark.parametrize("scope", ["local", pytest.param("global", marks=pytest.mark.slow)])
def test_rungs_are_exact_and_nested(toy_bert: Path, toy_text: Path, tmp_path: Path, scope: str) -> None:
    config = jobs.imp_config(tmp_path / "run", toy_bert, toy_text, scope=scope, sparsity=0.45)
    result = jobs.find(config)
    run = Run(tmp_path / "run")
    rungs = [load_mask(run.rung_mask(sparsity)) for sparsity in (0.1, 0.2, 0.3, 0.4, 0.45)]
    for sparsity, mask in zip((0.1, 0.2, 0.3, 0.4, 0.45), rungs, strict=True):
        for name in [None] if scope == "global" else mask:
            num_weights = mask.num_weights(name)
            assert mask.num_kept(name) == num_weights - round(sparsity * num_weights)
    for denser, sparser in itertools.pairwise(rungs):
        assert all(not (sparser[name] & ~denser[name]).any() for name in sparser)
    assert load_mask(run.mask) == rungs[-1]
    assert result["steps"] == 4 * config.interval_steps
    shown = [json.loads(line).get("mask/sparsity/total") for line in run.metrics.read_text().splitlines()]
    assert next(one for one in reversed(shown) if one is not None) == pytest.approx(result["sparsity"])


def test_the_first_rung_is_omp(toy_bert: Path, toy_text: Path, tmp_path: Path) -> None:
    """The first 10 % go before step 1, so 10 % IMP is 10 % OMP."""
    result = jobs.find(jobs.imp_config(tmp_path / "run", toy_bert, toy_text, sparsity=0.1))
    assert result["distance_from_omp"] == 0
    assert result["steps"] == 0


@pytest.mark.parametrize("decoder", ["masked", pytest.param("unmasked", marks=pytest.mark.slow)])
def test_a_decoder_of_its_own_stays_theta_0s(toy_bert: Path, toy_text: Path, tmp_path: Path, decoder: str) -> None:
    """As in the checkpoints that ``finemask mask export`` writes: neither replaced, trained, pruned nor in the head."""
    apart = tmp_path / "apart"
    pretrained = load_pretrained(str(toy_bert))
    apply_mask(pretrained.model, Mask.random(pretrained.shapes, 0.05, seed=1))
    save_pretrained(pretrained, apart)
    own = load_pretrained(str(apart))
    decoder_weight = own.model.get_submodule(own.family.decoder).weight.detach().clone()
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        expected = own.model(tokens).logits
    config = jobs.imp_config(tmp_path / "run", apart, toy_text, decoder=decoder, sparsity=0.2)
    setting = open_setting(config, jobs.World(), model=str(apart), data=str(toy_text))
    theta0, _, groups = imp.start(setting, config)
    with torch.no_grad():
        assert torch.equal(theta0.model(tokens).logits, expected)
    of_model = {id(parameter) for parameter in theta0.model.parameters()}
    assert all(id(parameter) in of_model for group in groups for parameter in group.parameters.values())
    jobs.find(config)
    assert "cls.predictions.decoder.weight" not in load_file(Run(tmp_path / "run").head)
    assert torch.equal(theta0.model.get_submodule(own.family.decoder).weight, decoder_weight)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.slow
def test_two_ranks_equal_one_plain_process(
    two_ranks: RankPool, toy_bert: Path, toy_text: Path, tmp_path: Path, stage: int
) -> None:
    plain = jobs.imp_config(tmp_path / "plain", toy_bert, toy_text)
    ranks = jobs.imp_config(tmp_path / "ranks", toy_bert, toy_text, stage)
    jobs.find(plain)
    jobs.find(ranks, two_ranks)
    for sparsity in (0.1, 0.2, 0.3):
        masks = [load_mask(Run(Path(config.run)).rung_mask(sparsity)) for config in (plain, ranks)]
        assert masks[0] == masks[1]


@pytest.mark.parametrize("stage", [None, *STAGES])
@pytest.mark.parametrize("rewind", ["theta0", "none"])
@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(
    two_ranks: RankPool, toy_bert: Path, toy_text: Path, tmp_path: Path, stage: int | None, rewind: str
) -> None:
    """Killed in the middle of the second rung."""
    whole, broken = (
        jobs.imp_config(tmp_path / name, toy_bert, toy_text, stage, dropout=0.1, rewind=rewind)
        for name in ("whole", "broken")
    )
    pool = None if stage is None else two_ranks
    jobs.find(whole, pool)
    if pool is None:
        jobs.killed_after(jobs.World(), broken, 8)
    else:
        pool.run(jobs.killed_after, broken, 8)
    jobs.find(broken, pool)
    assert jobs.same(jobs.last_values(whole), jobs.last_values(broken))
    for sparsity in (0.1, 0.2, 0.3):
        masks = [load_mask(Run(Path(config.run)).rung_mask(sparsity)) for config in (whole, broken)]
        assert masks[0] == masks[1]


@pytest.mark.parametrize(
    "killed_after", [pytest.param(3, marks=pytest.mark.slow), 5, pytest.param(8, marks=pytest.mark.slow)]
)
def test_a_killed_run_records_the_same_flips(toy_bert: Path, toy_text: Path, tmp_path: Path, killed_after: int) -> None:
    """Killed in a rung before its mask was looked at, with a checkpoint of its end, and after a look."""
    whole, broken = (
        jobs.imp_config(tmp_path / name, toy_bert, toy_text, save_every=1, watch_every=4, log_every=1)
        for name in ("whole", "broken")
    )
    jobs.find(whole)
    jobs.killed_after(jobs.World(), broken, killed_after)
    jobs.find(broken)
    flips = [
        [
            line.get("mask/flips/total")
            for line in map(json.loads, Run(Path(config.run)).metrics.read_text().splitlines())
        ]
        for config in (whole, broken)
    ]
    assert flips[0] == flips[1]
    assert sum(number is not None and number > 0 for number in flips[0]) == 3, "each pruning is seen"


@pytest.mark.parametrize("decoder", ["masked", "unmasked"])
def test_zeros_hold_to_the_end_with_either_decoder(
    toy_bert: Path, toy_text: Path, tmp_path: Path, decoder: str
) -> None:
    config = jobs.imp_config(tmp_path / "run", toy_bert, toy_text, decoder=decoder, save_every=3, weight_decay=0.1)
    jobs.find(config)
    folders = sorted((Path(config.run) / "checkpoints").iterdir())
    assert len(folders) == 2
    for folder in folders:
        rung = read_json(folder / "state.json")["rung"]
        mask = load_mask(Run(tmp_path / "run").rung_mask((0.1, 0.2, 0.3)[rung]))
        values = jobs.checkpoint_values(folder)
        assert all(not values[name][~keep].any() for name, keep in mask.items())
        assert "cls.predictions.decoder.weight" not in values  # It is the embedding, or theta_0's and frozen.
