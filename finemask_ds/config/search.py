"""Every knob of a search, with its unit and its source.

TAMT is Liu et al. 2022 (tables and equations below are theirs); BERT-Tickets is Chen et al. 2020.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finemask_ds.config.knobs import EXECUTORS, Config, DispatchKnobs, check_schedule, check_warmup, knob
from finemask_ds.errors import UserError

TABLE_2_STEPS = {
    0.2: 3_000,
    0.3: 6_000,
    0.4: 8_000,
    0.5: 11_000,
    0.6: 14_000,
    0.7: 17_000,
    0.8: 20_000,
    0.9: 22_000,
}
"""Steps of TAMT for each sparsity (TAMT Table 2)."""

PAPER_INTERVAL_STEPS = 2_792
"""Steps of IMP between two prunings: a tenth of two epochs of WikiText-103 (TAMT Appendix B.2)."""

PAPER_SCHEDULE_STEPS = 10 * PAPER_INTERVAL_STEPS
"""Steps over which the authors' learning rates fall to zero: two epochs, whatever step the mask is taken at."""


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {"init": "binary", "scope": "local"},
    "fast": {"init": "reconstruction", "scope": "global", "mask_lr": 3e-4, "steps": 200},
}
"""Preset of TAMT -> what a knob is that was not typed; the paper's rates and steps go by objective and sparsity."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Config):
    """What every stage shares: model, text, batches, evaluation, run directory."""

    model: str = knob("bert-base-uncased", "hub name, folder, or 'builtin'", source="TAMT 4.1.1")
    data: str = knob("wikitext-103", "'wikitext-103', a hub text data set, a folder or file of text, or 'builtin'",
                     source="TAMT 4.1.2")  # fmt: skip
    batch_size: int = knob(
        16, "sequences per optimizer step over all ranks", unit="sequences", source="TAMT Table 1", least=1
    )
    micro_batch_size: int = knob(0, "sequences per forward on one rank; 0: all of the rank's at once", unit="sequences")
    eval_batch_size: int = knob(0, "dev sequences per forward on one rank; 0: as many as in training", unit="sequences")
    seq_len: int = knob(
        512, "tokens per sequence, [CLS] and [SEP] included", unit="tokens", source="TAMT Table 1", least=1
    )
    dropout: float = knob(0.1, "dropout of the hidden states and the attention in training", source="authors' code")
    max_grad_norm: float = knob(
        1.0, "gradients are clipped to this global norm; 0: not at all", source="authors' MLM code"
    )
    weight_decay: float = knob(
        0.0, "AdamW's weight decay, of biases and norms too; scores never decay", source="authors' MLM code"
    )
    dev_blocks: int = knob(0, "dev sequences to evaluate on; 0: all", unit="sequences")
    seed: int = knob(1, "seed of data order, masking, dropout and random masks", source="TAMT 4.1.3: three seeds")
    eval_seed: int = knob(0, "seed of the dev masking, the same for every method")
    log_every: int = knob(50, "a line and a TensorBoard point every so often", unit="steps", least=1)
    watch_every: int = knob(
        500,
        "mask flips and distances, score histograms and gradient norms by role every so often; 0: at the end",
        unit="steps",
    )
    eval_every: int = knob(1000, "dev loss of the objective every so often; 0: only at the end", unit="steps")
    save_every: int = knob(1000, "a checkpoint every so often and at the end; 0: only then", unit="steps")
    run: str = knob("", "run directory; empty: runs/NAME-HASH from the options given")
    deepspeed: str = knob("", "DeepSpeed JSON file (configs/ds/*.json); empty: one plain process")
    precision: str = knob("fast", "'fast' computes in the DeepSpeed file's 16-bit type where the accelerator has fast "
                          "arithmetic for it, else in fp32; 'file' does what the file says, however slowly",
                          choices=("fast", "file"))  # fmt: skip
    ranks: int = knob(0, "refuse to start with another number of ranks; 0: any number", unit="ranks")
    time_out_sec: int = knob(
        1800, "a collective that waits longer for the slowest rank ends the run", unit="seconds", least=1
    )
    silence_sec: int = knob(30, "a rank that gives no sign of life for so long is given up and the run ends",
                            unit="seconds", least=1)  # fmt: skip
    hostfile: str = knob("", "with python, not deepspeed, in front: this process starts deepspeed on the hosts of this "
                         "file ('node1 slots=8' a line) and sees it through")  # fmt: skip
    max_restarts: int = knob(0, "the same, and starts it again from the last checkpoint so often after a failure, on "
                             "the hosts that are left", unit="restarts")  # fmt: skip
    agree_every: int = knob(500, "the ranks compare hashes of their masks every so often; 0: never", unit="steps")

    def __post_init__(self) -> None:
        """Check the numbers; see the base class."""
        super().__post_init__()
        if self.dropout >= 1:
            raise UserError(f"--dropout {self.dropout} must be below 1")


@dataclass(frozen=True, kw_only=True)
class SearchConfig(DispatchKnobs, TrainingConfig):
    """What every search for a subnetwork shares."""

    sparsity: float = knob(0.7, "share of the weights to remove, in [0, 1)", source="TAMT 4.2")
    targets: str = knob("paper", "matrices to prune: 'paper' embedding and Q K V AO FI FO of every layer; 'authors' "
                        "those and the pooler; 'bert-tickets' the pooler instead of the embedding (its authors rank "
                        "with --scope global)",
                        source="TAMT 3.2", choices=("paper", "authors", "bert-tickets"))  # fmt: skip
    scope: str = knob(
        "local", "rank inside each matrix or over all of them", source="TAMT 3.4.2", choices=("local", "global")
    )
    head_lr: float = knob(5e-5, "peak learning rate of the MLM head (transform and bias)", source="TAMT Table 1")
    head_steps: int = knob(0, "for a model without an MLM head: train one on the frozen encoder first", unit="steps")
    new_head_lr: float = knob(1e-3, "peak learning rate of --head_steps")
    dispatch: str = knob("no", "fine-tune the mask on tasks when it is found: 'local' on this machine's GPUs or cores, "
                         "as job arrays of 'slurm', on an existing cluster of 'ray'; 'elsewhere' only writes the plan",
                         choices=("no", *EXECUTORS))  # fmt: skip
    tasks: tuple[str, ...] = knob((), "tasks of --dispatch; default the paper's seven, or all built-in ones with "
                                  "--model builtin", source="TAMT 4.1.2")  # fmt: skip
    task_data: str = knob("", "GLUE root of --dispatch, with SQuAD's two files in squad/ inside it; empty: the hub, "
                          "for built-in tasks 'builtin'")  # fmt: skip
    finetune_seeds: tuple[int, ...] = knob((1, 2, 3), "fine-tuning seeds of --dispatch", source="TAMT 4.1.3")

    def __post_init__(self) -> None:
        """Check the numbers; see the base class."""
        super().__post_init__()
        if not 0.0 <= self.sparsity < 1.0:
            raise UserError(f"--sparsity {self.sparsity} is not in [0, 1); type the share to remove, as --sparsity 0.7")

    @property
    def needs_head(self) -> bool:
        """Whether the search trains on MLM, for which the model must have an MLM head."""
        return False


@dataclass(frozen=True, kw_only=True)
class TamtConfig(SearchConfig):
    """Task-agnostic mask training (TAMT Section 3.4); the defaults are TAMT-MLM of Tables 1 and 2."""

    objective: str = knob("mlm", "what the masks learn from", source="TAMT 3.4.3", choices=("mlm", "kd", "mlm+kd"))
    preset: str = knob("paper", "what --init, --scope, --mask_lr and --steps are where they are not typed: 'paper' as "
                       "below, 'fast' a better start, layers denser than the embedding and a higher rate, for few "
                       "steps (results/README.md)",
                       choices=("paper", "fast"))  # fmt: skip
    init: str | None = knob(None, "scores at the start: 'binary' (the paper's) alpha*phi on the OMP mask (Eq. 5), "
                            "'random' alpha*phi at random positions, 'ranked' phi*|w|/t with t the OMP threshold, "
                            "'activations' the same with |w| times the norm of its inputs, 'reconstruction' (of "
                            "--preset fast) with what its matrix's outputs miss it by under a mask found by swaps",
                            source="TAMT 3.4.2, 4.2.4; Wanda Section 3; results/README.md",
                            choices=("binary", "random", "ranked", "activations", "reconstruction"))  # fmt: skip
    scope: str = knob(None, "'local' (the paper's) ranks inside each matrix, 'global' (of --preset fast) over all of "
                      "them; 'activations' and 'reconstruction' then start with an embedding at 0.7 of the density",
                      source="TAMT 3.4.2; results/README.md", choices=("local", "global"))  # fmt: skip
    phi: float = knob(0.01, "threshold of the scores at the start", source="TAMT 4.1.3")
    alpha: float = knob(2.0, "kept scores start at alpha * phi", source="TAMT 4.1.3")
    threshold_every: int = knob(1, "exact selection every so often, a fixed threshold between; the authors: 1000 for "
                                "MLM, 100 for KD", unit="steps", least=1)  # fmt: skip
    keep_every: int = knob(0, "the mask along the search is kept and scored every so often (masks/step-N); 0: never",
                           unit="steps", source="TAMT 4.2.3")  # fmt: skip
    mask_lr: float | None = knob(None, "peak learning rate of the scores; default 5e-5 for mlm and mlm+kd, 2e-5 for kd "
                                 "(only its ratio to phi matters: scores, phi and rate times c give the same masks)",
                                 source="TAMT Table 1")  # fmt: skip
    steps: int | None = knob(None, "optimizer steps; default from Table 2 by sparsity (17,000 at 0.7)", unit="steps",
                             source="TAMT Table 2")  # fmt: skip
    schedule_steps: int | None = knob(None, "steps of the linear decay; default 27,920 with Table 2's steps, else "
                                      "--steps", unit="steps", source="authors' code", least=1)  # fmt: skip

    def __post_init__(self) -> None:
        """Take from the preset what was not given and check the numbers; see the base class."""
        for name, value in PRESETS.get(self.preset, PRESETS["paper"]).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        super().__post_init__()
        if self.phi <= 0 or self.alpha < 1:
            raise UserError(f"--phi {self.phi} must be positive and --alpha {self.alpha} at least 1 (TAMT Eq. 5)")
        if self.steps is None and self.sparsity not in TABLE_2_STEPS:
            raise UserError(f"Table 2 has no number of steps for --sparsity {self.sparsity}; type --steps N")
        check_schedule(self.num_schedule_steps, self.num_steps, "--steps")

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """See the base class; the paper's preset is no choice."""
        return {**super().defaults(), **PRESETS["paper"]}

    @property
    def method(self) -> str:
        """``tamt-mlm``, ``tamt-kd`` or ``tamt-mlm+kd``."""
        return f"tamt-{self.objective}"

    @property
    def needs_head(self) -> bool:
        """See the base class."""
        return "mlm" in self.objective

    @property
    def peak_mask_lr(self) -> float:
        """Peak learning rate of the scores, with Table 1's default for the objective."""
        return self.mask_lr if self.mask_lr is not None else (2e-5 if self.objective == "kd" else 5e-5)

    @property
    def num_steps(self) -> int:
        """Optimizer steps, with Table 2's default for the sparsity."""
        return self.steps if self.steps is not None else TABLE_2_STEPS[self.sparsity]

    @property
    def num_schedule_steps(self) -> int:
        """Steps until the learning rates reach zero."""
        if self.schedule_steps is not None:
            return self.schedule_steps
        return PAPER_SCHEDULE_STEPS if self.steps is None else self.num_steps


@dataclass(frozen=True, kw_only=True)
class ImpConfig(SearchConfig):
    """Iterative magnitude pruning with rewinding (BERT-Tickets; TAMT Section 3.2 and Appendix B.2)."""

    lr: float = knob(5e-5, "peak learning rate of the weights", source="TAMT Table 1")
    interval_steps: int = knob(
        PAPER_INTERVAL_STEPS, "steps between two prunings of 10 %", unit="steps", source="TAMT B.2", least=1
    )
    schedule_steps: int | None = knob(None, "steps of the linear decay, restarted after each pruning; default ten "
                                      "intervals", unit="steps", source="authors' code", least=1)  # fmt: skip
    rewind: str = knob("theta0", "after each pruning the backbone's weights go back to theta_0, or stay ('none')",
                       source="TAMT 4.1.3", choices=("theta0", "none"))  # fmt: skip
    decoder: str = knob("masked", "the MLM decoder is tied to the 'masked' embedding (one matrix, trained and pruned "
                        "as one: what is zero is zero wherever it is used) or to theta_0's 'unmasked' one, frozen, "
                        "as in TAMT",
                        choices=("masked", "unmasked"))  # fmt: skip

    def __post_init__(self) -> None:
        """Check the numbers; see the base class."""
        super().__post_init__()
        check_schedule(self.num_schedule_steps, self.interval_steps, "--interval_steps")

    @property
    def method(self) -> str:
        """``imp``."""
        return "imp"

    @property
    def needs_head(self) -> bool:
        """See the base class."""
        return True

    @property
    def num_schedule_steps(self) -> int:
        """Steps until the learning rates reach zero, counted from each pruning."""
        return self.schedule_steps if self.schedule_steps is not None else 10 * self.interval_steps


@dataclass(frozen=True, kw_only=True)
class MagnitudeConfig(SearchConfig):
    """Masks without training: oneshot magnitude pruning, the random baseline (TAMT Section 3.2), reconstruction."""

    kind: str = knob("omp", "'omp' keeps the largest magnitudes, 'random' keeps weights at random, 'reconstruction' "
                     "those that keep what every matrix computes on the text", source="TAMT 3.2; results/README.md",
                     choices=("omp", "random", "reconstruction"))  # fmt: skip

    @property
    def method(self) -> str:
        """``omp``, ``random`` or ``reconstruction``."""
        return self.kind


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig):
    """Masked-language-model training of all weights from a random draw: how the built-in model is made."""

    model: str = knob("builtin", "only the built-in model is made here", choices=("builtin",))
    data: str = knob("builtin", "only the built-in language", choices=("builtin",))
    batch_size: int = knob(16, "sequences per optimizer step over all ranks", unit="sequences", least=1)
    seq_len: int = knob(64, "tokens per sequence, [CLS] and [SEP] included", unit="tokens", least=1)
    dropout: float = knob(0.0, "dropout; the text is read about once, so that nothing is learnt by heart")
    weight_decay: float = knob(0.01, "AdamW's weight decay, of biases and norms too")
    log_every: int = knob(250, "a line and a TensorBoard point every so often", unit="steps", least=1)
    lr: float = knob(1e-3, "peak learning rate of the weights")
    steps: int = knob(2500, "optimizer steps", unit="steps")
    warmup_steps: int = knob(250, "steps of the linear rise to the peak rate", unit="steps")

    def __post_init__(self) -> None:
        """Check the numbers; see the base class."""
        super().__post_init__()
        check_warmup(self.warmup_steps, self.steps, "--steps")

    @property
    def method(self) -> str:
        """``pretrain``."""
        return "pretrain"


@dataclass(frozen=True, kw_only=True)
class HeadConfig(TrainingConfig):
    """Training of an MLM head on the frozen encoder, for a checkpoint that has none."""

    lr: float = knob(1e-3, "peak learning rate of the head")
    steps: int = knob(1000, "optimizer steps", unit="steps")

    @property
    def method(self) -> str:
        """``head``."""
        return "head"
