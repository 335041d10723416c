"""A plan for workers that somebody else starts by ``finemask worker``, such as an indexed Job of Kubernetes."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence

from finemask_ds.dispatch.executor import Executor
from finemask_ds.dispatch.plan import Plan


class ElsewhereExecutor(Executor):
    """Starts nothing and waits for nothing."""

    @property
    def slots(self) -> int:
        """See the base class; how many there will be nobody knows here."""
        return 1

    @property
    def place(self) -> str:
        """See the base class."""
        return "a worker that is started elsewhere"

    @property
    def waits(self) -> bool:
        """See the base class."""
        return False

    def start(self, plan: Plan, waiting: Sequence[str]) -> int:
        """See the base class."""
        return 0

    def poll(self, plan: Plan) -> int:
        """See the base class."""
        return 0

    def stop(self, plan: Plan, is_urgent: Callable[[], bool]) -> str:
        """See the base class."""
        folder, root = shlex.quote(os.getcwd()), shlex.quote(str(plan.root))  # Masks and data may be named from here.
        return f"start as many workers as you like, by: cd {folder} && finemask worker {root}"

    def advice(self, plan: Plan) -> str:
        """See the base class."""
        return f"see {plan.root}"
