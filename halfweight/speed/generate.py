"""Generation speed: every rival's model in one harness, static cache, compiled, greedy.

The harness is the best honest one for the 16-bit baseline: transformers' model with a static cache
of exactly the length needed, one decode step compiled whole by torch.compile with CUDA graphs, the
argmax inside it, no host synchronization between tokens. Rivals run in it unchanged.

A decode step reads each weight once and the cache of each sequence once; those bytes over the
measured read bandwidth are the floor of its time.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import StaticCache

from halfweight.kernels.timing import read_bandwidth
from halfweight.speed import Folders, from_fresh_process, open_model, synchronize

T = TypeVar("T")
WARM_STEPS = 4
"""Steps before timing: compile, record, replay, and one more."""


@dataclass(frozen=True)
class Workload:
    """What to generate: `new_tokens` after `prompt_tokens`, for each batch size; the long prompt
    (at batch 1) whose first token is timed. `compiled` False skips torch.compile (on a CPU).
    """

    batch_sizes: tuple[int, ...] = (1, 16, 64)
    prompt_tokens: int = 128
    new_tokens: int = 256
    long_prompt_tokens: int = 2048
    repeats: int = 3
    compiled: bool = True


@dataclass(frozen=True)
class DecodeTime:
    """Decoding of one rival at one batch size; medians over the repeats."""

    rival: str
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


class StaticLoop:
    """Greedy decoding of sequences of up to `max_length` tokens, all of one batch in step."""

    def __init__(
        self,
        model: Any,
        max_length: int,
        *,
        compiled: bool = False,
        cache_class: Callable[..., Any] = StaticCache,
    ) -> None:
        self._model = model
        self._cache = cache_class(model.config, max_cache_len=max_length)
        self._step = self._forward
        if compiled:
            self._step = torch.compile(self._forward, mode="reduce-overhead", fullgraph=True)

    @torch.no_grad()
    def prefill(self, ids: Tensor, chunk_tokens: int | None = None) -> Tensor:
        """Forget all, read prompts [B, T] (`chunk_tokens` at a time); the next tokens [B, 1]."""
        self._cache.reset()
        for chunk in torch.split(ids, chunk_tokens or ids.shape[1], dim=1):
            token = self._forward(chunk)
        return token

    @torch.no_grad()
    def decode(self, token: Tensor, num_tokens: int) -> Tensor:
        """The `num_tokens` tokens [B, num_tokens] that follow `token` [B, 1]."""
        tokens = []
        for _ in range(num_tokens):
            token = self._step(token).clone()
            tokens.append(token)
        return torch.cat(tokens, dim=1)

    def _forward(self, ids: Tensor) -> Tensor:
        out = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        token: Tensor = out.logits.argmax(dim=-1)
        return token


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
    for batch_size in workload.batch_sizes:
        yield _decode(rival, model, device, workload, batch_size, peak)
        torch.compiler.reset()
        gc.collect()


def _first_token(
    rival: str, model: Any, device: torch.device, workload: Workload
) -> FirstTokenTime:
    num_tokens = workload.long_prompt_tokens
    loop = StaticLoop(model, num_tokens + 1)
    ids = random_ids(model, (1, num_tokens), device)
    seconds = [_timed(device, lambda: loop.prefill(ids))[0] for _ in range(workload.repeats + 2)]
    return FirstTokenTime(rival, num_tokens, 1e3 * median(seconds[2:]))


def _decode(
    rival: str, model: Any, device: torch.device, workload: Workload, batch_size: int, peak: float
) -> DecodeTime:
    length = workload.prompt_tokens + workload.new_tokens
    loop = StaticLoop(model, length, compiled=workload.compiled)
    ids = random_ids(model, (batch_size, workload.prompt_tokens), device)
    warm_up, _ = _timed(device, lambda: loop.decode(loop.prefill(ids), WARM_STEPS))
    num_steps, samples = workload.new_tokens - 1, []
    for _ in range(workload.repeats):
        decode = partial(loop.decode, loop.prefill(ids), num_steps)
        samples.append(_timed(device, decode)[0])
    step = median(samples) / num_steps
    num_bytes = step_bytes(model, batch_size, length - num_steps // 2)
    rate = num_bytes / step
    return DecodeTime(
        rival, batch_size, batch_size / step, 1e3 * step, num_bytes, rate, rate / peak, warm_up
    )


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


def random_ids(model: Any, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Token ids of `shape`, the same for every rival."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, shape, generator=generator).to(device)
