"""How transformers' models reach our attention, and what their layers ask of it.

transformers looks its attention function up by the name in `config._attn_implementation`. `using`
sets a name of ours for the time of one forward, so outside of it the model is as it was; the
function that then answers is whoever made itself the `attention` of this thread.

`learn` runs one short forward in which attention does nothing but take notes: the shapes of keys
and values at each call, which calls share their keys with an earlier one, and which tokens a token
sees. That last is read off the very mask that the model asks transformers to make, by asking the
mask's function about pairs of positions, so it does not matter how a model names its window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from halfweight.engine.runners.paged_attention import Span
from halfweight.errors import HalfweightError

PAGED = "halfweight_pages"
NOTES = "halfweight_notes"
EAGER = "eager"

_HARMLESS = frozenset(
    "dropout scaling softcap s_aux is_causal sliding_window position_ids cache past_key_values "
    "use_cache cache_position output_attentions output_hidden_states output_router_logits "
    "return_dict position_embeddings logits_to_keep deterministic".split()
)
"""Arguments of an attention function that we take, or that say nothing new."""


class UnpageableError(HalfweightError):
    """The model's attention cannot run over pages; the message says why."""


class Attention(Protocol):
    """Answers one call of a layer: q [1, H, T, D], k and v [1, Hkv, T, D] -> [1, T, H, Dv]."""

    def __call__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **asked: Any
    ) -> Tensor:
        """`asked` are the other arguments of the layer's call."""
        ...


@dataclass(frozen=True)
class Call:
    """One call of the attention function in a forward."""

    num_heads: int
    """Of keys and values."""
    widths: tuple[int, int]
    """Numbers of a key and of a value."""
    dtype: torch.dtype
    span: Span
    source: int | None
    """The earlier call whose keys and values it is given again."""

    def num_bytes(self, *, int8: bool) -> int:
        """Of a token's keys and values; in int8 each has a scale."""
        size = self.dtype.itemsize
        each = sum(self.widths) + 2 * size if int8 else sum(self.widths) * size
        return self.num_heads * each


_attention: ContextVar[Attention] = ContextVar("attention")


def configs_of(model: nn.Module) -> list[Any]:
    """The distinct configurations that the modules of `model` look their attention up in."""
    found = (getattr(module, "config", None) for module in model.modules())
    known = {id(config): config for config in found if hasattr(config, "_attn_implementation")}
    return list(known.values())


@contextmanager
def using(configs: list[Any], name: str, attention: Attention | None = None) -> Iterator[None]:
    """Inside the block, the models of `configs` use the attention of this name, ours `attention`."""
    AttentionInterface.register(PAGED, _call)
    AttentionInterface.register(NOTES, _call)
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation_internal = name
    token = _attention.set(attention or _no_attention)
    try:
        yield
    finally:
        _attention.reset(token)
        for config, old in zip(configs, before, strict=True):
            config._attn_implementation_internal = old


def learn(
    model: PreTrainedModel, forward: Callable[[], Tensor], num_tokens: int, max_context: int
) -> tuple[list[Call], Tensor]:
    """The attention calls of `forward`, which reads `num_tokens` tokens of one sequence; its result.

    Raises UnpageableError where a call is of a kind that pages have no answer for.
    """
    notes = _Notes(num_tokens, max_context)
    AttentionMaskInterface.register(NOTES, notes.make_mask)
    with using(configs_of(model), NOTES, notes):
        found = forward()
    if not notes.calls:
        raise UnpageableError("its attention does not go through transformers' interface")
    return notes.calls, found


def span_of(mask_function: Callable[..., Tensor], max_context: int, device: torch.device) -> Span:
    """Which tokens a mask function of transformers lets positions below `max_context` see.

    The last position that sees token 0 gives the size; then the guess is held against the function
    at 64 positions and all their borders. Raises UnpageableError for any other pattern.
    """
    every = torch.arange(max_context, device=device)
    sees_start = _ask(mask_function, every, torch.zeros_like(every))
    size = int(sees_start.sum())
    guesses = [Span("all")] if size == max_context else [Span("window", size), Span("block", size)]
    some = torch.linspace(0, max_context - 1, 64, device=device).long()
    near = torch.cat([some, (size + torch.arange(-1, 3, device=device)).clamp(0, max_context - 1)])
    for span in guesses:
        first = span.first(near).clamp(min=0)
        keys = [first, (first - 1).clamp(min=0), near, (near + 1), near // 2, near * 0]
        q, k = near.repeat(len(keys)), torch.cat(keys)
        if torch.equal(_ask(mask_function, q, k), (k <= q) & (k >= span.first(q))):
            return span
    raise UnpageableError("a layer's mask is neither causal, nor a window, nor blocks")


def _ask(mask_function: Callable[..., Tensor], q: Tensor, k: Tensor) -> Tensor:
    zero = torch.zeros(1, dtype=torch.long, device=q.device)
    try:
        return mask_function(zero, zero, q, k).expand(len(q))
    except (IndexError, RuntimeError) as error:
        raise UnpageableError("a layer's mask depends on more than positions") from error


class _Notes:
    """Answers with zeros and writes down what was asked."""

    def __init__(self, num_tokens: int, max_context: int) -> None:
        self.calls: list[Call] = []
        self._num_tokens = num_tokens
        self._max_context = max_context
        self._masks: list[tuple[Tensor, Span]] = []
        self._keys: list[Tensor] = []

    def make_mask(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        mask_function: Callable[..., Tensor],
        *,
        use_vmap: bool = False,
        device: Any = "cpu",
        **_: Any,
    ) -> Tensor:
        """transformers' call for a mask: the mask, remembered with its span."""
        if use_vmap:
            raise UnpageableError("it adds to the causal mask")
        span = span_of(mask_function, self._max_context, torch.device(device))
        positions = torch.arange(self._num_tokens, device=device)
        seen = (positions <= positions[:, None]) & (positions >= span.first(positions)[:, None])
        self._masks.append((seen[None, None].expand(batch_size, -1, -1, -1), span))
        return self._masks[-1][0]

    def __call__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **asked: Any
    ) -> Tensor:
        strange = sorted(n for n in asked.keys() - _HARMLESS if asked[n] is not None)
        if strange:
            raise UnpageableError(f"its attention asks for {', '.join(strange)}")
        if q.shape[2] != self._num_tokens or k.shape[2] != self._num_tokens or len(q) != 1:
            raise UnpageableError("a layer attends to something else than the text")
        span = self._span(module, mask, asked)
        same = [i for i, known in enumerate(self._keys) if known.data_ptr() == k.data_ptr()]
        source = same[0] if same else None
        widths = (k.shape[-1], v.shape[-1])
        self.calls.append(Call(k.shape[1], widths, k.dtype, span, source))
        self._keys.append(k)
        return q.new_zeros(1, self._num_tokens, q.shape[1], v.shape[-1])

    def _span(self, module: nn.Module, mask: Any, asked: dict[str, Any]) -> Span:
        if mask is None:
            causal = asked.get("is_causal")
            if not (getattr(module, "is_causal", True) if causal is None else causal):
                raise UnpageableError("a layer attends in both directions")
            return Span()
        for known, span in self._masks:
            if mask.untyped_storage().data_ptr() == known.untyped_storage().data_ptr():
                return span
        raise UnpageableError("a layer changes its mask")


def _call(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **asked: Any
) -> tuple[Tensor, None]:
    return _attention.get()(module, query, key, value, mask, **asked), None


def _no_attention(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("no runner has a step under way")
