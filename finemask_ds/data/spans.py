"""From start and end logits back to the text of an answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from finemask_ds.data.tasks import Examples
from finemask_ds.data.windows import SpanFeatures


def decode_spans(
    features: SpanFeatures,
    start_logits: Sequence[np.ndarray] | np.ndarray,
    end_logits: Sequence[np.ndarray] | np.ndarray,
    examples: Examples,
    *,
    n_best: int = 20,
    max_answer_tokens: int = 30,
) -> list[str]:
    """The best answer to each question over all its windows, exactly as it stands in the context.

    In each window the `n_best` starts and the `n_best` ends among the tokens of the context are paired; of the pairs
    that are in order and at most `max_answer_tokens` long the one with the largest sum of logits is the answer. Ties
    go to the earliest window, then the earliest start, then the shortest span. A token that lies in several windows
    may be taken from any of them: it makes no difference how much context it has there ("max context" in Devlin et
    al.'s code).

    Args:
        features: the windows.
        start_logits, end_logits: float [tokens] of each window, possibly padded on the right.
        examples: the questions that the windows are of.
        n_best: candidates for either end.
        max_answer_tokens: longest answer.

    Returns:
        A text for each question; "" where no window has a valid span with finite logits.
    """
    if len(start_logits) != len(features) or len(end_logits) != len(features):
        raise ValueError(f"{len(start_logits)} and {len(end_logits)} logits for {len(features)} windows")
    contexts = examples.second or []
    texts, best = [""] * len(examples), np.full(len(examples), -np.inf)
    for window, question in enumerate(features.questions.tolist()):
        characters = features.characters[features.bounds[window] : features.bounds[window + 1]]
        # A token of white space alone can neither begin nor end an answer.
        tokens = np.flatnonzero(characters[:, 1] > characters[:, 0])
        if not len(tokens):
            continue
        starts, start_scores = _candidates(tokens, start_logits[window], n_best)
        ends, end_scores = _candidates(tokens, end_logits[window], n_best)
        lengths = ends - starts[:, None] + 1
        sums = np.where((lengths >= 1) & (lengths <= max_answer_tokens), start_scores[:, None] + end_scores, -np.inf)
        at, to = np.unravel_index(np.argmax(sums), sums.shape)
        if sums[at, to] > best[question]:
            best[question] = sums[at, to]
            texts[question] = contexts[question][characters[starts[at], 0] : characters[ends[to], 1]]
    return texts


def _candidates(tokens: np.ndarray, logits: np.ndarray, n_best: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens with the `n_best` largest logits, in their order in the window, and these logits in fp64."""
    scores = np.asarray(logits, dtype=np.float64)[tokens]
    chosen = np.sort(np.argsort(-scores, kind="stable")[:n_best])
    return tokens[chosen], scores[chosen]
