"""Metrics against values computed by hand, and the libraries' definitions at the edges."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest

from finemask_ds.data.metrics import METRICS, Scores, score
from finemask_ds.data.tasks import TASKS, Answer

COLA, MRPC, STSB, MNLI, SQUAD = (TASKS[name] for name in ("cola", "mrpc", "stsb", "mnli", "squad"))


@pytest.fixture(autouse=True)
def _no_warning_leaks():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_every_task_has_metrics_that_exist():
    assert {name for task in TASKS.values() for name in task.metrics} == set(METRICS)
    for name, metric in METRICS.items():
        kinds = {task.kind for task in TASKS.values() if name in task.metrics}
        assert metric.title
        assert (metric.compute is None) == (kinds == {"span"})


def test_against_values_by_hand():
    predictions, targets = np.array([1, 1, 1, 0, 0, 1, 0, 0]), [1, 0, 1, 1, 0, 1, 0, 1]  # 3 TP, 1 FP, 2 FN, 2 TN
    assert score(MRPC, predictions, targets) == Scores({"accuracy": 5 / 8, "f1": 6 / 9}, {})
    values = score(COLA, predictions, targets).values
    assert values["accuracy"] == 5 / 8
    assert values["matthews"] == pytest.approx((3 * 2 - 1 * 2) / math.sqrt(4 * 5 * 3 * 4), rel=1e-12)
    values = score(STSB, np.array([1.0, 2.0, 4.0], np.float32), [0.0, 3.0, 3.0]).values
    # Deviations (-4, -1, 5) / 3 and (-2, 1, 1); ranks 1 2 3 and 1 2.5 2.5.
    assert values["pearson"] == pytest.approx((8 - 1 + 5) / 3 / math.sqrt(42 / 9 * 6), rel=1e-12)
    assert values["spearman"] == pytest.approx(1.5 / math.sqrt(2 * 1.5), rel=1e-12)


def test_f1_is_of_the_positive_class():
    assert score(MRPC, [0, 0, 0, 1], [0, 0, 0, 0]).values == {"accuracy": 0.75, "f1": 0.0}
    assert score(MRPC, [1, 0, 0, 0], [1, 1, 0, 0]).values == {"accuracy": 0.75, "f1": 2 / 3}


def test_perfect_and_inverted_predictions():
    classes = [0, 1, 1, 0, 1]
    assert score(MRPC, classes, classes).values == {"accuracy": 1.0, "f1": 1.0}
    assert score(MRPC, [1 - label for label in classes], classes).values == {"accuracy": 0.0, "f1": 0.0}
    assert score(COLA, classes, classes).values == {"matthews": 1.0, "accuracy": 1.0}
    assert score(COLA, [1 - label for label in classes], classes).values == {"matthews": -1.0, "accuracy": 0.0}
    assert score(MNLI, [2, 1, 0], [2, 1, 0]).values == {"accuracy": 1.0}
    scores = [0.0, 1.25, 5.0, 3.8]
    for sign in (1, -1):
        values = score(STSB, [sign * 2 * value + 7 for value in scores], scores).values
        assert values == {name: pytest.approx(sign, abs=1e-15) for name in ("pearson", "spearman")}


def test_monotone_is_perfect_for_spearman_only():
    values = score(STSB, [math.exp(value) for value in (0, 1, 2, 5)], [0.0, 1.0, 2.0, 5.0]).values
    assert values["spearman"] == pytest.approx(1, abs=1e-15)
    assert values["pearson"] < 0.99


def test_ties_share_their_ranks():
    """Ranks 1.5 1.5 3 and 1 2.5 2.5: deviations (-.5, -.5, 1) and (-1, .5, .5)."""
    values = score(STSB, [2.0, 2.0, 3.0], [0.0, 4.0, 4.0]).values
    assert values["spearman"] == pytest.approx(0.75 / 1.5, rel=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_correlation_of_constants_is_undefined_and_says_why(dtype):
    constant, varied = np.full(4, 2.5, dtype), np.array([0.0, 1, 3, 2], dtype)
    for predictions, targets, what in ((constant, varied, "predictions"), (varied, constant, "targets")):
        told = score(STSB, predictions, targets)
        assert told.values == {"pearson": None, "spearman": None}
        assert told.undefined == dict.fromkeys(STSB.metrics, f"all 4 {what} are 2.5")


def test_what_differs_by_rounding_only_is_undefined_for_pearson():
    nearly = np.array([1.0, 1 + 2**-52, 1.0, 1.0])
    told = score(STSB, nearly, [0.0, 1.0, 2.0, 3.0])
    assert told.values["pearson"] is None
    assert "no more than rounding" in told.undefined["pearson"]
    assert set(told.undefined) == {"pearson"}


def test_what_overflows_is_undefined_for_pearson():
    told = score(STSB, [1.5e308, 1.7e308, -1.0, 1.6e308], [0.0, 1.0, 2.0, 3.0])
    assert told.values["pearson"] is None
    assert "too large" in told.undefined["pearson"]
    assert told.values["spearman"] == pytest.approx(0, abs=1e-15)  # ranks 2 4 1 3


def test_constant_classes_have_the_librarys_values():
    for constant in (0, 1):
        told = score(COLA, [constant] * 4, [0, 1, 1, 0])
        assert told == Scores({"matthews": 0.0, "accuracy": 0.5}, {})
    assert score(MRPC, [0] * 4, [0, 1, 1, 0]).values == {"accuracy": 0.5, "f1": 0.0}
    assert score(MRPC, [1] * 4, [0, 1, 1, 0]).values == {"accuracy": 0.5, "f1": 2 / 3}


@pytest.mark.parametrize("only", [0, 1])
def test_folds_of_a_single_class(only):
    assert score(COLA, [only] * 3, [only] * 3) == Scores({"matthews": 0.0, "accuracy": 1.0}, {})
    assert score(COLA, [0, 1, 0], [only] * 3).values["matthews"] == 0.0
    assert score(MRPC, [only] * 3, [only] * 3).values == {"accuracy": 1.0, "f1": float(only)}


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_predictions_that_are_not_finite_are_not_scored(broken):
    told = score(STSB, np.array([1.0, broken, broken, 2.0], np.float32), [1.0, 2.0, 3.0, 4.0])
    assert told.values == {"pearson": None, "spearman": None}
    assert set(told.undefined.values()) == {"2 of 4 predictions are not finite"}


def test_one_row_and_none():
    assert score(STSB, [1.0], [1.0]).undefined == dict.fromkeys(STSB.metrics, "there is only one row")
    assert score(COLA, [1], [1]).values == {"matthews": 0.0, "accuracy": 1.0}
    for task in (COLA, STSB, SQUAD):
        assert score(task, [], []) == Scores(
            dict.fromkeys(task.metrics), dict.fromkeys(task.metrics, "there are no rows")
        )


@pytest.mark.parametrize("wrong", [[0, 2, 1], [0, -1, 1], [0.0, 1.0, 1.0]])
def test_what_is_no_class_is_a_mistake_of_the_caller(wrong):
    with pytest.raises(ValueError, match="integers from 0 to 1"):
        score(COLA, wrong, [0, 1, 1])
    with pytest.raises(ValueError, match="2 predictions for 3 targets"):
        score(COLA, [0, 1], [0, 1, 1])


def squad_score(prediction: str, *answers: str) -> tuple[float, float]:
    values = score(SQUAD, [prediction], [tuple(Answer(text, 0) for text in answers)]).values
    return values["f1"], values["exact_match"]


def test_answers_are_compared_as_squad_does():
    for same in ("The Norman Dukes", "norman dukes!", "  norman   dukes ", "a Norman, Dukes.", "NORMAN DUKES"):
        assert squad_score(same, "Norman dukes") == (1.0, 1.0)
    assert squad_score("dukes Norman", "Norman dukes") == (1.0, 0.0)
    assert squad_score("Paris", "Norman dukes") == (0.0, 0.0)
    assert squad_score("", "Norman dukes") == (0.0, 0.0)
    f1, exact = squad_score("the old Norman dukes of France", "Norman dukes")  # 2 of 5 words, both of 2
    assert (f1, exact) == (pytest.approx(2 * 0.4 / 1.4, rel=1e-6), 0.0)


def test_the_best_of_several_answers_counts_and_rows_are_averaged():
    assert squad_score("in Rome", "Paris", "Rome", "in Rome") == (1.0, 1.0)
    assert squad_score("in Rome", "Paris", "Rome")[0] == pytest.approx(2 / 3, rel=1e-6)
    gold = [(Answer("Rome", 3), Answer("in Rome", 0)), (Answer("1976", 0),), (Answer("blue", 9),), (Answer("red", 9),)]
    values = score(SQUAD, ["Rome", "1977", "blue", "the red"], gold).values
    assert values == {"f1": 0.75, "exact_match": 0.75}
    turned = score(replace(SQUAD, metrics=("exact_match", "f1")), ["Rome"], gold[:1])
    assert list(turned.values) == ["exact_match", "f1"]
