"""The page, the Markdown and the CSV files of a report."""

import csv
import html.parser
import json
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from finemask_ds.report import scores as statistic
from finemask_ds.report.collect import collect
from finemask_ds.report.tables import MISSING
from finemask_ds.report.write import score_tables, write_report
from tests.report.fakes import HOLES, Fakes, long_names, small

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Reader(html.parser.HTMLParser):
    """Checks nesting, and keeps ids, links, sources, tags and the rows of tables."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.ids, self.links, self.sources, self.tags = [], [], [], [], []
        self.tables, self.texts, self.attributes = [], [], []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.open(tag, attrs)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.open(tag, attrs)

    def open(self, tag, attrs):
        self.tags.append(tag)
        found = dict(attrs)
        self.attributes.append((tag, found))
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if "href" in found and tag in ("a", "use") else []
        self.sources += [found[key] for key in ("src", "srcset", "data", "action") if key in found]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if "td" in self.stack or "th" in self.stack:
            self.tables[-1][-1][-1] += f"{data} "


@pytest.fixture(scope="module")
def page(report):
    return Reader((report / "index.html").read_text())


@pytest.fixture(scope="module")
def collection(holes):
    return collect([holes])


def rows_of(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def test_every_link_leads_somewhere(report, page):
    assert len(page.ids) == len(set(page.ids))
    inner = [link[1:] for link in page.links if link.startswith("#")]
    assert set(inner) <= set(page.ids)
    assert sum(anchor.startswith("cells-") for anchor in inner) > 100
    files = [unquote(link) for link in page.links if not link.startswith("#")]
    assert sum(name.endswith("result.json") for name in files) > 100
    assert all((report / name).is_file() for name in files)


def test_every_number_links_to_its_cells(page, collection):
    """The scores on the page are those of the statistics, and the block of each names exactly its cells."""
    text_of = {}
    for table in page.tables:
        title = None
        for row in table:
            if len(row) == 1:
                title = row[0].split(":")[0].strip()
                text_of[title] = []
            elif title and len(row) == 10:
                text_of[title].append(row[0].strip())
    assert text_of["tamt-kd, MRPC, 70 %, 200 search steps"]
    for score in statistic.scores(collection.cells):
        if score.method == "imp" and score.num_samples == 0:
            name = {"cola": "CoLA", "stsb": "STS-B", "mrpc": "MRPC", "squad": "SQuAD"}[score.task]
            title = f"imp, {name}, {100 * score.sparsity:g} %, {score.search_steps} search steps"
            assert text_of[title] == [cell.id for cell in score.cells]


def test_missing_failed_and_undefined_cells_are_shown(page, collection):
    (table,) = [table for table in page.tables if table[0][-1].strip() == "why"]
    listed = {row[0].strip(): row[1].strip() for row in table[1:]}
    assert listed == {cell.id: cell.state for cell in collection.cells if not cell.done}
    text = " ".join(page.texts)
    assert "0/3 cells" in text
    assert "8/9 cells" in text
    assert "constant predictions" in text
    assert "†" in text
    assert len(listed) == sum(state != "undefined" for state in HOLES.values())


def test_the_page_needs_nothing_else_and_runs_nothing(report, page):
    text = (report / "index.html").read_text()
    assert page.sources == []
    assert not {"script", "iframe", "img", "object", "link"} & set(page.tags)
    assert not re.search(r"""(href|src)=["']?(https?:|//)|@import|url\((?!#)""", text)
    assert not any(name.startswith("on") for _, found in page.attributes for name in found)


def test_tables_and_figures_can_be_read_without_seeing_them(page):
    assert page.tags.count("caption") == page.tags.count("table")
    for tag, found in page.attributes:
        if tag == "th":
            assert found["scope"] in ("col", "row", "rowgroup")
        if tag == "svg":
            assert found["role"] == "img"
            assert found["aria-labelledby"] in page.ids
    assert "<text" in "".join(f"<{tag}" for tag in page.tags)


def test_text_of_files_is_never_markup(tmp_path):
    long_names(tmp_path)
    fakes = Fakes(tmp_path / "more")
    fakes.cell("mrpc", state="failed")
    fakes.cell("<b>cola", method="$\\frac{", model="</style><b>", mask=None)
    fakes.plan()
    fakes.cell("_x", method="_hidden", undefined="<b>", state="undefined")
    (tmp_path / "more" / "<b>broken").mkdir()
    (tmp_path / "more" / "<b>broken" / "result.json").write_text("{")
    page, left_out = write_report([tmp_path, tmp_path / "more"])
    read = Reader(page.read_text())
    assert not {"script", "b"} & set(read.tags)
    assert any("alert" in text for text in read.texts)
    assert "<b>broken" in left_out[-1]
    assert any("<b>broken" in text for text in read.texts)
    markdown = (page.parent / "report.md").read_text()
    assert not re.search(r"<(?!a id=\"|/a>)", markdown)


def test_markdown_has_the_same_numbers_and_links(report, collection):
    text = (report / "report.md").read_text()
    anchors = re.findall(r'<a id="([^"]+)">', text)
    assert len(anchors) == len(set(anchors))
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= set(anchors)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (report / unquote(target)).is_file(), target
    section = text.split("### Scores at 70 % sparsity")[1].split("###")[0]
    lines = [line.strip("| ").split("|") for line in section.splitlines() if line.startswith("| ")][2:]
    board = statistic.board(collection.cells, 0.7)
    assert [line[0].strip() for line in lines] == ["full model", *board.methods[1:]]
    for method, line in zip(board.methods, lines, strict=True):
        found = [board.scores[method, column] for column in board.columns] + [board.averages[method]]
        for score, place in zip(found, line[1:], strict=True):
            if score.mean is None:
                assert MISSING in place
            else:
                mean, sd, n = re.search(r"([\d.]+) ± ([\d.]+).*n = (\d)", place).groups()
                assert (mean, sd, int(n)) == (f"{100 * score.mean:.1f}", f"{100 * score.sd:.1f}", score.n)
        assert all("**" not in place for place in line) or method != "full"
    best = max((board.averages[m].mean, m) for m in board.methods[1:])[1]
    assert [line[0].strip() for line in lines if "**" in line[-1]] == [best]


def test_the_terminals_tables_have_the_same_numbers(holes, report):
    markdown = (report / "report.md").read_text()
    lines = score_tables([holes]).splitlines()
    assert [line for line in lines if line.startswith("Scores")] == [
        f"Scores at {sparsity} % sparsity (builtin)" for sparsity in (50, 70)]  # fmt: skip
    numbers = re.findall(r"\d+\.\d ± \d+\.\d", "".join(lines))
    assert len(numbers) > 40
    assert set(numbers) <= set(re.findall(r"\d+\.\d ± \d+\.\d", markdown))


def test_csv_files_parse_back_to_the_same_values(report, collection):
    cells = {row["id"]: row for row in rows_of(report / "cells.csv")}
    assert cells.keys() == {cell.id for cell in collection.cells}
    for cell in collection.cells:
        row = cells[cell.id]
        assert (row["score"], row["state"], int(row["seed"])) == (
            "" if cell.score is None else repr(cell.score), cell.state, cell.seed)  # fmt: skip
        assert json.loads(row["metrics"]) == cell.metrics
        assert (report / unquote(row["path"])).exists() == cell.done
    found = statistic.scores(collection.cells)
    rows = rows_of(report / "scores.csv")
    for score, row in zip(found, rows, strict=True):
        assert (row["method"], row["task"], int(row["n"])) == (score.method, score.task, score.n)
        assert [float(row[name]) if row[name] else None for name in ("mean", "sd")] == [score.mean, score.sd]
        assert (int(row["cells_done"]), int(row["cells_planned"])) == (score.done, len(score.cells))


def test_the_same_results_give_the_same_bytes_and_no_other_files(tmp_path):
    small(tmp_path)
    out = tmp_path / "report"

    def contents():
        write_report([tmp_path])
        return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}

    first = contents()
    (out / "figures" / "scarcity-12.5.png").write_bytes(b"of an earlier report")
    (out / "figures" / "mine.png").write_bytes(b"of the user")
    assert contents() == {**first, "figures/mine.png": b"of the user"}
    names = {name for name in first if "/" not in name}
    assert names == {"index.html", "report.md", "cells.csv", "scores.csv"}


def test_two_backbones_are_never_averaged(tmp_path):
    fakes = Fakes(tmp_path)
    for model in ("one", "two"):
        fakes.cell("mrpc", model=model, model_sha256=f"of {model}", score=0.5)
    page, _ = write_report([tmp_path])
    assert [row["model"] for row in rows_of(page.parent / "scores.csv")] == ["one", "two"]
    reader = Reader(page.read_text())
    assert len(reader.ids) == len(set(reader.ids))
    assert "To be read with care" not in page.read_text()


def test_a_backbone_is_its_weights_and_not_its_name(tmp_path):
    """Another under the same name is another; the same in a second place is one, and what is missing is its."""
    for model, weights, seed in (("theta", "a" * 64, 1), ("theta", "b" * 64, 2), ("other/theta", "b" * 64, 3)):
        Fakes(tmp_path / str(seed)).cell("mrpc", model=model, model_sha256=weights, seed=seed)
    fakes = Fakes(tmp_path / "1")
    fakes.cell("cola", model="theta", seed=1, state="missing")
    fakes.plan()
    plan = json.loads((tmp_path / "1/plan.json").read_text())
    plan["cells"][0]["options"]["model"] = "theta"
    (tmp_path / "1/plan.json").write_text(json.dumps(plan))
    page, _ = write_report([tmp_path])
    found = {(row["model"], row["task"]): (row["cells_done"], row["cells_planned"])
             for row in rows_of(page.parent / "scores.csv")}  # fmt: skip
    assert found == {
        ("other/theta, theta", "mrpc"): ("2", "2"), ("theta", "mrpc"): ("1", "1"), ("theta", "cola"): ("0", "1"),
    }  # fmt: skip
    assert "theta is not one model in all cells: weights aaaaaaaaaaaa, weights bbbbbbbbbbbb." in page.read_text()


def test_two_backbones_of_one_name_are_called_apart(tmp_path):
    for weights in ("a" * 64, "b" * 64, None):
        Fakes(tmp_path / str(weights)[:1]).cell("mrpc", model="theta", model_sha256=weights)
    titles = [line for line in score_tables([tmp_path]).splitlines() if line.startswith("Scores")]
    assert titles == [f"Scores of the full model (theta ({weights}))" for weights in (
        "weights aaaaaaaaaaaa", "weights bbbbbbbbbbbb", "weights not recorded")]  # fmt: skip


def test_cells_that_are_not_alike_are_told(tmp_path):
    fakes = Fakes(tmp_path)
    fakes.cell("mrpc", seed=1)
    fakes.cell("mrpc", seed=2, lr=5e-5)
    page, _ = write_report([tmp_path])
    sentence = "Cells that differ in lr are averaged in: full model, MRPC"
    assert sentence in page.read_text()
    assert sentence in score_tables([tmp_path])


def test_a_sweep_with_another_setting_in_the_same_folder_is_told(tmp_path):
    """All of its cells count, beside those of the sweep before, and the table says so."""
    fakes = Fakes(tmp_path)
    for warmup_steps, score in ((0, 0.5), (300, 0.7)):
        for seed in (1, 2, 3):
            fakes.cell("mrpc", seed=seed, warmup_steps=warmup_steps, score=score)
    page, _ = write_report([tmp_path])
    (row,) = rows_of(page.parent / "scores.csv")
    assert (float(row["mean"]), int(row["cells_done"])) == (pytest.approx(0.6), 6)
    assert "Cells that differ in warmup_steps are averaged in: full model, MRPC" in page.read_text()


def test_rows_that_the_seed_draws_are_no_other_setting(tmp_path):
    fakes = Fakes(tmp_path)
    for seed in (1, 2):
        told = {"data_sha256": {"train": f"of seed {seed}", "dev": "cc"}, "steps": 120 + seed, "warmup_steps": seed}
        fakes.cell("mrpc", seed=seed, num_samples=100, **told)
    assert "Cells that differ" not in write_report([tmp_path])[0].read_text()
    fakes.cell("mrpc", seed=2, num_samples=100, **{**told, "data_sha256": {"train": "of other rows", "dev": "cc"}})
    assert "Cells that differ in train_sha256" in write_report([tmp_path])[0].read_text()


@pytest.mark.parametrize("kind", ["nothing done", "searches only"])
def test_a_report_before_the_first_result(tmp_path, kind):
    fakes = Fakes(tmp_path)
    fakes.search("tamt-kd", 0.7, 1)
    if kind == "nothing done":
        fakes.cell("mrpc", state="missing")
        fakes.cell("mrpc", method="omp", mask=next(iter(fakes.search("omp", 0.7, 1).values())), state="missing")
        fakes.plan()
    page, _ = write_report([Path(tmp_path)], tmp_path / "out")
    assert ("0/1 cells" in page.read_text()) == (kind == "nothing done")
