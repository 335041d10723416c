"""Sparsity over time, as pure functions."""

from __future__ import annotations

from decimal import Decimal


def ladder(target: float, start: float = 0.1, step: float = 0.1) -> list[float]:
    """The sparsities through which iterative magnitude pruning goes: start, start + step, ..., target.

    The steps are decimal, so that the third rung of the default is 0.3 and not 0.30000000000000004; the last
    one is the target even where that is no whole number of steps, and none is within 1e-6 of it (0.1 * 7 is more
    than 0.7). A target of 0 is a ladder of one rung, 0.

    Source: TAMT Section 4.1.3 (another 10 % after every tenth of the training).
    """
    if start <= 0 or step <= 0:
        raise ValueError(f"a ladder climbs: start {start} and step {step} must be positive")
    rungs, rung = [], Decimal(str(start))
    while rung + Decimal("1e-6") < Decimal(str(target)):
        rungs.append(float(rung))
        rung += Decimal(str(step))
    return [*rungs, target]


def cubic(step: int, target: float, *, begin: int, end: int, initial: float = 0.0) -> float:
    """Sparsity at a step of the gradual schedule, s_f + (s_i - s_f) (1 - (t - t_0) / (t_n - t_0))^3.

    ``initial`` until step ``begin``, ``target`` from step ``end`` on; fast at first, slow towards the end.

    Source: Zhu and Gupta 2017, "To prune, or not to prune", Eq. 1.
    """
    progress = min(max((step - begin) / (end - begin), 0.0), 1.0) if end > begin else float(step >= end)
    return target + (initial - target) * (1.0 - progress) ** 3
