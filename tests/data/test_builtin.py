"""The built-in language: the same bytes everywhere, nothing unknown to its tokenizer, tasks without give-aways."""

from __future__ import annotations

import collections
import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from finemask_ds.data import builtin


def first(split: str, number: int, seed: int = 0) -> list[str]:
    return list(itertools.islice(builtin.documents(split, seed=seed), number))


def test_the_same_seed_gives_the_same_text_in_every_process() -> None:
    """Python's own hash is salted anew in each process; nothing may depend on it."""
    code = (
        "import hashlib, itertools as i; from finemask_ds.data import builtin as b;"
        "t = list(i.islice(b.documents('train'), 300)) + [str(b.task_examples(n, 'train', num=50)) for n in b.TASKS];"
        "print(hashlib.sha256(repr(t).encode()).hexdigest())"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": salt}, capture_output=True, text=True,
            check=True,
        ).stdout.strip()
        for salt in ("1", "2")
    }  # fmt: skip
    here = first("train", 300) + [str(builtin.task_examples(name, "train", num=50)) for name in builtin.TASKS]
    assert told == {hashlib.sha256(repr(here).encode()).hexdigest()}


def test_seeds_and_splits_differ() -> None:
    assert first("train", 50) != first("train", 50, seed=1)
    assert not set(first("train", 3000)) & set(first("valid", 400))
    with pytest.raises(ValueError, match="no split 'test'"):
        next(builtin.documents("test"))


def test_the_tokenizer_knows_every_word_and_joins_what_it_cut(tmp_path: Path) -> None:
    builtin.write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert [tokenizer.pad_token_id, tokenizer.unk_token_id] == [0, 1]
    assert 300 < len(tokenizer) < 1_500
    for text in first("train", 2_000) + first("valid", 400):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")
    assert tokenizer("the dog")["input_ids"][0] == tokenizer.cls_token_id


def test_corpus_files_hold_the_documents(tmp_path: Path) -> None:
    builtin.write_corpus(tmp_path)
    for split, number in builtin.DOCUMENTS.items():
        documents = (tmp_path / f"{split}.txt").read_text().strip().split("\n\n")
        assert documents == first(split, number)
        assert len(documents) == number


@pytest.mark.parametrize("task", list(builtin.TASKS))
def test_examples_are_balanced_disjoint_and_without_shallow_give_aways(task: str) -> None:
    """No single word says the label much better than chance, except by its meaning in a context."""
    train, valid = (builtin.task_examples(task, split, num=900) for split in ("train", "valid"))
    texts = [{"\n".join(v for v in one.values() if isinstance(v, str)) for one in some} for some in (train, valid)]
    assert not texts[0] & texts[1]
    if task == "questions":
        for one in train:
            start = one["start"]
            assert one["context"][start : start + len(one["answer"])] == one["answer"]
        return
    labels = [one.get("label", one.get("score")) for one in train]
    counts = collections.Counter(labels)
    assert max(counts.values()) - min(counts.values()) <= 1
    if task == "similarity":
        return
    lengths = collections.defaultdict(list)
    for one in train:
        lengths[one["label"]].append(len(" ".join(v for v in one.values() if isinstance(v, str)).split()))
    means = [sum(some) / len(some) for some in lengths.values()]
    assert max(means) - min(means) < 1.5
