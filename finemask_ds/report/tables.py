"""Tables of scores as plain values: what stands in each place, what it is made of and where that is listed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from finemask_ds.report import scores as statistic
from finemask_ds.report.cells import CellResult
from finemask_ds.report.figures import percent, title_of, unit_of
from finemask_ds.report.scores import Average, Board, MaskPoint, Score, Spread

MISSING = "–"  # noqa: RUF001 - a dash, as tables have it
UNDEFINED = "†"


@dataclass(frozen=True)
class Entry:
    """One place of a table."""

    text: str
    small: str = ""
    """What the number is over, or how much of it is there."""
    anchor: str = ""
    """Where its cells are listed; "" for no link."""
    best: bool = False
    note: str = ""
    """Why a score is undefined."""


@dataclass(frozen=True)
class Sheet:
    """A table: a row per method."""

    title: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Entry, ...]], ...]


@dataclass(frozen=True)
class Group:
    """The cells of one number; of an average the groups it is made of."""

    anchor: str
    title: str
    number: str
    cells: tuple[CellResult, ...] = ()
    parts: tuple[tuple[str, str], ...] = ()
    """Anchors and titles."""


@dataclass
class Groups:
    """All numbers of a page; the same cells have the same place."""

    prefix: str
    found: dict[tuple[str, ...], Group] = field(default_factory=dict)

    def of(self, score: Score, sparsity: float | None) -> str:
        """The anchor of a score's cells."""
        key = tuple(sorted(str(cell.path) for cell in score.cells))
        if key not in self.found:
            title = f"{name_of(score.method)}, {title_of(score.task, score.num_samples)}"
            steps = score.search_steps
            if score.method != "full":
                title += f", {percent(sparsity)}" + (f", {steps:,} search steps" if steps else "")
            self._add(key, Group("", title, written(score), score.cells))
        return self.found[key].anchor

    def average(self, method: str, average: Average, sparsity: float) -> str:
        """The anchor of the list of an average's scores."""
        parts = tuple((self.of(score, sparsity), title_of(score.task, score.num_samples)) for score in average.scores)
        title = f"{name_of(method)}, average, {percent(sparsity)}"
        return self._add(("average", method, str(sparsity)), Group("", title, written(average), parts=parts))

    def mask(self, point: MaskPoint) -> str:
        """The anchor of the list of the scores that a mask's cells are in."""
        one = point.cell
        parts = tuple(
            (group.anchor, title_of(group.cells[0].task, group.cells[0].num_samples))
            for group in self.found.values()
            if any(c.mask_key == one.mask_key and (c.task, c.num_samples) in point.tasks for c in group.cells)
        )
        title = f"mask {one.mask}, average"
        return self._add(("mask", one.mask_key), Group("", title, f"{100 * point.mean:.1f}", parts=parts))

    def _add(self, key: tuple[str, ...], group: Group) -> str:
        anchor = f"{self.prefix}cells-{len(self.found) + 1}"
        self.found[key] = replace(group, anchor=anchor)
        return anchor


def name_of(method: str) -> str:
    """A method as rows are named."""
    return "full model" if method == "full" else method


def written(found: Spread) -> str:
    """``71.3 ± 0.4``, a score of 1 being 100; without a deviation where there is one value."""
    if found.mean is None:
        return MISSING
    mean = round(100 * found.mean, 1) + 0.0  # never -0.0
    return f"{mean:.1f}" + (f" ± {100 * found.sd:.1f}" if found.sd is not None else "")


def over(found: Spread) -> str:
    """``n = 3 masks``; of an average ``n = 2 of 3 masks`` where one lacks a task."""
    if isinstance(found, Average) and found.n < found.units:
        return f"n = {found.n} of {found.units} {found.over}"
    return f"n = {found.n} {found.over if found.n != 1 else found.over.removesuffix('s')}" if found.n else ""


def main_sheet(board: Board, groups: Groups) -> Sheet:
    """Method x task at one sparsity, with the average over the tasks that all methods have."""
    header = ("method", *(_heading(board, column) for column in board.columns))
    best = {column: _best(board.methods, lambda m, c=column: board.scores.get((m, c))) for column in board.columns}  # type: ignore[misc]
    best_average = _best(board.methods, board.averages.get)
    rows = []
    for method in board.methods:
        entries = [_entry(board, method, column, groups, method in best[column]) for column in board.columns]
        if board.averages:
            entries.append(_average_entry(board, method, groups, method in best_average))
        rows.append((name_of(method), tuple(entries)))
    caption = (
        "Mean ± standard deviation of the best dev result, x 100. n counts masks, each the mean over its fine-tuning "
        "seeds; where a method has a single mask, the deviation is over its seeds and n counts these. "
    )
    if board.averages:
        header = (*header, f"average of {len(board.common)}")
        names = ", ".join(title_of(*column) for column in board.common)
        caption += (
            f"The average is over {names}: the tasks that all methods with results have; n counts the masks or seeds "
            "that have all of them. "
        )
    title = f"Scores at {percent(board.sparsity)} sparsity" if board.has_masks else "Scores of the full model"
    return Sheet(title, caption + "Bold: the best sparse method.", header, tuple(rows))


def _heading(board: Board, column: statistic.Column) -> str:
    metric = next((c.metric for s in board.scores.values() for c in s.cells if c.metric and c.task == column[0]), "")
    return title_of(*column) + (f", {_called(metric)}" if metric else "")


def _called(metric: str) -> str:
    return unit_of(metric).removesuffix(" (%)").removesuffix(" x 100")


def _best(methods: Sequence[str], score: Callable[[str], Spread | None]) -> set[str]:
    found = {m: s.mean for m in methods if m != "full" and (s := score(m)) is not None and s.mean is not None}
    return {m for m, mean in found.items() if mean == max(found.values())} if len(found) > 1 else set()


def _entry(board: Board, method: str, column: statistic.Column, groups: Groups, best: bool) -> Entry:
    score = board.scores.get((method, column))
    return Entry(MISSING, "not planned") if score is None else entry(score, board.sparsity, groups, best)


def entry(score: Score, sparsity: float | None, groups: Groups, best: bool = False) -> Entry:
    """A score in its place: flagged where undefined, with its count where cells are missing."""
    small = [over(score)] if score.n else []
    if score.done < len(score.cells):
        small.append(f"{score.done}/{len(score.cells)} cells")
    flag = UNDEFINED if score.undefined else ""
    return Entry(written(score) + flag, ", ".join(small), groups.of(score, sparsity), best, "; ".join(score.undefined))


def _average_entry(board: Board, method: str, groups: Groups, best: bool) -> Entry:
    average = board.averages.get(method)
    if average is None:
        return Entry(MISSING)
    flag = UNDEFINED if any(score.undefined for score in average.scores) else ""
    return Entry(written(average) + flag, over(average), groups.average(method, average, board.sparsity), best)


def fewer_samples(cells: Sequence[CellResult], board: Board, groups: Groups) -> Sheet | None:
    """Method x task for the smaller training sets (TAMT 4.2.6)."""
    here = [c for c in statistic.final(cells) if c.sparsity == board.sparsity or not c.mask_key]
    asked = {(c.task, c.num_samples) for c in here if c.mask_key} - set(board.columns)
    columns = sorted(asked, key=lambda c: (statistic.task_key(c[0]), -c[1]))
    found = {(s.method, (s.task, s.num_samples)): s for s in statistic.scores(here, by_steps=False)}
    methods = sorted({method for method, column in found if column in columns}, key=statistic.method_key)
    if not columns:
        return None
    best = {c: _best(methods, lambda m, c=c: found.get((m, c))) for c in columns}  # type: ignore[misc]
    rows = tuple(
        (name_of(m), tuple(entry(found[m, c], board.sparsity, groups, m in best[c]) if (m, c) in found
                           else Entry(MISSING, "not planned") for c in columns))
        for m in methods
    )  # fmt: skip
    header = ("method", *(title_of(*column) for column in columns))
    caption = "Mean ± standard deviation of the best dev result, x 100, with fewer rows to train on."
    return Sheet(f"With fewer training samples, {percent(board.sparsity)} sparsity", caption, header, rows)


_Value = Callable[[CellResult], float | None]


def other_metrics(board: Board, groups: Groups) -> Iterator[Sheet]:
    """Beside the score: the other metrics of each task at its best evaluation, and the last evaluation's score."""
    columns: list[tuple[str, statistic.Column, _Value]] = []
    last: list[tuple[str, statistic.Column, _Value]] = []
    for column in board.columns:
        done = [c for (_, where), s in board.scores.items() if where == column for c in s.cells if c.done]
        names = {name for c in done for name in c.metrics if name != c.metric}
        columns += [(f"{title_of(*column)}, {_called(name)}", column, _metric("metrics", name))
                    for name in sorted(names)]  # fmt: skip
        columns += [(f"{title_of(column[0])}-mm, {_called(name)}", column, _metric("mismatched", name))
                    for name in sorted({name for c in done for name in c.mismatched})]  # fmt: skip
        if done:
            last.append((_heading(board, column), column, lambda c: c.last_score if c.last_score is not None else 0.0))
    where = f"{percent(board.sparsity)} sparsity" if board.has_masks else "full model"
    for title, caption, chosen in (
        (f"Other metrics, {where}", "At the evaluation with the best score: mean ± standard deviation, x 100.",
         columns),
        (f"Last evaluation, {where}", "The score after the last step, beside the best one above; an undefined one "
         "counts 0.", last),
    ):  # fmt: skip
        if chosen:
            rows = tuple((name_of(m), tuple(_other(board, m, column, value, groups) for _, column, value in chosen))
                         for m in board.methods)  # fmt: skip
            yield Sheet(title, caption, ("method", *(heading for heading, _, _ in chosen)), rows)


def _metric(where: str, name: str) -> _Value:
    """A metric that is there but undefined counts 0, one that is not there does not count."""

    def value(cell: CellResult) -> float | None:
        found = getattr(cell, where)
        return (found[name] or 0.0) if name in found else None

    return value


def _other(board: Board, method: str, column: statistic.Column, value: _Value, groups: Groups) -> Entry:
    score = board.scores.get((method, column))
    found = statistic.spread(score.cells, value) if score else None
    if score is None or found is None or found.mean is None:
        return Entry(MISSING)
    return Entry(written(found), over(found), groups.of(score, board.sparsity))


def mask_sheet(cells: Sequence[CellResult], groups: Groups) -> Sheet | None:
    """A row per mask: what its search cost, how it pre-trains and what it scores; the numbers behind the figures."""
    rows = []
    for sparsity in statistic.sparsities(cells):
        here = [c for c in cells if c.sparsity == sparsity and c.mask_key]
        _, points, _ = statistic.mask_points(here, statistic.main_columns(cells, sparsity))
        for point in points:
            cell, origin = point.cell, point.cell.origin
            steps = cell.search_steps if cell.search_steps is not None else (origin.steps if origin else None)
            numbers = (origin.seconds, origin.mlm_loss, origin.kd_loss, origin.distance_from_omp) if origin else ()
            shown = [Entry(_plain(number, places)) for number, places in zip(numbers, (0, 4, 4, 4), strict=False)]
            shown += [Entry(MISSING)] * (4 - len(shown))
            rows.append((name_of(cell.method), (
                Entry(percent(sparsity)), Entry(_plain(cell.mask_seed)), Entry(_plain(steps)), *shown,
                Entry(f"{100 * point.mean:.1f}", anchor=groups.mask(point)), Entry(cell.mask or MISSING),
            )))  # fmt: skip
    header = ("method", "sparsity", "seed", "search steps", "search seconds", "MLM dev loss", "KD dev loss",
              "distance from OMP", "average score", "file")  # fmt: skip
    caption = (
        "The numbers behind the figures with a point per mask. MLM loss in nats per masked token with the "
        "pre-trained head; distance is 1 - Jaccard similarity; the average is over the tasks named under the figures."
    )
    return Sheet("Masks", caption, header, tuple(rows)) if rows else None


def _plain(number: float | None, places: int = 0) -> str:
    return MISSING if number is None else f"{number:,.{places}f}"
