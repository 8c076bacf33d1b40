"""A plan as one self-contained HTML page: bars, heat map, sliders that recompute in the page.

The page holds what the planner's arithmetic needs (sums of weights by runtime and group size, the
cache's layers, sizes) and that arithmetic again in JavaScript; a test compares both over a grid.
It loads nothing: no network, no fonts, no libraries.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from dataclasses import asdict, replace
from importlib.resources import files
from typing import Any

from halfweight.memory import engine_memory, transient
from halfweight.memory.cache_bytes import kind_of_layer
from halfweight.memory.cards import Gpus
from halfweight.memory.commands import OUT, gpu_share, quantize_command, source_words
from halfweight.memory.plan import Model, Plan, legal_ranks, on_ranks
from halfweight.memory.tensor_parallel import KINDS
from halfweight.memory.what_fits import grid_axes, with_group_size
from halfweight.memory.workload import COMMUNICATION_OVERHEAD, SLACK_DIVISOR
from halfweight.quantization.scheme import GROUP_SIZES

SIZES = (
    "hidden",
    "intermediate",
    "heads",
    "kv_heads",
    "head_dim",
    "vocabulary",
    "fused_mlp",
    "fused_attention",
    "experts_per_token",
)
CONSTANTS = {
    transient: ("CHUNK_TOKENS", "CUBLAS_WORKSPACE_BYTES", "MULTIPROCESSORS", "PARTIAL_SUMS"),
    engine_memory: (
        *(
            "PAGE_TOKENS",
            "STEP_TOKENS",
            "FEW_TOKENS",
            "FEW_SEQUENCES",
            "READ_TOKENS",
            "SMALL_BUCKETS",
        ),
        *("BUCKET_STEP", "DECODE_PROGRAMS", "MIN_DOT_ROWS", "TILE_ROWS"),
    ),
}
"""What the arithmetic takes from these modules."""
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def render(found: Plan, gpus: Gpus, name: str = "", *, plugin: bool = False) -> str:
    """The page's HTML; `name` of the model as it was given, `plugin` as for `commands`."""
    folder = files("halfweight.memory")
    page = (folder / "plan_page.html").read_text()
    data = json.dumps(page_data(found, gpus, name, plugin=plugin)).replace("<", "\\u003c")
    for mark, text in (
        ("/*ARITHMETIC*/", (folder / "plan_arithmetic.js").read_text()),
        ("/*DATA*/null", data),
    ):
        assert page.count(mark) == 1, mark
        page = page.replace(mark, text)
    return page


def page_data(found: Plan, gpus: Gpus, name: str = "", *, plugin: bool = False) -> dict[str, Any]:
    """All that the page computes from."""
    model, work, a = found.model, found.workload, found.model.architecture
    by_group = _by_group(model)
    runtimes = {w.runtime: w for w in (on_ranks(model, work, 2), replace(work, ranks=1))}
    batches, contexts = grid_axes(model, work)
    is_made = model.recipe is None
    name = name or a.name
    return {
        "name": a.name,
        "parameters": a.num_parameters,
        "architecture": {name: getattr(a, name) for name in SIZES},
        "layers": [
            {**asdict(layer), "count": count, "kind": kind_of_layer(layer)}
            for layer, count in Counter(a.cache_layers).items()
        ],
        "weights": {
            runtime: {
                "16bit": model.weight_sums("16bit", runtime),
                "int8": {g: m.weight_sums("int8", runtime) for g, m in by_group.items()},
            }
            for runtime in runtimes
        },
        "legalRanks": {g: legal_ranks(m) for g, m in by_group.items()},
        "runtime": work.runtime,
        "isShared": a.kind in KINDS,
        "communication": asdict(COMMUNICATION_OVERHEAD),
        "device": work.device,
        "constants": {n: getattr(module, n) for module, names in CONSTANTS.items() for n in names},
        "slackDivisor": SLACK_DIVISOR,
        "runners": {g: m.runner(replace(work, ranks=1), "int8") for g, m in by_group.items()},
        "process": {r: asdict(w.expected_overhead) for r, w in runtimes.items()},
        "gpu": gpus.name,
        "budget": found.budget,
        "work": {
            "context": work.context,
            "batch": work.batch,
            "ranks": work.ranks,
            "groupSize": _group_size(model),
            "kvDtype": work.kv_dtype,
        },
        "stops": {
            "context": contexts,
            "batch": sorted({*BATCHES, work.batch}),
            "groupSize": list(by_group),
        },
        "grid": {"batch": batches, "context": contexts},
        "commands": {
            "quantize": None if is_made else _quantize_commands(by_group, name, plugin),
            "source": "" if is_made else source_words(name, a.name),
            "folder": shlex.quote(name) if is_made else OUT,
            "madeInGroupsOf": _group_size(model) if is_made else None,
            "gpuShare": gpu_share(found.budget, gpus.num_bytes),
        },
    }


def _quantize_commands(
    by_group: dict[str, Model], name: str, plugin: bool
) -> dict[str, dict[str, str]]:
    """For each runtime that has one, what makes the file in groups of each size."""
    return {
        runtime: {
            g: quantize_command(name, m, for_vllm=runtime == "vllm" and not plugin)
            for g, m in by_group.items()
        }
        for runtime in ("halfweight", "vllm")
    }


def _group_size(model: Model) -> str:
    """Of the largest quantized weight: others may have had to take a smaller one."""
    if model.recipe is not None:
        return str(model.recipe.scheme.group_size)
    sizes = [(d.tensor.num_elements, d.scheme.group_size) for d in model.decisions if d.scheme]
    return str(max(sizes, key=lambda pair: pair[0])[1])


def _by_group(model: Model) -> dict[str, Model]:
    """The model in groups of each size; as it is for its own."""
    own = _group_size(model)
    sizes = {str(g): model if str(g) == own else with_group_size(model, g) for g in GROUP_SIZES}
    return sizes if own in sizes else {**sizes, own: model}
