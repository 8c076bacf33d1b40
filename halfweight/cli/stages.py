"""`--devices` without ranks: which layers lie on which device, and the speed to expect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from halfweight.cli.output import print_json, stderr, stdout

if TYPE_CHECKING:
    from halfweight.memory.pipeline import Pipeline
    from halfweight.memory.plan import Model


def device_names(devices: str | None) -> list[str] | None:
    """The names of a list of devices."""
    return None if devices is None else [name.strip() for name in devices.split(",")]


def say_stages(model: str, devices: Sequence[str], limits: dict[str, Any]) -> None:
    """Tell, before anything is loaded, what lies where. Raises what `plan_stages` does."""
    from halfweight.engine.pipeline.start import plan_stages

    known = ("max_sequences", "max_context", "cache_tokens", "kv_cache")
    found = plan_stages(model, devices, {k: limits[k] for k in known if limits.get(k)})
    for line in (*found.lines(), _speed(found, _rates(found))):
        stderr.print(line, highlight=False, soft_wrap=True)


def plan_on_devices(
    model: Model, devices: str, context: int, batch: int, kv_cache: Any, json_output: bool
) -> None:
    """`plan --devices`: print where the layers of a model would lie. Raises as `plan_stages`."""
    from halfweight.engine.pipeline.start import place_on

    limits = {"max_context": context, "max_sequences": batch, "kv_cache": kv_cache}
    found = place_on(model, "int8", device_names(devices) or [], limits)
    rates = _rates(found)
    if json_output:
        print_json(_document(found, rates))
        return
    for line in (*found.lines(), _speed(found, rates)):
        stdout.print(line, highlight=False, soft_wrap=True)


def _rates(found: Pipeline) -> dict[str, float]:
    """Bytes a second that each device reads, as measured now."""
    import torch

    from halfweight.kernels.timing import read_bandwidth

    return {stage.device: read_bandwidth(torch.device(stage.device)) for stage in found.stages}


def _speed(found: Pipeline, rates: dict[str, float]) -> str:
    times = ", ".join(
        f"{stage.device} {1000 * part.read / rates[stage.device]:.1f} ms"
        for stage, part in zip(found.stages, found.parts, strict=True)
    )
    most = 1 / found.seconds(rates)
    return f"at most {most:.1f} tokens a second of one text, by the bytes read: {times}"


def _document(found: Pipeline, rates: dict[str, float]) -> dict[str, Any]:
    stages = [
        {
            "device": stage.device,
            "layers": [stage.begin, stage.end],
            "runner": part.runner,
            "weight_bytes": part.footprint.weight_bytes,
            "cache_bytes": found.cache_tokens * part.cache_token,
            "num_bytes": part.num_bytes(found.cache_tokens),
            "read_bytes": part.read,
            "read_bandwidth": rates[stage.device],
        }
        for stage, part in zip(found.stages, found.parts, strict=True)
    ]
    return {
        "stages": stages,
        "max_context": found.max_context,
        "cache_tokens": found.cache_tokens,
        "tokens_per_second": 1 / found.seconds(rates),
    }
