"""How text becomes token ids: by a copy of a tokenizer that nobody else sets otherwise."""

from __future__ import annotations

from typing import Any, Protocol


class HoldsBackend(Protocol):
    """A fast tokenizer of transformers."""

    @property
    def backend_tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer` inside."""


def plain_backend(tokenizer: HoldsBackend) -> Any:
    """A copy of the `tokenizers.Tokenizer` inside, which neither truncates nor pads and takes all text for text."""
    held = tokenizer.backend_tokenizer
    backend = type(held).from_str(held.to_str())  # transformers changes the settings of the one it holds
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # tokenizers' name for: special tokens in the text are text
    return backend
