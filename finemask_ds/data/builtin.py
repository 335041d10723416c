"""The built-in language: a seeded, English-like grammar with a corpus, a tokenizer and five tasks, no download.

The language and its fixed world were written for this project. A corpus takes about a second, and a small BERT learns
the grammar in about two core-minutes, but topics, facts and copying hardly: results/README.md tells what its weights
are worth on each task.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from finemask_ds.data import genres, lexicon
from finemask_ds.data.builtin_tasks import TASKS, Task, in_split, task_examples

__all__ = [
    "DOCUMENTS",
    "MODEL",
    "TASKS",
    "VERSION",
    "Task",
    "documents",
    "initial_positions",
    "task_examples",
    "write_corpus",
    "write_tokenizer",
]

VERSION = 1  # raise it whenever any output below changes: caches are keyed by it
DOCUMENTS = {"train": 24_000, "valid": 400}
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

MODEL: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 64,
    "initializer_range": 0.05,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def documents(split: str, *, seed: int = 0) -> Iterator[str]:
    """Yield the documents of a split, "train" or "valid"; no document is in both, whatever the seeds.

    A document is one line of lower-case words, commas, full stops and question marks set apart by spaces, of several
    sentences (up to some 90 WordPieces). Raises ValueError for an unknown split.
    """
    if split not in DOCUMENTS:
        raise ValueError(f"no split {split!r}: type {' or '.join(DOCUMENTS)}")
    drawn = genres.stream("documents", split, seed)
    return itertools.islice((text for text in drawn if in_split(text, split)), DOCUMENTS[split])


def write_corpus(folder: Path, *, seed: int = 0) -> None:
    """Write train.txt and valid.txt (UTF-8), documents separated by one blank line, each file atomically."""
    from finemask_ds.run import atomic_write

    for split in DOCUMENTS:
        with atomic_write(Path(folder) / f"{split}.txt") as file:
            file.write("\n\n".join(documents(split, seed=seed)) + "\n")


def tokenizer() -> Tokenizer:
    """Return the WordPiece tokenizer of the language, in BERT's manner: [CLS] first [SEP] second [SEP]."""
    vocabulary = {piece: index for index, piece in enumerate((*SPECIAL_TOKENS, *lexicon.pieces()))}
    built = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    built.normalizer = normalizers.BertNormalizer(lowercase=True)
    built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    built.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    built.decoder = decoders.WordPiece()
    built.add_special_tokens(list(SPECIAL_TOKENS))
    return built


def write_tokenizer(folder: Path) -> None:
    """Write the tokenizer as Hugging Face reads it: tokenizer.json, its two JSON companions and vocab.txt."""
    from finemask_ds.run import atomic_write

    folder = Path(folder)
    roles = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL_TOKENS, strict=True))
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 64} | roles
    built = tokenizer()
    numbers = built.get_vocab()
    vocabulary = sorted(numbers, key=numbers.__getitem__)
    contents = {
        "vocab.txt": "\n".join(vocabulary),
        "special_tokens_map.json": json.dumps(roles, indent=2),
        "tokenizer_config.json": json.dumps(settings, indent=2),
        "tokenizer.json": built.to_str(pretty=True),
    }
    for name, text in contents.items():
        with atomic_write(folder / name) as file:
            file.write(text + "\n")


def initial_positions() -> np.ndarray:
    """Return the position embeddings to begin pre-training with, fp32 [max_position_embeddings, hidden_size].

    They are sinusoids of amplitude 0.15 (Vaswani et al. 2017, section 3.5) and train like the rest. From Gaussian
    positions the encoder spends some 700 steps before it finds out which tokens are neighbours.
    """
    positions = np.arange(MODEL["max_position_embeddings"])[:, None]
    rates = np.exp(-np.log(10_000.0) * np.arange(0, MODEL["hidden_size"], 2) / MODEL["hidden_size"])[None]
    angles = positions * rates
    return (0.15 * np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(len(positions), -1)).astype(np.float32)
