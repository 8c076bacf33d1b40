"""Generate text: prefill in chunks, decode step by step with a static cache, sample on the device.

One batch of prompts goes through one `Decoder`: prompts are padded on the left to one length, the
cache has exactly the room that prompts and new tokens need, and every decode step has the same
shapes. Llama-like models take a step of our own kernels (`step="kernel"`): on CUDA ten launches a
layer (gpu_step.py), on the CPU a single one for one sequence (cpu_step.py). Other models step
through transformers' forward (`"eager"`), on CUDA recorded as a graph (`"graph"`) or compiled by
torch first (`"compiled"`; slower to start). Steps on CUDA are recorded once as a CUDA graph and
replayed. Only the last token's logits are computed. It takes any causal model of transformers.

A prompt that cannot fit, an id outside the vocabulary and a sampled NaN are errors before anything
is launched, or end that one sequence: on a GPU each would else poison the process or read as text.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, StaticCache
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from halfweight.engine.kv_cache import Int8Cache
from halfweight.errors import UsageError
from halfweight.memory.device_memory import available_bytes
from halfweight.model.experts import has_experts

if TYPE_CHECKING:
    from halfweight.engine.gpu_step import GpuStep

Step = Literal["eager", "graph", "compiled", "kernel"]
KvCache = Literal["16bit", "int8"]
FinishReason = Literal["stop", "length", "nan"]

CHUNK_TOKENS = 2048
"""Tokens, of all prompts together, that go through the model at a time: bounds prefill's memory."""
NAN = -1
"""The token that stands for logits with a NaN in them."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 takes the likeliest. The names are the usual."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def processors(self) -> LogitsProcessorList:
        """transformers' own processors for these values."""
        found: list[Any] = []
        if self.repetition_penalty != 1.0:
            found.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature > 0:
            if self.temperature != 1.0:
                found.append(TemperatureLogitsWarper(self.temperature))
            if self.top_k > 0:
                found.append(TopKLogitsWarper(self.top_k))
            if self.top_p < 1.0:
                found.append(TopPLogitsWarper(self.top_p))
        return LogitsProcessorList(found)


@dataclass(frozen=True)
class Generation:
    """The new tokens of one prompt, without the stop token, and why they end."""

    tokens: tuple[int, ...]
    finish_reason: FinishReason


class Decoder:
    """One batch of sequences of at most `max_length` tokens, all in step.

    `prefill` reads the prompts, `advance` one token a sequence; both return logits [B, V] of the
    last token. A CUDA graph is recorded at the first `advance` and reused after `prefill` again.
    `step` says how steps are made; "kernel" becomes another at the first one where it cannot be.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch_size: int,
        max_length: int,
        *,
        kv_cache: KvCache = "16bit",
        step: Step = "eager",
    ) -> None:
        """Allocates nothing yet; the cache comes with the first prompt."""
        self._model = model
        cache_class = {"16bit": StaticCache, "int8": Int8Cache}[kv_cache]
        self._cache = cache_class(model.config, max_cache_len=max_length)
        self._cache_name = cache_argument(model)
        where: dict[str, Any] = {"dtype": torch.long, "device": model.device}
        self._ids = torch.zeros(batch_size, 1, **where)
        self._positions = torch.zeros(batch_size, 1, **where)
        self._mask = torch.ones(batch_size, max_length, **where)
        self._slot = torch.zeros(1, dtype=torch.int32, device=model.device)
        self._starts = torch.zeros(batch_size, dtype=torch.int32, device=model.device)
        self.step = step
        self._own: GpuStep | None = None
        self._step = self._choose if step == "kernel" else _make_step(self._one_token, step)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Forget all, read prompts of any lengths; logits [B, V]."""
        self._cache.reset()
        ids, mask = _pad_left(prompts, self._ids.device)
        self._mask.fill_(1)
        self._mask[:, : ids.shape[1]] = mask
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        step = max(1, CHUNK_TOKENS // len(prompts))
        reader = self._prompt_reader()
        for begin in range(0, ids.shape[1], step):
            part = slice(begin, begin + step)
            if reader is not None:
                logits = reader.prefill(ids[:, part], begin)
            else:
                logits = self._forward(ids[:, part], positions[:, part])
        self._positions.copy_(positions[:, -1:])
        self._slot.fill_(ids.shape[1] - 1)
        self._starts.copy_((mask == 0).sum(dim=1))
        return logits

    @torch.inference_mode()
    def advance(self, tokens: Tensor) -> Tensor:
        """Read the next token [B] of every sequence; logits [B, V], valid until the next call."""
        self._ids.copy_(tokens.unsqueeze(1))
        self._positions += 1
        self._slot += 1
        logits: Tensor = self._step()
        return logits

    def _prompt_reader(self) -> GpuStep | None:
        """Our kernels for a prompt alone on CUDA, if the steps after it are theirs; else None."""
        if self.step != "kernel" or len(self._ids) > 1 or not self._ids.is_cuda:
            return None
        if self._own is None and type(self._cache) is StaticCache:
            self._own = self._gpu_step()
        return self._own if self._own is not None and self._own.reads_prompts else None

    def _choose(self) -> Tensor:
        """The first step, when the cache exists: by our kernels if the model has such a step."""
        on_cuda = self._ids.is_cuda
        fast = self._own or (self._gpu_step() if on_cuda else self._cpu_step())
        if fast is None:
            self.step = "graph" if on_cuda and not has_experts(self._model) else "eager"
        call = self._one_token if fast is None else fast
        self._step = _Graph(call) if on_cuda and self.step != "eager" else call
        return self._step()

    def _gpu_step(self) -> GpuStep | None:
        from halfweight.engine.gpu_step import step_for

        return step_for(self._model, self._cache, self._ids, self._slot, self._starts)

    def _cpu_step(self) -> Callable[[], Tensor] | None:
        from halfweight.engine.cpu_step import step_for

        kernel = step_for(self._model, self._cache, len(self._ids))
        return None if kernel is None else lambda: kernel(int(self._ids), int(self._positions))

    def _one_token(self) -> Tensor:
        return self._forward(self._ids, self._positions)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        out = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            **{self._cache_name: self._cache},
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = out.logits[:, -1].float()
        return logits


def stream(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 256,
    sampling: Sampling = Sampling(),
    stop_tokens: Sequence[int] | None = None,
    kv_cache: KvCache = "16bit",
    step: Step = "kernel",
    decoder: Decoder | None = None,
) -> Iterator[list[int | FinishReason | None]]:
    """Generate for all prompts at once; yields after every step one entry a prompt.

    An entry is the new token, then once the reason why the sequence ends, then None. `stop_tokens`
    default to the model's own; `step` and `kv_cache` are Decoder's; a `decoder` of as
    many sequences, long enough, is used instead of a new one, with what it has recorded. Raises
    UsageError before any work for an empty or over-long prompt or an id outside the vocabulary.
    """
    check_prompts(model, prompts, max_new_tokens)
    stops = set(model_stop_tokens(model) if stop_tokens is None else stop_tokens)
    if decoder is None:
        length = max(map(len, prompts)) + max_new_tokens
        decoder = Decoder(model, len(prompts), length, kv_cache=kv_cache, step=step)
    sampler = _Sampler(sampling, prompts, model.device)
    alive = [True] * len(prompts)
    logits = decoder.prefill(prompts)
    for count in range(1, max_new_tokens + 1):
        tokens = sampler.choose(logits)
        entries: list[int | FinishReason | None] = [None] * len(prompts)
        for i, token in enumerate(tokens.tolist()):
            if alive[i]:
                entries[i] = "nan" if token == NAN else "stop" if token in stops else token
                alive[i] = isinstance(entries[i], int)
        yield entries
        if not any(alive):
            return
        if count < max_new_tokens:
            logits = decoder.advance(tokens.clamp(min=0))
    yield ["length" if lives else None for lives in alive]


def generate(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], **options: Any
) -> list[Generation]:
    """The whole of `stream`, a Generation for each prompt; same options."""
    tokens: list[list[int]] = [[] for _ in prompts]
    reasons: list[FinishReason] = ["length"] * len(prompts)
    for entries in stream(model, prompts, **options):
        for i, entry in enumerate(entries):
            if isinstance(entry, int):
                tokens[i].append(entry)
            elif entry is not None:
                reasons[i] = entry
    return [Generation(tuple(t), r) for t, r in zip(tokens, reasons, strict=True)]


def check_prompts(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    """Raise UsageError for what would fail on the device: lengths and ids, checked on the host."""
    config = model.config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None)
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UsageError(f"prompt {i} has no tokens", hint="give it at least one")
        if context is not None and len(prompt) + max_new_tokens > context:
            raise UsageError(
                f"prompt {i} has {len(prompt)} tokens, with {max_new_tokens} new ones "
                f"{len(prompt) + max_new_tokens}; the model's context is {context}",
                hint=f"shorten the prompt, or ask for {max(0, context - len(prompt))} tokens",
            )
        for token in prompt:
            if not 0 <= token < config.vocab_size:
                raise UsageError(
                    f"prompt {i} has token id {token}, expected 0 to {config.vocab_size - 1}",
                    hint="the tokenizer is not this model's",
                )


def largest_batch(model: PreTrainedModel, max_length: int, kv_cache: KvCache = "16bit") -> int:
    """Sequences of `max_length` tokens whose cache and logits fit what the device has free.

    A tenth is left for activations. 64 on a CPU, which can swap. At least 1: what then does not fit
    fails with its own message.
    """
    free = available_bytes(model.device)
    if free is None:
        return 64
    config = model.config.get_text_config(decoder=True)
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    numbers = 2 * config.num_hidden_layers * kv_heads * max_length
    size = model.dtype.itemsize
    width = head_dim + size if kv_cache == "int8" else head_dim * size
    logits = config.vocab_size * 4 * 3
    widths = _intermediate_size(config) + 4 * hidden
    prefill = min(max_length, CHUNK_TOKENS) * widths * 2 * size
    each = int(numbers * width + logits + prefill)
    return max(1, int(free * 0.9) // each)


def _intermediate_size(config: Any) -> int:
    """Width of the widest MLP; four times the model where a config does not say."""
    size = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return max(size) if isinstance(size, list | tuple) else int(size)


class _Sampler:
    """Chooses tokens [B] from logits [B, V] on the device, with what each sequence has so far."""

    def __init__(
        self, sampling: Sampling, prompts: Sequence[Sequence[int]], device: torch.device
    ) -> None:
        self._processors = sampling.processors()
        self._random = sampling.temperature > 0
        self._needs_history = sampling.repetition_penalty != 1.0
        self._generator = torch.Generator(device)
        if sampling.seed is not None:
            self._generator.manual_seed(sampling.seed)
        else:
            self._generator.seed()
        longest = max(map(len, prompts))
        rows = [[prompt[0]] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        self._history = torch.tensor(rows, device=device)

    @torch.inference_mode()
    def choose(self, logits: Tensor) -> Tensor:
        """Tokens [B]; NAN for a row whose logits hold one."""
        bad = logits.isnan().any(dim=-1)
        scores = self._processors(self._history, logits.nan_to_num())
        if self._random:
            chances = torch.softmax(scores, dim=-1)
            tokens = torch.multinomial(chances, 1, generator=self._generator).squeeze(1)
        else:
            tokens = scores.argmax(dim=-1)
        if self._needs_history:
            self._history = torch.cat([self._history, tokens.unsqueeze(1)], dim=1)
        return torch.where(bad, NAN, tokens)


def cache_argument(model: PreTrainedModel) -> str:
    """What the model's forward calls its cache: transformers 5.24 renamed `past_key_values`."""
    names = inspect.signature(type(model).forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def _pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids and mask [B, T]: 1 where a prompt's token is, 0 for the padding before it."""
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def model_stop_tokens(model: PreTrainedModel) -> list[int]:
    """The ids at which the model's own configuration says that a text ends."""
    found = getattr(model.generation_config, "eos_token_id", None)
    found = model.config.eos_token_id if found is None else found
    if found is None:
        return []
    return list(found) if isinstance(found, list | tuple) else [found]


def _make_step(call: Any, step: Step) -> Any:
    if step == "compiled":
        return torch.compile(call, mode="reduce-overhead", fullgraph=True)
    return _Graph(call) if step == "graph" else call


class _Graph:
    """A call without arguments recorded as one CUDA graph; replays write into the same tensor.

    The first call runs eagerly (it allocates, compiles kernels and counts), the second is recorded
    and replayed, all later ones are replayed.
    """

    def __init__(self, call: Any) -> None:
        self._call = call
        self._graph: Any = None
        self._warm = False
        self._result: Tensor | None = None

    def __call__(self) -> Tensor:
        if not self._warm:
            self._warm = True
            found: Tensor = self._call()
            return found
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._result = self._call()
        self._graph.replay()
        assert self._result is not None
        return self._result
