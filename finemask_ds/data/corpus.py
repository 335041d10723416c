"""Text to token blocks: tokenised once, cached by content, memory-mapped ever after."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from finemask_ds.data.once import build_once
from finemask_ds.data.sources import TextFiles, find_text, read_documents, text_bytes
from finemask_ds.data.text import plain_backend
from finemask_ds.errors import UserError
from finemask_ds.run import cache_dir, content_hash, read_json, write_json

FORMAT_VERSION = "1"
"""Part of every cache key: raised whenever the same text would give other blocks."""

BATCH_CHARACTERS = 1 << 20  # handed to the tokenizer at once: enough for all its threads, little enough to hold
DEV_SHARE = 100  # one document in so many is dev text where there is no dev split


class TextTokenizer(Protocol):
    """What is used of a `transformers.PreTrainedTokenizerFast`."""

    cls_token_id: int | None
    sep_token_id: int | None
    mask_token_id: int | None
    all_special_ids: list[int]

    @property
    def backend_tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer` inside."""

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Corpus:
    """Token blocks, uint16 or uint32 [blocks, seq_len], memory-mapped, read-only, and their origin."""

    train: np.ndarray
    dev: np.ndarray
    provenance: dict[str, Any]
    path: Path


def load_blocks(
    data: str,
    tokenizer: TextTokenizer,
    seq_len: int,
    *,
    cache: Path | None = None,
    max_positions: int | None = None,
) -> Corpus:
    """Load the token blocks of a text, building them first if no earlier run of anyone did.

    The documents of a split follow one another, as in the TAMT authors' code, each with its line break, and
    are cut into [CLS] + (seq_len - 2) tokens + [SEP]; what is left at the end is dropped. Text without a dev
    split is cut 99:1 by document, the last ones (at least one) being the dev text.

    Special tokens never arise from text: "[MASK]" or "</s>" written in a document is tokenised as the
    characters it consists of. Otherwise an article about BERT would hold positions that are not masked and
    sentence ends that are none.

    Args:
        data: see `finemask_ds.data.sources.find_text`; `builtin` must be turned into a folder before.
        tokenizer: a fast tokenizer with [CLS] and [SEP], or RoBERTa's <s> and </s>.
        seq_len: tokens of a block, special ones included.
        cache: the folder to keep blocks in; default `cache_dir()`.
        max_positions: how many tokens the model takes.

    Raises:
        UserError: the text is missing, unreadable, empty or too short, or seq_len is impossible.
    """
    if max_positions is not None and seq_len > max_positions:
        raise UserError(f"--seq_len {seq_len} is longer than the {max_positions} positions of the model; "
                        f"type --seq_len {max_positions} or less")  # fmt: skip
    if seq_len < 3:
        raise UserError(f"--seq_len {seq_len} leaves no room for text between two special tokens; type 3 or more")
    source, packer = find_text(data), _Packer(tokenizer, seq_len)
    key = content_hash(FORMAT_VERSION, packer.identity, *_identity(source))
    folder = (cache or cache_dir()) / "blocks" / key
    build_once(folder, lambda temporary: _build(temporary, folder, source, packer))
    train, dev = (np.load(folder / f"{split}.npy", mmap_mode="r") for split in ("train", "dev"))
    return Corpus(train, dev, {"source": data, "key": key, **read_json(folder / "corpus.json")}, folder)


def _identity(source: TextFiles) -> list[str | Path]:
    """What tells this text from others: a hub data set's name and revision, local files' bytes and splits."""
    if source.revision:
        return [source.name, source.revision, "dev" if source.dev else "cut"]
    return [str(len(source.train)), *(source.fetch(name) for name in source.train + source.dev)]


class _Packer:
    """Turns documents into token ids and token ids into blocks."""

    def __init__(self, tokenizer: TextTokenizer, seq_len: int) -> None:
        if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
            raise UserError("the tokenizer has no [CLS] and [SEP]; type a --model of the BERT or RoBERTa kind")
        self.backend = plain_backend(tokenizer)
        self.ends = (tokenizer.cls_token_id, tokenizer.sep_token_id)
        self.seq_len = seq_len
        self.dtype = np.dtype(np.uint16 if max(self.backend.get_vocab().values()) < 1 << 16 else np.uint32)
        self.tokenizer_hash = content_hash(self.backend.to_str())
        self.identity = f"{self.tokenizer_hash} {self.ends} {seq_len}"

    def encode(self, documents: list[str]) -> list[np.ndarray]:
        """Token ids of each document, without special tokens."""
        encodings = self.backend.encode_batch_fast(documents, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def write_blocks(self, path: Path, tokens: Path, start: int, stop: int) -> int:
        """Cut the tokens [start, stop) of a raw file into blocks, saved as .npy; returns their number."""
        room = self.seq_len - 2
        num_blocks = (stop - start) // room
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (num_blocks, self.seq_len),
        }
        with open(path, "wb") as target, open(tokens, "rb") as stream:
            np.lib.format.write_array_header_1_0(target, header)
            stream.seek(start * self.dtype.itemsize)
            per_piece = max(1, BATCH_CHARACTERS // self.seq_len)
            for done in range(0, num_blocks, per_piece):
                count = min(per_piece, num_blocks - done)
                blocks = np.empty((count, self.seq_len), dtype=self.dtype)
                blocks[:, 0], blocks[:, -1] = self.ends
                blocks[:, 1:-1] = np.fromfile(stream, self.dtype, count * room).reshape(count, room)
                target.write(blocks.tobytes())
        return num_blocks

    def write_tokens(self, path: Path, batches: Iterable[list[str]], advance: Callable[[int], None]) -> _Count:
        """Append the token ids of all documents to a raw file, and where each ends to another beside it.

        Only one batch is in memory at a time, whatever the size of the corpus.
        """
        count = _Count()
        with open(path, "wb") as tokens, open(_ends(path), "wb") as ends:
            for documents in _regroup(batches):
                ids = self.encode(documents)
                stops = count.tokens + np.cumsum([len(each) for each in ids], dtype=np.int64)
                tokens.write(np.concatenate(ids).tobytes())
                ends.write(stops.tobytes())
                num_bytes = sum(len(document.encode()) for document in documents)
                count = _Count(count.documents + len(ids), int(stops[-1]), count.num_bytes + num_bytes)
                advance(num_bytes)
        return count


@dataclass(frozen=True)
class _Count:
    """How much text there is."""

    documents: int = 0
    tokens: int = 0
    num_bytes: int = 0


def _ends(path: Path) -> Path:
    return path.with_suffix(".ends")


def _regroup(batches: Iterable[list[str]]) -> Iterator[list[str]]:
    """The same documents in batches of about BATCH_CHARACTERS, however long or short they are."""
    pending: list[str] = []
    characters = 0
    for documents in batches:
        for document in documents:
            pending.append(document)
            characters += len(document)
            if characters >= BATCH_CHARACTERS:
                yield pending
                pending, characters = [], 0
    if pending:
        yield pending


def _build(folder: Path, final: Path, source: TextFiles, packer: _Packer) -> None:
    """Tokenise every split into a raw file, cut off dev text if there is none, pack the blocks, say so."""
    names = [Path(name).name for name in source.train + source.dev]
    print(f"tokenising {source.name}: {', '.join(names)}", flush=True)
    files = {split: [source.fetch(n) for n in getattr(source, split)] for split in ("train", "dev")}
    counts, start = {}, time.perf_counter()
    with _progress([path for paths in files.values() for path in paths]) as advance:
        for split, paths in files.items():
            batches = (documents for path in paths for documents in read_documents(path))
            counts[split] = packer.write_tokens(folder / f"{split}.tokens", batches, advance)
    seconds = time.perf_counter() - start

    splits = {}
    for split, (name, first, count) in _cut(folder, source, counts).items():
        tokens, stop = folder / f"{name}.tokens", first + count.tokens
        blocks = packer.write_blocks(folder / f"{split}.npy", tokens, first, stop)
        if not blocks:
            few = f"the {split} text of {source.name} has {count.tokens} tokens, too few for a block"
            raise UserError(f"{few} of {packer.seq_len}; give more text or type a smaller --seq_len")
        splits[split] = {"documents": count.documents, "tokens": count.tokens, "blocks": blocks}
        how_much = f"{count.documents:,} documents, {count.tokens:,} tokens, {blocks:,} blocks"
        print(f"{split}: {how_much}", flush=True)
    for path in (*folder.glob("*.tokens"), *folder.glob("*.ends")):
        path.unlink()
    origin = {"name": source.name, "files": names, "revision": source.revision}
    form = {"tokenizer": packer.tokenizer_hash, "seq_len": packer.seq_len, "dtype": packer.dtype.name}
    write_json(folder / "corpus.json", {**origin, **form, **splits})
    megabytes = sum(count.num_bytes for count in counts.values()) / 1e6
    print(f"tokenised {megabytes:.1f} MB at {megabytes / seconds:.1f} MB/s into {final}", flush=True)


def _cut(folder: Path, source: TextFiles, counts: dict[str, _Count]) -> dict[str, tuple[str, int, _Count]]:
    """For train and dev: the raw file, the first token, how much of it."""
    train = counts["train"]
    if not train.documents:
        raise UserError(f"{source.name} holds no text to train on; give UTF-8 text with words in it")
    if source.dev:
        return {split: (split, 0, count) for split, count in counts.items()}
    if train.documents == 1:
        raise UserError(f"{source.name} is one document (a line, a row), not to be cut into train and dev "
                        "text; give a folder with train and valid files")  # fmt: skip
    kept = train.documents - max(1, train.documents // DEV_SHARE)
    stop = int(np.fromfile(_ends(folder / "train.tokens"), np.int64, 1, offset=8 * (kept - 1))[0])
    dev = _Count(train.documents - kept, train.tokens - stop)
    return {"train": ("train", 0, _Count(kept, stop)), "dev": ("train", stop, dev)}


@contextlib.contextmanager
def _progress(paths: list[Path]) -> Iterator[Callable[[int], None]]:
    """A progress bar with the time left, where someone watches; it is advanced by bytes of text."""
    if not sys.stderr.isatty():
        yield lambda num_bytes: None
        return
    from rich.console import Console
    from rich.progress import Progress

    known = [size for size in map(text_bytes, paths) if size is not None]
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("tokenising", total=sum(known) if len(known) == len(paths) else None)
        yield lambda num_bytes: progress.advance(task, num_bytes)
