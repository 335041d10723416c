"""Libraries that talk on standard output, kept out of ours."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def silent_output() -> Iterator[None]:
    """Swallow what the block prints on standard output."""
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        yield
