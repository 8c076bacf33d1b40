"""Generation speed: 16 bits and its rivals as quick as transformers goes, halfweight by its engine.

Plain models of transformers run by `StaticDecoder`, the best honest harness for a baseline: a
static cache of exactly the length needed, one decode step recorded as a CUDA graph or compiled
whole by torch.compile, no host synchronization between tokens. halfweight's own rows are what a
user gets: requests to `Engine`, timed as their tokens arrive, without guessing ahead.

A decode step reads each weight once and the cache of each sequence once; those bytes over the
measured read bandwidth are the floor of its time.
"""

from __future__ import annotations

import gc
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import median
from threading import Event
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from halfweight.engine.engine import Engine
from halfweight.engine.request import Output, Request
from halfweight.engine.runners import LEAST_CONTEXT
from halfweight.errors import UsageError
from halfweight.evaluation.speed.process import from_fresh_process
from halfweight.evaluation.speed.rivals import (
    BY_ENGINE,
    SIXTEEN_BIT,
    Folders,
    open_model,
    synchronize,
)
from halfweight.evaluation.speed.static_decoder import StaticDecoder, Step
from halfweight.kernels.timing import read_bandwidth

T = TypeVar("T")
PREFILL_REPEATS = 7
"""Of the first token at least: a prefill is short, and a median of two is no median."""
MOST_PAGE_TOKENS = 64
"""No runner has longer pages, so that the last one of a sequence has room."""
WARM_STEPS = 4
"""Steps before timing: compile, record, replay, and one more."""


@dataclass(frozen=True)
class Workload:
    """What to generate: `new_tokens` after `prompt_tokens`, for each batch size; the long prompt
    (at batch 1) whose first token is timed. `steps` are the baselines' (StaticDecoder), tried in
    turn.
    """

    batch_sizes: tuple[int, ...] = (1, 16, 64)
    prompt_tokens: int = 128
    new_tokens: int = 256
    long_prompt_tokens: int = 2048
    repeats: int = 3
    steps: tuple[Step, ...] = ("graph", "compiled")


@dataclass(frozen=True)
class DecodeTime:
    """Decoding of one rival at one batch size; medians over the repeats."""

    rival: str
    step: Step | Literal["engine"]
    batch_size: int
    tokens_per_second: float
    step_milliseconds: float
    step_bytes: int
    bytes_per_second: float
    fraction_of_read_bandwidth: float
    warm_up_seconds: float


@dataclass(frozen=True)
class FirstTokenTime:
    """Time to the first token of one long prompt, batch 1; of a baseline not compiled."""

    rival: str
    prompt_tokens: int
    milliseconds: float


Row = DecodeTime | FirstTokenTime


@dataclass(frozen=True)
class Speedup:
    """A rival against the 16-bit model: decoding at each batch size (each by its best step), and
    the time to the first token (below 1 is faster); None where either is missing.
    """

    rival: str
    decode: dict[int, float]
    first_token_ratio: float | None


def speedups(rows: Sequence[Row]) -> list[Speedup]:
    """Every rival but the 16-bit model itself."""
    rates: dict[str, dict[int, float]] = defaultdict(dict)
    first: dict[str, float] = {}
    for row in rows:
        if isinstance(row, FirstTokenTime):
            first[row.rival] = row.milliseconds
            continue
        best = max(row.tokens_per_second, rates[row.rival].get(row.batch_size, 0.0))
        rates[row.rival][row.batch_size] = best
    base, base_first = rates.pop(SIXTEEN_BIT, {}), first.get(SIXTEEN_BIT)
    return [
        Speedup(
            rival,
            {batch: rate / base[batch] for batch, rate in found.items() if batch in base},
            first[rival] / base_first if base_first and rival in first else None,
        )
        for rival, found in rates.items()
    ]


def compare(
    rivals: Sequence[str],
    folders: Folders,
    device: torch.device,
    workload: Workload,
    *,
    deadline: float = math.inf,
    report: Callable[[str, Row | str], None] = lambda rival, row: None,
) -> list[Row]:
    """Each rival in a fresh process; `report` is told every row, or the line of an error.

    Rivals still to come at `deadline` of time.monotonic are left out.
    """
    found: list[Row] = []
    for rival in rivals:
        job = (measure, rival, folders, str(device), workload)
        try:
            for row in from_fresh_process(*job, deadline=deadline):
                found.append(row)
                report(rival, row)
        except RuntimeError as error:
            report(rival, str(error))
    return found


def measure(rival: str, folders: Folders, device_name: str, workload: Workload) -> Iterator[Row]:
    """Load `rival` in this process and time it: the first token, then decoding by batch size."""
    device = torch.device(device_name)
    peak = read_bandwidth(device)
    model = open_model(rival, folders, device)
    if rival in BY_ENGINE:
        yield FirstTokenTime(
            rival, workload.long_prompt_tokens, 1e3 * _engine_first(model, workload)
        )
        for batch_size in workload.batch_sizes:
            timing = _engine_decoding(model, workload, batch_size)
            yield _row(rival, model, workload, "engine", batch_size, timing, peak)
            gc.collect()
        return
    seconds = _first_token(model, device, workload)
    yield FirstTokenTime(rival, workload.long_prompt_tokens, 1e3 * seconds)
    for batch_size, step in product(workload.batch_sizes, workload.steps):
        timing = _decoding(model, device, workload, step, batch_size)
        yield _row(rival, model, workload, step, batch_size, timing, peak)
        torch.compiler.reset()
        gc.collect()


@dataclass(frozen=True)
class _Timing:
    """Seconds of a decode step and of warming up."""

    step: float
    warm_up: float


def _row(
    rival: str,
    model: Any,
    workload: Workload,
    step: Step | Literal["engine"],
    batch_size: int,
    timing: _Timing,
    peak: float,
) -> DecodeTime:
    num_steps = workload.new_tokens - 1
    length = workload.prompt_tokens + workload.new_tokens
    num_bytes = step_bytes(model, batch_size, length - num_steps // 2)
    rate = num_bytes / timing.step
    return DecodeTime(
        rival,
        step,
        batch_size,
        tokens_per_second=batch_size / timing.step,
        step_milliseconds=1e3 * timing.step,
        step_bytes=num_bytes,
        bytes_per_second=rate,
        fraction_of_read_bandwidth=rate / peak,
        warm_up_seconds=timing.warm_up,
    )


def _first_token(model: Any, device: torch.device, workload: Workload) -> float:
    """Seconds by StaticDecoder."""
    num_tokens = workload.long_prompt_tokens
    decoder = StaticDecoder(model, 1, num_tokens + 1)
    prompt = random_prompts(model, 1, num_tokens)
    seconds = [
        _timed(device, lambda: decoder.prefill(prompt).argmax(dim=-1))[0]
        for _ in range(max(workload.repeats, PREFILL_REPEATS) + 2)
    ]
    return median(seconds[2:])


def _decoding(
    model: Any, device: torch.device, workload: Workload, step: Step, batch_size: int
) -> _Timing:
    """By StaticDecoder."""
    length = workload.prompt_tokens + workload.new_tokens
    decoder = StaticDecoder(model, batch_size, length, step=step)
    prompts = random_prompts(model, batch_size, workload.prompt_tokens)
    warm_up, _ = _timed(device, lambda: _advance(decoder, decoder.prefill(prompts), WARM_STEPS))
    num_steps, samples = workload.new_tokens - 1, []
    for _ in range(workload.repeats):
        steps = partial(_advance, decoder, decoder.prefill(prompts), num_steps)
        samples.append(_timed(device, steps)[0])
    return _Timing(median(samples) / num_steps, warm_up)


def _advance(decoder: StaticDecoder, logits: Tensor, num_steps: int) -> None:
    for _ in range(num_steps):
        logits = decoder.advance(logits.argmax(dim=-1))


def _engine_first(model: Any, workload: Workload) -> float:
    """Seconds from a request to its first token, each time of another prompt."""
    num_tokens = workload.long_prompt_tokens
    with _engine(model, 1, num_tokens + 1) as engine:
        seconds = []
        for seed in range(max(workload.repeats, PREFILL_REPEATS) + 2):
            arrivals = Arrivals.of(engine, random_prompts(model, 1, num_tokens, seed), 1)
            seconds.append(arrivals.first_token_seconds)
    return median(seconds[2:])


def _engine_decoding(model: Any, workload: Workload, batch_size: int) -> _Timing:
    """Of the steps in which all sequences decode."""
    length = workload.prompt_tokens + workload.new_tokens
    with _engine(model, batch_size, length) as engine:
        prompts = random_prompts(model, batch_size, workload.prompt_tokens)
        begin = time.perf_counter()  # what is read now is shared later: decoding begins together
        Arrivals.of(engine, prompts, WARM_STEPS + 1)
        warm_up = time.perf_counter() - begin
        samples = [
            Arrivals.of(engine, prompts, workload.new_tokens).step_seconds
            for _ in range(workload.repeats)
        ]
    return _Timing(median(samples), warm_up)


def _engine(model: Any, batch_size: int, length: int) -> Engine:
    """An engine with room for a batch and no more; without drafts, so that a step is a token."""
    length = max(length, LEAST_CONTEXT)
    return Engine(
        model,
        max_sequences=batch_size,
        max_context=length,
        cache_tokens=batch_size * (length + MOST_PAGE_TOKENS),
        speculates=False,
    )


class Arrivals:
    """When the tokens of a batch of greedy requests, submitted together, arrived."""

    def __init__(self, num_requests: int) -> None:
        self._num_requests = self._num_left = num_requests
        self._begin = time.perf_counter()
        self._firsts: list[float] = []
        self._together = 0
        self._last = self._begin
        self._error: Exception | None = None
        self._done = Event()

    @classmethod
    def of(cls, engine: Engine, prompts: Sequence[Sequence[int]], new_tokens: int) -> Arrivals:
        """Those of `new_tokens` after each of `prompts`; raises what ends a request."""
        found = cls(len(prompts))
        for prompt in prompts:
            request = Request(tuple(prompt), new_tokens, stop_tokens=frozenset())
            engine.submit(request, partial(found._take, []))
        found._done.wait()
        if found._error is not None:
            raise found._error
        return found

    @property
    def first_token_seconds(self) -> float:
        """From the first request to the first token of all."""
        return max(self._firsts) - self._begin

    @property
    def step_seconds(self) -> float:
        """Of one token of every request, while all are decoding."""
        if self._together == 0:
            raise UsageError(
                "one text was at its end before the last prompt was read",
                hint="ask for more new tokens, or for fewer at once",
            )
        return (self._last - max(self._firsts)) * self._num_requests / self._together

    def _take(self, seen: list[int], output: Output) -> None:
        """An output of one request, which has `seen` tokens before; on the engine's thread."""
        now = time.perf_counter()
        if output.tokens and not seen:
            self._firsts.append(now)
        elif len(self._firsts) == self._num_left == self._num_requests:
            self._together, self._last = self._together + len(output.tokens), now
        seen.extend(output.tokens)
        if output.finish_reason is not None or output.error is not None:
            self._error = self._error or output.error
            self._num_left -= 1
            if self._num_left == 0:
                self._done.set()


def _timed(device: torch.device, call: Callable[[], T]) -> tuple[float, T]:
    """Seconds that the call takes, device work included, and what it returns."""
    synchronize(device)
    begin = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - begin, result


def step_bytes(model: Any, batch_size: int, context: int) -> int:
    """Bytes a decode step must read: each weight once (of an embedding that is not the head, one
    row a sequence) and `context` tokens of cache for each sequence.
    """
    weights = {_place(p): _data_bytes(p) for p in model.parameters()}
    table = {_place(p) for p in model.get_input_embeddings().parameters()}
    head = {_place(p) for p in model.get_output_embeddings().parameters()}
    read = sum(num_bytes for place, num_bytes in weights.items() if place not in table - head)
    return read + batch_size * context * kv_token_bytes(model)


def kv_token_bytes(model: Any) -> int:
    """Bytes of one token in the 16-bit cache, keys and values of all layers."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize)


def _place(parameter: Tensor) -> int:
    """The same for parameters that share their data."""
    return parameter.data_ptr() or id(parameter)


def _data_bytes(parameter: Tensor) -> int:
    """Bytes of a parameter, or of the tensors inside one that is a wrapper of others."""
    if not hasattr(parameter, "__tensor_flatten__"):
        return parameter.nbytes
    names, _ = parameter.__tensor_flatten__()
    return sum(_data_bytes(getattr(parameter, name)) for name in names)


def random_prompts(model: Any, batch_size: int, num_tokens: int, seed: int = 0) -> list[list[int]]:
    """Prompts of random token ids, the same for every rival."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, num_tokens)
    ids: list[list[int]] = torch.randint(
        model.config.vocab_size, shape, generator=generator
    ).tolist()
    return ids
