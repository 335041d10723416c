"""The table of tasks, rows of all of them from one `--data`, subsets, and what is wrong with data as sentences."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from finemask_ds.data import builtin
from finemask_ds.data.examples import BUILTIN_DEV_ROWS, check_data, has_split, load_split
from finemask_ds.data.tasks import BUILTIN_TASKS, PAPER_TASKS, SPLITS, TASKS, Answer, Examples, Task, task_named
from finemask_ds.errors import UserError

GLUE = [task for task in TASKS.values() if task.folder]
CONTEXT = "The tower of Ghent is tall ."


def write_glue(root: Path, task: Task, splits: tuple[str, ...] = ("train", "dev"), num: int = 3) -> Path:
    """The task's files with `num` rows; texts name their split and row."""
    root.mkdir(parents=True, exist_ok=True)
    target = "2.5" if task.kind == "regression" else (task.written or task.labels)[0]
    for split in splits:
        rows = [[f"{column} of {split} {row}" for column in task.columns] + [target] for row in range(num)]
        lines = [[*task.columns, task.target], *rows]
        if task.headerless:
            lines = [["gj04", row[-1], "", row[0]] for row in rows]
        (root / (task.files or {})[split]).write_text("".join("\t".join(line) + "\n" for line in lines))
    return root


def write_squad(path: Path, question: str = "Where is the tower?") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    qas = [{"id": "5a", "question": question, "answers": [{"text": "Ghent", "answer_start": 13}]}]
    path.write_text(json.dumps({"data": [{"title": "x", "paragraphs": [{"context": CONTEXT, "qas": qas}]}]}))
    return path


def refusal(task: str, data: object, split: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        load_split(TASKS[task], str(data), split)
    with pytest.raises(UserError) as checked:
        check_data(TASKS[task], str(data), ["train", split])
    assert str(checked.value) == str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_table_is_whole():
    assert set(PAPER_TASKS) | set(BUILTIN_TASKS) < set(TASKS)
    assert set(BUILTIN_TASKS) == set(builtin.TASKS)
    for name, task in TASKS.items():
        assert task.name == name
        assert task_named(task.title) == task_named(name.upper()) == task
        assert len(task.columns) in (1, 2)
        assert not task.hub_columns or len(task.hub_columns) == len(task.columns)
        assert len(task.written) in (0, len(task.labels))
        assert (task.kind == "classification") == bool(task.labels)
        assert set(task.files or ("train", "dev")) <= set(SPLITS)
        assert task.is_builtin == (name in BUILTIN_TASKS)
    with pytest.raises(UserError, match="'sst3' is unknown; type one of cola, sst2, mrpc"):
        task_named("sst3")


@pytest.mark.parametrize("task", GLUE, ids=lambda task: task.name)
def test_every_task_of_glue_from_its_root_its_own_folder_and_one_above_both(task, tmp_path):
    write_glue(tmp_path / "all" / "glue" / task.folder, task)
    for data in ("all", "all/glue", f"all/glue/{task.folder}"):
        for split in ("train", "dev"):
            examples = load_split(task, str(tmp_path / data), split)
            assert list(examples.first) == [f"{task.columns[0]} of {split} {row}" for row in range(3)]
            assert (examples.second is None) == (len(task.columns) == 1)
            assert examples.targets == [2.5 if task.kind == "regression" else 0] * 3
            assert has_split(task, str(tmp_path / data), split)
        assert not has_split(task, str(tmp_path / data), "test")
        check_data(task, str(tmp_path / data), ("train", "dev"))


@pytest.mark.parametrize("name", ["SST-2", "sst-2", "SST2", "sst2"])
def test_the_case_of_folders_does_not_matter(name, tmp_path):
    write_glue(tmp_path / "GLUE" / name, TASKS["sst2"])
    for data in (tmp_path, tmp_path / "GLUE"):
        assert len(load_split(TASKS["sst2"], str(data), "dev")) == 3


def test_the_tasks_own_folder_wins_over_its_neighbours_files(tmp_path):
    write_glue(tmp_path, TASKS["rte"], num=1)
    write_glue(tmp_path / "WNLI", TASKS["wnli"])
    (tmp_path / "RTE").mkdir()  # empty
    assert len(load_split(TASKS["wnli"], str(tmp_path), "train")) == 3
    assert len(load_split(TASKS["rte"], str(tmp_path), "train")) == 1


def test_the_folder_of_another_task_is_refused(tmp_path):
    write_glue(tmp_path / "CoLA", TASKS["cola"])
    write_glue(tmp_path / "SST-2", TASKS["sst2"])
    assert "no column 'sentence'" in refusal("sst2", tmp_path / "CoLA")
    assert "unusable" in refusal("cola", tmp_path / "SST-2")


def test_a_home_folder_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_glue(tmp_path / "glue" / "RTE", TASKS["rte"])
    assert len(load_split(TASKS["rte"], "~/glue", "train")) == 3


@pytest.mark.parametrize("layout", ["", "squad", "SQuAD"])
def test_squad_by_its_names_or_by_any_single_file_of_a_split(layout, tmp_path):
    squad, folder = TASKS["squad"], tmp_path / layout
    write_squad(folder / "train-subset.json")
    write_squad(folder / "dev-v1.1.json")
    write_squad(folder / "dev-other.json", question="?")
    for split in ("train", "dev"):
        examples = load_split(squad, str(tmp_path), split)
        assert (examples.first, examples.second) == (["Where is the tower?"], [CONTEXT])
        assert examples.targets == [(Answer("Ghent", 13),)]
    write_squad(folder / "train-more.json")
    assert "several files for the train split of SQuAD: train-more.json, train-sub" in refusal("squad", tmp_path)
    assert not has_split(squad, str(tmp_path), "train")


@pytest.mark.parametrize("split", ["train", "dev"])
def test_a_question_without_an_answer_is_refused_before_anything_starts(split, tmp_path):
    """SQuAD v2 has such; none can be learnt or scored."""
    write_squad(tmp_path / "train-v1.1.json")
    write_squad(tmp_path / "dev-v1.1.json")
    file = tmp_path / f"{split}-v1.1.json"
    file.write_text(re.sub(r'"answers": \[.*?\]', '"answers": []', file.read_text()))
    assert f"{file}: 1 questions have no answer, the first '5a'" in refusal("squad", tmp_path, split)


@pytest.mark.parametrize("name", BUILTIN_TASKS)
def test_tasks_of_the_built_in_language(name, tmp_path):
    task, spec = TASKS[name], builtin.TASKS[name]
    train, dev = (load_split(task, "", split) for split in ("train", "dev"))
    assert (len(train), len(dev)) == (spec.num_train, BUILTIN_DEV_ROWS)
    assert not set(zip(train.first, train.second or train.first, strict=True)) & set(
        zip(dev.first, dev.second or dev.first, strict=True)
    )
    for data in ("builtin", "hub", str(tmp_path)):
        assert load_split(task, data, "train") == train
    check_data(task, "", ("train", "dev"))
    for examples in (train, dev):
        rows = builtin.task_examples(name, "train" if examples is train else "valid", num=len(examples))
        assert list(examples.first) == [row[task.columns[0]] for row in rows]
        if task.kind == "span":
            for context, answers in zip(examples.second, examples.targets, strict=True):
                assert [context[a.start :][: len(a.text)] for a in answers] == [a.text for a in answers]
        else:
            assert examples.targets == [row[task.target] for row in rows]
    assert "no test split; it has train, dev" in refusal(name, "", "test")
    assert not has_split(task, "", "test")
    with pytest.raises(ValueError, match="no split 'valid'"):
        load_split(task, "", "valid")


def examples(num: int) -> Examples:
    return Examples.of([str(row) for row in range(num)], [f"a{row}" for row in range(num)],
                       [f"b{row}" for row in range(num)], [row % 3 for row in range(num)])  # fmt: skip


def test_subsets_nest_by_seed_and_keep_rows_together():
    whole = examples(2000)
    small, large = whole.subset(100, seed=3), whole.subset(1000, seed=3)
    assert list(large.ids[:100]) == list(small.ids)
    assert large.rows(range(100)) == small
    assert set(whole.subset(100, seed=4).ids) != set(small.ids)
    assert sorted(whole.subset(2000, seed=3).ids) == sorted(whole.ids)
    for number, first, second, target in zip(small.ids, small.first, small.second, small.targets, strict=True):
        assert (first, second, target) == (f"a{number}", f"b{number}", int(number) % 3)
    for num in (0, -1, 2001):
        with pytest.raises(UserError, match=f"--num_samples {num}: there are 2000 training rows; type 1 to 2000"):
            whole.subset(num, seed=3)


@pytest.mark.parametrize("task", ["cola", "stsb", "squad"])
def test_nested_subsets_are_the_same_in_every_process(task, tmp_path):
    if task == "squad":
        write_squad(tmp_path / "train-v1.1.json")
        num = 1
    else:
        write_glue(tmp_path, TASKS[task], num=50)
        num = 20
    code = (
        "import sys; from finemask_ds.data.examples import load_split; from finemask_ds.data.tasks import TASKS;"
        f"print(load_split(TASKS['{task}'], sys.argv[1], 'train').subset({num}, seed=1).sha256)"
    )
    told = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "PYTHONHASHSEED": "5"},
                          capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    assert told == load_split(TASKS[task], str(tmp_path), "train").subset(num, seed=1).sha256


def test_the_sha256_tells_texts_targets_and_their_order_but_not_ids():
    whole = examples(5)
    others = [
        whole.rows([1, 0, 2, 3, 4]),
        whole.rows(range(4)),
        Examples.of(whole.ids, whole.second, whole.first, whole.targets),
        Examples.of(whole.ids, [*whole.first[:4], "a"], whole.second, whole.targets),
        Examples.of(whole.ids, whole.first, whole.second, [0] * 5),
        Examples.of(whole.ids, whole.first, whole.second, None),
        Examples.of(whole.ids, whole.first, None, whole.targets),
        Examples.of(whole.ids, [*whole.first, *whole.second], [], whole.targets),
    ]
    assert len({whole.sha256, *(other.sha256 for other in others)}) == 1 + len(others)
    renamed = replace(whole, ids=["x"] * 5)
    assert Examples.of(renamed.ids, renamed.first, renamed.second, renamed.targets).sha256 == whole.sha256


def test_a_missing_folder_or_file_tells_where_it_looked_and_the_layouts(tmp_path):
    layouts = ("train.tsv and dev.tsv", "MRPC/train.tsv and MRPC/dev.tsv", "GLUE download", "--data hub")
    absent = refusal("mrpc", tmp_path / "absent")
    assert f"--data {tmp_path / 'absent'} is no folder" in absent
    (tmp_path / "glue" / "mrpc").mkdir(parents=True)
    nothing = refusal("mrpc", tmp_path)
    assert f"holds no file of MRPC (looked in {tmp_path / 'glue' / 'mrpc'}, {tmp_path})" in nothing
    for part in layouts:
        assert part in absent
        assert part in nothing
    for part in ("train-v1.1.json and dev-v1.1.json", "squad/train-v1.1.json"):
        assert part in refusal("squad", tmp_path)
    file = write_squad(tmp_path / "train-v1.1.json")
    assert "is a file, not a folder" in refusal("squad", file)
    write_glue(tmp_path / "glue" / "mrpc", TASKS["mrpc"], ("train",))
    missing = refusal("mrpc", tmp_path, "dev")
    assert f"{tmp_path / 'glue' / 'mrpc'} has no dev.tsv, the dev split of MRPC" in missing


def test_splits_and_sources_that_a_task_has_not(tmp_path):
    write_glue(tmp_path / "RTE", TASKS["rte"])
    assert "RTE has no dev_mismatched split; it has train, dev, test" in refusal("rte", tmp_path, "dev_mismatched")
    assert "--data builtin has no RTE; type --task acceptability or sentiment" in refusal("rte", "builtin")
    assert not has_split(TASKS["rte"], "builtin", "dev")
    for split in ("dev_mismatched", "test_mismatched"):
        assert not has_split(TASKS["rte"], "", split)


def test_a_broken_row_far_down_is_found_before_anything_starts(tmp_path):
    write_glue(tmp_path / "SST-2", TASKS["sst2"], num=5000)
    with open(tmp_path / "SST-2" / "dev.tsv", "a") as stream:
        stream.write("fine\t7\n")
    assert "dev.tsv, line 5002: '7' is no label of SST-2; valid are 0, 1" in refusal("sst2", tmp_path, "dev")


@pytest.mark.shared
def test_one_data_folder_for_all_tasks(shared):
    data = str(shared / "data")
    real = {"cola": (8551, 1043), "squad": (3838, 10570), "mrpc": (3668, 408)}
    for name in (*real, *BUILTIN_TASKS):
        check_data(TASKS[name], data, ("train", "dev"))
    assert not has_split(TASKS["mnli"], data, "dev_mismatched")
    for name, rows in real.items():
        assert tuple(len(load_split(TASKS[name], data, split)) for split in ("train", "dev")) == rows
    train = load_split(TASKS["mrpc"], data, "train")
    assert train.subset(1000, seed=0).rows(range(100)) == train.subset(100, seed=0)
