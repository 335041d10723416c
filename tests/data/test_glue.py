"""TSV files of GLUE: rows that break naive parsers, the layouts that were published, errors that name file and line."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finemask_ds.data.examples import load_split
from finemask_ds.data.glue import read_tsv
from finemask_ds.data.tasks import TASKS
from finemask_ds.errors import UserError

MNLI_TEXTS = ("sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse", "sentence2_parse",
              "sentence1", "sentence2")  # fmt: skip
MNLI_TRAIN = ("index", "promptID", "pairID", "genre", *MNLI_TEXTS, "label1", "gold_label")
MNLI_DEV = (*MNLI_TRAIN[:-1], "label2", "label3", "label4", "label5", "gold_label")
QQP = ("id", "qid1", "qid2", "question1", "question2", "is_duplicate")
MRPC = ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")
SST2 = ("sentence", "label")


def written(path: Path, rows: Iterable[Iterable[str]], end: str = "\n", mark: bytes = b"") -> Path:
    path.write_bytes(mark + "".join("\t".join(row) + end for row in rows).encode())
    return path


def refusal(path: Path, task: str, split: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        read_tsv(TASKS[task], path, split)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


HARD = (
    'he said "no',
    '"',
    '" opens',
    '""',
    "it's",
    "a\x85b\u2028c\u2029d\x0be\x0cf\x1cg",
    "carriage\rreturn",
    " spaces ",
    "",
    "Ünïcödé 語 🙂",
    "\ufeffmark",
    "nul\0",
    "back\\slash \\t",
    "#",
    "NA",
    "null",
)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_rows_that_break_naive_parsers(tmp_path, end, mark):
    """Each text is the first, a middle and the last field of a line."""
    one = [(text, str(number % 2)) for number, text in enumerate(HARD)]
    examples = read_tsv(TASKS["sst2"], written(tmp_path / "one.tsv", [SST2, *one], end, mark), "train")
    assert examples.first == list(HARD)
    assert examples.second is None
    assert examples.targets == [int(label) for _, label in one]
    two = [("1", "7", "8", text, text) for text in HARD]
    examples = read_tsv(TASKS["mrpc"], written(tmp_path / "two.tsv", [MRPC, *two], end, mark), "dev")
    assert examples.first == examples.second == list(HARD)
    assert examples.ids == [str(number) for number in range(len(HARD))]


FIELD = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t\n"))


@given(rows=st.lists(st.tuples(st.sampled_from("01"), FIELD, FIELD.filter(lambda text: text[-1:] != "\r")), min_size=1))
def test_any_rows_come_back(rows, tmp_path_factory):
    path = written(tmp_path_factory.mktemp("any") / "train.tsv", [MRPC, *((a, "", "", b, c) for a, b, c in rows)])
    examples = read_tsv(TASKS["mrpc"], path, "train")
    columns = [[int(label) for label, _, _ in rows], [first for _, first, _ in rows], [second for _, _, second in rows]]
    assert [examples.targets, examples.first, examples.second] == columns
    assert examples.dropped_rows == 0


def test_cola_has_no_header_but_in_its_test_file(tmp_path):
    rows = [("gj04", "1", "", "index"), ("bc01", "0", "*", "A sentence ."), ("bc01", "1", "", "", "")]
    train = read_tsv(TASKS["cola"], written(tmp_path / "train.tsv", rows), "train")
    assert (train.first, train.targets) == (["index", "A sentence .", ""], [1, 0, 1])
    path = written(tmp_path / "test.tsv", [("index", "sentence"), ("0", "One ."), ("4", "Two .")])
    test = read_tsv(TASKS["cola"], path, "test")
    assert (test.ids, test.first, test.targets) == (["0", "4"], ["One .", "Two ."], None)


@pytest.mark.parametrize("columns", [MNLI_TRAIN, MNLI_DEV])
def test_mnli_by_column_names(columns, tmp_path):
    row = {name: f"<{name}>" for name in columns} | {"index": "31", "label1": "neutral"}
    rows = [[{**row, "gold_label": label}[name] for name in columns] for label in TASKS["mnli"].labels]
    examples = read_tsv(TASKS["mnli"], written(tmp_path / "m.tsv", [columns, *rows]), "dev")
    assert examples.ids == ["31"] * 3
    assert (examples.first, examples.second) == (["<sentence1>"] * 3, ["<sentence2>"] * 3)
    assert examples.targets == [0, 1, 2]


def test_test_files_have_ids_and_no_targets(tmp_path):
    path = written(tmp_path / "q.tsv", [("id", "question1", "question2"), ("8", "a?", "b?"), ("3", "c?", "d?")])
    qqp = read_tsv(TASKS["qqp"], path, "test")
    assert (qqp.ids, qqp.first, qqp.second, qqp.targets) == (["8", "3"], ["a?", "c?"], ["b?", "d?"], None)
    path = written(tmp_path / "m.tsv", [("index", *MRPC[1:]), ("5", "1", "2", "a", "b")])
    mrpc = read_tsv(TASKS["mrpc"], path, "test")
    assert (mrpc.ids, mrpc.first, mrpc.second, mrpc.targets) == (["5"], ["a"], ["b"], None)


def test_empty_columns_at_the_end_and_blank_lines_are_nothing(tmp_path):
    rows = [(*SST2, "", ""), ("good", "1"), (), ("bad", "0", ""), ("", "1", "", ""), ()]
    examples = read_tsv(TASKS["sst2"], written(tmp_path / "train.tsv", rows), "train")
    assert (examples.first, examples.targets) == (["good", "bad", ""], [1, 0, 1])
    assert examples.dropped_rows == 0


def test_a_file_without_a_last_line_break(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("sentence\tlabel\ngood\t1\nbad\t0")
    assert read_tsv(TASKS["sst2"], path, "train").targets == [1, 0]


def qqp_rows(num: int) -> list[tuple[str, ...]]:
    return [(str(7 * row), "1", "2", f"a{row}?", f"b{row}?", str(row % 2)) for row in range(num)]


def test_rows_without_all_fields_are_dropped_and_counted(tmp_path):
    """QQP has questions with a line break in them, so that neither half of the row has all fields."""
    rows = qqp_rows(300)
    rows[10:11] = [rows[10][:4], ("rest?", *rows[10][4:])]
    examples = read_tsv(TASKS["qqp"], written(tmp_path / "train.tsv", [QQP, *rows]), "train")
    assert examples.dropped_rows == 2
    assert examples.ids == [str(7 * row) for row in range(300) if row != 10]
    assert examples.second == [f"b{row}?" for row in range(300) if row != 10]


@pytest.mark.parametrize("label", ["-", ""])
def test_rows_without_a_gold_label_are_dropped_and_counted(label, tmp_path):
    rows = [("good", "1")] * 300
    rows[7] = ("undecided", label)
    examples = read_tsv(TASKS["sst2"], written(tmp_path / "dev.tsv", [SST2, *rows]), "dev")
    assert (len(examples), examples.dropped_rows) == (299, 1)
    assert examples.ids == [str(row) for row in range(300) if row != 7]


def test_a_tab_in_a_text_does_not_move_the_next_column(tmp_path):
    rows = [("1", "7", "8", f"first {row}", "second") for row in range(200)]
    rows[5] = ("1", "7", "8", "first\tcut", "second")
    examples = read_tsv(TASKS["mrpc"], written(tmp_path / "train.tsv", [MRPC, *rows]), "train")
    assert (set(examples.second), examples.dropped_rows) == ({"second"}, 1)


def test_one_percent_may_be_unusable_and_no_more(tmp_path):
    for num_broken, fine in ((3, True), (4, False)):
        rows = [("good", "1")] * (300 - num_broken) + [("tabs are missing",)] * num_broken
        path = written(tmp_path / f"{num_broken}.tsv", [SST2, *rows])
        if fine:
            assert read_tsv(TASKS["sst2"], path, "train").dropped_rows == num_broken
        else:
            error = refusal(path, "sst2")
            assert "4 of 300 rows are unusable" in error
            assert f"line {300 - num_broken + 2} has 1 fields where there are 2 columns" in error


STSB = ("sentence1", "sentence2", "score")
ZERO_TO_FIVE = "numbers from 0 to 5"


@pytest.mark.parametrize(
    ("task", "header", "good", "wrong", "valid"),
    [
        ("sst2", SST2, "1", "2", "0, 1"),
        ("sst2", SST2, "positive", "1.0", "0, 1"),
        ("mnli", MNLI_TRAIN, "neutral", "entails", "entailment, neutral, contradiction"),
        ("wnli", ("index", "sentence1", "sentence2", "label"), "1", "-1", "0, 1"),
        *(("stsb", STSB, "3.8", wrong, ZERO_TO_FIVE) for wrong in ("5.001", "-0.1", "nan", "inf", "high")),
    ],
)
def test_an_invalid_target_names_file_line_value_and_the_valid_ones(task, header, good, wrong, valid, tmp_path):
    before = ["text"] * (len(header) - 1)
    rows = [header, (*before, good), (*before, good), (*before, wrong)]
    error = refusal(written(tmp_path / "train.tsv", rows), task)
    assert f"line 4: {wrong!r} is no {header[-1]} of {TASKS[task].title}; valid are {valid}" in error


def test_a_long_wrong_label_is_cut(tmp_path):
    error = refusal(written(tmp_path / "train.tsv", [SST2, ("1", "a sentence " * 1000)]), "sst2")
    assert len(error) < 200 + len(str(tmp_path))


def test_a_missing_column_names_those_that_are_there(tmp_path):
    path = written(tmp_path / "dev.tsv", [("sentence", "is_good"), ("fine", "1")])
    error = refusal(path, "sst2", "dev")
    assert "no column 'label'" in error
    assert "sentence, is_good" in error
    headerless = written(tmp_path / "train.tsv", [("fine", "1"), ("bad", "0")])
    assert "no column 'sentence'" in refusal(headerless, "sst2")
    other_task = written(tmp_path / "other.tsv", [SST2, ("fine", "1"), ("bad", "0")])
    assert "2 of 3 rows" not in refusal(other_task, "mrpc")
    assert "rows are unusable" in refusal(other_task, "cola")


def test_empty_files_are_sentences(tmp_path):
    path = tmp_path / "train.tsv"
    for content, found in (("", "is empty"), ("\n\n", "is empty"), ("sentence\tlabel\n", "has no rows")):
        path.write_text(content)
        assert found in refusal(path, "sst2")
    path.write_text("")
    assert "has no rows" in refusal(path, "cola")


def test_what_is_not_utf_8_or_not_a_file_is_a_sentence(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_bytes(b"sentence\tlabel\nfine\t1\ncaf\xe9\t1\n")
    assert "line 3 is not UTF-8" in refusal(path, "sst2")
    path.write_bytes("sentence\tlabel\nfine\t1\n".encode("utf-16"))
    assert "line 1 is not UTF-8" in refusal(path, "sst2")
    assert "cannot be read" in refusal(tmp_path, "sst2")
    assert "cannot be read" in refusal(tmp_path / "absent.tsv", "sst2")


ROWS = {
    "cola": (8551, 1043, 1063), "mrpc": (3668, 408, 1725), "stsb": (5749, 1500, 1379), "sst2": (67349, 872, 1821),
    "mnli": (8999, 1000),
}  # fmt: skip


@pytest.mark.shared
@pytest.mark.parametrize("task", ROWS)
def test_all_rows_of_the_real_files(task, shared):
    glue = {path: path.read_bytes() for path in (shared / "data" / "glue" / TASKS[task].folder).iterdir()}
    for split, num in zip(("train", "dev", "test"), ROWS[task], strict=False):
        examples = load_split(TASKS[task], str(shared / "data"), split)
        assert (len(examples), examples.dropped_rows) == (num, 0)
        texts = [*examples.first, *(examples.second or ())]
        assert all(text and not {"\t", "\n"} & set(text) for text in texts)
        if split == "test":
            assert examples.targets is None
            assert examples.ids == [str(row) for row in range(num)]
        elif task == "stsb":
            assert (min(examples.targets), max(examples.targets)) == (0.0, 5.0)
        else:
            assert set(examples.targets) == set(range(len(TASKS[task].labels)))
    assert {path: path.read_bytes() for path in glue} == glue
