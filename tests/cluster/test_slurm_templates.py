"""The templates of jobs/slurm, run as they are: only site.sh, the place a person edits, is a toy's."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from finemask_ds.config import SweepConfig
from finemask_ds.dispatch.slurm_jobs import checked_options
from finemask_ds.options import parse
from finemask_ds.run import read_json
from tests.cluster.networks import wait_until
from tests.cluster.slurm import Slurm
from tests.conftest import REPOSITORY

END_SEC = 240.0
TEMPLATES = sorted((REPOSITORY / "jobs" / "slurm").glob("*.sbatch"))


@pytest.fixture
def site(toy_bert: Path, toy_text: Path, toy_tasks: Path, tmp_path: Path) -> Path:
    """Two nodes with a rank each, a small model; everything below a folder with a space.

    The search's job outlives its ranks by a moment, in which one can look at what they have left in the queue.
    """
    folder = tmp_path / "my site"
    folder.mkdir()
    log = f"--output={folder}/%x-%j.log"
    lines = [
        *("NODES=2", "GPUS_PER_NODE=1", "CELLS_AT_A_TIME=2", "MOST_RESTARTS=2", f"RUN={shlex.quote(f'{folder}/run')}"),
        f"SEARCH_OPTIONS=({shlex.quote(log)} --gres=gpu:1)",
        f"SMALL_OPTIONS=({shlex.quote(log)} --ntasks=1)",
        "SITE_OPTIONS=(--partition=main --comment='two words')",
        "CELL_OPTIONS=(gres=gpu:1)",
        f"SEARCH=(--model {toy_bert} --data {toy_text} --objective kd --steps 60 --save_every 1"
        " --batch_size 8 --seq_len 16 --eval_every 0)",
        f"SWEEP=(--model {toy_bert} --data {toy_tasks} --tasks cola --seeds 1 --full no)",
        "export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1",
        'srun() { command srun "$@"; local code=$?; sleep 5; return $code; }',
    ]
    path = folder / "site.sh"
    path.write_text("\n".join(lines) + "\n")
    return path


def submitted(slurm: Slurm, site: Path, template: str, *options: str) -> list[str]:
    """Run a template on the head; the numbers of the jobs it has submitted."""
    told = slurm.run(["bash", f"jobs/slurm/{template}", *options], env={"FINEMASK_SITE": str(site)})
    assert told.returncode == 0, told.stderr
    return re.findall(r"\d+", told.stdout)


def queue(slurm: Slurm) -> str:
    return slurm.run(["squeue", "--noheader", "--array", "--format=%i"]).stdout


def results(run: Path) -> list[dict[str, Any]]:
    return [read_json(path) for path in run.glob("downstream/cells/*/result.json")]


def logs(site: Path) -> str:
    paths = [*site.parent.glob("*.log"), *site.parent.glob("run/downstream/logs/*")]
    return "\n".join(f"{path}:\n{path.read_text()}" for path in paths)


@pytest.mark.slow
def test_a_chain_ends_in_a_page_of_scores_though_its_search_is_sent_away(
    slurm: Slurm, site: Path, toy_tasks: Path
) -> None:
    """Then the same search, which is done, with --dispatch: its job ends before the cells that it leaves behind."""
    run = site.parent / "run"
    search, _ = submitted(slurm, site, "chain.sbatch")
    wait_until(lambda: list(run.glob("checkpoints/step-*")), END_SEC, "the search has saved")
    slurm.run(["scancel", "--signal=TERM", search])  # as Slurm does before its time limit
    wait_until(lambda: not queue(slurm), END_SEC, "nothing is left in the queue")
    assert (run / "downstream/report/index.html").exists(), logs(site)
    assert [result["method"] for result in results(run)] == ["tamt-kd"]
    assert len(read_json(run / "provenance.json")["restarts"]) == 1, logs(site)
    assert logs(site).count("finemask: SIGTERM: checkpoint at step ") == 1
    assert logs(site).count("2 rank(s) on 2 host(s): node1 (1), node2 (1)\n") == 2

    cells = ("--tasks", "cola", "--finetune_seeds", "1", "--task_data", str(toy_tasks))
    (search,) = submitted(slurm, site, "search.sbatch", "--dispatch", "slurm", *cells)
    log = site.parent / f"finemask-search-{search}.log"
    words = r"job\(s\) (\d+) stay in Slurm's queue and job (\d+) goes on"
    wait_until(lambda: log.exists() and re.search(words, log.read_text()), END_SEC, "the cells are in the queue")
    (left,) = re.findall(words, log.read_text())
    told = slurm.run(["squeue", "--noheader", f"--jobs={left[0]}", "--format=%E"]).stdout
    assert f"afterany:{search}" in told, "the cells wait for the search's devices"
    wait_until(lambda: search not in queue(slurm).split(), END_SEC, "the search's job has ended")
    assert re.search(r": 2 cells, 1 done, 1 to run on Slurm\n", logs(site)), "the other is done already"
    slurm.run(["scancel", *left])


@pytest.mark.slow
def test_the_ranks_of_a_search_get_the_cores_of_their_tasks(slurm: Slurm, site: Path) -> None:
    lines = ["SEARCH_OPTIONS+=(--cpus-per-task=2)", "srun() { command srun --verbose true; }"]
    site.write_text("\n".join([site.read_text(), *lines]) + "\n")
    (search,) = submitted(slurm, site, "search.sbatch")
    wait_until(lambda: not queue(slurm), END_SEC, "nothing is left in the queue")
    told = (site.parent / f"finemask-search-{search}.log").read_text()
    assert re.search(r"^srun: cpus-per-task +: 2$", told, re.M), told


def test_the_sites_options_are_the_cells_or_refused_before_anything_is_submitted(tmp_path: Path) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (tmp_path / "sbatch").write_text(f"#!/bin/sh\ntouch {tmp_path}/submitted\necho 1\n")
    for program in ("python", "sbatch"):
        (tmp_path / program).chmod(0o755)

    def run(template: str, options: str, **told: str) -> subprocess.CompletedProcess[str]:
        site = (REPOSITORY / "jobs/slurm/site.sh").read_text().replace("SITE_OPTIONS=()", f"SITE_OPTIONS=({options})")
        # After its own lines, which may put an environment's python first.
        (tmp_path / "site.sh").write_text(f"{site}\nPATH={tmp_path}:$PATH\n")
        told |= {"FINEMASK_SITE": str(tmp_path / "site.sh")}
        return subprocess.run(
            ["bash", f"jobs/slurm/{template}"], cwd=REPOSITORY, env={**os.environ, **told}, capture_output=True,
            text=True, check=False,
        )  # fmt: skip

    said = run("cells.sbatch", "--partition=gpu --exclusive --comment='two words'", SLURM_JOB_ID="1").stdout
    config = parse(SweepConfig, said.splitlines()[2:])
    assert config.job_options[:3] == ("partition=gpu", "exclusive=", "comment=two words")
    assert checked_options(config.job_options)[1] == "--exclusive"
    for options, at_fault in (("-p gpu", "-p"), ("--partition gpu", "gpu")):
        told = run("chain.sbatch", options)
        assert (told.returncode, told.stdout) == (2, "")
        assert told.stderr.startswith(f"SITE_OPTIONS in {tmp_path}/site.sh: type '{at_fault}' as a part of --NAME=")
        assert not (tmp_path / "submitted").exists()
    assert run("chain.sbatch", "--partition=gpu").returncode == 0
    assert (tmp_path / "submitted").exists()


def test_the_templates_are_bash_and_pass_the_ranks() -> None:
    assert [path.name for path in TEMPLATES] == ["cells.sbatch", "chain.sbatch", "search.sbatch"]
    for path in [*TEMPLATES, *(REPOSITORY / "jobs/slurm").glob("*.sh")]:
        subprocess.run(["bash", "-n", path], check=True)
    assert "--ranks $((NODES * GPUS_PER_NODE))" in (REPOSITORY / "jobs/slurm/search.sbatch").read_text()
