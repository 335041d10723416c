"""Magnitudes weighed by their inputs: against norms taken by hand, no trace left; starts are the same on all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finemask_ds.config import TamtConfig
from finemask_ds.engine.world import this_process
from finemask_ds.errors import UserError
from finemask_ds.masks.files import load_mask
from finemask_ds.masks.select import select
from finemask_ds.run import Run
from finemask_ds.search.activations import NUM_TOKENS, activation_magnitudes
from finemask_ds.search.reconstruction import reconstruction_sizes
from finemask_ds.search.setting import open_setting
from tests.pool import RankPool
from tests.search import jobs

SIZES = {"activations": activation_magnitudes, "reconstruction": reconstruction_sizes}


def test_they_are_magnitudes_times_the_norms_of_the_inputs(toy_bert: Path, toy_text: Path, tmp_path: Path) -> None:
    config = jobs.tamt(tmp_path / "run", toy_bert, toy_text, targets="authors")
    setting = open_setting(config, this_process(), model=config.model, data=config.data)
    theta0 = setting.theta0()
    found = activation_magnitudes(theta0, setting)
    tokens = torch.from_numpy(setting.corpus.train[: NUM_TOKENS // config.seq_len].astype("int64"))
    with torch.no_grad():
        hidden = theta0.model.bert(input_ids=tokens, output_hidden_states=True).hidden_states
    weights, query = theta0.targets, "bert.encoder.layer.0.attention.self.query.weight"
    by_hand = weights[query].abs() * hidden[0].double().square().sum((0, 1)).sqrt().float()
    torch.testing.assert_close(found[query], by_hand, rtol=1e-6, atol=0)
    pooler = "bert.pooler.dense.weight"  # Reads the first token alone.
    by_hand = weights[pooler].abs() * hidden[-1][:, 0].double().square().sum(0).sqrt().float()
    torch.testing.assert_close(found[pooler], by_hand, rtol=1e-6, atol=0)
    embedding = "bert.embeddings.word_embeddings.weight"
    occurrences = torch.tensor([int((tokens == token).sum()) for token in range(weights[embedding].shape[0])])
    by_hand = weights[embedding].abs() * (1 + occurrences).double().sqrt().float()[:, None]
    assert torch.equal(found[embedding], by_hand)
    assert found.keys() == weights.keys()
    assert not any(theta0.model.get_submodule(name.removesuffix(".weight"))._forward_hooks for name in weights)


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("init", SIZES)
@pytest.mark.slow
def test_ranks_start_from_the_mask_of_one_process(
    two_ranks: RankPool, toy_bert: Path, toy_text: Path, tmp_path: Path, init: str, stage: int
) -> None:
    plain = jobs.tamt(tmp_path / "plain", toy_bert, toy_text, init=init, steps=3)
    shared = jobs.tamt(tmp_path / "ranks", toy_bert, toy_text, stage, init=init, steps=3)
    jobs.find(plain)
    jobs.find(shared, two_ranks)
    setting = open_setting(plain, this_process(), model=plain.model, data=plain.data)
    expected = select(SIZES[init](setting.theta0(), setting), plain.sparsity)
    for config in (plain, shared):
        start = load_mask(Run(Path(config.run)).start_mask)
        assert all(torch.equal(start[name], chosen.mask) for name, chosen in expected.items())


def test_a_preset_gives_what_is_not_typed() -> None:
    paper, fast = TamtConfig(), TamtConfig(preset="fast", steps=50)
    assert (paper.init, paper.peak_mask_lr, paper.num_steps) == ("binary", 5e-5, 17_000)
    assert (fast.init, fast.num_steps, fast.num_schedule_steps) == ("reconstruction", 50, 50)
    assert fast.peak_mask_lr > paper.peak_mask_lr
    assert paper.identity()["init"] == TamtConfig.defaults()["init"]
    assert TamtConfig(preset="fast", init="ranked").init == "ranked"
    assert (paper.scope, fast.scope, TamtConfig(preset="fast", scope="local").scope) == ("local", "global", "local")
    with pytest.raises(UserError, match="--preset 'quick' is unknown; type one of paper, fast"):
        TamtConfig(preset="quick")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"schedule_steps": 0}, "--schedule_steps 0 must be at least 1"),
        (
            {"steps": 100, "schedule_steps": 10},
            "--schedule_steps 10 would .* at least the 100 of --steps",
        ),
        ({"mask_lr": float("inf")}, "--mask_lr inf is too large"),
        ({"mask_lr": float("nan")}, "--mask_lr nan must be at least 0"),
        ({"seed": 2**63}, "--seed 9223372036854775808 is too large"),
        ({"finetune_seeds": (1, -1)}, "--finetune_seeds -1 must be at least 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_numbers_that_cannot_be_are_sentences(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        TamtConfig(**options)
