"""A plan measured: the same workload run in a process of its own, its memory by component.

On a GPU, torch's allocator says what weights, cache and prefill held, nvidia-smi what the process
takes of the device in all after prefill, and the driver how much more after each step; other
processes should leave the device alone meanwhile. The total is the most that it took: torch keeps
what prefill reserved until the decode step's graph is recorded and then gives it back, so a total
seen at the end would be short. On a CPU the total is the process's largest resident set: mapped
weights count, as every page of them is touched.

The components add up to the total. "decode step" is by how much it grew after prefill: nothing,
as a rule, for a step lives in what prefill has left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from halfweight.errors import HalfweightError
from halfweight.evaluation.speed.process import from_fresh_process
from halfweight.memory.devices import local_device, process_bytes, processor_device
from halfweight.memory.measurements import Record, key_of
from halfweight.memory.plan import WEIGHT_PARTS, Model, footprint
from halfweight.memory.workload import Weights, Workload

STEPS = 3
"""Decode steps: the first allocates and compiles, the second is recorded, the third replayed."""
PREDICTED = {
    "weights": WEIGHT_PARTS,
    "KV cache": ("KV cache",),
    "activations": ("prefill activations", "logits", "kernel workspace"),
    "decode step": ("decode step",),
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
    try:
        (seen,) = from_fresh_process(run_once, folder, workload)
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


def run_once(folder: str, workload: Workload) -> Iterator[Seen]:
    """Load, prefill and decode in this process, which should be a fresh one."""
    yield _on_gpu(folder, workload) if workload.device == "cuda" else _on_cpu(folder, workload)


def _on_gpu(folder: str, workload: Workload) -> Seen:
    before = _free_bytes()
    import torch

    from halfweight.model.loading import load

    device = torch.device("cuda", 0)
    model = load(folder, device=device)
    torch.cuda.synchronize()
    weights = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    decoder, logits = _prefill(model, workload)
    torch.cuda.synchronize()
    cache, held = _cache_bytes(decoder), torch.cuda.max_memory_allocated()
    prefilled, left, growth = before - _free_bytes(), torch.cuda.mem_get_info()[0], 0
    for _ in _decode(decoder, logits):
        torch.cuda.synchronize()
        growth = max(growth, left - torch.cuda.mem_get_info()[0])
    components = {
        "weights": weights,
        "KV cache": cache,
        "activations": held - weights - cache,
        "decode step": growth,
    }
    return Seen(components, prefilled + growth)


def _on_cpu(folder: str, workload: Workload) -> Seen:
    from halfweight.model.loading import load

    model = load(folder)
    weights = {p.data_ptr(): _touched(p) for p in model.parameters()}
    resident = process_bytes("VmRSS")
    decoder, logits = _prefill(model, workload)
    cache = _cache_bytes(decoder)
    prefilled = process_bytes("VmHWM")
    for _ in _decode(decoder, logits):
        pass
    total = process_bytes("VmHWM")
    components = {
        "weights": sum(weights.values()),
        "KV cache": cache,
        "activations": max(0, prefilled - resident - cache),
        "decode step": total - prefilled,
    }
    return Seen(components, total)


def _free_bytes() -> int:
    return local_device().free_bytes


def _touched(parameter: Any) -> int:
    """Bytes of a parameter, each page of which has been read."""
    import torch

    parameter.detach().reshape(-1).view(torch.uint8)[::4096].sum()
    return int(parameter.nbytes)


def _prefill(model: Any, workload: Workload) -> tuple[Any, Any]:
    """A decoder for the workload, its prompts read, room left for the steps."""
    from halfweight.engine.decoder import Decoder

    length = max(1, workload.context - STEPS)
    kind = workload.kv_dtype
    decoder = Decoder(model, workload.batch, workload.context, kv_cache=kind, step="kernel")
    return decoder, decoder.prefill([[1] * length] * workload.batch)


def _decode(decoder: Any, logits: Any) -> Iterator[None]:
    """Steps, one each time it is asked."""
    for _ in range(STEPS):
        logits = decoder.advance(logits.argmax(dim=-1))
        yield


def _cache_bytes(decoder: Any) -> int:
    """Bytes of all keys, values and scales that the decoder's cache has allocated."""
    names = ("keys", "values", "key_scales", "value_scales")
    tensors = (getattr(layer, n, None) for layer in decoder._cache.layers for n in names)
    return sum(t.nbytes for t in tensors if t is not None)
