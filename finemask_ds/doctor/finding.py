"""What a check says: one line, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, cast

from finemask_ds.errors import printable

Level = Literal["ok", "note", "bad"]
"""``bad``: a run will fail or be wrong; ``note``: it will be slower, or fail later."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: Level
    what: str
    """The thing that was looked at, in a word or two."""
    found: str
    todo: str = ""
    """What to type."""

    def __str__(self) -> str:
        return printable(f"{self.level:<5} {self.what}: {self.found}{f'; {self.todo}' if self.todo else ''}")

    @classmethod
    def parse(cls, line: str) -> Finding | None:
        """A finding from the line that it was printed as, with pdsh's "host: " before it or not; None from others."""
        match = re.match(r"(?:\S+: )?(ok|note|bad) +([^:]+): (.*)", line)
        return cls(cast(Level, match[1]), match[2], match[3]) if match else None


@dataclass
class Report:
    """Findings, printed as they come, so that a check which hangs leaves those before it to be read."""

    speaks: bool = True
    """False on the ranks that only take part."""
    findings: list[Finding] = field(default_factory=list)

    def add(self, findings: Iterable[Finding]) -> None:
        """Print and keep."""
        for finding in findings:
            self.findings.append(finding)
            if self.speaks:
                print(finding, flush=True)

    @property
    def is_bad(self) -> bool:
        """Whether a run would fail or be wrong."""
        return any(finding.level == "bad" for finding in self.findings)

    @property
    def exit_code(self) -> int:
        """1 where anything is bad, 0 otherwise."""
        return int(self.is_bad)

    def __str__(self) -> str:
        count = {level: sum(f.level == level for f in self.findings) for level in ("ok", "note", "bad")}
        return f"{count['ok']} ok, {count['note']} to note, {count['bad']} bad"
