"""One cell: every task ends in a whole result; what it starts from decides it; a killed one ends as if never killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from finemask_ds.config import Config, FinetuneConfig, PretrainConfig, SweepConfig
from finemask_ds.data.examples import load_split
from finemask_ds.data.tasks import task_named
from finemask_ds.engine.world import this_process
from finemask_ds.errors import UserError
from finemask_ds.finetune.cell import measure_cell, run_cell
from finemask_ds.finetune.evaluate import Split
from finemask_ds.finetune.give import model_card, write_predictions
from finemask_ds.finetune.job import with_model
from finemask_ds.finetune.train import fine_tune
from finemask_ds.masks.files import load_mask, save_mask
from finemask_ds.masks.mask import Mask
from finemask_ds.report.cells import SETTINGS
from finemask_ds.run import Run, read_json
from finemask_ds.signals import Interrupted, Interruption
from tests.conftest import REPOSITORY
from tests.pool import free_port

QUICK: dict[str, Any] = {
    "steps": 6, "batch_size": 8, "seq_len": 32, "eval_every": 3, "lr": 1e-3, "log_every": 3, "save_every": 4,
}  # fmt: skip
TASKS = ("cola", "mrpc", "stsb", "mnli", "squad")


def cell(model: Path, data: Path, folder: Path, task: str = "cola", **more: Any) -> dict[str, Any]:
    options = {**QUICK, "task": task, "model": str(model), "data": str(data), **more}
    return fine_tune(FinetuneConfig(run=str(folder), **options), this_process(), model=str(model))


def comparable(result: dict[str, Any]) -> dict[str, Any]:
    """All that does not depend on the clock."""
    return {
        key: value for key, value in result.items() if key not in {"seconds", "peak_memory_gib", "run", "steps_sec"}
    }


@pytest.mark.parametrize("task", TASKS)
def test_every_kind_of_task_ends_in_a_whole_result(
    task: str, toy_bert: Path, toy_tasks: Path, toy_mask: Path, tmp_path: Path
) -> None:
    result = cell(toy_bert, toy_tasks, tmp_path / "run", task, mask=str(toy_mask))
    assert read_json(tmp_path / "run/result.json") == {key: result[key] for key in result if key != "run"}
    assert result["task"] == task
    assert set(SETTINGS) - {"train_sha256", "data_sha256"} <= result.keys()
    assert result["train_rows"] == (24 if task == "squad" else 48)
    assert result["dev_rows"] == result["train_rows"]
    assert result["metric"] == next(iter(result["metrics"]))
    assert result["method"] == "random"
    assert result["mask_seed"] == 3
    assert result["sparsity"] == pytest.approx(load_mask(toy_mask / "mask.safetensors").sparsity(), abs=2e-3)
    assert [point["step"] for point in result["curve"]] == [3, 6]
    assert (result["mismatched"] is not None) == (task == "mnli")
    defined = [value for point in result["curve"] if (value := point["metrics"][result["metric"]]) is not None]
    assert result["score"] == max(defined, default=None)
    assert result["last_score"] == result["curve"][-1]["metrics"][result["metric"]]
    assert not Run(tmp_path / "run").checkpoints.exists()


def test_a_done_cell_returns_its_result_at_once(toy_bert: Path, toy_tasks: Path, tmp_path: Path) -> None:
    first = cell(toy_bert, toy_tasks, tmp_path / "run")
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    assert cell(toy_bert, toy_tasks, tmp_path / "run") == first
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_the_seed_decides_and_nothing_else(toy_bert: Path, toy_tasks: Path, tmp_path: Path) -> None:
    one, again, other = (
        cell(toy_bert, toy_tasks, tmp_path / name, "stsb", seed=seed)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )  # fmt: skip
    assert comparable(one) == comparable(again)
    assert one["curve"] != other["curve"]


def test_an_all_ones_mask_is_the_full_model(toy_bert: Path, toy_tasks: Path, toy_mask: Path, tmp_path: Path) -> None:
    mask = load_mask(toy_mask / "mask.safetensors")
    save_mask(tmp_path / "ones.safetensors", Mask.full_like(mask.shapes).with_provenance(mask.provenance))
    kept = cell(toy_bert, toy_tasks, tmp_path / "ones", "stsb", mask=str(tmp_path / "ones.safetensors"))
    full = cell(toy_bert, toy_tasks, tmp_path / "full", "stsb")
    assert kept["curve"] == full["curve"]


def test_num_samples_cuts_the_training_rows_alone(toy_bert: Path, toy_tasks: Path, tmp_path: Path) -> None:
    result = cell(toy_bert, toy_tasks, tmp_path / "run", num_samples=10)
    assert (result["train_rows"], result["dev_rows"]) == (10, 48)


def test_micro_batches_change_no_score(toy_bert: Path, toy_tasks: Path, tmp_path: Path) -> None:
    """Nor the training loss, though every fourth step has 6 rows for the 14 of the others: steps count alike."""
    same: dict[str, Any] = {"batch_size": 14, "eval_every": 2, "log_every": 2, "dropout": 0.0}
    whole, cut = (
        cell(toy_bert, toy_tasks, tmp_path / str(size), "stsb", micro_batch_size=size, **same) for size in (0, 2)
    )
    for one, two in zip(whole["curve"], cut["curve"], strict=True):
        assert one["metrics"] == pytest.approx(two["metrics"], abs=1e-4)
        assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-4)


def test_an_undefined_score_is_null_with_its_reason(toy_bert: Path, toy_tasks: Path, tmp_path: Path) -> None:
    """Without a step of any size a fresh head on constant rows predicts a constant."""
    root = tmp_path / "STS-B"
    root.mkdir()
    header, *rows = (toy_tasks / "glue/STS-B/train.tsv").read_text().splitlines()
    text = "\n".join([header, *(rows[0].rsplit("\t", 1)[0] + f"\t{number % 6}" for number in range(16))]) + "\n"
    for name in ("train.tsv", "dev.tsv"):
        (root / name).write_text(text)
    result = cell(toy_bert, root, tmp_path / "run", "stsb")
    assert result["score"] is None
    assert "all 16 predictions are" in result["undefined"]


def test_the_cost_is_measured_without_a_trace(toy_bert: Path, toy_tasks: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    options = {**QUICK, "task": "cola", "model": str(toy_bert), "data": str(toy_tasks)}
    assert measure_cell(options) > 0
    assert sorted(tmp_path.iterdir()) == before
    run_cell(options, tmp_path / "cell", Interruption())
    assert read_json(tmp_path / "cell/result.json")["task"] == "cola"


def launcher(model: Path, data: Path, run: Path, *more: str) -> list[str]:
    options = {**QUICK, "task": "mnli", "model": str(model), "data": str(data), "run": str(run)}
    return ["launcher/finetune.py", *(f"--{name}={value}" for name, value in options.items()), *more]


@pytest.mark.slow
def test_a_killed_cell_goes_on_as_if_never_killed(toy_bert: Path, toy_tasks: Path, tmp_path: Path) -> None:
    """MNLI keeps the weights of its best evaluation, which must survive too."""
    more = ("--steps=400", "--eval_every=20", "--save_every=30")
    command = [sys.executable, *launcher(toy_bert, toy_tasks, tmp_path / "run", *more)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/checkpoints/step-60").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run/result.json").exists()
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, timeout=120)
    undisturbed = cell(toy_bert, toy_tasks, tmp_path / "other", "mnli", steps=400, eval_every=20, save_every=30)
    assert comparable(read_json(tmp_path / "run/result.json")) == comparable(undisturbed)


@pytest.mark.slow
def test_a_cell_that_is_asked_to_end_saves_the_step_it_is_at(toy_bert: Path, toy_tasks: Path, tmp_path: Path) -> None:
    """Whenever it comes: what was done is not done again, and nobody sees in the result that it came."""
    undisturbed = cell(toy_bert, toy_tasks, tmp_path / "whole", "mnli", log_every=1)
    options = {**QUICK, "task": "mnli", "model": str(toy_bert), "data": str(toy_tasks), "log_every": 1}
    run, rounds, steps = Run(tmp_path / "run"), 0, [0]
    with Interruption().watching() as interruption:
        while not run.done("finetune"):
            interruption.signal, rounds = 0, rounds + 1
            with _signalled_after(run.folder / "metrics.jsonl"), contextlib.suppress(Interrupted):
                with interruption.raising():
                    run_cell(options, run.folder, interruption)
            if not run.done("finetune"):
                steps.append(max(int(path.name.removeprefix("step-")) for path in run.checkpoints.iterdir()))
    assert rounds > 2, "it was interrupted"
    # One that is asked after its last step has nothing to save.
    assert steps[:-1] == sorted(set(steps[:-1])), "each round goes on where the last one stood"
    assert comparable(read_json(run.result)) == comparable({**undisturbed, "run": ""})


@contextlib.contextmanager
def _signalled_after(metrics: Path) -> Iterator[None]:
    """SIGTERM to this process as soon as the block has logged one more step."""
    over = threading.Event()

    def watch(size: int) -> None:
        while not over.wait(0.001):
            if metrics.exists() and metrics.stat().st_size > size:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=watch, args=(metrics.stat().st_size if metrics.exists() else 0,))
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.slow
def test_two_ranks_score_as_one(toy_bert: Path, toy_tasks: Path, toy_mask: Path, tmp_path: Path) -> None:
    """Through accelerate, as on two GPUs; dropout is drawn by rank, so without."""
    more = ("--task=squad", f"--mask={toy_mask}", "--dropout=0")
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1",
        "--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={free_port()}",
        *launcher(toy_bert, toy_tasks, tmp_path / "two", *more),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run(command, cwd=REPOSITORY, check=True, timeout=240, env=environment)
    two = read_json(tmp_path / "two/result.json")
    one = cell(toy_bert, toy_tasks, tmp_path / "one", "squad", mask=str(toy_mask), dropout=0.0)
    assert [point["metrics"] for point in two["curve"]] == [point["metrics"] for point in one["curve"]]
    for first, second in zip(one["curve"], two["curve"], strict=True):
        assert first["train_loss"] == pytest.approx(second["train_loss"], rel=1e-4)
    assert two["sparsity"] == one["sparsity"]


def test_bad_input_is_one_sentence_before_anything_is_written(
    toy_bert: Path, toy_roberta: Path, toy_tasks: Path, toy_mask: Path, tmp_path: Path
) -> None:
    (tmp_path / "there").touch()
    cases: list[tuple[str, dict[str, Any]]] = [
        (r"--task 'moli' is unknown; type one of cola, sst2", {"task": "moli"}),
        (r"is a mask for toy .*not for .*roberta", {"model": str(toy_roberta), "mask": str(toy_mask)}),
        (r"there is no mask file .*nowhere", {"mask": str(tmp_path / "nowhere")}),
        (r"--seq_len 65 is more than the 64 positions", {"seq_len": 65}),
        (r"--num_samples 49: there are 48 training rows; type 1 to 48", {"num_samples": 49}),
        (r"there exists and is not written over; type another --save_model", {"save_model": str(tmp_path / "there")}),
        (r"there exists and is not written over; type another --predict", {"predict": str(tmp_path / "there")}),
        (r"there/new cannot be written, as .*there is no folder", {"predict": str(tmp_path / "there/new")}),
        (r"run is where the run itself goes", {"save_model": str(tmp_path / "run")}),
        (r"type another --predict", {"predict": str(tmp_path)}),
        (r"--mixed_precision fp16 needs an accelerator", {"mixed_precision": "fp16"}),
        (r"--warmup_steps 6 would .*; type less than the 6 steps of --epochs",
         {"steps": None, "epochs": 1, "warmup_steps": 6}),
        (r"RTE", {"task": "rte"}),
    ]  # fmt: skip
    for sentence, options in cases:
        model = options.pop("model", str(toy_bert))
        with pytest.raises(UserError, match=sentence) as error:
            cell(Path(model), toy_tasks, tmp_path / "run", **options)
        assert "\n" not in str(error.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["there"], sentence


@pytest.mark.parametrize("command", [FinetuneConfig, SweepConfig, PretrainConfig])
def test_a_rate_that_would_never_reach_its_peak_is_refused(command: type[Config]) -> None:
    """Where the steps are typed, before anything is read."""
    options: dict[str, Any] = {"task": "rte"} if command is FinetuneConfig else {}
    for warmup in (20, 21):
        with pytest.raises(UserError, match=f"--warmup_steps {warmup} .* type less than the 20 steps of --steps"):
            command(steps=20, warmup_steps=warmup, **options)
    command(steps=20, warmup_steps=19, **options)
    command(steps=1, warmup_steps=0, **options)


def test_another_mask_under_the_same_name_is_refused(
    toy_bert: Path, toy_tasks: Path, toy_mask: Path, tmp_path: Path
) -> None:
    mask = load_mask(toy_mask / "mask.safetensors")
    path = tmp_path / "mask.safetensors"
    save_mask(path, mask)
    cell(toy_bert, toy_tasks, tmp_path / "run", mask=str(path))
    save_mask(path, Mask.random(mask.shapes, 0.7, seed=4).with_provenance(mask.provenance))
    with pytest.raises(UserError, match="was begun with another mask"):
        cell(toy_bert, toy_tasks, tmp_path / "run", mask=str(path))


def test_the_subnetwork_is_given_away_with_its_zeros(
    toy_bert: Path, toy_tasks: Path, toy_mask: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    out, run = tmp_path / "model", tmp_path / "run"
    result = cell(
        toy_bert, toy_tasks, run, "mnli", mask=str(toy_mask), save_model=str(out), predict=str(tmp_path / "MNLI-m.tsv")
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_pretrained(out)
    mask, weights = load_mask(toy_mask / "mask.safetensors"), dict(model.named_parameters())
    assert all(not weights[name][~mask[name]].any() for name in mask)
    stored = load_file(out / "model.safetensors")
    assert all(not stored[name][~mask[name]].any() for name in mask)
    assert "mnli" in (out / "README.md").read_text().lower()
    tokenizer = AutoTokenizer.from_pretrained(out)
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
    for name, split in (("MNLI-m", "test_matched"), ("MNLI-mm", "test_mismatched")):
        header, *lines = (tmp_path / f"{name}.tsv").read_text().splitlines()
        assert header == "index\tprediction"
        rows = (toy_tasks / f"glue/MNLI/{split}.tsv").read_text().splitlines()[1:]
        assert [line.split("\t")[0] for line in lines] == [row.split("\t")[0] for row in rows]
        texts = [row.split("\t")[8:10] for row in rows]
        again = [classify({"text": a, "text_pair": b}, truncation=True, max_length=32)["label"] for a, b in texts]
        assert [line.split("\t")[1] for line in lines] == again
    assert result["best_step"] in (3, 6)
    assert not run.joinpath("best").exists()


def test_the_card_names_a_model_of_the_hub_in_full_and_a_local_folder_by_its_name(
    toy_bert: Path, toy_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import ModelCard

    result = cell(toy_bert, toy_tasks, tmp_path / "run", save_model=str(tmp_path / "model"))
    text = (tmp_path / "model/README.md").read_text()
    assert f"fine-tuned from {toy_bert.name} on" in text
    assert str(toy_bert.parent) not in text
    assert ModelCard(text).data.base_model is None
    monkeypatch.chdir(toy_bert)
    for name, base_model in (
        ("sentence-transformers/all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"),
        ("bert-base-uncased", "bert-base-uncased"), ("builtin", None), (".", None),
    ):  # fmt: skip
        card = model_card(task_named("cola"), {**result, "model": name})
        assert ModelCard(card).data.base_model == base_model
        assert f"fine-tuned from {base_model or name.replace('.', toy_bert.name)} on" in card


def test_the_same_command_knows_its_own_files_again(
    toy_bert: Path, toy_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between two of the files that it writes elsewhere, and once more when it is done."""

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    names = {"save_model": str(tmp_path / "model"), "predict": str(tmp_path / "MNLI-m.tsv")}
    with monkeypatch.context() as patch:
        patch.setattr("finemask_ds.finetune.give.save_folder", killed)
        with pytest.raises(KeyboardInterrupt):
            cell(toy_bert, toy_tasks, tmp_path / "run", "mnli", **names)
    assert (tmp_path / "MNLI-mm.tsv").exists()
    first = cell(toy_bert, toy_tasks, tmp_path / "run", "mnli", **names)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert tmp_path / "model/model.safetensors" in written
    assert cell(toy_bert, toy_tasks, tmp_path / "run", "mnli", **names)["score"] == first["score"]
    kept = {path: path.stat().st_mtime_ns for path in written if path.name != "provenance.json"}
    assert kept.items() <= written.items()
    (tmp_path / "MNLI-m.tsv").unlink()
    with pytest.raises(UserError, match="is done and kept no weights; type another --run"):
        cell(toy_bert, toy_tasks, tmp_path / "run", "mnli", **names)
    with pytest.raises(UserError, match=r"MNLI-mm\.tsv exists and is not written over"):
        cell(toy_bert, toy_tasks, tmp_path / "other", "mnli", predict=names["predict"])
    assert not (tmp_path / "other").exists()


def test_a_row_that_is_unusable_moves_no_other_prediction(tmp_path: Path) -> None:
    """GLUE's server goes by the index; a row that could not be read has none of our predictions."""
    rows = [f"{number}\ta sentence" for number in range(200)]
    (tmp_path / "test.tsv").write_text("\n".join(["index\tsentence", *rows[:3], "3", *rows[4:]]) + "\n")
    task = task_named("cola")
    split = Split(task, load_split(task, str(tmp_path), "test"), features=None, batch_size=1)  # type: ignore[arg-type]
    answers = [number % 2 for number in range(200) if number != 3]
    write_predictions(tmp_path / "CoLA.tsv", split, answers)
    written = dict(line.split("\t") for line in (tmp_path / "CoLA.tsv").read_text().splitlines()[1:])
    assert written == {str(number): str(number % 2) for number in range(200) if number != 3}


@pytest.mark.parametrize(("task", "name"), [("stsb", "STS-B.tsv"), ("squad", "squad.json"), ("cola", "CoLA.tsv")])
def test_predictions_are_in_the_submissions_format(
    task: str, name: str, toy_bert: Path, toy_tasks: Path, tmp_path: Path
) -> None:
    cell(toy_bert, toy_tasks, tmp_path / "run", task, predict=str(tmp_path / name))
    text = (tmp_path / name).read_text()
    if task == "squad":
        data = json.loads((toy_tasks / "squad/dev-v1.1.json").read_text())["data"][0]["paragraphs"]
        answers = json.loads(text)
        assert list(answers) == [paragraph["qas"][0]["id"] for paragraph in data]
        assert all(answers[paragraph["qas"][0]["id"]] in paragraph["context"] for paragraph in data)
        return
    values = [line.split("\t")[1] for line in text.splitlines()[1:]]
    assert len(values) == 48
    assert all(0 <= float(value) <= 5 for value in values) if task == "stsb" else set(values) <= {"0", "1"}


def test_the_model_is_the_masks_own_where_none_is_typed(
    toy_bert: Path, toy_tasks: Path, toy_mask: Path, tmp_path: Path
) -> None:
    mask = load_mask(toy_mask / "mask.safetensors")
    told = mask.with_provenance({**mask.provenance, "model": str(toy_bert)})
    save_mask(tmp_path / "mask.safetensors", told)
    options = {**QUICK, "task": "cola", "data": str(toy_tasks), "mask": str(tmp_path / "mask.safetensors")}
    run_cell(options, tmp_path / "run", Interruption())
    assert read_json(tmp_path / "run/result.json")["model"] == str(toy_bert)
    assert with_model(FinetuneConfig(task="cola"), [""]).model == "bert-base-uncased"
    assert with_model(FinetuneConfig(task="cola", model="m"), [str(tmp_path / "nowhere")]).model == "m"
