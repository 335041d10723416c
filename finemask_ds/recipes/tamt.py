"""TAMT's main result as one plan: searches for every mask, fine-tunings of every mask, and what the paper says of it.

Nested as in Section 4.1.3: three masks of each method (OMP has one), three fine-tunings of each mask, so n = 3 masks.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from finemask_ds.config import SweepConfig, TamtRecipeConfig
from finemask_ds.data.tasks import default_tasks, task_named
from finemask_ds.dispatch.executors import check_executor
from finemask_ds.errors import UserError
from finemask_ds.finetune.job import check_tasks
from finemask_ds.masks.schedule import ladder
from finemask_ds.recipes.stages import Stage, run_stage, run_stages
from finemask_ds.report.collect import collect
from finemask_ds.report.scores import Board, average_over, board, final
from finemask_ds.report.table import aligned
from finemask_ds.run import Run


@dataclass(frozen=True)
class Plan:
    """The searches, and the mask files that they leave."""

    searches: tuple[Stage, ...]
    masks: tuple[Path, ...]


def plan_of(config: TamtRecipeConfig) -> Plan:
    """Every search that the recipe needs, and every mask that it fine-tunes, by sparsity."""
    searches: dict[str, Stage] = {}
    masks: list[Path] = []
    for sparsity in config.sparsities:
        for method in config.methods:
            for seed in config.mask_seeds[:1] if method == "omp" else config.mask_seeds:
                stage, mask = _search(config, method, sparsity, seed)
                searches.setdefault(stage.name, stage)
                masks.append(mask)
    return Plan(tuple(searches.values()), tuple(dict.fromkeys(masks)))


def _search(config: TamtRecipeConfig, method: str, sparsity: float, seed: int) -> tuple[Stage, Path]:
    """The search of one mask and where it leaves it; IMP passes its smaller sparsities on the way to the largest."""
    root, largest = Path(config.run), max(config.sparsities)
    shared = ("--seed", str(seed), *_words("--search", config.search))
    if method == "imp":
        on_the_way = sparsity in ladder(largest)
        target = largest if on_the_way else sparsity
        options = (*_sparse(target), *shared, *_words("--imp", config.imp))
        stage = Stage(f"imp-s{target:g}-seed{seed}", "imp.py", options, config.ranks, config.zero)
        run = stage.run(root)
        return stage, run.rung_mask(sparsity) if on_the_way else run.mask
    name = f"{method}-s{sparsity:g}-seed{seed}"
    if method in ("omp", "random"):
        stage = Stage(name, "magnitude.py", ("--kind", method, *_sparse(sparsity), *shared), ranks=0)
    else:
        objective = ("--objective", method.removeprefix("tamt-"))
        options = (*objective, *_sparse(sparsity), *shared, *_words("--tamt", config.tamt))
        stage = Stage(name, "tamt.py", options, config.ranks, config.zero)
    return stage, stage.run(root).mask


def _sparse(sparsity: float) -> tuple[str, str]:
    return "--sparsity", f"{sparsity:g}"


def run_recipe(config: TamtRecipeConfig) -> str:
    """Run what is not done yet; the paper's statements beside what was found."""
    root, plan = Path(config.run), plan_of(config)
    shared = ("--model", config.model, "--data", config.data)
    options = ["--model", config.model, "--masks", *map(str, plan.masks), "--seeds", *map(str, config.finetune_seeds)]
    options += ["--tasks", *config.tasks] if config.tasks else []
    options += ["--data", config.task_data] if config.task_data else []
    sweep = Stage("downstream", "dispatch.py", (*options, *_words("--finetune", config.finetune)), ranks=0)
    check(sweep, root)
    print(f"{len(plan.searches)} searches, {len(plan.masks)} masks to fine-tune", flush=True)
    run_stages(plan.searches, root, shared, "--run")
    run_stage(sweep, root)
    return compare(sweep.run(root), config.sparsities)


def check(sweep: Stage, root: Path) -> None:
    """Refuse, before hours of searches, what would end the sweep after them; `run_stages` looks at theirs.

    Raises:
        UserError: for options that it does not have, unknown tasks, missing rows or an executor that is not here.
    """
    asked = sweep.check(root, ())
    assert isinstance(asked, SweepConfig)
    check_executor(asked)
    check_tasks(asked, [task_named(name, "--tasks") for name in asked.tasks or default_tasks(asked.model)])


def _words(option: str, text: str) -> list[str]:
    """Options that are quoted in one option."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(
            f"{option} {text!r} cannot be read ({error}); type options in quotes, as '--steps 100'"
        ) from error


def compare(sweep: Run, sparsities: tuple[float, ...]) -> str:
    """What the paper says of BERT-base beside what the sweep found: a table for the terminal."""
    cells = final(collect([sweep.folder]).cells)
    boards = {sparsity: board(cells, sparsity) for sparsity in sparsities}
    rows = []
    for band in BANDS:
        found, holds = band.check(boards)
        rows.append([band.said, band.source, found, "no data" if holds is None else "yes" if holds else "NO"])
    return aligned(["expected (the paper, BERT-base)", "where", "found", "holds"], rows)


Boards = Mapping[float, Board]


@dataclass(frozen=True)
class Band:
    """A statement of the paper that scores can meet or miss."""

    said: str
    source: str
    check: Callable[[Boards], tuple[str, bool | None]]
    """Boards by sparsity -> what was found, and whether it holds; None where the cells are missing."""


def _shares(boards: Boards, sparsity: float) -> dict[str, float]:
    """Method -> its average, of however few tasks, as a share of the full model's; empty where there is no board."""
    if sparsity not in boards:
        return {}
    board = boards[sparsity]
    averages = {method: average_over(board, method, board.common) for method in board.methods}
    means = {method: found.mean for method, found in averages.items() if found is not None and found.mean is not None}
    full = means.pop("full", None)
    return {method: mean / full for method, mean in means.items()} if full else {}


def _matching(boards: Boards) -> tuple[str, bool | None]:
    shares = {method: share for method, share in _shares(boards, 0.5).items() if method != "random"}
    if not shares:
        return "-", None
    worst = min(shares, key=shares.__getitem__)
    return f"at least {shares[worst]:.1%} ({worst})", shares[worst] >= 0.9


def _random_last(boards: Boards) -> tuple[str, bool | None]:
    margins = {}
    for sparsity in boards:
        shares = _shares(boards, sparsity)
        others = [share for method, share in shares.items() if method != "random"]
        if "random" in shares and others:
            margins[sparsity] = min(others) - shares["random"]
    if not margins:
        return "-", None
    return _smallest(margins), min(margins.values()) > 0


def _above(better: str, worse: str) -> Callable[[Boards], tuple[str, bool | None]]:
    """Whether every method whose name starts with ``better`` is above ``worse`` at 60 to 90 %."""

    def check(boards: Boards) -> tuple[str, bool | None]:
        margins = {}
        for sparsity in (one for one in boards if 0.6 <= one <= 0.9):
            shares = _shares(boards, sparsity)
            ours = [share for method, share in shares.items() if method.startswith(better)]
            if ours and worse in shares:
                margins[sparsity] = min(ours) - shares[worse]
        return (_smallest(margins), min(margins.values()) > 0) if margins else ("-", None)

    return check


def _half(boards: Boards) -> tuple[str, bool | None]:
    shares = _shares(boards, 0.9)
    if not shares:
        return "-", None
    low, high = min(shares.values()), max(shares.values())
    return f"{low:.1%} to {high:.1%}", low >= 0.35 and high <= 0.65


def _smallest(margins: Mapping[float, float]) -> str:
    sparsity = min(margins, key=margins.__getitem__)
    return f"margin {margins[sparsity]:+.1%} of full or more (at {sparsity:.0%})"


BANDS = (
    Band("all but random keep 90 % of the full score at 50 %", "4.2.1", _matching),
    Band("random is below all others", "4.2.1, Fig. 3", _random_last),
    Band("TAMT is above IMP at 60 to 90 %", "4.2.1, Fig. 3", _above("tamt", "imp")),
    Band("IMP is above OMP at 60 to 90 %", "4.2.1, Fig. 3", _above("imp", "omp")),
    Band("all are about half of the full score at 90 % (35 to 65 %)", "4.2.1", _half),
)
"""What Section 4.2.1 says of BERT-base on the seven tasks."""
