"""Span tasks as tokens: a question and a window of its context, which slides where the context is long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finemask_ds.data.features import (
    TEXTS_AT_ONCE,
    Features,
    FeatureStore,
    PairTokenizer,
    flat,
    own_backend,
    pad_id,
    parts,
    uses_token_types,
)
from finemask_ds.data.tasks import Answer, Examples, Task
from finemask_ds.errors import UserError

LONGEST_QUESTION = 64
"""Tokens of a question that are read (Devlin et al. 2019's code); fewer where the window is short."""

CLS = 0
"""The place of [CLS] in every window."""

NOWHERE = (-1, -1)
"""First and last place of what does not stand in a context."""


@dataclass(frozen=True)
class SpanFeatures(Features):
    """Windows: [CLS] question [SEP] some of the context [SEP]. Rows of the base class are windows.

    Targets, in training, are "start_positions" and "end_positions" (the last token of the answer), int64 [windows];
    both are [CLS] where the answer is not wholly inside the window.
    """

    questions: np.ndarray
    """int32 [windows]: the row of the examples that a window is of; they do not decrease."""
    characters: np.ndarray
    """int32 [tokens, 2]: a token's first character in its context, white space left out, and the one after its last;
    both are -1 where a token is not of the context, and equal where it is white space only."""


def span_features(
    task: Task,
    examples: Examples,
    tokenizer: PairTokenizer,
    seq_len: int,
    doc_stride: int,
    *,
    training: bool,
) -> SpanFeatures:
    """Tokenise questions and contexts into windows of at most `seq_len` tokens.

    Where a context does not fit beside its question there are several windows; neighbours share `doc_stride` tokens
    of it. Of a question the first 64 tokens are read, or fewer, so that a window goes on by at least half of what
    `doc_stride` leaves free. Special tokens never arise from text.

    Args:
        task: a span task.
        examples: questions and contexts; in training the first answer of each is what is learnt.
        tokenizer: a fast tokenizer of BERT's or RoBERTa's kind.
        seq_len: longest window, special tokens included.
        doc_stride: tokens of the context that two neighbouring windows have in common.
        training: whether to find the answers' positions.

    Raises:
        UserError: `seq_len` is too short for `doc_stride`, a training question has no answer, or the tokenizer is of
            another kind.
    """
    if task.kind != "span" or examples.second is None:
        raise ValueError(f"{task.name} is a {task.kind} task")
    backend = own_backend(tokenizer)
    frame = _Frame.probe(backend)
    free = seq_len - frame.size - doc_stride
    if free < 2:
        raise UserError(f"--seq_len {seq_len} leaves no room for a question of {task.title} beside the {doc_stride} "
                        f"tokens that windows share; type {seq_len - free + 2} or more")  # fmt: skip
    longest = min(LONGEST_QUESTION, free // 2)
    contexts = _read_contexts(backend, examples.second)
    windows = _Windows(frame, seq_len, doc_stride, uses_token_types(tokenizer))
    for part in parts(len(examples), TEXTS_AT_ONCE):
        encodings = backend.encode_batch_fast(examples.first[part], add_special_tokens=False)
        for row, encoding in enumerate(encodings, start=part.start):
            context = contexts[examples.second[row]]
            answer = context.tokens_of(_first_answer(examples, row)) if training else NOWHERE
            windows.add(row, encoding.ids[:longest], context, answer)
    return windows.features(pad_id(tokenizer), training=training)


@dataclass(frozen=True)
class _Frame:
    """The special tokens that a tokenizer puts around a pair, and the token types of all five parts."""

    before: list[int]
    between: list[int]
    after: list[int]
    types: tuple[int, int, int, int, int]

    @classmethod
    def probe(cls, backend: Any) -> _Frame:
        """Read them off a pair of texts."""
        pair = backend.encode("a", "a")
        ids, types, sequences = pair.ids, pair.type_ids, pair.sequence_ids
        first, second = sequences.index(0), sequences.index(1)
        stop, end = first + sequences.count(0), second + sequences.count(1)
        return cls(
            ids[:first], ids[stop:second], ids[end:], (types[0], types[first], types[stop], types[second], types[-1])
        )

    @property
    def size(self) -> int:
        """How many special tokens there are."""
        return len(self.before) + len(self.between) + len(self.after)

    def join(self, question: list[int], context: list[int]) -> tuple[list[int], list[int]]:
        """Token ids and token types of a pair."""
        pieces = (self.before, question, self.between, context, self.after)
        ids = [token for piece in pieces for token in piece]
        return ids, [kind for kind, piece in zip(self.types, pieces, strict=True) for _ in piece]


@dataclass(frozen=True)
class _Context:
    """A whole context's token ids and, int32 [tokens, 2], their characters."""

    ids: list[int]
    characters: np.ndarray

    def tokens_of(self, answer: Answer) -> tuple[int, int]:
        """The first and the last token with a character of the answer, white space around it left out."""
        start = answer.start + len(answer.text) - len(answer.text.lstrip())
        stop = answer.start + len(answer.text.rstrip())
        first = np.searchsorted(self.characters[:, 1], start, side="right")
        last = np.searchsorted(self.characters[:, 0], stop, side="left") - 1
        return int(first), int(last)


def _read_contexts(backend: Any, texts: Sequence[str]) -> dict[str, _Context]:
    """Tokenise each context once, however many questions are asked about it."""
    different = list(dict.fromkeys(texts))
    contexts = {}
    for part in parts(len(different), TEXTS_AT_ONCE):
        encodings = backend.encode_batch(different[part], add_special_tokens=False)
        for text, encoding in zip(different[part], encodings, strict=True):
            characters = flat(encoding.offsets, np.int32).reshape(-1, 2)
            contexts[text] = _Context(encoding.ids, _without_space(text, characters))
    return contexts


def _without_space(text: str, characters: np.ndarray) -> np.ndarray:
    """Characters of tokens, int32 [tokens, 2], without the white space before a word that RoBERTa's may begin with."""
    is_space = np.strings.isspace(np.array([*text, "."], dtype="U1"))
    next_kept = np.minimum.accumulate(np.where(is_space, len(text), np.arange(len(text) + 1))[::-1])[::-1]
    starts = np.minimum(next_kept[characters[:, 0]], characters[:, 1])
    return np.stack([starts, characters[:, 1]], axis=1).astype(np.int32)


def _first_answer(examples: Examples, row: int) -> Answer:
    answers: Any = examples.targets[row] if examples.targets is not None else ()
    if not answers:
        raise UserError(f"the training question {examples.ids[row]!r} has no answer; give each one or leave it out")
    return answers[0]


class _Windows:
    """Collects windows, question by question."""

    def __init__(self, frame: _Frame, seq_len: int, doc_stride: int, has_types: bool) -> None:
        self.frame, self.seq_len, self.doc_stride = frame, seq_len, doc_stride
        self.store = FeatureStore(has_types)
        self.questions: list[int] = []
        self.characters: list[np.ndarray] = [np.empty((0, 2), dtype=np.int32)]
        self.positions: list[tuple[int, int]] = []

    def add(self, row: int, question: list[int], context: _Context, answer: tuple[int, int]) -> None:
        """Append the windows of a question; of its answer the first and the last token of the context are given."""
        frame, num_tokens = self.frame, len(context.ids)
        room = self.seq_len - frame.size - len(question)
        offset = len(frame.before) + len(question) + len(frame.between)
        start = stop = 0
        while True:
            stop = min(start + room, num_tokens)
            ids, types = frame.join(question, context.ids[start:stop])
            self.store.add([ids], [types])
            self.questions.append(row)
            characters = np.full((len(ids), 2), NOWHERE, dtype=np.int32)
            characters[offset : offset + stop - start] = context.characters[start:stop]
            self.characters.append(characters)
            first, last = (token - start + offset for token in answer)
            is_inside = start <= answer[0] <= answer[1] < stop
            self.positions.append((first, last) if is_inside else (CLS, CLS))
            if stop == num_tokens:
                return
            start += room - self.doc_stride

    def features(self, padding: int, *, training: bool) -> SpanFeatures:
        """All windows."""
        targets = {}
        if training:
            positions = np.array(self.positions, dtype=np.int64).reshape(-1, 2)
            targets = {"start_positions": positions[:, 0].copy(), "end_positions": positions[:, 1].copy()}
        questions = np.array(self.questions, dtype=np.int32)
        return SpanFeatures(*self.store.arrays(), targets, padding, questions, np.concatenate(self.characters))
