"""Text data sets of the Hugging Face hub: which files are which split, on the hub or in its caches."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finemask_ds.data.sources import HUB_FORMATS, TextFiles, format_of, pick_splits, split_of
from finemask_ds.errors import UserError, abbreviated

_CARD = "README.md"
_SHARD = re.compile(r"-\d{5}-of-(\d{5})\.")


def find_hub_text(data: str, name: str, config: str | None) -> TextFiles:
    """Find a hub data set's train and validation files: on the hub, else in its cache, else prepared ones.

    `datasets.load_dataset(name)` would prepare the test split too, and without network does not look into the
    hub's own cache. So the files are picked here; `fetch` downloads one by one into that cache.

    Args:
        data: what the user typed, for error messages.
        name: OWNER/NAME.
        config: of a data set that has several; None: its default.

    Raises:
        UserError: no such data set or configuration, no train split, or out of reach and in no cache.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    download = functools.partial(huggingface_hub.hf_hub_download, name, repo_type="dataset")
    try:
        info = huggingface_hub.HfApi().dataset_info(name, timeout=10)
        try:
            card = Path(download(_CARD))  # of the branch main, by which the cache notes the branch's revision
        except EntryNotFoundError:
            card = None
    except RepositoryNotFoundError as error:
        raise UserError(f"--data {data}: the hub has no such data set, or not for you; check the name") from error
    except Exception as error:  # no network, by whatever name the HTTP library of the day has for it
        found = _snapshot(data, name, config) or _prepared(data, name, config)
        if found is None:
            raise UserError(_out_of_reach(data, error)) from error
        return found
    files = [sibling.rfilename for sibling in info.siblings or []]
    train, dev = _pick(data, files, card, config)
    if not train:
        raise UserError(
            f"--data {data} has no train split of a readable kind; its files are {abbreviated(sorted(files), 10)}"
        )

    def fetch(file: str) -> Path:
        try:
            return Path(download(file, revision=info.sha))
        except Exception as error:
            again = "type the same command again to go on"
            raise UserError(f"{file} of {name} could not be downloaded ({error}); {again}") from error

    return TextFiles(_name(name, config), train, dev, fetch, str(info.sha))


def _snapshot(data: str, name: str, config: str | None) -> TextFiles | None:
    """The data set in the hub's cache (HF_HOME/hub/datasets--OWNER--NAME), if all of it is there."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(huggingface_hub.snapshot_download(name, repo_type="dataset", local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    train, dev = _pick(data, files, folder / _CARD if _CARD in files else None, config)
    if not train:
        return None  # a card alone is all that `datasets` leaves here after preparing
    for split in (train, dev):
        shards = _SHARD.search(split[0]) if split else None
        if shards and len(split) < int(shards[1]):
            return None  # an unfinished download: half a corpus would be taken for the whole
    return TextFiles(_name(name, config), train, dev, folder.joinpath, folder.name)


def _prepared(data: str, name: str, config: str | None) -> TextFiles | None:
    """The data set as `datasets.load_dataset` once prepared it (HF_HOME/datasets/OWNER___NAME)."""
    from datasets.packaged_modules.cache.cache import Cache

    try:
        builder: Any = Cache(
            dataset_name=name.split("/")[1], repo_id=name, config_name=config, version="auto", hash="auto"
        )
    except ValueError:
        return None
    folder = Path(builder.cache_dir)
    splits = pick_splits((path.name for path in folder.glob("*.arrow")), prefix=f"{builder.dataset_name}-")
    if not splits["train"]:
        return None
    return TextFiles(_name(name, config), splits["train"], splits["dev"], folder.joinpath, folder.name)


def _pick(data: str, files: Iterable[str], card: Path | None, config: str | None) -> tuple[tuple[str, ...], ...]:
    """Names of the train and the dev files among `files`, by the data set's card or else by their names.

    Where one of the splits that the card lists has no file, both are empty.
    """
    readable = [f for f in files if format_of(f, HUB_FORMATS) and not f.endswith("dataset_infos.json")]
    patterns = _patterns(data, card, config)
    if patterns is None:
        prefix = f"{config}/" if config else ""
        splits = pick_splits((file for file in readable if file.startswith(prefix)), prefix=prefix)
        return splits["train"], splits["dev"]
    picked = {}
    for split in {"train", "dev"} & set(patterns):
        matching = (f for f in readable if any(fnmatch.fnmatch(f, p) for p in patterns[split]))
        picked[split] = tuple(sorted(matching))
    if not all(picked.values()):
        return (), ()
    return picked.get("train", ()), picked.get("dev", ())


def _patterns(data: str, card: Path | None, config: str | None) -> dict[str, list[str]] | None:
    """The card's file patterns of each split in the chosen configuration; None where the card lists none."""
    if card is None:
        return None
    from huggingface_hub import DatasetCard

    configs = {c["config_name"]: c for c in DatasetCard.load(card).data.to_dict().get("configs") or []}
    if not configs:
        return None
    if config is None:
        default = [n for n, c in configs.items() if c.get("default") or n == "default" or len(configs) == 1]
        config = default[0] if default else None
    if config not in configs:
        names = abbreviated(sorted(f"{data.split(':')[0]}:{name}" for name in configs), 10)
        raise UserError(f"--data {data} names no configuration that this data set has; type one of {names}")
    listed = configs[config].get("data_files")
    if listed is None:
        return None
    patterns: dict[str, list[str]] = {}
    for entry in [listed] if isinstance(listed, str) else listed:
        split, path = (entry["split"], entry["path"]) if isinstance(entry, dict) else ("train", entry)
        patterns.setdefault(split_of(split), []).extend([path] if isinstance(path, str) else path)
    return patterns


def _name(name: str, config: str | None) -> str:
    return f"{name}:{config}" if config else name


def _out_of_reach(data: str, error: Exception) -> str:
    import datasets
    import huggingface_hub

    return (
        f"--data {data}: the hub cannot be reached ({type(error).__name__}), and neither "
        f"{huggingface_hub.constants.HF_HUB_CACHE} nor {datasets.config.HF_DATASETS_CACHE} holds all of it; "
        "download it where there is a network and set HF_HOME to that cache, or put train.txt and valid.txt "
        "in a folder and type --data FOLDER, or type --data builtin"
    )
