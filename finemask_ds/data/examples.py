"""The rows of a task: from the hub, from files or from the built-in language, by one `--data`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from finemask_ds.data import builtin
from finemask_ds.data.tasks import BUILTIN_TASKS, SPLITS, Answer, Examples, Targets, Task
from finemask_ds.errors import UserError, abbreviated

BUILTIN_DEV_ROWS = 1000


def load_split(task: Task, data: str, split: str) -> Examples:
    """Read the rows of one split.

    Args:
        task: whose rows.
        data: "" for the hub (of a task of the built-in language: that), "hub", "builtin", or a folder: GLUE's with a
            folder for each task (`CoLA/train.tsv`, in capitals or not), SQuAD's, one that holds `glue/` and `squad/`,
            or the task's own. A task of the built-in language is always drawn from that.
        split: one of `tasks.SPLITS`.

    Returns:
        The rows in the order of the file; targets are class numbers (int), scores (float) or tuples of `Answer`, None
        for the test splits.

    Raises:
        UserError: nothing there, an unreadable or broken file, a missing column, an invalid target.
    """
    if task.is_builtin:
        return _drawn(task, split)
    if _is_hub(task, data):
        from finemask_ds.data.hub_tables import read_hub_table

        _known_split(task, split)
        return read_hub_table(task, split)
    path = _find_file(task, data, split)
    if task.kind == "span":
        from finemask_ds.data.squad import read_squad

        return read_squad(path)
    from finemask_ds.data.glue import read_tsv

    return read_tsv(task, path, split)


def has_split(task: Task, data: str, split: str) -> bool:
    """Whether `load_split` would find the split; nothing is downloaded and no row read."""
    try:
        _find(task, data, split)
    except UserError:
        return False
    return True


def check_data(task: Task, data: str, splits: Iterable[str]) -> None:
    """Raise the UserError that `load_split` would: files are read whole, of the hub only the list of files."""
    for split in splits:
        if task.is_builtin or _is_hub(task, data):
            _find(task, data, split)
        else:
            load_split(task, data, split)


def _find(task: Task, data: str, split: str) -> None:
    """Raise UserError where the split is not to be found."""
    _known_split(task, split)
    if task.is_builtin:
        return
    if not _is_hub(task, data):
        _find_file(task, data, split)
        return
    from finemask_ds.data.hub_tables import find_hub_table

    find_hub_table(task, split)


def _known_split(task: Task, split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}: one of {', '.join(SPLITS)}")
    known = ("train", "dev") if task.files is None else tuple(task.files)
    if split not in known:
        raise UserError(f"{task.title} has no {split} split; it has {', '.join(known)}")


def _is_hub(task: Task, data: str) -> bool:
    if data == "builtin":
        raise UserError(f"--data builtin has no {task.title}; type --task {' or '.join(BUILTIN_TASKS)}, "
                        "or --data hub, or --data FOLDER")  # fmt: skip
    return data in ("", "hub")


def _drawn(task: Task, split: str) -> Examples:
    """Rows of the built-in language, the same in every process."""
    _known_split(task, split)
    num = builtin.TASKS[task.name].num_train if split == "train" else BUILTIN_DEV_ROWS
    rows = builtin.task_examples(task.name, "train" if split == "train" else "valid", num=num)
    texts = [[row[column] for row in rows] for column in task.columns]
    targets: Targets = (
        [(Answer(row["answer"], row["start"]),) for row in rows]
        if task.kind == "span"
        else [row[task.target] for row in rows]
    )
    ids = [str(number) for number in range(num)]
    return Examples.of(ids, texts[0], texts[1] if len(texts) > 1 else None, targets)


def _find_file(task: Task, data: str, split: str) -> Path:
    """The split's file below the folder `data`."""
    _known_split(task, split)
    root = Path(data).expanduser()
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "is no folder"
        raise UserError(f"--data {data} {what}; for {task.title} {_layouts(task)}")
    try:
        looked = list(_folders(task, root))
    except OSError as error:
        raise UserError(f"--data {data} cannot be read ({error.strerror}); give a folder that you may read") from error
    held = [folder for folder in looked if any(_candidates(task, folder, name) for name in task.files or ())]
    if not held:
        where = ", ".join(map(str, looked))
        raise UserError(f"--data {data} holds no file of {task.title} (looked in {where}); {_layouts(task)}")
    found = _candidates(task, held[0], split)
    if not found:
        raise UserError(f"{held[0]} has no {_file_name(task, split)}, the {split} split of {task.title}; put it there")
    if len(found) > 1:
        names = abbreviated([path.name for path in found])
        raise UserError(f"{held[0]} has several files for the {split} split of {task.title}: {names}; leave only one")
    return found[0]


def _folders(task: Task, root: Path) -> Iterator[Path]:
    """Where the task's files may be: a folder of its name, one in glue/, or the root itself."""
    children = sorted(child for child in root.iterdir() if child.is_dir())
    for folder in (*children, *(below for child in children if _plain(child) == "glue" for below in child.iterdir())):
        if _plain(folder) == task.name and folder.is_dir():
            yield folder
    yield root


def _plain(folder: Path) -> str:
    """A folder's name as a task's: SST-2 is sst2."""
    return re.sub(r"[^a-z0-9]", "", folder.name.lower())


def _candidates(task: Task, folder: Path, split: str) -> list[Path]:
    """The split's file; of SQuAD also any others of the split, where that one is absent."""
    path = folder / _file_name(task, split)
    if path.is_file():
        return [path]
    return sorted(folder.glob(f"{split}*.json")) if task.kind == "span" else []


def _file_name(task: Task, split: str) -> str:
    return (task.files or {})[split]


def _layouts(task: Task) -> str:
    """The ways to give a task's data."""
    train, dev = _file_name(task, "train"), _file_name(task, "dev")
    name = task.folder or task.name
    root = f"one with {name}/{train} and {name}/{dev}" + (", as in the GLUE download" if task.folder else "")
    return f"give a folder with {train} and {dev}, or {root}, or type --data hub"
