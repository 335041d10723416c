"""Scores of predictions, as fractions, computed by scikit-learn, SciPy and torchmetrics."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from finemask_ds.data.tasks import Answer, Task


class UndefinedError(ValueError):
    """A metric has no value for these predictions; the message says why."""


class Metric(NamedTuple):
    """One metric."""

    title: str
    """As tables and axes print it."""
    compute: Callable[[np.ndarray, np.ndarray], float] | None
    """Classes or scores [rows], their targets [rows] -> a fraction, or `UndefinedError`; None: only of answers."""


@dataclass(frozen=True)
class Scores:
    """Values of a task's metrics over one split."""

    values: dict[str, float | None]
    """Metric -> fraction (1 is perfect; correlations lie in [-1, 1]), None where it is undefined."""
    undefined: dict[str, str]
    """Metric -> why it has no value."""


def score(task: Task, predictions: Sequence[Any] | np.ndarray, targets: Sequence[Any] | np.ndarray) -> Scores:
    """Compute all metrics of a task.

    Args:
        task: names the metrics.
        predictions: class numbers (int), scores (float) or texts of answers, [rows].
        targets: as in `Examples`, [rows].

    Returns:
        The values. Accuracy, F1 (of class 1) and Matthews are scikit-learn's, which calls F1 and Matthews of constant
        predictions 0; correlations are SciPy's, undefined where predictions or targets are constant; F1 and exact
        match of answers are SQuAD's by torchmetrics. Predictions that are not finite leave all undefined.

    Raises:
        ValueError: there are not as many predictions as targets, or there is no such class.
    """
    if len(predictions) != len(targets):
        raise ValueError(f"{len(predictions)} predictions for {len(targets)} targets")
    if not len(targets):
        return _all_undefined(task, "there are no rows")
    if task.kind == "span":
        values = _squad(list(predictions), list(targets))
        return Scores({name: values[name] for name in task.metrics}, {})
    predicted, wanted = np.asarray(predictions), np.asarray(targets)
    if num := np.count_nonzero(~np.isfinite(predicted)):
        return _all_undefined(task, f"{num} of {len(predicted)} predictions are not finite")
    if task.kind == "classification":
        for numbers in (predicted, wanted):
            if numbers.dtype.kind not in "iu" or numbers.min() < 0 or numbers.max() >= len(task.labels):
                raise ValueError(f"classes of {task.name} are integers from 0 to {len(task.labels) - 1}")
    scores = Scores({}, {})
    for name in task.metrics:
        try:
            compute = METRICS[name].compute
            assert compute is not None, name
            scores.values[name] = compute(predicted, wanted)
        except UndefinedError as error:
            scores.values[name] = None
            scores.undefined[name] = str(error)
    return scores


def _all_undefined(task: Task, why: str) -> Scores:
    return Scores(dict.fromkeys(task.metrics), dict.fromkeys(task.metrics, why))


def _accuracy(predicted: np.ndarray, wanted: np.ndarray) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(wanted, predicted))


def _f1(predicted: np.ndarray, wanted: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(wanted, predicted, pos_label=1, zero_division=0))


def _matthews(predicted: np.ndarray, wanted: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    with warnings.catch_warnings():  # that one class is all there is, where the value 0 is right
        warnings.simplefilter("ignore", UserWarning)
        return float(matthews_corrcoef(wanted, predicted))


def _pearson(predicted: np.ndarray, wanted: np.ndarray) -> float:
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predicted, wanted)


def _spearman(predicted: np.ndarray, wanted: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predicted, wanted)


def _correlation(library: Callable[..., Any], predicted: np.ndarray, wanted: np.ndarray) -> float:
    """A correlation in fp64; what SciPy only warns of, that the inputs are (nearly) constant, is `UndefinedError`."""
    from scipy.stats import ConstantInputWarning, NearConstantInputWarning

    if len(wanted) == 1:
        raise UndefinedError("there is only one row")
    for name, values in (("predictions", predicted), ("targets", wanted)):
        if (values == values[0]).all():
            raise UndefinedError(f"all {len(values)} {name} are {values[0]:g}")
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("error", ConstantInputWarning)
        warnings.simplefilter("error", NearConstantInputWarning)
        try:
            value = float(library(predicted.astype(np.float64), wanted.astype(np.float64)).statistic)
        except (ConstantInputWarning, NearConstantInputWarning) as warning:
            raise UndefinedError("predictions or targets differ by no more than rounding") from warning
    if not np.isfinite(value):
        raise UndefinedError("predictions or targets are too large for the products of a correlation")
    return value


def _squad(predictions: Sequence[str], targets: Sequence[tuple[Answer, ...]]) -> dict[str, float]:
    """F1 and exact match of answers, each the best over the acceptable ones, as fractions."""
    from torchmetrics.functional.text.squad import squad

    told = [{"id": str(row), "prediction_text": text} for row, text in enumerate(predictions)]
    gold: list[dict[str, Any]] = [
        {"id": str(row), "answers": {"text": [a.text for a in answers], "answer_start": [a.start for a in answers]}}
        for row, answers in enumerate(targets)
    ]
    return {name: float(value) / 100 for name, value in squad(told, gold).items()}


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric("accuracy", _accuracy),
    "f1": Metric("F1", _f1),
    "matthews": Metric("Matthews", _matthews),
    "pearson": Metric("Pearson", _pearson),
    "spearman": Metric("Spearman", _spearman),
    "exact_match": Metric("EM", None),
}
"""All metrics by name; F1 of answers is that of their words."""
