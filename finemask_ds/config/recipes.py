"""Knobs of the papers' experiments as plans."""

from __future__ import annotations

from dataclasses import dataclass

from finemask_ds.config.knobs import Config, knob
from finemask_ds.errors import UserError

METHODS = ("random", "omp", "imp", "tamt-mlm", "tamt-kd", "tamt-mlm+kd")


@dataclass(frozen=True, kw_only=True)
class TamtRecipeConfig(Config):
    """TAMT's main result (Figures 3, 5 and 8): methods x sparsities x tasks, 3 masks of each, 3 fine-tunings."""

    run: str = knob("runs/tamt", "folder of the searches, the plan of cells and the report")
    model: str = knob("bert-base-uncased", "hub name, folder, or 'builtin'", source="TAMT 4.1.1")
    data: str = knob("wikitext-103", "text to search on, as of launcher/tamt.py", source="TAMT 4.1.2")
    task_data: str = knob("", "GLUE root, with SQuAD's two files in squad/ inside it; empty: the hub, for built-in "
                          "tasks 'builtin'")  # fmt: skip
    sparsities: tuple[float, ...] = knob((0.5, 0.6, 0.7, 0.8, 0.9), "shares to remove", source="TAMT Figure 3")
    methods: tuple[str, ...] = knob(METHODS, "of random, omp, imp, tamt-mlm, tamt-kd, tamt-mlm+kd", source="TAMT 4.1.2")
    tasks: tuple[str, ...] = knob((), "tasks; default the paper's seven, or all built-in ones with --model builtin",
                                  source="TAMT 4.1.2")  # fmt: skip
    mask_seeds: tuple[int, ...] = knob((1, 2, 3), "seeds of the searches; OMP has one mask", source="TAMT 4.1.3")
    finetune_seeds: tuple[int, ...] = knob((1, 2, 3), "fine-tunings of each mask", source="TAMT 4.1.3")
    ranks: int = knob(1, "processes of a search on this machine; 0: one plain process without DeepSpeed", unit="ranks")
    zero: int = knob(2, "ZeRO stage of the searches")
    search: str = knob("", "further options of every search, quoted: --search '--seq_len 128'")
    tamt: str = knob("", "further options of launcher/tamt.py, quoted")
    imp: str = knob("", "further options of launcher/imp.py, quoted")
    finetune: str = knob("", "further options of launcher/dispatch.py, quoted")

    def __post_init__(self) -> None:
        """Check the choices; see the base class."""
        super().__post_init__()
        for method in self.methods:
            if method not in METHODS:
                raise UserError(f"--methods {method!r} is unknown; type some of {', '.join(METHODS)}")
        for sparsity in self.sparsities:
            if not 0 <= sparsity < 1:
                raise UserError(f"--sparsities {sparsity} is not in [0, 1); type shares to remove, as 0.5 0.7")
        if self.zero > 3:
            raise UserError("--zero must be 0 to 3")

    @property
    def method(self) -> str:
        """``recipe-tamt``."""
        return "recipe-tamt"
