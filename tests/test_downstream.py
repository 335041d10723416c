"""From masks to a page of scores, as a user starts it: sweeps, searches that end in one, the paper's recipe."""

from __future__ import annotations

import csv
import subprocess
from pathlib import Path

import pytest

from finemask_ds.config import TamtRecipeConfig
from finemask_ds.dispatch.plan import Plan
from finemask_ds.errors import UserError
from finemask_ds.masks.files import load_mask
from finemask_ds.recipes.tamt import BANDS, plan_of
from finemask_ds.run import read_json
from tests.test_launchers import deepspeed, leaks, python, start

QUICK = ("--steps", "4", "--batch_size", "8", "--seq_len", "32", "--eval_every", "2", "--lr", "1e-3")


def results(root: Path) -> dict[str, int]:
    """Cell -> when its result was written, in ns."""
    return {path.parent.name: path.stat().st_mtime_ns for path in root.glob("cells/*/result.json")}


@pytest.mark.slow
def test_a_sweep_ends_in_a_page_and_a_second_call_runs_nothing(
    toy_bert: Path, toy_tasks: Path, toy_mask: Path, tmp_path: Path
) -> None:
    options = [
        *("--model", str(toy_bert), "--data", str(toy_tasks), "--masks", str(toy_mask), "--run", str(tmp_path / "s")),
        *("--tasks", "cola", "stsb", *QUICK),
    ]  # fmt: skip
    first = python("dispatch.py", *options, "--seeds", "1")
    assert first.returncode == 0, first.stderr
    before = results(tmp_path / "s")
    assert len(before) == 4
    again = python("dispatch.py", *options, "--seeds", "1", "2")
    assert again.returncode == 0, again.stderr
    after = results(tmp_path / "s")
    assert len(after) == 8
    assert {name: after[name] for name in before} == before
    assert {len(list(folder.glob("attempt-*"))) for folder in (tmp_path / "s/cells").iterdir()} == {1}
    with open(tmp_path / "s/report/cells.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert sorted((row["task"], row["method"], row["seed"]) for row in rows) == sorted(
        (task, method, seed) for task in ("cola", "stsb") for method in ("full", "random") for seed in "12"
    )
    assert "<table" in (tmp_path / "s/report/index.html").read_text()
    assert "full" in again.stdout
    assert "random" in again.stdout


@pytest.mark.slow
def test_bad_input_is_one_sentence_before_anything_starts(
    toy_bert: Path, toy_roberta: Path, toy_tasks: Path, toy_mask: Path, tmp_path: Path
) -> None:
    mine = ("--masks", str(toy_mask), "--run", str(tmp_path / "s"))
    for sentence, options in (
        ("'moli' is unknown", ("--model", str(toy_bert), "--data", str(toy_tasks), "--tasks", "moli", *mine)),
        ("rte", ("--model", str(toy_bert), "--data", str(toy_tasks), "--tasks", "cola", "rte", *mine)),
        ("is a mask for toy", ("--model", str(toy_roberta), "--data", str(toy_tasks), "--tasks", "cola", *mine)),
        ("there is nothing to fine-tune", ("--full", "no", "--run", str(tmp_path / "s"))),
    ):
        ended = python("dispatch.py", *options)
        assert ended.returncode == 2, ended.stderr
        (line,) = ended.stderr.strip().splitlines()
        assert sentence in line.lower()
        assert not (tmp_path / "s").exists(), sentence


@pytest.mark.slow
def test_a_search_under_deepspeed_dispatches_once_its_ranks_are_gone(
    toy_bert: Path, toy_text: Path, toy_tasks: Path, tmp_path: Path
) -> None:
    """The first rank becomes the dispatcher, so the launcher waits for the page and tells its exit code."""
    command = deepspeed(
        "tamt.py", "--model", str(toy_bert), "--data", str(toy_text), "--run", str(tmp_path / "run"), "--steps", "4",
        *("--seq_len", "16", "--batch_size", "8", "--eval_every", "0", "--objective", "kd", "--dispatch", "local"),
        *("--tasks", "acceptability", "cola", "--task_data", str(toy_tasks), "--finetune_seeds", "1"),
    )  # fmt: skip
    log = tmp_path / "log"
    process = start(command, log)
    try:
        code = process.wait(timeout=300)
    finally:
        process.kill()
    assert code == 0, log.read_text()
    sweep = tmp_path / "run/downstream"
    assert {cell.method for cell in Plan.read(sweep).cells} == {"full", "tamt-kd"}
    assert len(results(sweep)) == 4
    assert (sweep / "report/index.html").exists()
    assert leaks(tmp_path) == [], "config, provenance, plan, results, TensorBoard, logs of ranks and workers, report"
    left = subprocess.run(["pgrep", "-f", str(sweep)], capture_output=True, text=True, check=False).stdout
    assert left == ""


def test_the_recipe_of_the_paper_is_nested_and_shares_imps_rungs() -> None:
    plan = plan_of(TamtRecipeConfig(run="r", sparsities=(0.5, 0.7, 0.75), mask_seeds=(1, 2)))
    names = [stage.name for stage in plan.searches]
    assert sum(name.startswith("omp") for name in names) == 3
    assert sum(name.startswith("random") for name in names) == 6
    assert sorted(name for name in names if name.startswith("imp")) == ["imp-s0.75-seed1", "imp-s0.75-seed2"]
    assert sum(name.startswith("tamt") for name in names) == 3 * 3 * 2
    assert len(plan.masks) == 3 + 3 * 2 * 5
    assert Path("r/imp-s0.75-seed2/masks/0.7.safetensors") in plan.masks
    assert all(name.count("seed") == 1 for name in names)
    with pytest.raises(UserError, match="--methods 'lth' is unknown"):
        TamtRecipeConfig(methods=("lth",))


def test_the_papers_statements_need_cells_to_hold() -> None:
    assert all(band.check({}) == ("-", None) for band in BANDS)


@pytest.mark.slow
def test_the_recipe_of_the_paper_runs_whole_in_miniature(
    toy_bert: Path, toy_text: Path, toy_tasks: Path, tmp_path: Path
) -> None:
    search = "--seq_len 16 --batch_size 8 --eval_every 0 --log_every 100"
    command = [
        *("-m", "finemask_ds", "recipe", "tamt", "--run", str(tmp_path / "r"), "--model", str(toy_bert)),
        *("--data", str(toy_text), "--task_data", str(toy_tasks), "--tasks", "cola", "stsb", "--sparsities", "0.1"),
        *("0.2", "--methods", "random", "omp", "imp", "tamt-kd", "--mask_seeds", "1", "2", "--finetune_seeds", "1"),
        *("--ranks", "0", "--search", search, "--tamt", "--steps 3", "--imp", "--interval_steps 2"),
        *("--finetune", " ".join(QUICK)),
    ]  # fmt: skip
    ended = python("", command=command)
    assert ended.returncode == 0, ended.stderr
    assert "12 searches, 14 masks to fine-tune" in ended.stdout
    # A mask that two seeds agree on (IMP's first rung is theta_0's) is one mask, and its cells are the same cells.
    masks = [load_mask(path) for path in (tmp_path / "r").glob("*-seed?/mask.safetensors")]
    masks += [load_mask(path) for path in (tmp_path / "r").glob("imp-*/masks/0.1.safetensors")]
    different = {(mask.provenance["method"], mask.fingerprint()) for mask in masks}
    assert len(masks) == 14
    assert len(results(tmp_path / "r/downstream")) == (len(different) + 1) * 2
    assert ended.stdout.count("no data") >= 3
    scores = read_json(tmp_path / "r/results.json")
    assert len(scores) == 12
