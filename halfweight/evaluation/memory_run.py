"""A plan measured: the same workload run in a process of its own, its memory by component.

On a GPU, torch's allocator says what weights, cache and steps held, nvidia-smi what the process
takes of the device in all; other processes should leave the device alone meanwhile. The total is
the most that it took: what torch had reserved at its peak and has given back since is added. On a
CPU the total is the process's largest resident set: mapped weights count, as every page of them is
touched.

The components add up to the total.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from halfweight.errors import HalfweightError
from halfweight.evaluation.speed.process import from_fresh_process
from halfweight.memory.cache_bytes import page_slots
from halfweight.memory.devices import local_device, process_bytes, processor_device
from halfweight.memory.engine_memory import PAGE_TOKENS
from halfweight.memory.measurements import Record, key_of
from halfweight.memory.plan import PASSING_PARTS, WEIGHT_PARTS, Model, footprint
from halfweight.memory.workload import Weights, Workload

STEPS = 3
"""Decode steps: the first allocates and compiles, the second is recorded, the third replayed."""
LEAST_STEP_TOKENS = 2048
"""Tokens of prompts that a runner on a GPU reads in a step, at least."""
PREDICTED = {
    "weights": WEIGHT_PARTS,
    "KV cache": ("KV cache",),
    "activations": PASSING_PARTS,
}
"""Component measured -> the plan's parts that it is compared with."""


@dataclass(frozen=True)
class Seen:
    """Bytes by component, and the most that the process took of its device."""

    components: dict[str, int]
    total: int


def measure(folder: str, model: Model, workload: Workload, weights: Weights) -> Record:
    """Run `workload` on the model in `folder` and compare with its plan.

    Raises HalfweightError with the line of the error that ended the process.
    """
    device = local_device() if workload.device == "cuda" else processor_device()
    tokens = cache_tokens(model, workload, weights)
    try:
        (seen,) = from_fresh_process(run_once, folder, workload, tokens)
    except RuntimeError as error:
        raise HalfweightError(
            f"measuring {folder}: {error}", hint="`halfweight plan` says what would fit"
        ) from error
    planned = footprint(model, workload, weights)
    predicted = {name: planned.bytes_of(*parts) for name, parts in PREDICTED.items()}
    predicted["context etc."] = planned.overhead.likely
    rest = seen.total - sum(seen.components.values())
    return Record(
        key_of(device, model.architecture),
        {
            "context": workload.context,
            "batch": workload.batch,
            "kv_dtype": workload.kv_dtype,
            "weights": weights,
        },
        predicted,
        {**seen.components, "context etc.": rest},
        planned.allocated,
        planned.slack,
        planned.total.likely,
        seen.total,
    )


def cache_tokens(model: Model, workload: Workload, weights: Weights) -> int:
    """Tokens of cache that the workload takes: each sequence's last page counts whole."""
    runner = model.runner(workload, weights)
    assert runner is not None, workload.runtime
    return page_slots(workload, runner) - PAGE_TOKENS[runner]


def run_once(folder: str, workload: Workload, tokens: int) -> Iterator[Seen]:
    """Load and generate in this process, which should be fresh, with so many tokens of cache."""
    run = _on_gpu if workload.device == "cuda" else _on_cpu
    yield run(folder, workload, tokens)


def _on_gpu(folder: str, workload: Workload, tokens: int) -> Seen:
    before = _free_bytes()
    import torch

    from halfweight.model.loading import load

    model = load(folder, device=torch.device("cuda", 0))
    torch.cuda.synchronize()
    weights = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    cache = _generate(model, workload, tokens)
    torch.cuda.synchronize()
    components = {
        "weights": weights,
        "KV cache": cache,
        "activations": torch.cuda.max_memory_allocated() - weights - cache,
    }
    given_back = torch.cuda.max_memory_reserved() - torch.cuda.memory_reserved()
    return Seen(components, before - _free_bytes() + given_back)


def _on_cpu(folder: str, workload: Workload, tokens: int) -> Seen:
    from halfweight.model.loading import load

    model = load(folder)
    weights = {p.data_ptr(): _touched(p) for p in model.parameters()}
    resident = process_bytes("VmRSS")
    cache = _generate(model, workload, tokens)
    total = process_bytes("VmHWM")
    components = {
        "weights": sum(weights.values()),
        "KV cache": cache,
        "activations": max(0, total - resident - cache),
    }
    return Seen(components, total)


def _generate(model: Any, workload: Workload, tokens: int) -> int:
    """All of the workload, its sequences decoding together at the end; bytes of the pages."""
    from halfweight.engine.engine import Engine
    from halfweight.engine.request import Sampling
    from halfweight.engine.runners import make_runner
    from halfweight.engine.sampler import Sampler
    from halfweight.evaluation.speed.generate import random_prompts

    batch, context = workload.batch, workload.context
    runner = make_runner(
        model,
        max_sequences=batch,
        max_context=context,
        cache_tokens=tokens,
        kv_cache=workload.kv_dtype,
    )
    cache = runner.cache_bytes
    reading = -(-batch * context // LEAST_STEP_TOKENS) if workload.device == "cuda" else 0
    new = min(STEPS + reading, context // 2)
    with Engine.over(runner, Sampler(runner.table, runner.vocab_size), None) as engine:
        prompts = random_prompts(model, batch, context - new)
        options: dict[str, Any] = {"max_new_tokens": new, "sampling": Sampling(), "stop_tokens": ()}
        for answer in engine.generate(prompts, **options):
            if answer.error is not None:
                raise answer.error
    return cache


def _free_bytes() -> int:
    return local_device().free_bytes


def _touched(parameter: Any) -> int:
    """Bytes of a parameter, each page of which has been read."""
    import torch

    parameter.detach().reshape(-1).view(torch.uint8)[::4096].sum()
    return int(parameter.nbytes)
