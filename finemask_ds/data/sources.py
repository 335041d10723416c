"""Where text comes from - files, a folder, a data set of the hub (`hub.py`) - and how it streams."""

from __future__ import annotations

import contextlib
import glob
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from finemask_ds.errors import UserError

if TYPE_CHECKING:
    import pyarrow

NICKNAMES = {
    "wikitext-103": "Salesforce/wikitext:wikitext-103-raw-v1",
    "wikitext-2": "Salesforce/wikitext:wikitext-2-raw-v1",
}
"""Short names of data sets on the hub (TAMT Section 4.1.2 uses the first)."""

FORMATS = {".txt": "text", ".tokens": "text", ".raw": "text", ".parquet": "parquet"}
"""File endings and the builder of the `datasets` library that reads each."""

HUB_FORMATS = {**FORMATS, ".json": "json", ".jsonl": "json", ".csv": "csv", ".arrow": "arrow"}
"""The same for hub data sets, which come in more formats."""

_SPLIT_WORDS = {
    "test": re.compile(r"(?<![a-z])(test|testing)(set|data)?(?![a-z])"),
    "train": re.compile(r"(?<![a-z])(train|training)(set|data)?(?![a-z])"),
    "dev": re.compile(r"(?<![a-z])(valid|validation|val|dev)(set|data)?(?![a-z])"),
}
_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")
_VALID = (
    f"{', '.join(NICKNAMES)}, a hub data set as OWNER/NAME or OWNER/NAME:CONFIG, a folder or a file "
    f"({', '.join(FORMATS)}), or builtin"
)


@dataclass(frozen=True)
class TextFiles:
    """Files of text: names of those to train on and to evaluate on (none: the dev text is cut off the end).

    `fetch` turns a name into a local path, downloading if need be; `revision` tells the contents of a hub
    data set, while local files ("") are told by their bytes.
    """

    name: str
    train: tuple[str, ...]
    dev: tuple[str, ...]
    fetch: Callable[[str], Path] = Path
    revision: str = ""


def find_text(data: str) -> TextFiles:
    """Find the text that `--data` names, without reading it.

    A folder's files are sorted into splits by their names; a single file has no dev split. Test splits are
    left out here, so that nothing later can open them.

    Raises:
        UserError: nothing of that name, no file of a known kind, or a hub data set out of reach.
    """
    path = Path(data).expanduser()
    if path.is_file():
        if format_of(path.name, FORMATS) is None:
            raise UserError(f"{path} has an unknown ending; the known ones are {', '.join(FORMATS)} (text also .gz)")
        if split_of(path.name) == "test":
            raise UserError(f"{path} is a test split by its name and never read; name a train file, or a folder")
        return TextFiles(str(path), (str(path),), ())
    if path.is_dir():
        names = (p.name for p in path.iterdir() if p.is_file() and format_of(p.name, FORMATS))
        splits = pick_splits(names)
        if not splits["train"]:
            raise UserError(f"{path} holds no file to train on; put train and valid files ({', '.join(FORMATS)}) there")
        return TextFiles(str(path), splits["train"], splits["dev"], path.joinpath)
    hub = _HUB_NAME.fullmatch(NICKNAMES.get(data, data))
    if hub is None or data.startswith(".") or format_of(data, FORMATS):
        missing = "there is no such file or folder" if "/" in data or "." in data else "no data set has this name"
        raise UserError(f"--data {data}: {missing}; valid are {_VALID}")

    from finemask_ds.data.hub import find_hub_text

    return find_hub_text(data, hub[1], hub[2])


def split_of(name: str) -> str:
    """The split that a file or split name speaks of in whole words: test, train, dev, or "" for none."""
    return next((split for split, words in _SPLIT_WORDS.items() if words.search(name.lower())), "")


def format_of(name: str, formats: dict[str, str]) -> str | None:
    """The builder that reads a file of this name, or None; text and JSON lines may be gzipped."""
    suffixes = PurePosixPath(name.lower()).suffixes
    if suffixes[-1:] != [".gz"]:
        return formats.get("".join(suffixes[-1:]))
    found = formats.get("".join(suffixes[-2:-1]))
    return None if found in ("parquet", "arrow") else found


def pick_splits(
    names: Iterable[str], *, prefix: str = "", split_of: Callable[[str], str] = split_of
) -> dict[str, tuple[str, ...]]:
    """Sort file names into splits by the one that `split_of` reads behind `prefix`; "train" and "dev" are always there.

    Without any train file, those that speak of no split are to be trained on.
    """
    splits: dict[str, tuple[str, ...]] = {"train": (), "dev": ()}
    for name in sorted(names):
        split = split_of(name.removeprefix(prefix))
        splits[split] = (*splits.get(split, ()), name)
    return {**splits, "train": splits["train"] or splits.get("", ())}


def read_documents(path: Path, *, batch_rows: int = 1000) -> Iterator[list[str]]:
    """Stream the documents of a file in batches, in order, with bounded memory.

    A document is a row of a table or a line of text, each ended by one line break; blank ones are left out.
    So the lines of a text file and the rows that the hub made of them are the same documents.

    Raises:
        UserError: the file cannot be read, is not UTF-8, or has no single column of text.
    """
    for table in read_tables(path, batch_rows=batch_rows):
        texts = table.column(_text_column(path, table.schema)).to_pylist()
        yield [text.rstrip("\n") + "\n" for text in texts if text and text.strip()]


def read_tables(path: Path, *, batch_rows: int) -> Iterator[pyarrow.Table]:
    """Stream the rows of a file of any of `HUB_FORMATS`; lines of text are rows of one column, `text`.

    Raises:
        UserError: the file cannot be read or is not UTF-8.
    """
    from datasets import load_dataset

    builder = format_of(path.name, HUB_FORMATS)
    options = {"encoding": "utf-8-sig"} if builder == "text" else {}
    with _readable(path):
        files = {"train": [glob.escape(str(path))]}
        rows = load_dataset(builder, data_files=files, split="train", streaming=True, **options)
        yield from rows.with_format("arrow").iter(batch_size=batch_rows)


def text_bytes(path: Path) -> int | None:
    """About how many bytes of text a file holds, without reading it; None where only reading would tell."""
    builder = format_of(path.name, HUB_FORMATS)
    if builder == "parquet":
        from pyarrow.parquet import read_metadata

        with _readable(path):
            metadata = read_metadata(path)
        return sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    return path.stat().st_size if builder == "text" and path.suffix != ".gz" else None


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what the readers raise on broken files into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError, EOFError, zlib.error) as error:  # Arrow's and Unicode errors are ValueErrors
        raise UserError(f"{path} cannot be read ({error}); give UTF-8 text or a whole parquet file") from error


def _text_column(path: Path, schema: pyarrow.Schema) -> str:
    """The column called text, or the only one that holds strings."""
    strings = [field.name for field in schema if str(field.type) in ("string", "large_string")]
    if "text" in strings:
        return "text"
    if len(strings) != 1:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise UserError(f"{path} has no column 'text' and not just one of strings: {columns}; rename the column")
    return strings[0]
