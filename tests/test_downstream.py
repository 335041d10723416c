"""From masks to a page of scores, as a user starts it: sweeps, searches that end in one, the paper's recipe."""

from __future__ import annotations

import csv
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finemask_ds.config import MagnitudeConfig, SweepConfig, TamtRecipeConfig
from finemask_ds.data.tasks import task_named
from finemask_ds.dispatch.plan import Plan
from finemask_ds.downstream import search_then_sweep, sweep
from finemask_ds.engine.damage import newest_step
from finemask_ds.errors import UserError
from finemask_ds.finetune.job import check_tasks
from finemask_ds.masks.files import load_mask
from finemask_ds.options import parse
from finemask_ds.recipes.stages import Stage, run_stage, run_stages
from finemask_ds.recipes.tamt import BANDS, compare, plan_of, run_recipe
from finemask_ds.run import Run, read_json
from finemask_ds.session import search
from finemask_ds.signals import REPEAT_SEC, Interrupted
from tests.conftest import REPOSITORY
from tests.dispatch.toys import until
from tests.report.fakes import Fakes
from tests.search import jobs
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


def test_an_unknown_task_of_a_sweep_is_told_by_the_option_that_sweeps_have() -> None:
    with pytest.raises(UserError, match=r"^--tasks 'mrpc,cola' is unknown; type one of cola, "):
        sweep(SweepConfig(tasks=("mrpc,cola",)))


def test_a_warm_up_too_long_for_one_of_the_cells_is_told_before_any(
    toy_bert: Path, toy_tasks: Path, tmp_path: Path
) -> None:
    """With 16 rows one step of 16 in each of three epochs; all 48 rows have three."""
    asked: dict[str, Any] = {"model": str(toy_bert), "data": str(toy_tasks), "tasks": ("cola",), "batch_size": 16}
    asked |= {"epochs": 3, "num_samples": (0, 16), "run": str(tmp_path / "s")}
    with pytest.raises(UserError, match=r"--warmup_steps 3 .* less than the 3 steps of --epochs on 16 rows of CoLA"):
        sweep(SweepConfig(warmup_steps=3, **asked))
    assert not (tmp_path / "s").exists()
    check_tasks(SweepConfig(warmup_steps=2, **asked), [task_named("cola")])
    # A row of SQuAD is several windows: only a cell knows how many.
    check_tasks(SweepConfig(warmup_steps=100, **asked), [task_named("squad")])


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"num_samples": (0, 49)}, "--num_samples 49: there are 48 training rows of CoLA; type 1 to 48"),
        ({"seq_len": 65}, "--seq_len 65 is more than the 64 positions of .*; type at most --seq_len 64"),
    ],
    ids=["num_samples", "seq_len"],
)
def test_a_sweep_that_is_refused_leaves_no_plan(
    toy_bert: Path, toy_tasks: Path, tmp_path: Path, more: dict[str, Any], sentence: str
) -> None:
    """Its cells would join those of the command that is mended."""
    with pytest.raises(UserError, match=sentence):
        sweep(SweepConfig(model=str(toy_bert), data=str(toy_tasks), tasks=("cola",), run=str(tmp_path / "s"), **more))
    assert not (tmp_path / "s").exists()


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


def test_a_single_task_is_its_own_average_and_what_fails_by_little_is_seen_to_fail(tmp_path: Path) -> None:
    fakes = Fakes(tmp_path)
    fakes.cell("mrpc", score=0.8)
    (mask,) = fakes.search("omp", 0.5, 1).values()
    fakes.cell("mrpc", mask, method="omp", sparsity=0.5, mask_seed=1, score=0.8 * 0.897)
    (line,) = [one for one in compare(Run(tmp_path), (0.5,)).splitlines() if "keep 90 %" in one]
    assert "at least 89.7% (omp)" in line
    assert line.split()[-1] == "NO"


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


@pytest.mark.parametrize(
    ("dispatch", "more", "sentence"),
    [
        ("local", {"tasks": ("foo",)}, "--tasks 'foo' is unknown"),
        ("local", {"tasks": ("mrpc",), "task_data": "nodata"}, "no folder.*what is --data there is --task_data here"),
        ("slurm", {"job_setup": "setup.sh"}, "^--dispatch slurm: cannot read --job_setup setup.sh"),
        ("slurm", {"job_options": ("array=0-9",)}, "--job_options array=0-9: dispatch sets --array itself"),
        ("slurm", {}, r"there is no sbatch on the PATH of .*--executor is --dispatch here\)$"),
        ("ray", {"job_options": ("num_cpus=many",)}, "--job_options num_cpus=many is no amount of a resource"),
        ("ray", {"ray_address": "127.0.0.1:1"}, "no Ray cluster at 127.0.0.1:1 can be used"),
    ],
)
def test_what_would_end_the_sweep_is_told_before_the_search(
    toy_bert: Path, toy_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dispatch: str,
    more: dict[str, Any], sentence: str,
) -> None:  # fmt: skip
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "squeue", "scontrol") if more else ():
        (tmp_path / "bin" / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    config = jobs.tamt(tmp_path / "run", toy_bert, toy_text, dispatch=dispatch, **more)
    with pytest.raises(UserError, match=sentence):
        search_then_sweep(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"tamt": "--stepz 3"}, "unknown option --stepz"),
        ({"imp": "--lr -1"}, "--lr -1.0 must be at least 0"),
        ({"finetune": "--bogus 1"}, "unknown option --bogus"),
        ({"search": "'unclosed"}, "--search .* cannot be read .No closing quotation."),
        ({"tasks": ("foo",)}, "--tasks 'foo' is unknown"),
        ({"task_data": "nodata", "tasks": ("mrpc",)}, "--data nodata is no folder"),
        ({"finetune": "--num_samples 9999", "tasks": ("sentiment",)}, "--num_samples 9999: there are 1000"),
        ({"finetune": "--warmup_steps 9999", "tasks": ("sentiment",)}, "--warmup_steps 9999 .* rows of sentiment"),
        ({"finetune": "--executor ray --job_options num_cpus=many"}, "num_cpus=many is no amount of a resource"),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_a_recipe_looks_at_all_of_its_stages_before_the_first(
    tmp_path: Path, more: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        run_recipe(TamtRecipeConfig(run=str(tmp_path / "r"), model="builtin", data="builtin", **more))
    assert not (tmp_path / "r").exists()


def test_a_recipe_refuses_what_was_searched_with_other_options(
    toy_bert: Path, toy_text: Path, toy_tasks: Path, tmp_path: Path
) -> None:
    """Though its folder has the same name; where only what is volatile differs it is done."""
    root, more = tmp_path / "r", "--seq_len 16 --batch_size 8 --eval_every 0"
    folder, shared = root / "omp-s0.5-seed1", ("--model", str(toy_bert), "--data", str(toy_text))
    search(parse(MagnitudeConfig, ["--run", str(folder), "--sparsity", "0.5", *shared, *more.split()]))
    asked = {"run": str(root), "model": str(toy_bert), "data": str(toy_text), "task_data": str(toy_tasks)}
    asked |= {"sparsities": (0.5,), "methods": ("omp",), "mask_seeds": (1,), "ranks": 0, "tasks": ("cola",)}
    for changed, said in (
        ({"search": more.replace("16", "32")}, "seq_len was 16, now 32"),
        ({"search": more, "model": "builtin"}, f"model was {toy_bert}, now builtin"),
        ({"search": more, "data": "builtin"}, f"data was {toy_text}, now builtin"),
    ):
        told = rf"^stage omp-s0.5-seed1: {folder} was .*{said}.*\): type another --run DIR$"
        with pytest.raises(UserError, match=told):
            run_recipe(TamtRecipeConfig(**{**asked, **changed}))
    (stage,) = plan_of(TamtRecipeConfig(**asked, search=f"{more} --log_every 7 --eval_every 3")).searches
    with pytest.raises(UserError, match=r"sparsity was 0.5, now 0.7\): type another --root DIR$"):
        run_stages([replace(stage, options=(*stage.options, "--sparsity", "0.7"))], root, shared)
    run_stages([stage], root, ("--model", f"{toy_bert}/", *shared[2:]))
    assert read_json(root / "results.json").keys() == {stage.name}
    assert "restarts" not in read_json(folder / "provenance.json")


SAVES = "trap 'sleep 0.5; touch saved; exit 3' TERM; touch begun; while :; do sleep 0.05; done"
DEAF = "trap '' TERM; touch begun; while :; do sleep 0.05; done"


@pytest.mark.parametrize("script", [SAVES, DEAF])
def test_a_recipe_that_is_asked_to_end_awaits_its_stage_unless_it_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Stage, "command", lambda *_: ["bash", "-c", script])

    def ask() -> None:
        until(Path("begun").exists)
        os.kill(os.getpid(), signal.SIGINT)
        if script == DEAF:
            time.sleep(1.2 * REPEAT_SEC)
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=ask).start()
    with pytest.raises(Interrupted) as ended:
        run_stage(Stage("sweep", "dispatch.py", ranks=0), tmp_path)
    assert ended.value.exit_code == 128 + signal.SIGINT
    assert Path("saved").exists() == (script == SAVES)
    assert not subprocess.run(["pgrep", "-f", script], capture_output=True, check=False).stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGALRM])
def test_a_recipe_that_is_torn_away_has_asked_its_stage_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """By a Ctrl-C that has ended the `| tee` which read what it says, or by an error of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Stage, "command", lambda *_: ["bash", "-c", SAVES])
    reader, writer = os.pipe()
    os.close(reader)
    before = signal.signal(signal.SIGALRM, lambda *_: (1 / 0, None)[1])

    def ask() -> None:
        until(Path("begun").exists)
        os.kill(os.getpid(), number)

    threading.Thread(target=ask).start()
    with io.TextIOWrapper(io.FileIO(writer, "w"), write_through=True) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with pytest.raises(Interrupted if number == signal.SIGINT else ZeroDivisionError):
            run_stage(Stage("sweep", "dispatch.py", ranks=0), tmp_path)
        monkeypatch.undo()
    signal.signal(signal.SIGALRM, before)
    until((tmp_path / "saved").exists)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "number"), [("0", signal.SIGINT), ("2", signal.SIGTERM)])
def test_a_recipe_that_is_asked_to_end_saves_the_step_of_its_search(
    toy_bert: Path, toy_text: Path, toy_tasks: Path, tmp_path: Path, ranks: str, number: signal.Signals
) -> None:
    root, log = tmp_path / "r", tmp_path / "log"
    process = start([
        *(sys.executable, "-m", "finemask_ds", "recipe", "tamt", "--run", str(root), "--model", str(toy_bert)),
        *("--data", str(toy_text), "--task_data", str(toy_tasks), "--tasks", "cola", "--sparsities", "0.5"),
        *("--methods", "tamt-kd", "--mask_seeds", "1", "--ranks", ranks, "--search", "--seq_len 16 --batch_size 8"),
        *("--tamt", "--steps 100000 --schedule_steps 100000 --save_every 10 --eval_every 0"),
    ], log)  # fmt: skip
    run = root / "tamt-kd-s0.5-seed1"
    try:
        until(lambda: newest_step(run / "checkpoints") >= 10 or process.poll() is not None)
        process.send_signal(number)
        assert process.wait(timeout=60) == 128 + number, log.read_text()
    except BaseException:
        process.kill()
        subprocess.run(["pkill", "-KILL", "-f", str(run)], check=False)  # Its stage has a session of its own.
        raise
    said = log.read_text()
    (step,) = re.findall(r"^finemask: SIGTERM: checkpoint at step (\d+) in ", said, re.M)
    assert newest_step(run / "checkpoints") == int(step)
    assert said.endswith("finemask: asked to end; the same command goes on\n")
    assert "Traceback" not in said
    assert not subprocess.run(["pgrep", "-f", str(run)], capture_output=True, check=False).stdout


def test_a_plan_is_not_written_into_the_run_directory_of_a_search(toy_mask: Path, tmp_path: Path) -> None:
    Run.open(tmp_path / "omp", {}, {}, "omp")
    with pytest.raises(UserError, match="omp is the run directory of a search or a fine-tuning; type another --run"):
        Plan.write(tmp_path / "omp", [])
    assert sorted(path.name for path in (tmp_path / "omp").iterdir()) == ["config.json"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_fine_tuning_that_is_asked_to_end_saves_and_goes_on(
    toy_bert: Path, toy_tasks: Path, toy_mask: Path, tmp_path: Path, number: signal.Signals
) -> None:
    options = ["--task", "cola", "--model", str(toy_bert), "--data", str(toy_tasks), "--mask", str(toy_mask)]
    options += ["--run", str(tmp_path / "run"), "--steps", "100000", "--save_every", "10", "--eval_every", "0"]
    process = subprocess.Popen(
        [sys.executable, "launcher/finetune.py", *options], cwd=REPOSITORY, text=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while newest_step(tmp_path / "run/checkpoints") < 10:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 128 + number
    assert said.endswith("finemask: asked to end; the same command goes on\n")
    assert "Traceback" not in said
