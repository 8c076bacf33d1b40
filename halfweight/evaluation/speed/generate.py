"""Generation speed: every rival's model in one harness, static cache, compiled, greedy.

The harness is halfweight's own `Decoder`, which takes any model of transformers and is the best
honest one for the 16-bit baseline: a static cache of exactly the length needed, one decode step
compiled whole by torch.compile with CUDA graphs (or recorded as it stands, or taken by our own
kernels where the model has such a step), no host synchronization between tokens.

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
from typing import Any, TypeVar

import torch
from torch import Tensor

from halfweight.engine.decoder import Decoder, Step
from halfweight.evaluation.speed.process import from_fresh_process
from halfweight.evaluation.speed.rivals import SIXTEEN_BIT, Folders, open_model, synchronize
from halfweight.kernels.timing import read_bandwidth

T = TypeVar("T")
PREFILL_REPEATS = 7
"""Of the first token at least: a prefill is short, and a median of two is no median."""
WARM_STEPS = 4
"""Steps before timing: compile, record, replay, and one more."""


@dataclass(frozen=True)
class Workload:
    """What to generate: `new_tokens` after `prompt_tokens`, for each batch size; the long prompt
    (at batch 1) whose first token is timed. `steps` are Decoder's, tried in turn; "kernel" is
    "graph" for a model that has no step of our own, and one that has is not compiled as well.
    """

    batch_sizes: tuple[int, ...] = (1, 16, 64)
    prompt_tokens: int = 128
    new_tokens: int = 256
    long_prompt_tokens: int = 2048
    repeats: int = 3
    steps: tuple[Step, ...] = ("kernel", "compiled")


@dataclass(frozen=True)
class DecodeTime:
    """Decoding of one rival at one batch size; medians over the repeats."""

    rival: str
    step: Step
    batch_size: int
    tokens_per_second: float
    step_milliseconds: float
    step_bytes: int
    bytes_per_second: float
    fraction_of_read_bandwidth: float
    warm_up_seconds: float


@dataclass(frozen=True)
class FirstTokenTime:
    """Time to the first token of one long prompt, batch 1, not compiled."""

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
    yield _first_token(rival, model, device, workload)
    has_own_step = False
    for batch_size, step in product(workload.batch_sizes, workload.steps):
        if step == "compiled" and has_own_step:
            continue
        row = _decode(rival, model, device, workload, step, batch_size, peak)
        has_own_step = row.step == "kernel"
        yield row
        torch.compiler.reset()
        gc.collect()


def _first_token(
    rival: str, model: Any, device: torch.device, workload: Workload
) -> FirstTokenTime:
    num_tokens = workload.long_prompt_tokens
    decoder = Decoder(model, 1, num_tokens + 1, step="kernel")
    prompt = random_prompts(model, 1, num_tokens)
    seconds = [
        _timed(device, lambda: decoder.prefill(prompt).argmax(dim=-1))[0]
        for _ in range(max(workload.repeats, PREFILL_REPEATS) + 2)
    ]
    return FirstTokenTime(rival, num_tokens, 1e3 * median(seconds[2:]))


def _decode(
    rival: str,
    model: Any,
    device: torch.device,
    workload: Workload,
    step: Step,
    batch_size: int,
    peak: float,
) -> DecodeTime:
    length = workload.prompt_tokens + workload.new_tokens
    decoder = Decoder(model, batch_size, length, step=step)
    prompts = random_prompts(model, batch_size, workload.prompt_tokens)
    warm_up, _ = _timed(device, lambda: _advance(decoder, decoder.prefill(prompts), WARM_STEPS))
    num_steps, samples = workload.new_tokens - 1, []
    for _ in range(workload.repeats):
        steps = partial(_advance, decoder, decoder.prefill(prompts), num_steps)
        samples.append(_timed(device, steps)[0])
    seconds = median(samples) / num_steps
    num_bytes = step_bytes(model, batch_size, length - num_steps // 2)
    rate = num_bytes / seconds
    return DecodeTime(
        rival,
        decoder.step,
        batch_size,
        tokens_per_second=batch_size / seconds,
        step_milliseconds=1e3 * seconds,
        step_bytes=num_bytes,
        bytes_per_second=rate,
        fraction_of_read_bandwidth=rate / peak,
        warm_up_seconds=warm_up,
    )


def _advance(decoder: Decoder, logits: Tensor, num_steps: int) -> None:
    for _ in range(num_steps):
        logits = decoder.advance(logits.argmax(dim=-1))


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


def random_prompts(model: Any, batch_size: int, num_tokens: int) -> list[list[int]]:
    """Prompts of random token ids, the same for every rival."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, num_tokens)
    ids: list[list[int]] = torch.randint(
        model.config.vocab_size, shape, generator=generator
    ).tolist()
    return ids
