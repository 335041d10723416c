"""What must not go wrong around a search: its end, its kept masks, its run directory, its hosts, its global start."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from finemask_ds.config import PretrainConfig, TamtConfig
from finemask_ds.engine.shared import check_same
from finemask_ds.engine.termination import Terminated, Termination
from finemask_ds.engine.world import World
from finemask_ds.errors import UserError
from finemask_ds.lock import Lock
from finemask_ds.masks.files import load_mask
from finemask_ds.run import Run, cache_dir, read_json
from finemask_ds.search.dense import builtin_folder
from finemask_ds.search.selection import EMBEDDING_DENSITY
from finemask_ds.search.setting import Trainer
from finemask_ds.session import search
from tests.pool import RankPool
from tests.search import jobs
from tests.search.jobs import mask_of
from tests.toys import write_headless

SHORT = functools.partial(PretrainConfig, steps=2, warmup_steps=1)
"""How the built-in model is made here."""


@pytest.mark.parametrize("method", ["tamt", pytest.param("imp", marks=pytest.mark.slow)])
def test_a_search_that_is_asked_to_end_in_its_last_evaluation_loses_nothing(
    toy_bert: Path, toy_text: Path, tmp_path: Path, method: str
) -> None:
    config, other = (
        jobs.either(method, tmp_path / name, toy_bert, toy_text, save_every=0, eval_every=1000)
        for name in ("run", "other")
    )
    termination = Termination()
    evaluate = Trainer._evaluate

    def asked(trainer: Trainer, *arguments: object) -> None:
        termination.asked = True
        evaluate(trainer, *arguments)

    with mock.patch.object(Trainer, "_evaluate", asked), pytest.raises(Terminated, match="the same command goes on"):
        search(config, World(termination=termination))
    trained = jobs.losses(config)
    jobs.find(config)
    if method == "tamt":
        assert jobs.losses(config) == trained, "no step was taken again"
    jobs.find(other)
    assert mask_of(config) == mask_of(other)
    assert jobs.losses(config) == jobs.losses(other)


def test_a_search_that_is_asked_to_end_logs_what_it_has_trained(toy_bert: Path, toy_text: Path, tmp_path: Path) -> None:
    """Between two lines of the log; the line after counts only what comes after."""
    config = jobs.tamt(tmp_path / "run", toy_bert, toy_text, steps=12, log_every=10, eval_every=0, watch_every=0)
    termination, agree = Termination(), Trainer._agree

    def asked(trainer: Trainer, step: int) -> None:
        termination.asked = step == 7
        agree(trainer, step)

    with mock.patch.object(Trainer, "_agree", asked), pytest.raises(Terminated, match="at step 8"):
        search(dataclasses.replace(config, agree_every=1), World(termination=termination))
    jobs.find(config)
    lines = [json.loads(line) for line in Run(tmp_path / "run").metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == [8, 10, 12]
    for line in lines:
        assert line["speed/step_sec"] * line["speed/tokens_per_sec"] == pytest.approx(8 * 16), "tokens of a step"
    hours = read_json(Run(tmp_path / "run").provenance)["core_hours"]
    assert 0 < hours * 3600 < 60


def test_masks_on_the_way_are_exact_between_selections(toy_bert: Path, toy_text: Path, tmp_path: Path) -> None:
    kept, plain = (
        jobs.tamt(tmp_path / name, toy_bert, toy_text, threshold_every=4, keep_every=every, steps=7, mask_lr=1e-2)
        for name, every in (("kept", 3), ("plain", 0))
    )
    jobs.find(kept)
    jobs.find(plain)
    snapshots = [load_mask(path) for path in Run(tmp_path / "kept").masks_on_the_way()]
    assert len(snapshots) == 2
    for mask in snapshots:
        weights = {name: mask.num_weights(name) for name in mask}
        assert all(mask.num_kept(name) == n - round(kept.sparsity * n) for name, n in weights.items())
    assert mask_of(kept) == mask_of(plain), "keeping changes nothing"


def test_two_searches_in_one_run_directory_are_refused(toy_bert: Path, toy_text: Path, tmp_path: Path) -> None:
    config = jobs.tamt(tmp_path / "run", toy_bert, toy_text, steps=3)
    with Lock(Run(tmp_path / "run").lock).owned("", wait=False):
        with pytest.raises(UserError, match=r"run is in use by process .* wait for its end, or type another --run"):
            jobs.find(config)
        assert not Run(tmp_path / "run").mask.exists()
    jobs.find(config)
    assert not Run(tmp_path / "run").lock.exists()


@pytest.mark.parametrize("method", ["tamt", pytest.param("imp", marks=pytest.mark.slow)])
def test_what_is_told_of_a_head_can_be_typed_for_the_same_run_directory(
    toy_bert: Path, toy_text: Path, tmp_path: Path, method: str
) -> None:
    headless = write_headless(tmp_path / "headless", toy_bert)
    for model, wrong, told, right in (
        (headless, 0, "no MLM head to train with; type --head_steps N", 2),
        (toy_bert, 2, "an MLM head already; remove --head_steps 2", 0),
    ):
        run = tmp_path / f"run-{wrong}"
        options = {"sparsity": 0.1, **({"steps": 2} if method == "tamt" else {"interval_steps": 2})}
        with pytest.raises(UserError, match=told):
            jobs.find(jobs.either(method, run, model, toy_text, head_steps=wrong, **options))
        assert not run.exists()
        jobs.find(jobs.either(method, run, model, toy_text, head_steps=right, **options))
        assert Run(run).mask.exists()
    heads = cache_dir() / "heads"
    made = {path: path.stat().st_mtime_ns for path in heads.rglob("*")}
    assert made
    jobs.find(jobs.either(method, tmp_path / "again", headless, toy_text, head_steps=2, **options))
    assert {path: path.stat().st_mtime_ns for path in heads.rglob("*")} == made, "a head that is there is only read"


@pytest.mark.slow
def test_ranks_that_cannot_make_the_built_in_model_are_told_who_can(
    pools: dict[int, RankPool], toy_bert: Path, toy_text: Path, tmp_path: Path
) -> None:
    """Three ranks share the search's 48 sequences, not the 16 of a step of the built-in model's training."""
    asked = (built_in, tmp_path, toy_text, jobs.stage_file(2), {"batch_size": 48})
    told = pools[3].run(*asked)
    assert all("type python launcher/pretrain.py first" in one for one in told), told
    with mock.patch.dict(os.environ, FINEMASK_CACHE=str(tmp_path)):
        shutil.copytree(toy_bert, builtin_folder(SHORT()))
    assert pools[3].run(*asked) == ["made"] * 3


def test_a_file_that_asks_for_what_it_cannot_have_is_refused_before_the_run_directory(
    two_ranks: RankPool, toy_bert: Path, toy_text: Path, tmp_path: Path
) -> None:
    (tmp_path / "x.json").write_text('{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}')
    config = jobs.tamt(tmp_path / "run", toy_bert, toy_text)
    config = dataclasses.replace(config, deepspeed=str(tmp_path / "x.json"))
    assert all("from which no checkpoint can be written" in told for told in two_ranks.run(jobs.failed, config))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_numbers_of_the_searchs_file_are_none_of_the_built_in_models(
    two_ranks: RankPool, toy_text: Path, tmp_path: Path
) -> None:
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"train_batch_size": 48, "gradient_clipping": 0.5, "zero_optimization": {"stage": 1}}))
    told = two_ranks.run(built_in, tmp_path, toy_text, str(file), {"batch_size": 16})
    assert all('fixes "train_batch_size" to 48 but --batch_size is 16' in one for one in told), told
    told = two_ranks.run(built_in, tmp_path, toy_text, str(file), {"batch_size": 48})
    assert all('fixes "gradient_clipping" to 0.5 but --max_grad_norm is 1.0' in one for one in told), told
    assert (
        two_ranks.run(built_in, tmp_path, toy_text, str(file), {"batch_size": 48, "max_grad_norm": 0.5}) == ["made"] * 2
    )


def built_in(world: World, cache: Path, text: Path, file: str, options: dict[str, Any]) -> str:
    """What a search on the built-in model says, or ``made`` once it has that model, trained for two steps."""
    config = TamtConfig(model="builtin", data=str(text), seq_len=16, deepspeed=file, **options)
    with (
        mock.patch.dict(os.environ, FINEMASK_CACHE=str(cache)),
        mock.patch("finemask_ds.search.dense.PretrainConfig", SHORT),
        mock.patch("finemask_ds.session.open_setting", side_effect=InterruptedError),
    ):
        try:
            search(config, world)
        except UserError as error:
            return str(error)
        except InterruptedError:
            return "made"
    return ""


def test_hosts_with_other_content_under_the_same_name_are_refused(two_ranks: RankPool) -> None:
    assert two_ranks.run(other_content, {"the model m": "x", "the text t": "y"}, {}) == ["", ""]
    for said in two_ranks.run(other_content, {"the model m": "x", "the text t": "y"}, {"the text t": "z"}):
        assert said.startswith("the text t on ")
        assert "is not the same as on" in said


def other_content(world: World, told: dict[str, str], differing: dict[str, str]) -> str:
    """What ``check_same`` says where rank 1 has something else."""
    try:
        check_same(world, told | (differing if world.rank else {}))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "sparsity", [pytest.param(0.1, marks=pytest.mark.slow), 0.7, pytest.param(0.9, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("init", ["activations", "reconstruction"])
def test_a_global_search_starts_even_with_the_embedding_sparser(
    toy_bert: Path, toy_text: Path, tmp_path: Path, init: str, sparsity: float
) -> None:
    config = jobs.tamt(tmp_path / "run", toy_bert, toy_text, init=init, scope="global", sparsity=sparsity, steps=2)
    jobs.find(config)
    start = load_mask(Run(tmp_path / "run").start_mask)
    total = sum(start.num_weights(name) for name in start)
    assert sum(start.num_kept(name) for name in start) == total - round(sparsity * total)
    density = {name: start.num_kept(name) / start.num_weights(name) for name in start}
    embedding = density.pop("bert.embeddings.word_embeddings.weight")
    others = list(density.values())
    assert max(others) - min(others) < 0.01
    assert embedding < 1 - sparsity < min(others)
    if sparsity > 0.5:
        assert embedding == pytest.approx(EMBEDDING_DENSITY * (1 - sparsity), rel=0.02)
