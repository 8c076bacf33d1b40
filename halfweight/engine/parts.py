"""From a model's name, or a model that is loaded, to the parts that an engine is made of."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from halfweight.checkpoint.headers import resolve
from halfweight.engine.request import Sampling
from halfweight.engine.runners import make_runner
from halfweight.engine.step import Runner
from halfweight.engine.stops import default_sampling, end_of_text_tokens
from halfweight.errors import UsageError
from halfweight.memory.device_memory import DEVICE_HINT
from halfweight.model.tokenizer import has_tokenizer, open_tokenizer

if TYPE_CHECKING:
    from halfweight.engine.sampler import Sampler

log = logging.getLogger("halfweight")


class Parts(NamedTuple):
    """What runs, and what the model's files say about its use."""

    runner: Runner
    sampler: Sampler
    tokenizer: Any
    """None where there is none: prompts and answers are then token ids."""
    stop_tokens: frozenset[int]
    sampling: Sampling
    name: str = "the model"
    """As errors call it: what it was loaded from."""


def make_parts(
    model: Any,
    tokenizer: Any,
    loading: dict[str, Any],
    limits: dict[str, Any],
    ranks: int = 1,
    devices: Sequence[str] | None = None,
) -> Parts:
    """The parts for a folder, a Hub id or a model that is loaded.

    `loading` are options of `halfweight.load`, `limits` of `make_runner`; raises what they do, and
    for several ranks what `parallel.start` does, for several devices what `pipeline.start` does.
    """
    from halfweight.engine.grammar import GrammarCompiler
    from halfweight.engine.sampler import Sampler

    if ranks > 1:
        loaded, runner = _start_ranks(model, loading, limits, ranks, devices)
    elif devices:
        loaded, runner = _start_stages(model, loading, limits, devices)
    else:
        loaded = _load(model, **loading)
        runner = make_runner(loaded, **limits)
    tokenizer = _tokenizer_of(model) if tokenizer is None else tokenizer
    generation = getattr(loaded, "generation_config", None)
    stops = end_of_text_tokens(generation, loaded.config, tokenizer)
    grammars = None
    if tokenizer is not None:
        grammars = GrammarCompiler(tokenizer, runner.vocab_size, sorted(stops))
    sampler = Sampler(runner.table, runner.vocab_size, grammars=grammars)
    name = os.fspath(model) if isinstance(model, str | os.PathLike) else type(model).__name__
    return Parts(runner, sampler, tokenizer, stops, default_sampling(generation), name)


def _start_ranks(
    model: Any,
    loading: dict[str, Any],
    limits: dict[str, Any],
    ranks: int,
    devices: Sequence[str] | None,
) -> tuple[Any, Runner]:
    """Rank 0's part of a model and its runner."""
    from halfweight.engine.parallel.start import start

    _require_name(model)
    if devices is None and loading["device"] is not None:
        devices = [str(loading["device"])] * ranks
    running = start(model, ranks, devices, loading, limits)
    return running.model, running.runner


def _start_stages(
    model: Any, loading: dict[str, Any], limits: dict[str, Any], devices: Sequence[str]
) -> tuple[Any, Runner]:
    """The first stage's model and the runner over all."""
    from halfweight.engine.pipeline.start import start

    _require_name(model)
    options = {name: value for name, value in loading.items() if name != "device"}
    running = start(model, devices, options, limits)
    return running.model, running.runner


def _require_name(model: Any) -> None:
    if not isinstance(model, str | os.PathLike):
        raise UsageError(
            "several devices load a model by themselves, and this one is loaded",
            hint="give the model's name",
        )


def _load(model: Any, **options: Any) -> Any:
    """A model by its name, or as it is."""
    from halfweight.model.loading import load

    if not isinstance(model, str | os.PathLike):
        given = [name for name, value in options.items() if value not in (None, "exact")]
        if given:
            raise UsageError(
                f"{given[0]!r} is for models that are loaded here, and this one is loaded",
                hint="leave it out, or give the model's name",
            )
        return model
    if options["device"] is None:
        options["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if str(options["device"]) == "meta":
        raise UsageError("device is meta, where nothing is computed", hint=DEVICE_HINT)
    return load(model, **options)


def _tokenizer_of(model: Any) -> Any:
    """The tokenizer in a model's folder, or None: prompts and answers are then token ids."""
    if not isinstance(model, str | os.PathLike):
        return None
    path = resolve(os.fspath(model))
    return open_tokenizer(path) if has_tokenizer(path) else None
