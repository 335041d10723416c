"""Windows of a context against the tokenizers' own, answers to tokens and back, span decoding against brute force."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from finemask_ds.data import builtin
from finemask_ds.data.spans import decode_spans
from finemask_ds.data.squad import read_squad
from finemask_ds.data.tasks import TASKS, Answer, Examples
from finemask_ds.data.windows import LONGEST_QUESTION, SpanFeatures, span_features
from finemask_ds.errors import UserError
from tests.data.tokenizers_for_tests import byte_bpe
from tests.toys import WORDS, sentences

SQUAD = TASKS["squad"]
KINDS = ("builtin", "bert", "roberta", "untrimmed")


@pytest.fixture(scope="module")
def tokenizers(toy_bert: Path, toy_roberta: Path, tmp_path_factory) -> dict[str, PreTrainedTokenizerFast]:
    folder = tmp_path_factory.mktemp("builtin")
    builtin.write_tokenizer(folder)
    folders = {"builtin": folder, "bert": toy_bert, "roberta": toy_roberta, "untrimmed": toy_roberta}
    loaded = {kind: AutoTokenizer.from_pretrained(folder) for kind, folder in folders.items()}
    post = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=False)
    loaded["untrimmed"].backend_tokenizer.post_processor = post  # offsets with the space before a word
    return loaded


def asked(questions: list[str], contexts: list[str], answers: list[Answer] | None = None) -> Examples:
    targets = None if answers is None else [(answer,) for answer in answers]
    return Examples([f"q{i}" for i in range(len(questions))], questions, contexts, targets, sha256="")


def windows(features: SpanFeatures) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Question, token ids and characters of each window."""
    for number, question in enumerate(features.questions.tolist()):
        part = slice(features.bounds[number], features.bounds[number + 1])
        yield question, features.input_ids[part], features.characters[part]


def gold_logits(features: SpanFeatures) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Logits that are 1 at the positions to be learnt and 0 elsewhere."""
    pairs = [features.targets["start_positions"], features.targets["end_positions"]]
    starts, ends = (
        [(np.arange(length) == at).astype(np.float32) for length, at in zip(features.lengths, positions, strict=True)]
        for positions in pairs
    )
    return starts, ends


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("seq_len", "doc_stride"), [(32, 4), (48, 16), (64, 0), (512, 128)])
def test_windows_are_those_of_the_tokenizers_own_truncation(tokenizers, kind, seq_len, doc_stride):
    tokenizer = tokenizers[kind]
    contexts = [" ".join(sentences(number, seed=number)) for number in (1, 3, 9)]
    contexts += ["", " ", "Zoë  saw\tthe\n\n  cat — 東京. ", contexts[0]]
    questions = ["the cat ?", "a", "", "where is   it", " what", "x", "red"]
    features = span_features(SQUAD, asked(questions, contexts), tokenizer, seq_len, doc_stride, training=False)
    own = tokenizer(
        questions, contexts, max_length=seq_len, truncation="only_second", stride=doc_stride,
        return_overflowing_tokens=True, return_offsets_mapping=True, return_token_type_ids=True,
    )  # fmt: skip
    assert features.questions.tolist() == own["overflow_to_sample_mapping"]
    assert features.input_ids.tolist() == [token for ids in own["input_ids"] for token in ids]
    if kind in ("builtin", "bert"):
        assert features.token_type_ids.tolist() == [kind for types in own["token_type_ids"] for kind in types]
    else:
        assert features.token_type_ids is None
    for number, (question, _, characters) in enumerate(windows(features)):
        text = contexts[question]
        for sequence, (start, stop), found in zip(
            own.sequence_ids(number), own["offset_mapping"][number], characters.tolist(), strict=True
        ):
            if sequence != 1:
                assert found == [-1, -1]
            else:
                assert text[found[0] : found[1]] == text[start:stop].strip()
                assert start <= found[0] <= found[1] <= stop
    assert not features.targets


SPACES = st.sampled_from([" ", "  ", "\t", "\n", " \n ", "\u00a0", ""])
PIECES = st.sampled_from([*WORDS[:6], "Zoë", "東京", "😀", "(", ",", "1,000", "the.", "seeslikes", "\u200b"])


@st.composite
def contexts_with_answers(draw) -> tuple[str, Answer]:
    words = draw(st.lists(PIECES, min_size=1, max_size=60))
    gaps = [draw(SPACES) for _ in words]
    first = draw(st.integers(0, len(words) - 1))
    last = draw(st.integers(first, min(first + 5, len(words) - 1)))
    parts = [word + gap for word, gap in zip(words, gaps, strict=True)]
    text = "".join(parts[first : last + 1])
    if draw(st.booleans()):
        text = text.rstrip()
    before = draw(SPACES) + "".join(parts[:first])
    start = draw(st.sampled_from([len(before.rstrip()), len(before)]))
    return before + "".join(parts[first:]), Answer(before[start:] + text, start)


@pytest.mark.parametrize("kind", KINDS)
@given(example=contexts_with_answers(), question=st.lists(PIECES, max_size=8), seq_len=st.integers(28, 90))
@settings(max_examples=200, deadline=None)
def test_an_answer_is_learnt_in_exactly_the_windows_that_hold_all_its_tokens(
    tokenizers, kind, example, question, seq_len
):
    """Its tokens are those of the uncut context with a character of it; BERT deletes U+200B, so there may be none."""
    context, answer = example
    begin = context.index(answer.text.strip(), answer.start)
    end = begin + len(answer.text.strip())
    examples = asked([" ".join(question)], [context], [answer])
    uncut = span_features(SQUAD, examples, tokenizers[kind], 4096, 16, training=False)
    places = uncut.characters[uncut.characters[:, 0] >= 0]
    holding = [token for token, (at, to) in enumerate(places.tolist()) if max(at, begin) < min(to, end)]
    features = span_features(SQUAD, examples, tokenizers[kind], seq_len, 16, training=True)
    found, step = 0, None
    for number, (_, ids, characters) in enumerate(windows(features)):
        (context_places,) = np.nonzero(characters[:, 0] >= 0)
        num_others = len(ids) - len(context_places)
        step = step or seq_len - num_others - 16
        start, offset = number * step, (context_places[0] if len(context_places) else 0)
        positions = tuple(int(features.targets[key][number]) for key in ("start_positions", "end_positions"))
        if holding and start <= holding[0] <= holding[-1] < start + len(context_places):
            assert positions == (holding[0] - start + offset, holding[-1] - start + offset)
            text = context[characters[positions[0], 0] : characters[positions[1], 1]]
            assert text == context[places[holding[0], 0] : places[holding[-1], 1]] == text.strip()
            found += 1
        else:
            assert positions == (0, 0)
    assert found or not holding or holding[-1] - holding[0] + 1 > 16 + 1


@pytest.mark.parametrize("kind", KINDS)
def test_words_come_back_exactly(tokenizers, kind):
    context = "\n".join(" ".join(sentences(4, seed=seed)) for seed in range(6))
    words = [(at, word) for at, word in enumerate(context.split())]
    answers, start = [], 0
    for _, word in words:
        start = context.index(word, start)
        answers.append(Answer(word, start))
        start += len(word)
    examples = asked(["the cat ?"] * len(answers), [context] * len(answers), answers)
    features = span_features(SQUAD, examples, tokenizers[kind], 64, 16, training=True)
    texts = decode_spans(features, *gold_logits(features), examples)
    assert texts == [answer.text for answer in answers]
    assert len(features) > 3 * len(answers)


def builtin_questions(split: str, num: int) -> Examples:
    rows = builtin.task_examples("questions", split, num=num)
    answers = [Answer(row["answer"], row["start"]) for row in rows]
    return asked([row["question"] for row in rows], [row["context"] for row in rows], answers)


@pytest.mark.parametrize("split", builtin.DOCUMENTS)
@pytest.mark.parametrize(("seq_len", "doc_stride", "num_windows"), [(64, 16, 1), (26, 4, 2)])
def test_every_built_in_question_comes_back_exactly(tokenizers, split, seq_len, doc_stride, num_windows):
    examples = builtin_questions(split, 300)
    features = span_features(TASKS["questions"], examples, tokenizers["builtin"], seq_len, doc_stride, training=True)
    assert decode_spans(features, *gold_logits(features), examples) == [row[0].text for row in examples.targets]
    assert np.bincount(features.questions).max() == num_windows


@pytest.mark.shared
def test_real_questions_come_back_but_for_answers_that_end_within_a_word(shared):
    """32 of 10,570 first answers begin or end within a WordPiece, such as "gold" in "golden"."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/all-MiniLM-L6-v2")
    examples = read_squad(shared / "data/squad/dev-v1.1.json")
    features = span_features(SQUAD, examples, tokenizer, SQUAD.seq_len, SQUAD.doc_stride, training=True)
    texts = decode_spans(features, *gold_logits(features), examples, max_answer_tokens=SQUAD.seq_len)
    wrong = [(text, row[0].text) for text, row in zip(texts, examples.targets, strict=True) if text != row[0].text]
    assert len(features) == 10_784
    assert len(wrong) == 32
    assert all(answer in text for text, answer in wrong)
    assert wrong[0] == ("golden", "gold")


def test_special_tokens_do_not_arise_from_text(tokenizers):
    tokenizer = tokenizers["bert"]
    examples = asked(["what [MASK] ?"], ["a [SEP] cat [CLS] [PAD]"])
    features = span_features(SQUAD, examples, tokenizer, 64, 16, training=False)
    special = features.input_ids[np.isin(features.input_ids, tokenizer.all_special_ids)]
    assert (special == tokenizer.cls_token_id).sum() == 1
    assert (special == tokenizer.sep_token_id).sum() == 2
    assert not np.isin(special, [tokenizer.pad_token_id, tokenizer.mask_token_id]).any()
    assert tokenizer.backend_tokenizer.encode_special_tokens is False  # the tokenizer given is left as it was


@pytest.mark.parametrize(
    ("seq_len", "doc_stride", "longest"), [(384, 128, LONGEST_QUESTION), (64, 16, 22), (21, 16, 1)]
)
def test_a_long_question_leaves_room_for_its_context(tokenizers, seq_len, doc_stride, longest):
    examples = asked(["the cat " * 200], [" ".join(sentences(30))])
    features = span_features(SQUAD, examples, tokenizers["bert"], seq_len, doc_stride, training=False)
    covered = set()
    for _, ids, characters in windows(features):
        is_context = characters[:, 0] >= 0
        assert np.argmax(is_context) == 1 + longest + 1
        assert len(ids) <= seq_len
        covered |= {tuple(place) for place in characters[is_context].tolist()}
    assert {start for start, _ in covered} >= {at for at, text in enumerate(examples.second[0]) if text.strip()} - {
        at for start, stop in covered for at in range(start + 1, stop)
    }


def test_what_cannot_be_windows_is_a_sentence(tokenizers):
    examples = asked(["a ?"], ["a cat"])
    with pytest.raises(
        UserError, match=r"--seq_len 20 leaves no room .* 16 tokens that windows share; type 21 or more"
    ):
        span_features(SQUAD, examples, tokenizers["bert"], 20, 16, training=False)
    for targets in (None, [()]):
        with pytest.raises(UserError, match="training question 'q0' has no answer"):
            span_features(SQUAD, replace(examples, targets=targets), tokenizers["bert"], 64, 16, training=True)
    with pytest.raises(UserError, match=r"puts no \[CLS\]"):
        span_features(SQUAD, examples, byte_bpe(), 64, 16, training=False)
    with pytest.raises(ValueError, match="cola"):
        span_features(TASKS["cola"], examples, tokenizers["bert"], 64, 16, training=False)


def brute_force(features: SpanFeatures, starts, ends, examples: Examples, longest: int) -> list[str]:
    """Every window, start and end in the order in which ties are broken."""
    texts = []
    for row in range(len(examples)):
        best, text = float("-inf"), ""
        for number, (question, ids, characters) in enumerate(windows(features)):
            if question != row:
                continue
            for at in range(len(ids)):
                for to in range(at, min(at + longest, len(ids))):
                    a, b = characters[at], characters[to]
                    total = float(starts[number][at]) + float(ends[number][to])
                    if a[0] < a[1] and b[0] < b[1] and total > best:
                        best, text = total, examples.second[row][a[0] : b[1]]
        texts.append(text)
    return texts


@pytest.mark.parametrize("kind", ["bert", "untrimmed"])
@pytest.mark.parametrize("longest", [1, 3, 30])
@pytest.mark.parametrize("many_ties", [False, True])
def test_decoding_is_what_trying_everything_finds(tokenizers, kind, longest, many_ties):
    contexts = [" ".join(sentences(number, seed=number)) for number in (2, 9)] + ["", "   ", "  the  cat\n "]
    examples = asked(["the cat ?"] * len(contexts), contexts)
    features = span_features(SQUAD, examples, tokenizers[kind], 40, 8, training=False)
    assert len(features) > len(contexts) + 1
    draw = np.random.default_rng(longest)
    found = set()
    for _ in range(20):
        table = draw.normal(size=(2, len(features), 45)).astype(np.float32)  # padded: rows of 40 tokens at most
        table = np.round(table) if many_ties else table
        texts = decode_spans(features, *table, examples, n_best=40, max_answer_tokens=longest)
        assert texts == brute_force(features, *table, examples, longest)
        ragged = [[row[:length] for row, length in zip(side, features.lengths, strict=True)] for side in table]
        assert decode_spans(features, *ragged, examples, n_best=40, max_answer_tokens=longest) == texts
        assert texts[2:4] == ["", ""]
        found |= set(texts)
    assert len(found) > 10


def test_only_the_best_starts_and_ends_are_paired(tokenizers):
    """The best end lies before the best start: one candidate each gives nothing, two give the second-best pair."""
    examples = asked(["a"], ["red blue old small"])
    features = span_features(SQUAD, examples, tokenizers["bert"], 64, 16, training=False)
    starts, ends = np.zeros((2, 1, 8), dtype=np.float32)  # [CLS] a [SEP] red blue old small [SEP]
    starts[0, [0, 5, 4]], ends[0, [7, 3, 5]] = (9, 3, 2), (9, 3, 1)  # what is not of the context does not count
    assert decode_spans(features, starts, ends, examples, n_best=1) == [""]
    assert decode_spans(features, starts, ends, examples, n_best=2) == ["old"]
    assert decode_spans(features, starts, ends, examples, n_best=20) == ["old"]


def test_logits_that_are_not_numbers_give_no_answer(tokenizers):
    examples = asked(["a"], ["red blue"])
    features = span_features(SQUAD, examples, tokenizers["bert"], 64, 16, training=False)
    logits = np.full((1, 6), np.nan, dtype=np.float32)
    assert decode_spans(features, logits, logits, examples) == [""]
    with pytest.raises(ValueError, match="0 and 1 logits for 1 windows"):
        decode_spans(features, logits[:0], logits, examples)
