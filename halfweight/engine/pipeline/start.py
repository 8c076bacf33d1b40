"""From a model's name and devices to a runner over stages."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from halfweight.checkpoint.headers import Checkpoint, quantized_modules, read_headers, resolve
from halfweight.engine.pipeline.runner import StagedRunner
from halfweight.engine.runners import MOST_SEQUENCES, make_runner
from halfweight.engine.runners.gpu_memory import FIXED_BYTES
from halfweight.engine.step import Runner
from halfweight.engine.transfer import on_device
from halfweight.errors import DoesNotFitError, UsageError
from halfweight.memory.device_memory import available_bytes, indexed, named_device, out_of_memory
from halfweight.memory.devices import processor_device
from halfweight.memory.engine_memory import PAGE_TOKENS
from halfweight.memory.pipeline import Limits, Pipeline, Place, StageBytes, place_layers
from halfweight.memory.plan import Model
from halfweight.memory.workload import Weights
from halfweight.model.loading import load_checkpoint
from halfweight.model.share import described
from halfweight.model.stage import load_stage, stage_part
from halfweight.model.weight_reader import Progress

log = logging.getLogger("halfweight")

LESS = "ask for fewer cache_tokens, fewer sequences or a shorter context"
AUTO = "auto"
"""In place of devices: all GPUs, and the CPU for what they do not hold."""
CPU_SHARE = 0.8
"""Part of the machine's free memory that stages may take."""


@dataclass(frozen=True)
class Running:
    """A runner over all stages, and the model of the first."""

    runner: Runner
    model: Any


def plan_stages(
    model: str | os.PathLike[str], devices: Sequence[str], limits: dict[str, Any]
) -> Pipeline:
    """Which layers would lie where; loads nothing.

    `limits` are those of `make_runner`. Raises UsageError for a device that is not there or a model
    that no stages run, DoesNotFitError where the devices are too small.
    """
    folder = resolve(os.fspath(model))
    weights: Weights = "int8" if quantized_modules(read_headers(folder)) else "16bit"
    return place_on(described(folder), weights, devices, limits)


def place_on(
    model: Model, weights: Weights, devices: Sequence[str], limits: dict[str, Any]
) -> Pipeline:
    """The same for a model as plans know it, which need not be here."""
    places = find_places(devices)
    found = place_layers(model, places, _asked(limits, places), weights)
    used = {stage.kind for stage in found.stages}
    without_cpu = [place for place in places if place.kind in used]
    if len(without_cpu) < len(places):
        with suppress(DoesNotFitError):  # GPUs alone run more sequences, which take more
            return place_layers(model, without_cpu, _asked(limits, without_cpu), weights)
    return found


def _asked(limits: dict[str, Any], places: Sequence[Place]) -> Limits:
    """As many sequences as the slowest kind of device is good for, if no number is given."""
    most = min(MOST_SEQUENCES[place.kind] for place in places)
    return Limits(**{**limits, "max_sequences": limits.get("max_sequences") or most})


def start(
    model: str | os.PathLike[str],
    devices: Sequence[str],
    loading: dict[str, Any],
    limits: dict[str, Any],
) -> Running:
    """Run a model on devices one after the other.

    `loading` are options of `halfweight.load` without the device. Raises what `plan_stages` does
    before a weight is read, then what loading does.
    """
    pipeline = plan_stages(model, devices, limits)
    for line in pipeline.lines():
        log.info("%s", line)
    checkpoint = read_headers(resolve(os.fspath(model)))
    if len(pipeline.stages) == 1:
        whole = load_checkpoint(checkpoint, device=pipeline.stages[0].device, **loading)
        return Running(make_runner(whole, **limits), whole)
    models = _load(checkpoint, pipeline, loading)
    own: dict[str, Any] = {
        "max_sequences": pipeline.max_sequences,
        "max_context": pipeline.max_context,
        "kv_cache": limits.get("kv_cache") or "16bit",
    }
    runners = []
    for loaded, part in zip(models, pipeline.parts, strict=True):
        own["cache_tokens"] = _tokens_of(part, pipeline)
        with out_of_memory(loaded.device, "a stage", hint=LESS):
            runners.append(make_runner(loaded, **own))
        _refuse_what_keeps_more(runners[-1], loaded)
    return Running(StagedRunner(models, runners, pipeline.step_tokens), models[0])


def _tokens_of(part: StageBytes, pipeline: Pipeline) -> int:
    """Tokens of cache of a stage, so that its pages are the largest stage's, with page 0, or parts
    of these.
    """
    largest = max(PAGE_TOKENS[other.runner] for other in pipeline.parts)
    whole = -(-pipeline.cache_tokens // largest) * largest
    return whole + largest - PAGE_TOKENS[part.runner]


def _load(checkpoint: Checkpoint, pipeline: Pipeline, loading: dict[str, Any]) -> list[Any]:
    """The models of all stages, one after the other; progress is told of the whole."""
    parts = [stage_part(checkpoint, stage) for stage in pipeline.stages]
    total, tell = sum(part.num_bytes for part in parts), loading.pop("progress", None)
    models, done = [], 0
    for stage, part in zip(pipeline.stages, parts, strict=True):
        progress = None if tell is None else _after(done, total, tell)
        with on_device(torch.device(stage.device)):
            loaded = load_stage(part, stage, pipeline.step_tokens, progress=progress, **loading)
        models.append(loaded)
        done += part.num_bytes
    return models


def _after(before: int, total: int, tell: Progress) -> Progress:
    """Progress of a part that `before` bytes come before."""
    return lambda done, _: tell(before + done, total)


def _refuse_what_keeps_more(runner: Runner, model: Any) -> None:
    """A stage's runner reads a token once, when its states are there."""
    if hasattr(runner, "release") or not runner.shares_prefixes:
        raise UsageError(
            f"{type(model).__name__} with this configuration reads a text again as it grows, which "
            "stages cannot",
            hint="run it on one device",
        )


def find_places(devices: Sequence[str]) -> list[Place]:
    """The devices and what each has free; one that is named twice gives half to each.

    Raises UsageError for one that is not there.
    """
    if list(devices) == [AUTO]:
        devices = [*(f"cuda:{i}" for i in range(torch.cuda.device_count())), "cpu"]
    names = [_checked(name) for name in devices]
    return [
        Place(str(device), "cuda" if device.type == "cuda" else "cpu", _room(device) // count)
        for device in names
        for count in (names.count(device),)
    ]


def _checked(name: str) -> torch.device:
    device = named_device(name)
    count = torch.cuda.device_count()
    if device.type not in ("cuda", "cpu"):
        raise UsageError(f"device {name!r} is not known", hint="name each as cuda:0, cuda:1 or cpu")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UsageError(
            f"there is no {name}: this machine has {count} GPUs",
            hint="leave it out, or --devices auto takes what there is",
        )
    return indexed(device) if device.type == "cuda" else torch.device("cpu")


def _room(device: torch.device) -> int:
    free = available_bytes(device)
    if free is None:
        return int(processor_device().free_bytes * CPU_SHARE)
    return free - FIXED_BYTES
