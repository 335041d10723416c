"""The launchers as a user starts them: bad input is one sentence, a kill -9 is continued, the main job holds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from finemask_ds.masks.files import load_mask
from finemask_ds.masks.mask import Mask
from finemask_ds.run import Run
from tests.conftest import REPOSITORY
from tests.pool import free_port
from tests.search import jobs

SECRETS = {"HF_TOKEN": "hf_s3cret", "WANDB_API_KEY": "wandb_s3cret", "AWS_SECRET_ACCESS_KEY": "aws_s3cret",
           "DB_PASSWORD": "db_s3cret"}  # fmt: skip
"""Every launcher is started with these, and no file of a run may hold one."""
ENVIRONMENT = {
    **SECRETS,
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}


def python(
    script: str, *options: str, command: Sequence[str] | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A launcher with its options, or another ``command`` of this interpreter."""
    command = [f"launcher/{script}", *options] if command is None else command
    return subprocess.run(
        [sys.executable, *command], cwd=REPOSITORY, env={**os.environ, **ENVIRONMENT, **environment},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def leaks(folder: Path) -> list[Path]:
    """The files that hold a secret of the environment."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if any(secret.encode() in path.read_bytes() for secret in SECRETS.values())]


def deepspeed(script: str, *options: str) -> list[str]:
    return [
        "deepspeed", "--log_level", "error", "--num_gpus", "2", "--master_port", str(free_port()),
        f"launcher/{script}", "--deepspeed", "configs/ds/zero2.json", *options,
    ]  # fmt: skip


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """In a session of its own, so that everything it starts can be ended with it."""
    with open(log, "wb") as stream:
        return subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**os.environ, **ENVIRONMENT},
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )


def toy(model: Path, text: Path, run: Path) -> list[str]:
    return [
        *("--model", str(model), "--data", str(text), "--run", str(run), "--seq_len", "16", "--batch_size", "8"),
        *("--dropout", "0", "--log_every", "5", "--eval_every", "0"),
    ]


BAD = {
    "sparsity": (["--sparsity", "1"], "--sparsity 1.0 is not in [0, 1)"),
    "no steps in Table 2": (["--sparsity", "0.65"], "Table 2 has no number of steps"),
    "unknown option": (["--maks_lr", "1"], "unknown option --maks_lr; did you mean --mask_lr? --help"),
    "not a number": (["--steps", "many"], "invalid int value: 'many'"),
    "unknown choice": (["--objective", "nsp"], "type one of mlm, kd, mlm+kd"),
    "unknown model": (["--model", "nobody/nothing"], "model 'nobody/nothing' could not be loaded"),
    "missing data": (["--data", "/nowhere"], "/nowhere"),
    "hub data without a network": (["--data", "wikitext-103"], "--data builtin"),
    "long blocks": (["--seq_len", "65"], "64"),
    "batch": (["--micro_batch_size", "3"], "--batch_size 8 is not ranks x micro-batch x accumulation"),
    "ranks": (["--ranks", "4"], "--ranks 4 but 1 started"),
    "a head too many": (["--head_steps", "3"], "has an MLM head already"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(toy_bert: Path, toy_text: Path, tmp_path: Path, case: str) -> None:
    options, expected = BAD[case]
    told = python("tamt.py", *toy(toy_bert, toy_text, tmp_path / "run"), *options)
    assert told.returncode == 2, told.stderr
    sentence = told.stderr.strip().splitlines()[-1]
    assert sentence.startswith("finemask: ")
    assert expected in sentence
    assert "Traceback" not in told.stderr
    assert not (tmp_path / "run" / "mask.safetensors").exists()


@pytest.mark.slow
def test_a_deepspeed_file_that_fixes_a_number_is_refused_by_every_rank(
    toy_bert: Path, toy_text: Path, tmp_path: Path
) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"train_batch_size": 99, "zero_optimization": {"stage": 2}}))
    command = deepspeed("tamt.py", *toy(toy_bert, toy_text, tmp_path / "run"), "--steps", "3")
    command[command.index("configs/ds/zero2.json")] = str(tmp_path / "ds.json")
    told = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert told.returncode != 0
    said = [line for line in told.stderr.splitlines() if line.startswith("finemask: ")]
    assert len(said) == 1
    assert 'fixes "train_batch_size" to 99 but --batch_size is 8' in said[0]


@pytest.mark.slow
def test_a_run_directory_of_another_configuration_is_left_alone(toy_bert: Path, toy_text: Path, tmp_path: Path) -> None:
    options = toy(toy_bert, toy_text, tmp_path / "run")
    assert python("magnitude.py", *options).returncode == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    told = python("magnitude.py", *options, "--sparsity", "0.6")
    assert told.returncode == 2
    assert "sparsity was 0.7, now 0.6" in told.stderr
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_run_that_was_killed_is_continued_by_the_same_command(toy_bert: Path, toy_text: Path, tmp_path: Path) -> None:
    """kill -9 of launcher and ranks somewhere in the middle; the end is that of the undisturbed run, bit for bit."""
    options = ["--objective", "kd", "--init", "ranked", "--mask_lr", "1e-3", "--steps", "150", "--save_every", "10"]
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    command = deepspeed("tamt.py", *toy(toy_bert, toy_text, broken), *options)
    process = start(command, tmp_path / "log")
    _wait_for(broken / "checkpoints" / "step-20", process, tmp_path / "log")
    os.killpg(process.pid, signal.SIGKILL)
    for pid in _ranks_of(broken):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert not (broken / "mask.safetensors").exists()
    for run in (broken, whole):
        command = deepspeed("tamt.py", *toy(toy_bert, toy_text, run), *options)
        assert start(command, tmp_path / "log").wait(300) == 0, (tmp_path / "log").read_text()
    values = [jobs.last_values(jobs.tamt(run, toy_bert, toy_text)) for run in (broken, whole)]
    assert jobs.same(*values)
    assert load_mask(broken / "mask.safetensors") == load_mask(whole / "mask.safetensors")
    assert "restarts" in json.loads((broken / "provenance.json").read_text())
    steps = [json.loads(line)["step"] for line in (broken / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(5, 151, 5))


@pytest.mark.slow
def test_fp16_as_the_file_asks_under_the_launcher(toy_bert: Path, toy_text: Path, tmp_path: Path) -> None:
    """The ranks and hosts are told first, then the precision; the log has the loss scale."""
    run, log = tmp_path / "run", tmp_path / "log"
    options = ["--objective", "kd", "--init", "ranked", "--mask_lr", "1e-3", "--steps", "10"]
    command = deepspeed("tamt.py", *toy(toy_bert, toy_text, run), *options, "--precision", "file", "--ranks", "2")
    command[command.index("configs/ds/zero2.json")] = "configs/ds/zero2_fp16.json"
    assert start(command, log).wait(300) == 0, log.read_text()
    told = log.read_text()
    assert told.index("2 rank(s) on 1 host(s)") < told.index("run directory") < told.index("compute in float16")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10]
    assert all(line["scale/loss_scale"] <= 2.0**16 for line in lines)


@pytest.mark.slow
def test_a_killed_rank_ends_the_whole_run_within_a_minute(toy_bert: Path, toy_text: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    options = ["--objective", "kd", "--init", "ranked", "--mask_lr", "1e-3", "--steps", "100000", "--save_every", "10"]
    process = start(deepspeed("tamt.py", *toy(toy_bert, toy_text, run), *options), log)
    _wait_for(run / "checkpoints" / "step-10", process, log)
    victim = next(pid for pid in _ranks_of(run) if b"--local_rank=1" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(victim, signal.SIGKILL)
    assert process.wait(60) != 0
    assert "--local_rank=1" in log.read_text()  # the launcher names the command of the rank that died
    assert _ranks_of(run) == []


def _wait_for(path: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def _ranks_of(run: Path) -> list[int]:
    """Processes whose command line names the run (the launcher starts each rank in a session of its own)."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(run).encode() in (process / "cmdline").read_bytes() and int(process.name) != os.getpid():
                found.append(int(process.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_the_main_job_ranks_the_methods_and_a_second_run_reuses_it(tmp_path: Path) -> None:
    """`make demo`, one seed, two tasks: TAMT-KD < OMP < random in KD loss, TAMT-MLM < OMP < random in MLM loss."""
    root = tmp_path / "demo"
    command = [sys.executable, "-m", "finemask_ds", "recipe", "quickstart", "--root", str(root), "--seeds", "1"]
    command += ["--tasks", "acceptability", "questions"]
    first = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=1500, check=False)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    results = json.loads((root / "results.json").read_text())
    dev = {name: result["dev"] for name, result in results.items()}
    assert dev["tamt-kd"]["kd_loss"] < dev["omp"]["kd_loss"] < dev["random"]["kd_loss"]
    assert dev["tamt-mlm"]["mlm_loss"] < dev["omp"]["mlm_loss"] < dev["random"]["mlm_loss"]
    assert set(dev) == {"random", "omp", "imp", "tamt-mlm", "tamt-kd"}
    for name in dev:
        mask = load_mask(root / name / "mask.safetensors")
        ranked_together = [None] if name.startswith("tamt") else list(mask)  # `--preset fast` ranks all matrices as one
        assert all(mask.num_kept(one) == (n := mask.num_weights(one)) - round(0.7 * n) for one in ranked_together)
    assert "<table" in (root / "downstream/report/index.html").read_text()
    second = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=True)
    assert second.stdout.count(": done") == 6
    assert (
        second.stdout.splitlines()[-1]
        == first.stdout.splitlines()[-1]
        == f"watch the searches with: tensorboard --logdir {root}"
    )
    _watched_in_tensorboard(Run(root / "tamt-kd"))


def _watched_in_tensorboard(run: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    tags = events.Tags()
    expected = {"train/kd_loss", "lr/mask", "train/grad_norm", "speed/tokens_per_sec", "memory/peak_gib", "dev/kd_loss"}
    expected |= {
        f"mask/{what}/{where}" for what in ("sparsity", "flips", "distance") for where in ("Q", "Emb", "layer_00")
    }
    assert expected <= set(tags["scalars"])
    assert tags["images"] == ["mask/distance_map"]
    assert "mask/margin/FO" in tags["histograms"]


@pytest.mark.slow
def test_roberta_goes_the_whole_way(toy_roberta: Path, toy_text: Path, tmp_path: Path) -> None:
    """Byte-level BPE, lm_head, 514 positions for 512 tokens: a block of 512 fits, one of 513 does not."""
    options = [
        *toy(toy_roberta, toy_text, tmp_path / "run"),
        "--seq_len",
        "512",
        "--objective",
        "mlm+kd",
        "--steps",
        "2",
    ]
    told = python("tamt.py", *options)
    assert told.returncode == 0, told.stderr
    assert isinstance(load_mask(tmp_path / "run" / "mask.safetensors"), Mask)
    told = python("tamt.py", *toy(toy_roberta, toy_text, tmp_path / "long"), "--seq_len", "513", "--steps", "2")
    assert told.returncode == 2
    assert "512" in told.stderr
