"""The one table of downstream tasks: files, columns, labels, metrics and hyper-parameters of each."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import numpy

from finemask_ds.data import builtin
from finemask_ds.errors import UserError

SPLITS = ("train", "dev", "dev_mismatched", "test", "test_mismatched")
"""Names of splits; the mismatched ones are MNLI's, where "dev" is the matched one."""


class Answer(NamedTuple):
    """A span of a context."""

    text: str
    start: int
    """Its first character's place in the context."""


Targets = Sequence[int] | Sequence[float] | Sequence[tuple[Answer, ...]]
"""Class numbers, scores, or the acceptable answers of each row."""


@dataclass(frozen=True)
class Task:
    """What a task asks, where its files are and how it is fine-tuned."""

    name: str
    """As typed after ``--task``."""
    title: str
    """As the papers print it."""
    kind: str
    """``classification``, ``regression`` or ``span``."""
    columns: tuple[str, ...]
    """Columns of the one or two texts; of a span task the question and the context."""
    target: str
    """Column of the label, the score or the answers."""
    metrics: tuple[str, ...]
    """Names of ``data.metrics.METRICS``; the first is the score."""
    labels: tuple[str, ...] = ()
    """Class names in the order of their numbers; empty unless a classification."""
    written: tuple[str, ...] = ()
    """The labels as the files and GLUE's submissions write them; empty: as ``labels``."""
    score_range: tuple[float, float] = (0.0, 5.0)
    """Smallest and largest target of a regression."""
    folder: str = ""
    """Its folder in the GLUE download; empty: not of GLUE."""
    files: Mapping[str, str] | None = None
    """Split -> file name."""
    headerless: tuple[str, ...] = ()
    """Column names of files without a header line (CoLA's train and dev)."""
    hub: str = ""
    """``OWNER/NAME:CONFIG`` on the hub; empty: the built-in language."""
    hub_columns: tuple[str, ...] = ()
    """``columns`` as the hub names them; empty: the same names."""
    epochs: int = 3
    batch_size: int = 32
    seq_len: int = 128
    doc_stride: int = 128
    """Tokens that neighbouring windows of a long context share (span tasks), as transformers' own script has it; in
    Devlin et al. 2019's code, which the papers' authors use, windows go on by so many."""
    lr: float = 2e-5
    warmup: float = 0.0
    """Share of the steps in which the rate rises."""
    eval_every: int = 50
    """Steps between two evaluations."""
    source: str = "TAMT Table 1"
    """Where the hyper-parameters are from."""

    @property
    def metric(self) -> str:
        """The metric that is the score."""
        return self.metrics[0]

    @property
    def is_builtin(self) -> bool:
        """Whether the task is of the built-in language."""
        return not self.hub


@dataclass(frozen=True)
class Examples:
    """The rows of one split, in the order of the file."""

    ids: Sequence[str]
    """GLUE's index or the question's id."""
    first: Sequence[str]
    second: Sequence[str] | None
    targets: Targets | None
    """None where the split has none (test)."""
    sha256: str
    """Of texts and targets in their order, whatever file they came from."""
    dropped_rows: int = 0
    """Rows left out because a field is missing, as the hub's own reader does (QQP has some)."""

    @classmethod
    def of(
        cls,
        ids: Sequence[str],
        first: Sequence[str],
        second: Sequence[str] | None,
        targets: Targets | None,
        dropped_rows: int = 0,
    ) -> Examples:
        """The rows with the sha256 of their contents."""
        examples = cls(ids, first, second, targets, "", dropped_rows)
        return replace(examples, sha256=contents_sha256(examples))

    def __len__(self) -> int:
        return len(self.ids)

    def subset(self, num: int, seed: int) -> Examples:
        """The first ``num`` rows of a permutation drawn from ``seed``: of one seed, smaller subsets nest in larger.

        Raises:
            UserError: where there are fewer rows.
        """
        self.check_subset(num)
        rows = numpy.random.default_rng(seed).permutation(len(self))[:num].tolist()
        return self.rows(rows)

    def check_subset(self, num: int, task: str = "") -> None:
        """Check that a subset of so many rows can be drawn; UserError, naming the task where it is told, if not."""
        if not 1 <= num <= len(self):
            of = f" of {task}" if task else ""
            raise UserError(f"--num_samples {num}: there are {len(self)} training rows{of}; type 1 to {len(self)}")

    def rows(self, rows: Sequence[int]) -> Examples:
        """The chosen rows, in the order given."""
        second = None if self.second is None else [self.second[row] for row in rows]
        targets = None if self.targets is None else cast(Targets, [self.targets[row] for row in rows])
        first = [self.first[row] for row in rows]
        return Examples.of([self.ids[row] for row in rows], first, second, targets, self.dropped_rows)


def contents_sha256(examples: Examples) -> str:
    """sha256 over texts and targets; ids are left out, because each source of a task numbers its rows anew."""
    digest = hashlib.sha256()
    for column in (examples.first, examples.second, examples.targets):
        digest.update(json.dumps(column).encode() + b"\n")
    return digest.hexdigest()


_TSV = {"train": "train.tsv", "dev": "dev.tsv", "test": "test.tsv"}
_YES_NO = ("entailment", "not_entailment")
_COLA_COLUMNS = ("source", "label", "mark", "sentence")
_SENTENCES = ("sentence1", "sentence2")
_NLI = "TAMT Table 1 has none; those of RTE and MNLI, the nearest tasks"

_GLUE = (
    Task("cola", "CoLA", "classification", ("sentence",), "label", ("matthews", "accuracy"),
         ("unacceptable", "acceptable"), ("0", "1"), folder="CoLA", files=_TSV, headerless=_COLA_COLUMNS,
         hub="nyu-mll/glue:cola"),
    Task("sst2", "SST-2", "classification", ("sentence",), "label", ("accuracy",), ("negative", "positive"),
         ("0", "1"), folder="SST-2", files=_TSV, hub="nyu-mll/glue:sst2"),
    Task("mrpc", "MRPC", "classification", ("#1 String", "#2 String"), "Quality", ("accuracy", "f1"),
         ("not_equivalent", "equivalent"), ("0", "1"), folder="MRPC", files=_TSV, hub="nyu-mll/glue:mrpc",
         hub_columns=_SENTENCES),
    Task("stsb", "STS-B", "regression", ("sentence1", "sentence2"), "score", ("pearson", "spearman"),
         folder="STS-B", files=_TSV, hub="nyu-mll/glue:stsb"),
    Task("rte", "RTE", "classification", ("sentence1", "sentence2"), "label", ("accuracy",), _YES_NO, folder="RTE",
         files=_TSV, hub="nyu-mll/glue:rte"),
    Task("mnli", "MNLI", "classification", ("sentence1", "sentence2"), "gold_label", ("accuracy",),
         ("entailment", "neutral", "contradiction"), folder="MNLI",
         files={"train": "train.tsv", "dev": "dev_matched.tsv", "dev_mismatched": "dev_mismatched.tsv",
                "test": "test_matched.tsv", "test_mismatched": "test_mismatched.tsv"},
         hub="nyu-mll/glue:mnli", hub_columns=("premise", "hypothesis"), eval_every=500),
    Task("qqp", "QQP", "classification", ("question1", "question2"), "is_duplicate", ("accuracy", "f1"),
         ("not_duplicate", "duplicate"), ("0", "1"), folder="QQP", files=_TSV, hub="nyu-mll/glue:qqp",
         eval_every=500, source="TAMT Table 1 has none; those of MRPC, evaluated as seldom as MNLI for its size"),
    Task("qnli", "QNLI", "classification", ("question", "sentence"), "label", ("accuracy",), _YES_NO, folder="QNLI",
         files=_TSV, hub="nyu-mll/glue:qnli", eval_every=500, source=_NLI),
    Task("wnli", "WNLI", "classification", ("sentence1", "sentence2"), "label", ("accuracy",),
         ("not_entailment", "entailment"), ("0", "1"), folder="WNLI", files=_TSV, hub="nyu-mll/glue:wnli",
         source=_NLI),
)  # fmt: skip

_SQUAD = Task(
    "squad", "SQuAD", "span", ("question", "context"), "answers", ("f1", "exact_match"),
    files={"train": "train-v1.1.json", "dev": "dev-v1.1.json"}, hub="rajpurkar/squad:plain_text",
    epochs=2, batch_size=16, seq_len=384, lr=3e-5, eval_every=1000,
)  # fmt: skip

_BUILTIN_COLUMNS = {
    "acceptability": ("text",),
    "sentiment": ("text",),
    "entailment": ("premise", "hypothesis"),
    "similarity": ("first", "second"),
    "questions": ("question", "context"),
}


def _builtin_task(name: str, spec: builtin.Task) -> Task:
    target = {"classification": "label", "regression": "score", "span": "answers"}[spec.kind]
    others = {"spearman": ("pearson",), "matthews": ("accuracy",), "exact_match": ("f1",)}
    return Task(
        name, name, spec.kind, _BUILTIN_COLUMNS[name], target, (spec.metric, *others.get(spec.metric, ())),
        spec.labels, epochs=9, seq_len=64, doc_stride=16, lr=5e-4, warmup=0.1,
        eval_every=96,
        source="chosen on the full built-in model",
    )  # fmt: skip


TASKS: Mapping[str, Task] = {
    task.name: task for task in (*_GLUE, _SQUAD, *(_builtin_task(name, spec) for name, spec in builtin.TASKS.items()))
}
"""Name -> task."""

PAPER_TASKS = ("mnli", "sst2", "cola", "stsb", "mrpc", "rte", "squad")
"""The seven tasks of TAMT, in the order of its Table 1."""

BUILTIN_TASKS = tuple(builtin.TASKS)
"""The five tasks of the built-in language."""


def task_named(name: str, option: str = "--task") -> Task:
    """The task of a name; case and punctuation do not matter, so that ``SST-2`` is ``sst2``.

    Args:
        name: as typed.
        option: where it was typed, for the message.

    Raises:
        UserError: for an unknown one, naming the known.
    """
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    if plain not in TASKS:
        raise UserError(f"{option} {name!r} is unknown; type one of {', '.join(TASKS)}")
    return TASKS[plain]


def default_tasks(model: str) -> tuple[str, ...]:
    """The tasks on which masks of a model are compared where none are typed."""
    return BUILTIN_TASKS if model == "builtin" else PAPER_TASKS
