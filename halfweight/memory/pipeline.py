"""Which layers of a model lie on which of several devices, one after the other. No torch here.

A stage is a run of layers on one device, with its part of the cache; the first has the embedding as
well, the last the head. A step goes through the stages in turn, so its time is the sum of theirs:
GPUs share what they can hold by the room that they have, and only the rest lies on a CPU.

What a stage takes is the footprint of a smaller model (plan.py), and the states that enter and
leave it. The loader cuts by this page and the engine sizes its pages by it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

from halfweight.errors import DoesNotFitError, UsageError
from halfweight.memory.cache_bytes import page_slots
from halfweight.memory.engine_memory import (
    LOGIT_ROWS,
    PAGE_TOKENS,
    READ_TOKENS,
    STEP_TOKENS,
    RunnerKind,
)
from halfweight.memory.plan import Footprint, Model, footprint
from halfweight.memory.tensor_parallel import KINDS
from halfweight.memory.workload import GIB, DeviceKind, KvDtype, Weights, Workload

LEAST_CONTEXT = 4096
"""Tokens of cache that layers are placed beside, where no number is given; the rest is filled."""
UNLIMITED_CONTEXT = 32_768
PAGE = max(PAGE_TOKENS.values())
MARGIN = 2 * PAGE
"""Tokens of cache beside those counted: a page that is nobody's, and one that is not full."""
_LAYER = re.compile(r"\blayers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Place:
    """A device by its name, and bytes of it that may be taken."""

    name: str
    kind: DeviceKind
    num_bytes: int


@dataclass(frozen=True)
class Stage:
    """Layers begin to end - 1 on one device: the first stage reads ids, the last gives logits."""

    device: str
    kind: DeviceKind
    begin: int
    end: int
    is_first: bool
    is_last: bool

    def words(self) -> str:
        """What it holds."""
        parts = [f"layers {self.begin} to {self.end - 1}"]
        parts = ["embedding", *parts] if self.is_first else parts
        return ", ".join([*parts, "head"] if self.is_last else parts)

    def role_of(self, tensor: str) -> Literal["layer", "embedding", "head", "every"] | None:
        """What a tensor of the whole model is to this stage; None for one that lies elsewhere."""
        if found := _LAYER.search(tensor):
            return "layer" if self.begin <= int(found[1]) < self.end else None
        if "embed_tokens" in tensor:
            return "embedding"
        if tensor.startswith("lm_head"):
            return "head" if self.is_last else None
        return "every"


@dataclass(frozen=True)
class Limits:
    """What a pipeline has to have room for; None: as much as there is."""

    max_sequences: int
    max_context: int | None = None
    cache_tokens: int | None = None
    kv_cache: KvDtype = "16bit"


@dataclass(frozen=True)
class Pipeline:
    """Stages, what each takes of its device, and what a token reads there."""

    stages: tuple[Stage, ...]
    parts: tuple[StageBytes, ...]
    max_sequences: int
    max_context: int
    cache_tokens: int
    step_tokens: int
    """Most tokens of a step."""

    def lines(self) -> list[str]:
        """What lies where, a line a stage."""
        return [
            f"{stage.device}: {stage.words()}, {size_words(part.num_bytes(self.cache_tokens))}"
            for stage, part in zip(self.stages, self.parts, strict=True)
        ]

    def seconds(self, rates: Mapping[str, float]) -> float:
        """Of a token of one sequence, where devices read so many bytes a second."""
        pairs = zip(self.stages, self.parts, strict=True)
        return sum(part.read / rates[stage.device] for stage, part in pairs)


def size_words(num_bytes: int) -> str:
    """Bytes in both units."""
    return f"{num_bytes / 1e9:.2f} GB ({num_bytes / GIB:.2f} GiB)"


@dataclass(frozen=True)
class StageBytes:
    """Bytes of a stage: its model's footprint, and the `states` that enter and leave it, with the
    logits of prompts of the last on a GPU. `read` are those of weights that one token reads.
    """

    footprint: Footprint
    runner: RunnerKind
    states: int
    read: int
    cache_token: int
    """Of one token of cache."""

    @property
    def fixed(self) -> int:
        """All but the cache."""
        found = self.footprint
        return found.allocated - found.kv_bytes + found.slack + self.states

    def num_bytes(self, cache_tokens: int) -> int:
        """All that it takes of its device beside so many tokens of cache."""
        return self.fixed + cache_tokens * self.cache_token


def is_tied(model: Model) -> bool:
    """Whether the head is the embedding's matrix."""
    return not any(d.tensor.name.startswith("lm_head") for d in model.decisions)


def stage_model(model: Model, stage: Stage) -> Model:
    """The smaller model that a stage is, as plans know it; its logits are states but for the last.

    The last stage of a tied model has the embedding's matrix once more, as its head.
    """
    tied, a = is_tied(model), model.architecture

    def is_held(name: str) -> bool:
        role = stage.role_of(name)
        if role == "embedding":
            return stage.is_first or (stage.is_last and tied)
        return role is not None

    decisions = tuple(d for d in model.decisions if is_held(d.tensor.name))
    smaller = replace(
        a,
        vocabulary=a.vocabulary if stage.is_last else a.hidden,
        tensors=tuple(d.tensor for d in decisions),
        cache_layers=a.cache_layers[stage.begin : stage.end],
    )
    return Model(smaller, decisions)


def place_layers(
    model: Model, places: Sequence[Place], limits: Limits, weights: Weights
) -> Pipeline:
    """Place all layers on devices in this order; devices that are not needed get none.

    Raises UsageError for a model that no stages run, DoesNotFitError where the devices are too
    small, with what would fit.
    """
    a = model.architecture
    if a.kind not in KINDS:
        raise UsageError(
            f"{a.name} is a {a.kind}, which runs on one device",
            hint=f"several run {', '.join(KINDS)}",
        )
    own = a.max_context or UNLIMITED_CONTEXT
    context = limits.max_context or own
    least = limits.cache_tokens or limits.max_context or min(own, LEAST_CONTEXT)
    work = Workload(context, limits.max_sequences, limits.kv_cache)
    step_tokens = _step_tokens(model, places, work, weights)

    def measure(stage: Stage) -> StageBytes:
        return _measure(model, stage, replace(work, device=stage.kind), weights, step_tokens)

    stages, used = _split(model, places, least + MARGIN, measure)
    if len(used) < len(places):
        with suppress(DoesNotFitError):  # steps are longer without a CPU, and take more
            return place_layers(model, used, limits, weights)
    parts = tuple(measure(stage) for stage in stages)
    room = min(
        (place.num_bytes - part.fixed) // part.cache_token
        for place, part in zip(used, parts, strict=True)
    )
    most = min(room - MARGIN, limits.max_sequences * context)
    tokens = limits.cache_tokens or most // PAGE * PAGE
    context = limits.max_context or min(context, tokens)
    return Pipeline(tuple(stages), parts, limits.max_sequences, context, tokens, step_tokens)


def _step_tokens(model: Model, places: Sequence[Place], work: Workload, weights: Weights) -> int:
    """Of the runner that takes fewest; a CPU's takes one of each sequence beside its own."""
    runners = {model.runner(replace(work, device=place.kind), weights) for place in places}
    own = {"cpu": work.batch}
    return min(STEP_TOKENS[runner] + own.get(runner, 0) for runner in runners if runner)


def _measure(
    model: Model, stage: Stage, work: Workload, weights: Weights, step_tokens: int
) -> StageBytes:
    smaller = stage_model(model, stage)
    runner = smaller.runner(work, weights)
    assert runner is not None
    found = footprint(smaller, work, weights)
    on_gpu = runner == "gpu"
    number = 4 if stage.kind == "cpu" else 2
    entering = 0 if stage.is_first else step_tokens
    leaving = 0 if stage.is_last else READ_TOKENS if on_gpu else step_tokens
    states = (entering + leaving) * model.architecture.hidden * number
    if stage.is_last and on_gpu:
        states += min(LOGIT_ROWS, step_tokens) * model.architecture.vocabulary * number
    return StageBytes(
        found,
        runner,
        states,
        _read_bytes(smaller, stage),
        found.kv_bytes // page_slots(work, runner),
    )


def _read_bytes(smaller: Model, stage: Stage) -> int:
    """Bytes of weights that a token reads: one row of the embedding, some of the experts."""
    experts = {int(f[1]) for d in smaller.decisions if (f := _EXPERT.search(d.tensor.name))}
    total = 0.0
    for decision in smaller.decisions:
        share = 1.0
        if _EXPERT.search(decision.tensor.name):
            share = smaller.architecture.experts_per_token / len(experts)
        elif stage.role_of(decision.tensor.name) == "embedding" and not stage.is_last:
            share = 0.0
        total += share * decision.resident_bytes
    return int(total)


def _split(
    model: Model, places: Sequence[Place], tokens: int, measure: Callable[[Stage], StageBytes]
) -> tuple[list[Stage], Sequence[Place]]:
    """Stages on those of the places that are needed, and these, beside `tokens` of cache."""
    layers = len(model.architecture.cache_layers)
    most = [_most_layers(i, places, layers, tokens, measure) for i in range(len(places))]
    if sum(most) < layers:
        raise _too_small(model, places, most, tokens - MARGIN)
    counts = _counts(places, most, layers)
    if 0 in counts:
        used = [place for place, count in zip(places, counts, strict=True) if count]
        with suppress(DoesNotFitError):  # the embedding or the head may not fit where layers do
            return _split(model, used, tokens, measure)
        while 0 in counts:
            counts[counts.index(0)] += 1
            counts[counts.index(max(counts))] -= 1
    ends, last = list(accumulate(counts)), len(counts) - 1
    stages = [
        Stage(place.name, place.kind, ends[i] - counts[i], ends[i], i == 0, i == last)
        for i, place in enumerate(places)
    ]
    return stages, places


def _most_layers(
    index: int,
    places: Sequence[Place],
    layers: int,
    tokens: int,
    measure: Callable[[Stage], StageBytes],
) -> int:
    """Layers that fit on a place beside `tokens` of their cache; 0 where not even one does."""
    place, is_last = places[index], index == len(places) - 1

    def fits(count: int) -> bool:
        begin = layers - count if is_last else 0
        stage = Stage(place.name, place.kind, begin, begin + count, index == 0, is_last)
        found = measure(stage)
        return found.fixed + tokens * found.cache_token <= place.num_bytes

    good, bad = 0, layers + 1
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def _counts(places: Sequence[Place], most: Sequence[int], layers: int) -> list[int]:
    """Layers of each place: GPUs by what they can hold, CPUs what is left."""
    on_gpus = [
        count if place.kind == "cuda" else 0 for place, count in zip(places, most, strict=True)
    ]
    on_cpus = [count - gpu for gpu, count in zip(on_gpus, most, strict=True)]
    on_them = min(layers, sum(on_gpus))
    both = _shared_out(on_them, on_gpus), _shared_out(layers - on_them, on_cpus)
    return [gpu + cpu for gpu, cpu in zip(*both, strict=True)]


def _shared_out(total: int, most: Sequence[int]) -> list[int]:
    """`total` in proportion to `most`, none above its own."""
    if not total:
        return [0] * len(most)
    ends = [round(total * end / sum(most)) for end in accumulate(most)]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


def _too_small(
    model: Model, places: Sequence[Place], most: Sequence[int], tokens: int
) -> DoesNotFitError:
    layers = len(model.architecture.cache_layers)
    held = ", ".join(
        f"{place.name} holds {count} ({max(0, place.num_bytes) / GIB:.2f} GiB free)"
        for place, count in zip(places, most, strict=True)
    )
    return DoesNotFitError(
        f"{layers} layers, each beside {tokens} tokens of KV cache, do not fit: {held}",
        hint="add a device, free memory, or ask for a shorter context or an int8 KV cache",
    )
