"""How transformers' models reach our attention, and what their layers ask of it.

transformers looks its attention function up by the name in `config._attn_implementation`. `using`
sets a name of ours for the time of one forward, so outside of it the model is as it was; the
function that then answers is whoever made itself the `attention` of this thread.

`learn` runs one short forward in which attention does nothing but take notes: the shapes of keys
and values at each call, which calls share their keys with an earlier one, and which tokens a token
sees. That last is read off the very mask that the model asks transformers to make, by asking the
mask's function about pairs of positions, so it does not matter how a model names its window. What
would only show beyond a short text is refused here: arguments of attention that we do not know (a
choice of blocks, a bias), and layers that number the row's tokens themselves (Llama 4 scales its
queries by such numbers, above 8,192).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import RLock
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from halfweight.engine.runners.paged_attention import Span
from halfweight.engine.runners.unfit import UnfitError

PAGED = "halfweight_pages"
NOTES = "halfweight_notes"
EAGER = "eager"

_HARMLESS = {
    *("dropout", "scaling", "softcap", "s_aux", "is_causal", "sliding_window", "position_ids"),
    *("cache", "past_key_values", "use_cache", "cache_position", "position_embeddings"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
    *("logits_to_keep", "deterministic"),
}
"""Arguments of an attention function that we take, or that say nothing new."""


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
_one_at_a_time = RLock()
"""Two engines may run one model, whose configuration can name one attention at a time."""


def configs_of(model: nn.Module) -> list[Any]:
    """The distinct configurations that the modules of `model` look their attention up in."""
    found = (getattr(module, "config", None) for module in model.modules())
    known = {id(config): config for config in found if hasattr(config, "_attn_implementation")}
    return list(known.values())


@contextmanager
def using(configs: list[Any], name: str, attention: Attention | None = None) -> Iterator[None]:
    """Inside the block models of `configs` use the attention of this name, ours by `attention`."""
    AttentionInterface.register(PAGED, _call)
    AttentionInterface.register(NOTES, _call)
    with _one_at_a_time:
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
    """The attention calls of `forward`, which reads `num_tokens` tokens of one text; its result.

    Raises UnfitError where a call is of a kind that pages have no answer for.
    """
    notes = _Notes(num_tokens, max_context)
    with using(configs_of(model), NOTES, notes), _Counting(num_tokens) as counting:
        AttentionMaskInterface.register(NOTES, notes.make_mask)
        found = forward()
    if not notes.calls:
        raise UnfitError("its attention does not go through transformers' interface")
    if counting.seen:
        raise UnfitError("a layer counts positions along the row")
    return notes.calls, found


def span_of(mask_function: Callable[..., Tensor], max_context: int, device: torch.device) -> Span:
    """Which tokens a mask function of transformers lets positions below `max_context` see.

    The last position that sees token 0 gives the size; then the guess is held against the function
    at 64 positions and all their borders. Raises UnfitError for any other pattern.
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
    raise UnfitError("a layer's mask is neither causal, nor a window, nor blocks")


def _ask(mask_function: Callable[..., Tensor], q: Tensor, k: Tensor) -> Tensor:
    zero = torch.zeros(1, dtype=torch.long, device=q.device)
    try:
        return mask_function(zero, zero, q, k).expand(len(q))
    except (IndexError, RuntimeError) as error:
        raise UnfitError("a layer's mask depends on more than positions") from error


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not type it
    """Sees whether a forward makes positions 0 to T - 1 by itself, beside those it is given."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False
        self._num_tokens = num_tokens

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = op(*args, **(kwargs or {}))
        self.seen |= "arange" in op.name() and found.numel() == self._num_tokens
        return found


class _Notes:
    """Answers with zeros and writes down what was asked."""

    def __init__(self, num_tokens: int, max_context: int) -> None:
        self.calls: list[Call] = []
        self._num_tokens = num_tokens
        self._max_context = max_context
        self._masks: list[tuple[Tensor, Callable[..., Tensor]]] = []
        self._states: list[tuple[Tensor, Tensor]] = []

    def make_mask(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        mask_function: Callable[..., Tensor],
        *,
        device: Any = "cpu",
        **_: Any,
    ) -> Tensor:
        """transformers' call for a mask: some tensor of its shape, remembered with its function."""
        mask = torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool, device=device)
        self._masks.append((mask, mask_function))
        return mask

    def __call__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **asked: Any
    ) -> Tensor:
        strange = sorted(n for n in asked.keys() - _HARMLESS if asked[n] is not None)
        if strange:
            raise UnfitError(f"its attention asks for {', '.join(strange)}")
        if q.shape[2] != self._num_tokens or k.shape[2] != self._num_tokens or len(q) != 1:
            raise UnfitError("a layer attends to something else than the text")
        span = self._span(module, mask, asked)
        same = [i for i, old in enumerate(self._states) if _same(old[0], k) and _same(old[1], v)]
        source = same[0] if same else None
        widths = (k.shape[-1], v.shape[-1])
        self.calls.append(Call(k.shape[1], widths, k.dtype, span, source))
        self._states.append((k, v))
        return q.new_zeros(1, self._num_tokens, q.shape[1], v.shape[-1])

    def _span(self, module: nn.Module, mask: Any, asked: dict[str, Any]) -> Span:
        if mask is None:
            causal = asked.get("is_causal")
            if not (getattr(module, "is_causal", True) if causal is None else causal):
                raise UnfitError("a layer attends in both directions")
            return Span()
        for known, function in self._masks:
            if mask.untyped_storage().data_ptr() == known.untyped_storage().data_ptr():
                return span_of(function, self._max_context, known.device)
        raise UnfitError("a layer changes its mask")


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors, both alive, are the same numbers in memory."""
    return (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())


def _call(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    **asked: Any,
) -> tuple[Tensor, None]:
    return _attention.get()(module, query, key, value, attention_mask, **asked), None


def _no_attention(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("no runner has a step under way")
