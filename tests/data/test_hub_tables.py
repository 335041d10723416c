"""Tasks of the hub, through the real client: a small hub on this host, its cache, prepared, absent or otherwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from finemask_ds.data.glue import read_tsv
from finemask_ds.data.hub_tables import hub_split
from finemask_ds.data.squad import read_squad
from finemask_ds.data.tasks import TASKS, Answer, Task
from tests.data.hub_for_tests import PREPARE, cache_folder, run, serving

GLUE, SQUAD = "nyu-mll/glue", "rajpurkar/squad"
ON_THE_HUB = [task for task in TASKS.values() if task.hub]
CONTEXT = "The tower of Ghent is tall ."
ANSWERS = {"text": ["tower", "The tower"], "answer_start": [4, 0]}

# What is asked of the library, in a process of its own because the hub's client reads HF_HOME and so on at import.
ASK = """
import json, sys
from finemask_ds.data.examples import check_data, has_split, load_split
from finemask_ds.data.tasks import TASKS
from finemask_ds.errors import UserError

opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
answers = []
for asked in sys.argv[1:]:
    name, split = asked.split(":")
    try:
        found = has_split(TASKS[name], "", split)
        before = [o for o in opened if o.endswith((".parquet", ".arrow"))]
        check_data(TASKS[name], "", [split])
        rows = load_split(TASKS[name], "hub", split)
        answers.append({"found": found, "opened": before, "ids": rows.ids, "first": rows.first, "second": rows.second,
                        "targets": rows.targets, "sha256": rows.sha256, "dropped": rows.dropped_rows})
    except UserError as error:
        answers.append({"found": found, "error": str(error)})
print(json.dumps(answers))
"""


def ask(*asked: str, home: Path, endpoint: str = "") -> list[dict]:
    where = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"} if endpoint else {"HF_HUB_OFFLINE": "1"}
    return json.loads(run(ASK, *asked, home=home, **where).splitlines()[-1])


def splits_of(task: Task) -> list[str]:
    return [hub_split(task, split) for split in task.files or ()]


def table(task: Task, split: str) -> Dataset:
    """Three rows of the columns that the hub has, and a fourth where more are wanted."""
    columns = task.hub_columns or task.columns
    values: dict[str, list] = {column: [f"{split} {column} {row}\x85" for row in range(3)] for column in columns}
    kinds: dict[str, object] = {column: Value("string") for column in columns}
    if task.kind == "span":
        values |= {"context": [CONTEXT] * 3, "answers": [ANSWERS] * 3, "id": ["5a", "5b", "5c"], "title": ["x"] * 3}
        return Dataset.from_dict(values)
    hidden = split.startswith("test")
    regression = task.kind == "regression"
    kinds |= {"label": Value("float32") if regression else ClassLabel(names=list(task.labels)), "idx": Value("int32")}
    given = [3.8, 0.0, 5.0] if regression else [1, 0, len(task.labels) - 1]
    values |= {"label": [-1] * 3 if hidden else given, "idx": [0, 7, 8]}
    return Dataset.from_dict(values, features=Features(kinds))


def card(tasks: list[Task]) -> str:
    lines = ["---", "configs:"]
    for task in tasks:
        config = task.hub.split(":")[1]
        lines += [f"- config_name: {config}", "  data_files:"]
        lines += [f"  - {{split: {split}, path: {config}/{split}-*}}" for split in splits_of(task)]
    return "\n".join([*lines, "---", ""])


def write_repository(folder: Path, tasks: list[Task], *, with_card: bool = True) -> Path:
    for task in tasks:
        below = folder / task.hub.split(":")[1]
        below.mkdir(parents=True)
        for split in splits_of(task):
            rows = table(task, split)
            if split == "train":  # large splits come in pieces
                rows.select(range(2)).to_parquet(below / "train-00000-of-00002.parquet")
                rows.select([2]).to_parquet(below / "train-00001-of-00002.parquet")
            else:
                rows.to_parquet(below / f"{split}-00000-of-00001.parquet")
    if with_card:
        (folder / "README.md").write_text(card(tasks))
    return folder


def of_glue() -> list[Task]:
    return [task for task in ON_THE_HUB if task.hub.startswith(GLUE)]


def cached(home: Path, *, with_card: bool = True) -> Mapping[str, Path]:
    folders = {name: cache_folder(home, name) for name in (GLUE, SQUAD)}
    write_repository(folders[GLUE], of_glue(), with_card=with_card)
    write_repository(folders[SQUAD], [TASKS["squad"]], with_card=with_card)
    return folders


def expected(task: Task, split: str) -> dict:
    rows = table(task, hub_split(task, split)).to_dict()
    first, *second = (rows[column] for column in task.hub_columns or task.columns)
    targets: list | None = [3.8, 0.0, 5.0] if task.kind == "regression" else rows.get("label")
    if task.kind == "span":
        targets = [[["tower", 4], ["The tower", 0]]] * 3
    ids = [str(number) for number in rows.get("idx", rows.get("id"))]
    return {"found": True, "ids": ids, "first": first, "second": second[0] if second else None,
            "targets": None if split.startswith("test") else targets, "dropped": 0}  # fmt: skip


def check(answers: list[dict], asked: list[str]) -> None:
    for answer, (name, split) in zip(answers, (each.split(":") for each in asked), strict=True):
        assert {**answer, "opened": [], "sha256": ""} == {**expected(TASKS[name], split), "opened": [], "sha256": ""}


EVERYTHING = [f"{task.name}:{split}" for task in ON_THE_HUB for split in task.files or ()]


def test_names_of_splits():
    assert [hub_split(TASKS["mnli"], split) for split in TASKS["mnli"].files or ()] == [
        "train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched"
    ]  # fmt: skip
    assert splits_of(TASKS["cola"]) == ["train", "validation", "test"]
    assert splits_of(TASKS["squad"]) == ["train", "validation"]


@pytest.mark.slow
@pytest.mark.parametrize("with_card", [True, False])
def test_every_task_from_the_hubs_cache(with_card, tmp_path):
    cached(tmp_path, with_card=with_card)
    answers = ask(*EVERYTHING, home=tmp_path)
    check(answers, EVERYTHING)
    assert not answers[0]["opened"], "to look for a split is not to read it"


@pytest.mark.slow
def test_from_the_hub_only_what_is_asked_for_and_then_without_it(tmp_path):
    folders = {GLUE: write_repository(tmp_path / "glue", of_glue()),
               SQUAD: write_repository(tmp_path / "squad", [TASKS["squad"]])}  # fmt: skip
    home, asked = tmp_path / "home", ["mrpc:train", "mrpc:dev", "mnli:dev_mismatched", "squad:dev"]
    with serving(folders) as hub:
        check(ask(*asked, home=home, endpoint=f"http://127.0.0.1:{hub.server_port}"), asked)
        downloads = {path.split("/", 3)[3] for path in hub.asked if path.startswith("/resolve/")}
    assert {path for path in downloads if path.endswith(".parquet")} == {
        "mrpc/train-00000-of-00002.parquet", "mrpc/train-00001-of-00002.parquet",
        "mrpc/validation-00000-of-00001.parquet", "mnli/validation_mismatched-00000-of-00001.parquet",
        "plain_text/validation-00000-of-00001.parquet",
    }  # fmt: skip
    *again, matched, train = ask(*asked, "mnli:dev", "squad:train", home=home)
    check(again, asked)
    for answer in (matched, train):
        assert not answer["found"]
        assert "cannot be reached" in answer["error"]


@pytest.mark.slow
def test_from_what_load_dataset_left(tmp_path):
    home = tmp_path / "home"
    folders = {GLUE: write_repository(tmp_path / "glue", of_glue()),
               SQUAD: write_repository(tmp_path / "squad", [TASKS["squad"]])}  # fmt: skip
    with serving(folders) as hub:
        where = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0"}
        run(PREPARE, GLUE, "mnli", home=home, **where)
        run(PREPARE, SQUAD, home=home, **where)
    shutil.rmtree(home / "hub")
    asked = [each for each in EVERYTHING if each.startswith(("mnli", "squad"))]
    *answers, other = ask(*asked, "cola:dev", home=home)
    check(answers, asked)
    assert "cannot be reached" in other["error"]


@pytest.mark.slow
def test_what_is_wrong_with_a_table_is_a_sentence(tmp_path):
    folders = cached(tmp_path)

    def put(task: str, rows: Dataset | pa.Table, split: str = "validation") -> None:
        path = folders[GLUE] / task / f"{split}-00000-of-00001.parquet"
        pq.write_table(rows, path) if isinstance(rows, pa.Table) else rows.to_parquet(path)

    def texts(num: int, **columns: list) -> pa.Table:
        return pa.table({"sentence1": ["a"] * num, "sentence2": ["b"] * num, **columns})

    turned = Features({"sentence": Value("string"), "label": ClassLabel(names=["acceptable", "unacceptable"])})
    put("cola", Dataset.from_dict({"sentence": ["a"], "label": [1]}, features=turned))
    put("sst2", pa.table({"text": ["a"], "label": [1]}))
    put("mrpc", texts(1, label=[2]))
    put("stsb", texts(1, label=[5.5]))
    put("wnli", texts(1, label=[-1]))
    put("rte", texts(200, label=[1] * 199 + [-1]))
    (folders[GLUE] / "qnli" / "validation-00000-of-00001.parquet").write_bytes(b"PAR1 cut short")
    unanswered = Dataset.from_dict(
        {"question": ["?"], "context": [CONTEXT], "answers": [{"text": [], "answer_start": []}]}
    )
    unanswered.to_parquet(folders[SQUAD] / "plain_text" / "validation-00000-of-00001.parquet")
    (folders[GLUE] / "qqp" / "train-00001-of-00002.parquet").unlink()
    tasks = ("cola", "sst2", "mrpc", "stsb", "wnli", "qnli", "rte", "squad")
    answers = dict(zip(tasks, ask(*(f"{task}:dev" for task in tasks), home=tmp_path), strict=True))
    for task, parts in {
        "cola": ("has the classes acceptable, unacceptable where CoLA has unacceptable, acceptable",),
        "sst2": ("no column 'sentence'", "text, label"),
        "mrpc": ("validation of nyu-mll/glue:mrpc, row 0: '2' is no label of MRPC; valid are 0 to 1",),
        "stsb": ("row 0: '5.5' is no label of STS-B; valid are numbers from 0 to 5",),
        "wnli": ("1 of 1 rows are unusable", "row 0 has no label"),
        "squad": ("row 0: \"{'text': [], 'answer_start': []}\" is no answers of SQuAD; valid are one or more answers",),
        "qnli": ("validation-00000-of-00001.parquet cannot be read",),
    }.items():
        for part in parts:
            assert part in answers[task]["error"]
        assert "\n" not in answers[task]["error"]
    assert (len(answers["rte"]["ids"]), answers["rte"]["dropped"]) == (199, 1)
    half, whole = ask("qqp:train", "qqp:dev", home=tmp_path)
    assert "holds all of it" in half["error"]
    check([whole], ["qqp:dev"])


def test_nowhere_is_a_sentence_with_the_places_and_the_ways(tmp_path):
    for answer, folder in zip(ask("sst2:dev", "squad:dev", home=tmp_path), ("SST-2", "train-v1.1"), strict=True):
        for part in (str(tmp_path / "hub"), str(tmp_path / "datasets"), "HF_HOME", "--data FOLDER", folder, "--task"):
            assert part in answer["error"]
        assert not answer["found"]


@pytest.mark.slow
def test_the_same_rows_from_the_hub_and_from_files_have_the_same_sha256(tmp_path):
    """Whatever each calls the rows."""
    cached(tmp_path)
    rows = table(TASKS["stsb"], "validation").to_dict()
    lines = zip(rows["sentence1"], rows["sentence2"], ("3.800", "0.000", "5.000"), strict=True)
    tsv = tmp_path / "dev.tsv"
    tsv.write_text("\n".join("\t".join(line) for line in [("sentence1", "sentence2", "score"), *lines]))
    questions = table(TASKS["squad"], "validation").to_dict()["question"]
    answers = [Answer(*answer) for answer in zip(ANSWERS["text"], ANSWERS["answer_start"], strict=True)]
    qas = [{"id": str(row), "question": question,
            "answers": [{"text": a.text, "answer_start": a.start} for a in answers]}
           for row, question in enumerate(questions)]  # fmt: skip
    file = tmp_path / "dev.json"
    file.write_text(json.dumps({"data": [{"title": "x", "paragraphs": [{"context": CONTEXT, "qas": qas}]}]}))
    stsb, squad = ask("stsb:dev", "squad:dev", home=tmp_path)
    assert stsb["sha256"] == read_tsv(TASKS["stsb"], tsv, "dev").sha256
    assert squad["sha256"] == read_squad(file).sha256
    assert squad["sha256"] != stsb["sha256"]
