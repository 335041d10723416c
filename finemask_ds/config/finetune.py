"""Every knob of one fine-tuning, and of a sweep of them; what is not given comes from data/tasks.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from finemask_ds.config.knobs import EXECUTORS, VOLATILE, Config, DispatchKnobs, check_warmup, knob
from finemask_ds.errors import UserError

_TABLE_1 = "TAMT Table 1 for its seven tasks"


@dataclass(frozen=True, kw_only=True)
class CellKnobs(Config):
    """What the cells of a sweep share."""

    volatile: ClassVar[frozenset[str]] = VOLATILE - {"eval_every"}
    """The best dev score depends on how often one looks."""

    model: str = knob("", "hub name, folder, or 'builtin'; empty: the model of the (first) mask, bert-base-uncased "
                      "without one", source="TAMT 4.1.1")  # fmt: skip
    data: str = knob("", "GLUE root (with SQuAD's two files in squad/ inside it, which the download has not), task "
                     "folder, 'hub' or 'builtin'; empty: the hub, for a built-in task 'builtin'")  # fmt: skip
    epochs: int | None = knob(None, "times through the training rows; default by task", source=_TABLE_1, least=1)
    steps: int | None = knob(None, "optimizer steps, in place of --epochs", unit="steps", least=1)
    batch_size: int | None = knob(None, "rows (windows of a long context) per optimizer step; default by task",
                                  unit="rows", source=_TABLE_1, least=1)  # fmt: skip
    micro_batch_size: int = knob(0, "rows per forward on one rank; 0: all of the rank's at once", unit="rows")
    eval_batch_size: int = knob(64, "dev rows per forward on one rank", unit="rows", least=1)
    seq_len: int | None = knob(None, "most tokens of an input, longer ones are cut (a long context becomes windows); "
                               "default by task, at most the model's positions", unit="tokens",
                               source=_TABLE_1, least=8)  # fmt: skip
    lr: float | None = knob(None, "peak learning rate, falling linearly to 0; default by task", source=_TABLE_1)
    warmup_steps: int | None = knob(None, "steps of the linear rise to the peak rate; default by task, 0 in the papers",
                                    unit="steps", source="authors' code")  # fmt: skip
    dropout: float | None = knob(None, "dropout of hidden states, attention and head; default: the checkpoint's own")
    weight_decay: float = knob(0.0, "AdamW's weight decay, of biases and norms too", source="authors' code")
    max_grad_norm: float = knob(1.0, "gradients of kept weights are clipped to this global norm; 0: not at all",
                                source="authors' code")  # fmt: skip
    mixed_precision: str = knob("no", "compute in fp32 ('no'), or in 16 bit with fp32 weights",
                                choices=("no", "bf16", "fp16"))  # fmt: skip
    eval_every: int | None = knob(None, "dev scores every so often and at the end (0: only there), the best counts; "
                                  "default by task", unit="steps", source=_TABLE_1)  # fmt: skip
    log_every: int = knob(50, "a line and a TensorBoard point every so often", unit="steps", least=1)
    save_every: int = knob(500, "a checkpoint every so often, to go on from after a kill; 0: only when a worker is "
                           "asked to end", unit="steps")  # fmt: skip

    def __post_init__(self) -> None:
        """Check the numbers; see the base class."""
        super().__post_init__()
        if self.dropout is not None and self.dropout >= 1:
            raise UserError(f"--dropout {self.dropout} must be below 1")
        if self.steps and self.warmup_steps:
            check_warmup(self.warmup_steps, self.steps, "--steps")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(CellKnobs):
    """Fine-tuning of a subnetwork, or of the full model, on one downstream task (TAMT Sections 3.3 and 4.1)."""

    task: str = knob("", "cola, sst2, rte, mnli, mrpc, stsb, qqp, qnli, wnli, squad, or of the built-in language "
                     "acceptability, sentiment, entailment, similarity, questions")  # fmt: skip
    mask: str = knob("", "mask file, or run directory of a search; empty: the full model")
    num_samples: int = knob(0, "training rows to use, drawn by --seed and nested; 0: all; dev is never cut",
                            unit="rows", source="TAMT 4.2.6")  # fmt: skip
    seed: int = knob(1, "seed of the head, the data order, dropout and the subset", source="TAMT 4.1.3: three seeds")
    run: str = knob("", "run directory; empty: runs/NAME-HASH from the options given")
    save_model: str = knob("", "new folder for the fine-tuned model of the best dev score, as Hugging Face loads it")
    predict: str = knob("", "new file for the predictions of the best dev score on the test rows, in GLUE's format "
                        "(SQuAD and built-in tasks: on the dev rows)")  # fmt: skip

    def __post_init__(self) -> None:
        """Check the numbers; see the base class."""
        super().__post_init__()
        if not self.task:
            raise UserError("no --task; type for instance --task mrpc")

    @property
    def method(self) -> str:
        """``finetune-TASK``."""
        return f"finetune-{self.task}"


@dataclass(frozen=True, kw_only=True)
class SweepConfig(DispatchKnobs, CellKnobs):
    """Fine-tuning of many masks on many tasks: masks x tasks x seeds x fractions, plus the full model."""

    masks: tuple[str, ...] = knob((), "mask files, or run directories of searches")
    tasks: tuple[str, ...] = knob((), "tasks; default the paper's seven, or all built-in ones of the built-in model",
                                  source="TAMT 4.1.2")  # fmt: skip
    seeds: tuple[int, ...] = knob((1, 2, 3), "fine-tuning seeds", source="TAMT 4.1.3")
    num_samples: tuple[int, ...] = knob((0,), "numbers of training rows; 0: all", unit="rows", source="TAMT 4.2.6")
    full: str = knob("yes", "fine-tune the full model too", choices=("yes", "no"))
    run: str = knob("runs/sweep", "folder of the plan; the same folder goes on with what is missing")
    executor: str = knob("local", "where the cells run: 'local' on this machine's GPUs or cores, as job arrays of "
                         "'slurm', on an existing cluster of 'ray'; 'elsewhere' only writes the plan, for finemask "
                         "worker RUN", choices=EXECUTORS)  # fmt: skip
    wait: str = knob("yes", "slurm: 'no' leaves the cells in the queue, and a last small job submits what is then "
                     "missing or writes the page; 'tidy' is what that job types",
                     choices=("yes", "no", "tidy"))  # fmt: skip
    after: str = knob("", "slurm: number of a job that must have ended before any cell begins")
    retries: int = knob(2, "a failed cell is tried again so often", unit="times")

    @property
    def method(self) -> str:
        """``sweep``."""
        return "sweep"

    def shared_options(self) -> dict[str, object]:
        """What every cell is given, where it differs from the defaults."""
        defaults = CellKnobs.defaults()
        return {name: value for name in defaults if (value := getattr(self, name)) != defaults[name]}
