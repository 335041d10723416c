"""A report as one HTML page and as Markdown, from the same content."""

from __future__ import annotations

from collections.abc import Iterator

from finemask_ds.report.cells import CellResult
from finemask_ds.report.content import Content, Part
from finemask_ds.report.figures import Drawing, title_of
from finemask_ds.report.style import to_svg
from finemask_ds.report.table import markdown
from finemask_ds.report.tables import MISSING, UNDEFINED, Entry, Sheet, name_of
from finemask_ds.report.template import PAGE, STYLE

TITLE = "Downstream scores of subnetworks"

CELL_HEADER = ("cell", "mask seed", "seed", "train rows", "score", "last score", "best step", "seconds", "mask",
               "result")  # fmt: skip


def cell_row(cell: CellResult) -> list[str]:
    """A cell as text, all columns but the last: scores with four decimals, 1 being perfect."""
    rows = cell.train_rows if cell.train_rows is not None else cell.num_samples or None
    score = _number(cell.score, 4) if cell.score is not None or not cell.done else f"undefined{UNDEFINED}"
    return [cell.id, _number(cell.mask_seed), str(cell.seed), _number(rows), score, _number(cell.last_score, 4),
            _number(cell.best_step), _number(cell.seconds, 1), cell.mask or name_of(cell.method)]  # fmt: skip


def _number(value: float | None, places: int = 0) -> str:
    return MISSING if value is None else f"{value:.{places}f}"


def last_line(error: str) -> str:
    """What a traceback ends with."""
    lines = error.strip().splitlines()
    return lines[-1] if lines else "failed without a word"


def html(content: Content) -> str:
    """The page: every text of a file is escaped, figures are inline SVG."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def svg(drawing: Drawing) -> Markup:
        assert drawing.figure is not None
        return Markup(to_svg(drawing.figure, drawing.name))

    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(PAGE)
    text = template.render(
        content=content, title=TITLE, style=Markup(STYLE), svg=svg, link=content.link, task=title_of,
        cell_header=CELL_HEADER, cell_row=cell_row, last_line=last_line,
    )  # fmt: skip
    return text + "\n"


def markdown_text(content: Content) -> str:
    """The same in Markdown, with the figures as files beside it."""
    return "\n".join(_markdown(content)) + "\n"


def _markdown(content: Content) -> Iterator[str]:
    yield from (f"# {TITLE}", "")
    yield from (f"- {name}: {_plain('; '.join(lines))}" for name, lines in content.facts)
    yield ""
    for part in content.parts:
        yield from (f"## Scores{_of(content, part)}", "")
        for sheet in part.sheets:
            yield from _sheet(sheet)
    if content.cautions:
        yield from ("### To be read with care", "", *(f"- {_plain(sentence)}" for sentence in content.cautions), "")
    for part in content.parts:
        yield from (f"## Figures{_of(content, part)}", "")
        for one in part.drawings:
            shown = f"![{one.title}](figures/{one.name}.png)\n\n" if one.figure else "Not drawn. "
            yield from (f"### {one.title}", "", f"{shown}{_plain(one.caption)}", "")
        yield from (f"## Details{_of(content, part)}", "")
        for sheet in part.details:
            yield from _sheet(sheet)
        yield from (f"## Cells{_of(content, part)}", "")
        yield from _groups(content, part)
    if content.unfinished:
        rows = [[_plain(t) for t in (c.id, c.state, c.method, title_of(c.task, c.num_samples), str(c.seed),
                 last_line(c.error) if c.error else "")] for c in content.unfinished]  # fmt: skip
        yield from ("## Missing and failed", "")
        yield from (markdown(["cell", "state", "method", "task", "seed", "why"], rows), "")
    if content.left_out:
        yield from ("## Left out", "", *(f"- {_plain(sentence)}" for sentence in content.left_out), "")


def _of(content: Content, part: Part) -> str:
    return f", model {_plain(part.model)}" if len(content.parts) > 1 else ""


def _sheet(sheet: Sheet) -> Iterator[str]:
    rows = [[_plain(name), *map(_entry, entries)] for name, entries in sheet.rows]
    yield from (f"### {_plain(sheet.title)}", "", markdown([_plain(name) for name in sheet.header], rows), "")
    yield from (_plain(sheet.caption), "")


def _entry(entry: Entry) -> str:
    text = f"**{entry.text}**" if entry.best else _plain(entry.text)
    linked = f"[{text}](#{entry.anchor})" if entry.anchor else text
    return f"{linked} ({entry.small})" if entry.small else linked


def _groups(content: Content, part: Part) -> Iterator[str]:
    for group in part.groups:
        yield from (f'<a id="{group.anchor}"></a>**{_plain(group.title)}: {group.number}**', "")
        if group.parts:
            yield from ("of " + ", ".join(f"[{_plain(title)}](#{anchor})" for anchor, title in group.parts), "")
            continue
        rows = [
            [*map(_plain, cell_row(cell)), f"[result.json]({content.link(cell.path)})" if cell.done else cell.state]
            for cell in group.cells
        ]
        yield from (markdown(list(CELL_HEADER), rows), "")


def _plain(text: str) -> str:
    """Text that Markdown takes as it stands: no tags, no columns, no emphasis, one line."""
    for sign, written in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("*", "\\*"), ("`", "\\`"),
                          ("[", "\\["), ("]", "\\]"), ("\n", " "), ("\r", " ")):  # fmt: skip
        text = text.replace(sign, written)
    return text
