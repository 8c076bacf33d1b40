"""A runner whose steps all ranks run: rank 0's own, which tells the others before it runs one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from halfweight.engine.parallel.channel import Kind
from halfweight.engine.parallel.faults import BrokenLinkError
from halfweight.engine.parallel.link import GroupLink
from halfweight.engine.parallel.ranks import Ranks
from halfweight.engine.parallel.steps import StepWriter
from halfweight.engine.step import Runner, Step
from halfweight.errors import HalfweightError


class SharedRunner:
    """Runner (engine/step.py) of rank 0; the others' have the same limits."""

    page_tokens: int
    num_pages: int
    max_sequences: int
    max_context: int
    vocab_size: int
    table: Tensor
    device: Any
    max_step_tokens: int
    cache_bytes: int
    shares_prefixes: bool
    most_drafts: int

    def __init__(self, own: Runner, ranks: Ranks, link: GroupLink) -> None:
        """`ranks` are ended when the runner is closed."""
        self.members = ranks.members
        self._ranks, self._own, self._link = ranks, own, link
        for name in SharedRunner.__annotations__:
            setattr(self, name, getattr(own, name))
        self._writer = StepWriter()

    @property
    def description(self) -> str:
        """What describe(runner) adds."""
        own = getattr(self._own, "description", "")
        return ", ".join(filter(None, [own, f"{len(self.members) + 1} ranks"]))

    def on_fault(self, tell: Callable[[HalfweightError], None]) -> None:
        """Have `tell` called, from another thread, when a rank is lost."""
        self._ranks.on_fault(tell)

    def run(self, step: Step) -> Tensor:
        """Logits of the step, which all ranks run; raises the fault of one that is lost."""
        self._ranks.send(Kind.STEP, self._writer.write(step))
        try:
            return self._own.run(step)
        except BrokenLinkError as error:
            raise self._ranks.explain(error) from error

    def close(self) -> None:
        """End all ranks."""
        self._ranks.end()
        self._own.close()
        self._link.close()
