"""Text to blocks: against tokenising the whole file at once, over formats, splits, caches and bad input."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from finemask_ds.data.corpus import load_blocks
from finemask_ds.data.sources import split_of
from finemask_ds.errors import UserError
from tests.data.tokenizers_for_tests import byte_bpe, wordpiece

LINES = [f"the cat {i} sat on   mat {i * i} , and a dog ran ." for i in range(250)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "wiki.train.tokens").write_text("\n\n".join(LINES[:200]))
    (folder / "wiki.valid.tokens").write_text("\n".join(LINES[200:]) + "\n")
    return folder


def plain_blocks(text: str, tokenizer: PreTrainedTokenizerFast, seq_len: int) -> np.ndarray:
    """As the TAMT authors' TextDataset: the whole text tokenised at once, cut, special tokens around."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    room = seq_len - 2
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    return np.array([[cls, *ids[i : i + room], sep] for i in range(0, len(ids) - room + 1, room)])


@pytest.mark.parametrize("make", [wordpiece, byte_bpe])
@pytest.mark.parametrize("seq_len", [3, 32])
def test_blocks_are_those_of_the_whole_text(make, seq_len, folder, tmp_path):
    tokenizer = make()
    corpus = load_blocks(str(folder), tokenizer, seq_len, cache=tmp_path)
    for split, lines in (("train", LINES[:200]), ("dev", LINES[200:])):
        blocks = getattr(corpus, split)
        expected = plain_blocks("\n".join(lines) + "\n", tokenizer, seq_len)
        assert np.array_equal(blocks, expected)
        assert blocks.dtype == np.uint16
        assert isinstance(blocks, np.memmap)
        assert not blocks.flags.writeable
        counts = corpus.provenance[split]
        assert counts["documents"] == len(lines)
        assert counts["blocks"] == len(expected) == counts["tokens"] // (seq_len - 2)
    assert corpus.provenance["source"] == str(folder)
    assert corpus.provenance["key"] == corpus.path.name


def test_blocks_do_not_depend_on_how_the_text_is_batched(folder, tmp_path, monkeypatch):
    whole = load_blocks(str(folder), byte_bpe(), 32, cache=tmp_path / "1")
    monkeypatch.setattr("finemask_ds.data.corpus.BATCH_CHARACTERS", 100)
    pieces = load_blocks(str(folder), byte_bpe(), 32, cache=tmp_path / "2")
    assert np.array_equal(whole.train, pieces.train)
    assert np.array_equal(whole.dev, pieces.dev)


def test_all_formats_give_the_same_blocks(tmp_path):
    text = "\n\n".join(LINES)
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "windows.raw").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    rows = [line + end for line in LINES for end in ("\n",)] + ["", None]
    pq.write_table(pa.table({"number": range(252), "content": rows}), tmp_path / "a.parquet", row_group_size=50)
    (tmp_path / "la[te]st test").mkdir()  # neither a pattern nor a split
    (tmp_path / "la[te]st test" / "a.tokens").write_text(text)
    files = ["a.txt", "windows.raw", "a.txt.gz", "a.parquet", "la[te]st test/a.tokens", "la[te]st test"]
    corpora = [load_blocks(str(tmp_path / file), byte_bpe(), 32, cache=tmp_path / file[-3:]) for file in files]
    for corpus in corpora[1:]:
        assert np.array_equal(corpus.train, corpora[0].train)
        assert np.array_equal(corpus.dev, corpora[0].dev)


@pytest.mark.parametrize(("documents", "dev_documents"), [(250, 2), (199, 1), (30, 1)])
def test_a_single_file_is_cut_by_document_and_the_last_are_dev(documents, dev_documents, tmp_path):
    (tmp_path / "train.txt").write_text("\n".join(LINES[:documents]))
    corpus = load_blocks(str(tmp_path / "train.txt"), wordpiece(), 8, cache=tmp_path)
    cut = documents - dev_documents
    assert corpus.provenance["dev"]["documents"] == dev_documents
    assert corpus.provenance["train"]["documents"] == cut
    assert np.array_equal(corpus.train, plain_blocks("\n".join(LINES[:cut]), wordpiece(), 8))
    assert np.array_equal(corpus.dev, plain_blocks("\n".join(LINES[cut:documents]), wordpiece(), 8))


def test_several_train_files_follow_one_another_and_others_are_left_alone(folder, tmp_path):
    plain = load_blocks(str(folder), wordpiece(), 16, cache=tmp_path)
    text = (folder / "wiki.train.tokens").read_text().split("\n\n")
    (folder / "wiki.train.tokens").unlink()
    (folder / "train-00000-of-00002.txt").write_text("\n".join(text[:77]))
    pq.write_table(pa.table({"text": text[77:]}), folder / "train-00001-of-00002.parquet")
    (folder / "LICENSE.txt").write_text("no text to train on, there being train files")
    (folder / "notes.md").write_text("nor this")
    assert np.array_equal(load_blocks(str(folder), wordpiece(), 16, cache=tmp_path).train, plain.train)


def test_test_splits_are_never_read(folder, tmp_path):
    before = load_blocks(str(folder), wordpiece(), 16, cache=tmp_path)
    (folder / "wiki.test.tokens").write_bytes(b"\xff not UTF-8")
    (folder / "test-00000-of-00001.parquet").write_bytes(b"no parquet")
    (folder / "test.txt").symlink_to("nowhere")
    assert load_blocks(str(folder), wordpiece(), 16, cache=tmp_path).path == before.path
    fresh = load_blocks(str(folder), wordpiece(), 16, cache=tmp_path / "fresh")
    assert np.array_equal(fresh.train, before.train)
    with pytest.raises(UserError, match="never read"):
        load_blocks(str(folder / "wiki.test.tokens"), wordpiece(), 16, cache=tmp_path)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.txt", "train"), ("wiki.train.raw", "train"), ("train_v2.txt", "train"),
        ("trainset.txt", "train"), ("valid.txt", "dev"), ("validation-00000-of-00001.parquet", "dev"),
        ("dev.txt", "dev"), ("Val.txt", "dev"), ("test.txt", "test"), ("wiki.test.tokens", "test"),
        ("train_test.txt", "test"), ("TESTSET.txt", "test"), ("latest.txt", ""), ("constraints.txt", ""),
        ("devices.txt", ""), ("news.txt", ""),
    ],
)  # fmt: skip
def test_splits_are_told_by_whole_words(name, split):
    assert split_of(name) == split


@pytest.mark.parametrize("make", [wordpiece, byte_bpe])
def test_special_tokens_in_the_text_are_text(make, tmp_path):
    tokenizer = make()
    line = "the cat [MASK] [CLS] [SEP] [PAD] [UNK] <mask> <s> </s> <pad> <unk> sat"
    (tmp_path / "a.txt").write_text("\n".join([line] * 200))
    corpus = load_blocks(str(tmp_path / "a.txt"), tokenizer, 16, cache=tmp_path)
    assert not np.isin(corpus.train[:, 1:-1], tokenizer.all_special_ids).any()
    text = tokenizer.decode(corpus.train[:20, 1:-1].flatten()).replace(" ", "")
    assert "[mask][cls][sep][pad][unk]<mask><s></s><pad><unk>" in re.sub("#|\n", "", text.lower())
    assert tokenizer.mask_token_id in tokenizer(line)["input_ids"]  # the caller's tokenizer is as it was


def test_large_vocabularies_take_four_bytes(tmp_path):
    words = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, **{f"w{i}": i for i in range(3, 70_000)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]")
    (tmp_path / "train.txt").write_text("w65534 w65535 w65536 w69999")
    (tmp_path / "valid.txt").write_text("w3 w4")
    corpus = load_blocks(str(tmp_path), tokenizer, 4, cache=tmp_path)
    assert corpus.train.dtype == np.uint32
    assert corpus.train.tolist() == [[1, 65534, 65535, 2], [1, 65536, 69999, 2]]


def test_blocks_are_built_once_for_each_content_tokenizer_and_length(folder, tmp_path, capsys):
    tokenizer = wordpiece()
    first = load_blocks(str(folder), tokenizer, 16, cache=tmp_path)
    printed = capsys.readouterr().out
    assert "200 documents" in printed
    assert "MB/s" in printed
    assert str(first.path) in printed
    tokenizer("a b c d e", truncation=True, max_length=3, padding="max_length")  # switches state inside it
    folder.rename(tmp_path / "renamed")
    again = load_blocks(str(tmp_path / "renamed"), tokenizer, 16, cache=tmp_path)
    assert again.path == first.path
    assert capsys.readouterr().out == ""
    others = [load_blocks(str(tmp_path / "renamed"), tokenizer, 17, cache=tmp_path),
              load_blocks(str(tmp_path / "renamed"), byte_bpe(), 16, cache=tmp_path)]  # fmt: skip
    (tmp_path / "renamed" / "wiki.valid.tokens").write_text("\n".join(LINES[201:]))
    others.append(load_blocks(str(tmp_path / "renamed"), tokenizer, 16, cache=tmp_path))
    assert len({corpus.path for corpus in [first, *others]}) == 4
    assert not list(first.path.glob("*.tokens"))


@pytest.mark.parametrize(
    ("files", "data", "message"),
    [
        ({}, "none.txt", "no such file"),
        ({}, "./none", "no such file or folder; valid are wikitext-103"),
        ({}, "wikitext", "no data set has this name; valid are .*OWNER/NAME:CONFIG.*builtin"),
        ({"a.doc": b"text"}, "a.doc", r"unknown ending; .*\.txt, \.tokens, \.raw, \.parquet"),
        ({"a.doc": b"text"}, ".", "no file to train on"),
        ({"test.txt": b"text"}, ".", "no file to train on"),
        ({"train.txt": b""}, "train.txt", "no text"),
        ({"train.txt": b" \n\n \n"}, "train.txt", "no text"),
        ({"train.txt": b"one line only"}, "train.txt", "one document"),
        (
            {"train.txt": b"a b c d e f g h " * 9, "valid.txt": b"a b c"},
            ".",
            "dev text .* 3 tokens, .* of 16",
        ),
        ({"train.txt": b"a b c", "valid.txt": b"a b c d e f g h " * 9}, ".", "train text .* 3 tokens"),
        ({"train.txt": b"a b c\n\xff\n"}, "train.txt", "train.txt cannot be read .*UTF-8"),
        ({"train.txt.gz": gzip.compress(b"a b\n" * 99999)[:50]}, "train.txt.gz", "cannot be read"),
        ({"train.parquet": b"PAR1 no"}, "train.parquet", "train.parquet cannot be read"),
    ],
)
def test_bad_text_is_a_sentence(files, data, message, tmp_path, monkeypatch):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        load_blocks(data, wordpiece(), 16, cache=tmp_path / "cache")


def test_tables_without_a_column_of_text_are_a_sentence_naming_the_columns(tmp_path):
    pq.write_table(pa.table({"title": ["a"], "body": ["b"], "year": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"title \(string\), body \(string\), year \(int64\)"):
        load_blocks(str(tmp_path / "a.parquet"), wordpiece(), 16, cache=tmp_path)


def test_impossible_lengths_and_tokenizers_are_sentences(folder, tmp_path):
    with pytest.raises(UserError, match=r"--seq_len 65 is longer than the 64 positions"):
        load_blocks(str(folder), wordpiece(), 65, cache=tmp_path, max_positions=64)
    with pytest.raises(UserError, match=r"--seq_len 2 leaves no room"):
        load_blocks(str(folder), wordpiece(), 2, cache=tmp_path)
    tokenizer = wordpiece()
    tokenizer.cls_token = None
    with pytest.raises(UserError, match=r"no \[CLS\]"):
        load_blocks(str(folder), tokenizer, 16, cache=tmp_path)


@pytest.mark.shared
@pytest.mark.slow
def test_wikitext_2_with_the_vocabulary_of_bert(shared, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "all-MiniLM-L6-v2")
    corpus = load_blocks(str(shared / "data" / "wikitext-2"), tokenizer, 128, cache=tmp_path)
    text = (shared / "data" / "wikitext-2" / "valid.txt").read_text()
    assert np.array_equal(corpus.dev, plain_blocks(text, tokenizer, 128))
    assert corpus.train.shape == (18_989, 128)
    assert tokenizer.decode(corpus.train[0, :6]) == "[CLS] = valkyria chronicles"
