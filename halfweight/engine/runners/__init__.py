"""Runners turn a step into logits; `make_runner` chooses one for a model, once, and says why.

`gpu.py` and `cpu.py` run Llama-like models by kernels of ours, `transformers_paged.py` any model
whose attention goes through transformers' interface, `static.py` the rest. Each says by its own
check whether it runs a model, with UnfitError and the reason if not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from halfweight.engine.runners.unfit import UnfitError
from halfweight.engine.stops import context_tokens
from halfweight.engine.transfer import on_device
from halfweight.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from halfweight.engine.step import KvCache, Runner

__all__ = ["UnfitError", "make_runner"]

log = logging.getLogger("halfweight")

MOST_SEQUENCES = {"cuda": 256, "cpu": 32}
"""Sequences at once by the type of device: past these a step takes so much longer that no more
tokens come of it."""
UNLIMITED_CONTEXT = 32_768
"""For models that set no limit."""
LEAST_CONTEXT = 16
"""Tokens that a runner must hold of a sequence."""


def make_runner(
    model: PreTrainedModel,
    *,
    max_sequences: int | None = None,
    max_context: int | None = None,
    cache_tokens: int | None = None,
    kv_cache: KvCache = "16bit",
) -> Runner:
    """The quickest runner that gives this model's logits; one log line names it and why.

    `max_context` is by default the model's own, or less where memory is short; `cache_tokens`, the
    size of the pool of pages, what the device has room for. Raises UsageError where no runner can,
    DoesNotFitError where memory is short.
    """
    kind, shortens = model.device.type, max_context is None
    max_sequences = max_sequences or MOST_SEQUENCES.get(kind, MOST_SEQUENCES["cpu"])
    max_context = max_context or context_tokens(model.config) or UNLIMITED_CONTEXT
    if max_context < LEAST_CONTEXT:
        raise UsageError(
            f"max_context is {max_context}, expected at least {LEAST_CONTEXT}",
            hint="runners try a model with a short text before they take it",
        )
    reasons: list[str] = []
    for name, make in _runners(kind):
        try:
            with on_device(model.device):
                runner: Runner = make(
                    model,
                    max_sequences=max_sequences,
                    max_context=max_context,
                    cache_tokens=cache_tokens,
                    kv_cache=kv_cache,
                    **({"shortens": shortens} if name in ("gpu", "cpu") else {}),
                )
        except UnfitError as error:
            reasons.append(f"not {name}: {error.message}")
            continue
        why = "; ".join([describe(runner), *reasons])
        log.info("%s runs by the %s runner: %s", type(model).__name__, name, why)
        return runner
    raise AssertionError("the static runner takes every model or raises UsageError")


def describe(runner: Runner) -> str:
    """What a user should know of a runner: sequences, cache, and what it cannot."""
    own = getattr(runner, "description", "")
    tokens = (runner.num_pages - 1) * runner.page_tokens
    longest = min(runner.max_context, tokens)
    found = [
        f"up to {runner.max_sequences} sequences of {longest} tokens, {tokens} tokens of cache"
    ]
    if not runner.shares_prefixes:
        found.append("no shared prefixes")
    return ", ".join([*found, own] if own else found)


def _runners(device_type: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Names and classes of the runners for a device, quickest first."""
    own = {"cuda": ("gpu", "GpuRunner"), "cpu": ("cpu", "CpuRunner")}.get(device_type)
    classes = [own] if own and find_spec(f"{__name__}.{own[0]}") else []
    classes += [("transformers_paged", "TransformersRunner"), ("static", "StaticRunner")]
    for module, name in classes:
        yield module.removesuffix("_paged"), getattr(import_module(f"{__name__}.{module}"), name)
