"""What is to run, and the units and words that plans are made of. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from halfweight.errors import UsageError

GIB = 1 << 30
MIB = 1 << 20

Weights = Literal["16bit", "int8"]
Runtime = Literal["halfweight", "transformers-tp", "vllm"]
KvDtype = Literal["16bit", "int8"]
DeviceKind = Literal["cuda", "cpu"]
Verdict = Literal["fits", "tight", "does not fit"]


@dataclass(frozen=True)
class Range:
    """Bytes: at least, probably, at most."""

    low: int
    likely: int
    high: int

    def plus(self, other: Range) -> Range:
        """Both together."""
        return Range(self.low + other.low, self.likely + other.likely, self.high + other.high)


ASSUMED_OVERHEAD: dict[DeviceKind, Range] = {
    "cuda": Range(MIB * 400, MIB * 860, MIB * 1400),
    "cpu": Range(MIB * 500, MIB * 700, MIB * 1200),
}
"""Driver's context (of a CPU: the process and its libraries) and loaded kernels. `likely` on CUDA
is what an H100 showed, as is SLACK_DIVISOR (the line through the workloads of
docs/notes/plan.md, by the median of slopes); the rest is an assumption, wide on
purpose."""
SLACK_DIVISOR = 5
"""torch's CUDA allocator reserves a fifth more than what comes and goes: blocks rounded up, or cut
so that they fit nothing else, mostly by the cache, whose layers are made one after the other."""
COMMUNICATION_OVERHEAD = Range(MIB * 50, MIB * 300, MIB * 700)
"""The buffers by which ranks of ours talk. An assumption."""
ENGINE_OVERHEAD = Range(MIB * 700, MIB * 1700, MIB * 2700)
"""Of another engine: its own graphs, its allocator, and the buffers by which GPUs talk as well. An
assumption."""


@dataclass(frozen=True)
class Workload:
    """What is to run: `batch` sequences of `context` tokens, prompt and answer together."""

    context: int = 4096
    batch: int = 1
    kv_dtype: KvDtype = "16bit"
    ranks: int = 1
    runtime: Runtime = "halfweight"
    device: DeviceKind = "cuda"
    overhead: Range | None = None

    def __post_init__(self) -> None:
        for name in ("context", "batch", "ranks"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}", hint="give 1 or more")

    @property
    def expected_overhead(self) -> Range:
        """What was measured, else what is assumed of the runtime on the device."""
        own = ASSUMED_OVERHEAD[self.device] if self.runtime == "halfweight" else ENGINE_OVERHEAD
        found = self.overhead or own
        if self.runtime == "halfweight" and self.ranks > 1:
            return found.plus(COMMUNICATION_OVERHEAD)
        return found
