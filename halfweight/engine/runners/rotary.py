"""Rotary factors that depend on a sequence's whole length, for several sequences in one row.

transformers' `longrope` takes other factors for a text longer than the original context, and
`dynamic` stretches its base with the length; both look at the highest position of the forward, so
in a shared row the longest sequence would choose for all. Here a sequence has a *length class*, the
number of boundaries that its length passes; each token's angles are made with the factors of its
class. Keys in the cache were turned by the factors of their class, and what deeper layers hold was
computed with them: where a sequence passes a boundary, the runner reads it again from its start.

`longrope` has one boundary, where its factors change. `dynamic` changes at every length; its
boundaries are the original context times powers of two, and a class has the factors of its upper
end: equal to transformers within the original context and at each boundary, between two of them
stretched as for the longer text. The factors then depend on the length alone, not on the chunks
that a text was read in.
"""

from __future__ import annotations

import inspect
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from halfweight.engine.runners.unfit import UnfitError

_STRETCHING = ("dynamic", "longrope")


@dataclass(frozen=True)
class _Factors:
    """Inverse frequencies and the factor of the cosines of one class."""

    inv_freq: Tensor
    scaling: float


def boundaries(model: nn.Module, max_context: int) -> list[int]:
    """Lengths below `max_context` beyond which a text has other rotary factors, in order."""
    modules = (module for module in model.modules() if _kinds(module))
    return sorted({b for module in modules for b in _boundaries(module, max_context)})


class LengthClasses:
    """The length classes of a model, and its rotary modules put under them; one class if none."""

    def __init__(self, model: nn.Module, max_context: int) -> None:
        """Raises UnfitError where a rotary module chooses its factors in a way of its own."""
        modules = [m for m in model.modules() if _kinds(m)]
        self.boundaries = boundaries(model, max_context)
        """Lengths; a longer sequence is in the next class."""
        self._turns = [_Turn(m, self.boundaries, max_context) for m in modules if self.boundaries]

    def class_of(self, length: int) -> int:
        """The class of a sequence of so many tokens."""
        return bisect_left(self.boundaries, length)

    @contextmanager
    def of_tokens(self, classes: Tensor) -> Iterator[None]:
        """Inside the block the row's tokens [T] have these classes."""
        for turn in self._turns:
            turn.put(classes)
        try:
            yield
        finally:
            for turn in self._turns:
                turn.remove()


class _Turn:
    """One rotary module, answered for each class in turn."""

    def __init__(self, module: nn.Module, boundaries: list[int], max_context: int) -> None:
        self._module = module
        self._forward = inspect.unwrap(type(module).forward)
        if not _chooses_as_usual(type(module).forward):
            raise UnfitError("its rotary factors depend on the length in a way of its own")
        lengths = [*boundaries, max_context]
        self._factors = {
            layer_type: [_factors(module, kind, layer_type, length) for length in lengths]
            for layer_type, kind in _kinds(module).items()
        }

    def put(self, classes: Tensor) -> None:
        """Answer for a row whose tokens [T] have these classes."""

        def forward(x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
            return self._answer(classes, x, position_ids, layer_type)

        self._module.forward = forward

    def remove(self) -> None:
        """Let the module answer by itself."""
        del self._module.forward

    def _answer(self, classes: Tensor, x: Tensor, positions: Tensor, layer_type: str | None) -> Any:
        named = {} if layer_type is None else {"layer_type": layer_type}
        if layer_type not in self._factors:
            return self._forward(self._module, x, positions, **named)
        found: Any = None
        for number, factors in enumerate(self._factors[layer_type]):
            with _factors_in(self._module, layer_type, factors):
                angles = self._forward(self._module, x, positions, **named)
            found = angles if number == 0 else _choose(classes == number, angles, found)
        return found


def _choose(of_class: Tensor, new: Any, old: Any) -> Any:
    if isinstance(new, tuple):
        return tuple(_choose(of_class, n, o) for n, o in zip(new, old, strict=True))
    axis = new.shape.index(len(of_class), 1)
    shape = [1] * new.dim()
    shape[axis] = len(of_class)
    return torch.where(of_class.view(shape), new, old)


def _chooses_as_usual(forward: Any) -> bool:
    """Whether one of a forward's decorators is transformers' `dynamic_rope_update`."""
    while forward is not None:
        if forward.__globals__["__name__"] == "transformers.modeling_rope_utils":
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def _kinds(module: nn.Module) -> dict[str | None, str]:
    """Layer type (None: all) -> rope type, of a rotary module whose factors depend on length."""
    kind = getattr(module, "rope_type", None)
    if not isinstance(module, nn.Module) or not hasattr(module, "config"):
        return {}
    kinds: dict[str | None, str] = kind if isinstance(kind, dict) else {None: str(kind)}
    return {layer: k for layer, k in kinds.items() if any(name in k for name in _STRETCHING)}


def _parameters(module: Any, layer_type: str | None) -> dict[str, Any]:
    found: dict[str, Any] = module.config.rope_parameters
    return found if layer_type is None else found[layer_type]


def _boundaries(module: Any, max_context: int) -> Iterator[int]:
    for layer_type, kind in _kinds(module).items():
        if kind == "longrope":
            first = _parameters(module, layer_type)["original_max_position_embeddings"]
            yield from [first] if first < max_context else []
        else:
            length = module.config.max_position_embeddings
            while length < max_context:
                yield length
                length *= 2


def _factors(module: Any, kind: str, layer_type: str | None, length: int) -> _Factors:
    named = {} if layer_type is None else {"layer_type": layer_type}
    place = module.inv_freq if layer_type is None else getattr(module, f"{layer_type}_inv_freq")
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](
        module.config, place.device, seq_len=length, **named
    )
    return _Factors(inv_freq, scaling)


@contextmanager
def _factors_in(module: nn.Module, layer_type: str | None, factors: _Factors) -> Iterator[None]:
    prefix = "" if layer_type is None else f"{layer_type}_"
    names = (f"{prefix}inv_freq", f"{prefix}attention_scaling")
    before = [getattr(module, name) for name in names]
    for name, value in zip(names, (factors.inv_freq, factors.scaling), strict=True):
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(module, name, value)
