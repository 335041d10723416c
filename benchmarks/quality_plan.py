"""The searches of benchmarks/quality.py: what each is asked for, and which decide first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from finemask_ds.recipes.stages import REPOSITORY

KEPT = REPOSITORY / "results/quality"
ROOT = Path("runs/quality")
LONG, SHORT, LEAST = 2000, 200, 100
"""Steps of the comparison, those in which the fast masks are to be as good, and those hoped for."""
PAPER_LR = {"kd": 2e-5, "mlm": 5e-5}
"""Rates of Table 1 for `binary`; below, those it is swept over at 70 %, and the best of them."""
SWEPT_LR = {"kd": (1e-4, 2e-4, 5e-4, 1e-3), "mlm": (1e-4, 2e-4, 5e-4)}
BINARY_LR = {"kd": 5e-4, "mlm": 2e-4}
FAST_LR = 3e-4
"""--preset fast's."""
RANKED_LR = {"kd": 1e-4, "mlm": 1e-4}
"""The best of `ranked`'s two at 70 %."""
SHARED = (
    *("--seq_len", "64", "--batch_size", "8", "--dropout", "0", "--dev_blocks", "200", "--eval_batch_size", "16"),
    *("--log_every", "50", "--watch_every", "0", "--save_every", "500"),
)
ALL_WEIGHTS = "all-weights"
"""In the place of a start: no mask is trained but the weights that IMP leaves, as a bound of what steps can teach."""


@dataclass(frozen=True)
class Cell:
    """One search; of ``ALL_WEIGHTS`` the rate is theirs, and the sparsity that of IMP's rung while it trains them."""

    objective: str
    sparsity: float
    init: str
    mask_lr: float
    steps: int
    seed: int
    scope: str = "local"

    @property
    def group(self) -> str:
        """Objective and sparsity: ``kd-70``."""
        return f"{self.objective}-{100 * self.sparsity:.0f}"

    @property
    def setting(self) -> str:
        """What is compared: start, scope and rate."""
        return " ".join([self.init, *self._scope, f"{self.mask_lr:g}"])

    @property
    def name(self) -> str:
        """Of its file."""
        return "-".join([self.group, self.init, *self._scope, f"{self.mask_lr:g}-{self.steps}-seed{self.seed}"])

    @property
    def _scope(self) -> list[str]:
        """As names have it, which are older than the choice."""
        return [] if self.scope == "local" else [self.scope]

    @property
    def launcher(self) -> Path:
        """What runs it."""
        return REPOSITORY / "launcher" / ("imp.py" if self.trains_weights else "tamt.py")

    @property
    def trains_weights(self) -> bool:
        """Whether it searches no mask."""
        return self.init == ALL_WEIGHTS

    @property
    def kept(self) -> Path:
        """Where its figures are kept."""
        return KEPT / f"{self.name}.json"

    def options(self, shared: Path) -> list[str]:
        """Of its launcher."""
        head = ["--head_steps", "500"] if self.objective == "mlm" else []
        return [
            *("--model", str(shared / "models/all-MiniLM-L6-v2"), "--data", str(shared / "data/wikitext-2")),
            *(self._of_imp() if self.trains_weights else self._of_tamt()),
            *("--scope", self.scope, "--seed", str(self.seed)),
            *("--eval_every", str(min(100, self.steps // 2)), "--run", str(ROOT / self.name), *SHARED, *head),
        ]

    def _of_tamt(self) -> list[str]:
        return [
            *("--objective", self.objective, "--sparsity", str(self.sparsity), "--preset", "fast"),
            *("--init", self.init, "--mask_lr", str(self.mask_lr), "--steps", str(self.steps)),
        ]

    def _of_imp(self) -> list[str]:
        """One interval with a decay of its own, after which IMP prunes the next 10 % and ends."""
        return [
            *("--sparsity", str(self.sparsity + 0.1), "--lr", str(self.mask_lr)),
            *("--interval_steps", str(self.steps), "--schedule_steps", str(self.steps)),
        ]


def plan() -> Iterator[Cell]:
    """What decides first: the preset's; KD and MLM at 70 %, with sweeps of `binary`'s rates; other starts; 80 %."""
    for objective in ("kd", "mlm"):
        for sparsity in (0.7, 0.8):
            for steps, seed in ((SHORT, 1), (SHORT, 2), (LEAST, 1), (LONG, 1), (LONG, 2)):
                yield Cell(objective, sparsity, "reconstruction", FAST_LR, steps, seed, "global")
    yield Cell("kd", 0.8, "reconstruction", 6e-4, SHORT, 1, "global")
    for objective in ("kd", "mlm"):
        yield from _compared(objective, 0.7, seed=1)
        for rate in SWEPT_LR[objective]:
            yield Cell(objective, 0.7, "binary", rate, LONG, 1)
        yield from _compared(objective, 0.7, seed=2)
        for rate in (1e-4, 3e-4):
            yield Cell(objective, 0.7, "ranked", rate, LONG, 1)
    for steps, seed in ((LEAST, 1), (SHORT, 1), (SHORT, 2), (LONG, 1)):
        yield Cell("kd", 0.7, "activations", FAST_LR, steps, seed)
    for objective in ("kd", "mlm"):
        for seed in (1, 2):
            yield from _compared(objective, 0.8, seed)
    for objective, rate in RANKED_LR.items():
        for sparsity, seed in ((0.7, 2), (0.8, 1), (0.8, 2)):
            yield Cell(objective, sparsity, "ranked", rate, LONG, seed)
    for rate in (1e-4, 3e-4, 1e-3):
        yield Cell("mlm", 0.1, ALL_WEIGHTS, rate, SHORT, 1)
    for objective, sparsity, rate in (("mlm", 0.7, 6e-4), ("kd", 0.8, 6e-4), ("kd", 0.8, 1e-3)):
        yield Cell(objective, sparsity, "reconstruction", rate, SHORT, 1)
    yield Cell("kd", 0.8, "reconstruction", FAST_LR, 2 * SHORT, 1)


def _compared(objective: str, sparsity: float, seed: int) -> Iterator[Cell]:
    for steps in (LEAST, SHORT):
        yield Cell(objective, sparsity, "reconstruction", FAST_LR, steps, seed)
    yield Cell(objective, sparsity, "binary", BINARY_LR[objective], LONG, seed)
    yield Cell(objective, sparsity, "reconstruction", FAST_LR, LONG, seed)
    yield Cell(objective, sparsity, "binary", PAPER_LR[objective], LONG, seed)


FINE_TUNED = (
    Cell("kd", 0.7, "reconstruction", FAST_LR, SHORT, 1, "global"),
    Cell("kd", 0.7, "binary", BINARY_LR["kd"], LONG, 1),
    Cell("kd", 0.7, "reconstruction", FAST_LR, SHORT, 1),
    Cell("kd", 0.7, "reconstruction", FAST_LR, LONG, 2),
    Cell("kd", 0.7, "activations", FAST_LR, SHORT, 1),
    Cell("kd", 0.7, "binary", PAPER_LR["kd"], LONG, 2),
)
"""Searches whose masks are compared on tasks, in the order in which they are fine-tuned."""
