"""Data sets of the Hugging Face hub, texts and tasks: which files are which split, on the hub or in its caches."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finemask_ds.data.sources import HUB_FORMATS, TextFiles, format_of, pick_splits, split_of
from finemask_ds.errors import TransientError, UserError, abbreviated

_CARD = "README.md"
_SHARD = re.compile(r"-\d{5}-of-(\d{5})\.")
_TEXT_INSTEAD = "put train.txt and valid.txt in a folder and type --data FOLDER, or type --data builtin"


@dataclass(frozen=True)
class Wanted:
    """A data set of the hub, and what is wanted of it."""

    typed: str
    """What the user typed, to open error messages with."""
    name: str
    """OWNER/NAME."""
    config: str | None
    """Of a data set that has several; None: its default."""
    splits: tuple[str, ...]
    """The first must be there, the others where the data set lists them."""
    split_of: Callable[[str], str]
    """Split of the name of a file or of a split of the hub."""
    instead: str
    """What else to type where the hub is out of reach."""

    @property
    def full_name(self) -> str:
        """OWNER/NAME:CONFIG."""
        return f"{self.name}:{self.config}" if self.config else self.name


@dataclass(frozen=True)
class HubFiles:
    """Names of the files of each split; `fetch` turns one into a local path, downloading if need be."""

    splits: Mapping[str, tuple[str, ...]]
    fetch: Callable[[str], Path]
    revision: str


def find_hub_text(data: str, name: str, config: str | None) -> TextFiles:
    """Find the train and validation files of a text data set; see `find_hub_files`."""
    wanted = Wanted(f"--data {data}", name, config, ("train", "dev"), split_of, _TEXT_INSTEAD)
    found = find_hub_files(wanted)
    return TextFiles(wanted.full_name, found.splits["train"], found.splits.get("dev", ()), found.fetch, found.revision)


def find_hub_files(wanted: Wanted) -> HubFiles:
    """Find the files of some splits of a hub data set: on the hub, else in its cache, else prepared ones.

    `datasets.load_dataset(name)` would prepare the other splits too, and without network does not look into the
    hub's own cache. So the files are picked here; `fetch` downloads one by one into that cache.

    Raises:
        UserError: no such data set or configuration, no first split, or out of reach and in no cache.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    download = functools.partial(huggingface_hub.hf_hub_download, wanted.name, repo_type="dataset")
    try:
        info = huggingface_hub.HfApi().dataset_info(wanted.name, timeout=10)
        try:
            card = Path(download(_CARD))  # of the branch main, by which the cache notes the branch's revision
        except EntryNotFoundError:
            card = None
    except RepositoryNotFoundError as error:
        raise UserError(f"{wanted.typed}: the hub has no such data set, or not for you; check the name") from error
    except Exception as error:  # no network, by whatever name the HTTP library of the day has for it
        found = _snapshot(wanted) or _prepared(wanted)
        if found is None:
            raise UserError(_out_of_reach(wanted, error)) from error
        return found
    files = [sibling.rfilename for sibling in info.siblings or []]
    splits = _pick(wanted, files, card)
    if not splits:
        listed = abbreviated(sorted(files), 10)
        raise UserError(f"{wanted.typed} has no {wanted.splits[0]} split of a readable kind; its files are {listed}")

    def fetch(file: str) -> Path:
        try:
            return Path(download(file, revision=info.sha))
        except Exception as error:
            again = "type the same command again to go on"
            raise TransientError(f"{file} of {wanted.name} could not be downloaded ({error}); {again}") from error

    return HubFiles(splits, fetch, str(info.sha))


def _snapshot(wanted: Wanted) -> HubFiles | None:
    """The data set in the hub's cache (HF_HOME/hub/datasets--OWNER--NAME), if all that is wanted is there."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(huggingface_hub.snapshot_download(wanted.name, repo_type="dataset", local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    splits = _pick(wanted, files, folder / _CARD if _CARD in files else None)
    # A card alone is all that `datasets` leaves here after preparing; and half a split, which an unfinished
    # download leaves, would be taken for the whole.
    return HubFiles(splits, folder.joinpath, folder.name) if splits and all(map(_is_whole, splits.values())) else None


def _is_whole(files: tuple[str, ...]) -> bool:
    shards = _SHARD.search(files[0])
    return shards is None or len(files) >= int(shards[1])


def _prepared(wanted: Wanted) -> HubFiles | None:
    """The data set as `datasets.load_dataset` once prepared it (HF_HOME/datasets/OWNER___NAME)."""
    from datasets.packaged_modules.cache.cache import Cache

    try:
        builder: Any = Cache(
            dataset_name=wanted.name.split("/")[1],
            repo_id=wanted.name,
            config_name=wanted.config,
            version="auto",
            hash="auto",
        )
    except ValueError:
        return None
    folder = Path(builder.cache_dir)
    names = (path.name for path in folder.glob("*.arrow"))
    splits = _chosen(wanted, pick_splits(names, prefix=f"{builder.dataset_name}-", split_of=wanted.split_of))
    return HubFiles(splits, folder.joinpath, folder.name) if splits else None


def _chosen(wanted: Wanted, splits: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The wanted splits that have files; none where the first has none."""
    chosen = {split: splits[split] for split in wanted.splits if splits.get(split)}
    return chosen if wanted.splits[0] in chosen else {}


def _pick(wanted: Wanted, files: Iterable[str], card: Path | None) -> dict[str, tuple[str, ...]]:
    """Names of the files of each wanted split among `files`, by the data set's card or else by their names.

    None at all where the first split, or one that the card lists, has no file.
    """
    readable = [f for f in files if format_of(f, HUB_FORMATS) and not f.endswith("dataset_infos.json")]
    patterns = _patterns(wanted, card)
    if patterns is None:
        prefix = f"{wanted.config}/" if wanted.config else ""
        below = (file for file in readable if file.startswith(prefix))
        return _chosen(wanted, pick_splits(below, prefix=prefix, split_of=wanted.split_of))
    picked = {}
    for split in set(wanted.splits) & set(patterns):
        matching = (f for f in readable if any(fnmatch.fnmatch(f, p) for p in patterns[split]))
        picked[split] = tuple(sorted(matching))
    return _chosen(wanted, picked) if all(picked.values()) else {}


def _patterns(wanted: Wanted, card: Path | None) -> dict[str, list[str]] | None:
    """The card's file patterns of each split in the chosen configuration; None where the card lists none."""
    if card is None:
        return None
    from huggingface_hub import DatasetCard

    configs = {c["config_name"]: c for c in DatasetCard.load(card).data.to_dict().get("configs") or []}
    if not configs:
        return None
    config = wanted.config
    if config is None:
        default = [n for n, c in configs.items() if c.get("default") or n == "default" or len(configs) == 1]
        config = default[0] if default else None
    if config not in configs:
        names = abbreviated(sorted(f"{wanted.name}:{name}" for name in configs), 10)
        raise UserError(f"{wanted.typed} names no configuration that this data set has; type one of {names}")
    listed = configs[config].get("data_files")
    if listed is None:
        return None
    patterns: dict[str, list[str]] = {}
    for entry in [listed] if isinstance(listed, str) else listed:
        split, path = (entry["split"], entry["path"]) if isinstance(entry, dict) else ("train", entry)
        patterns.setdefault(wanted.split_of(split), []).extend([path] if isinstance(path, str) else path)
    return patterns


def _out_of_reach(wanted: Wanted, error: Exception) -> str:
    import datasets
    import huggingface_hub

    return (
        f"{wanted.typed}: the hub cannot be reached ({type(error).__name__}), and neither "
        f"{huggingface_hub.constants.HF_HUB_CACHE} nor {datasets.config.HF_DATASETS_CACHE} holds all of it; "
        f"download it where there is a network and set HF_HOME to that cache, or {wanted.instead}"
    )
