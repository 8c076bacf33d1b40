"""What fits: the largest batch or context, fewest GPUs, finest groups; remedies; refusal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from halfweight.errors import DoesNotFitError
from halfweight.memory.plan import Model, Plan, footprint, legal_ranks
from halfweight.memory.workload import GIB, Range, Weights, Workload
from halfweight.quantization.scheme import GROUP_SIZES, Recipe, Scheme

Quantity = Literal["batch", "context", "gpus", "group-size"]
MOST_BATCH = 1 << 20
MOST_CONTEXT = 1 << 24
"""Where the model itself sets no limit."""


def fits(model: Model, workload: Workload, budget: int, weights: Weights = "int8") -> bool:
    """Whether even the high estimate fits."""
    return footprint(model, workload, weights).judge(budget) == "fits"


def solve(
    model: Model, workload: Workload, budget: int, quantity: Quantity, weights: Weights = "int8"
) -> int | None:
    """The largest batch or context, the fewest GPUs or the smallest group whose high estimate fits.

    None if none does. A larger group takes fewer bytes and loses more: the finest that fits is the
    best. A context is at most the model's own, or what the workload asks for beyond that.
    """
    if quantity == "gpus":
        ranks = (
            n for n in legal_ranks(model) if fits(model, workload.on_ranks(n), budget, weights)
        )
        return next(ranks, None)
    if quantity == "group-size":
        regrouped = ((g, with_group_size(model, g)) for g in GROUP_SIZES)
        return next((g for g, changed in regrouped if fits(changed, workload, budget)), None)
    own = model.architecture.max_context or MOST_CONTEXT
    most = MOST_BATCH if quantity == "batch" else max(own, workload.context)

    def holds(n: int) -> bool:
        changed = replace(workload, batch=n) if quantity == "batch" else None
        return fits(model, changed or replace(workload, context=n), budget, weights)

    return _largest(holds, most)


def with_group_size(model: Model, group_size: int) -> Model:
    """The same model quantized in groups of another size."""
    scheme = next((d.scheme for d in model.decisions if d.scheme), Scheme())
    keep = tuple(d.tensor.name for d in model.decisions if d.scheme is None)
    recipe = model.recipe or Recipe(scheme, keep)
    scheme = replace(recipe.scheme, group_size=group_size)
    changed = replace(recipe, scheme=scheme, requantize=True)
    return Model.from_recipe(model.architecture, changed)


def _largest(holds: Callable[[int], bool], most: int) -> int | None:
    """The largest n in 1..most with holds(n), which is true up to some n and not beyond."""
    if not holds(1):
        return None
    good, bad = 1, most + 1
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    return good


@dataclass(frozen=True)
class Cell:
    """Bytes a GPU of the INT8 model at one batch and context."""

    batch: int
    context: int
    total: Range


def grid(
    model: Model, workload: Workload, batches: Sequence[int], contexts: Sequence[int]
) -> Iterator[Cell]:
    """The INT8 model at every batch and context, row by row."""
    for batch in batches:
        for context in contexts:
            work = replace(workload, batch=batch, context=context)
            yield Cell(batch, context, footprint(model, work, "int8").total)


def grid_axes(model: Model, workload: Workload) -> tuple[list[int], list[int]]:
    """Powers of two around the workload: batches 1..64, contexts 512 to the model's own."""
    most = max(model.architecture.max_context or 32768, workload.context)
    contexts = [n for n in (2**i for i in range(9, 21)) if n <= most]
    batches = {1, 2, 4, 8, 16, 32, 64, workload.batch}
    return sorted(batches), sorted({*contexts, workload.context})


def by_another_runtime(work: Workload, gpus: int) -> str:
    """What to add to an answer in GPUs: who runs it, where that is not who was asked for."""
    runtime = work.on_ranks(gpus).runtime
    return "" if runtime == work.runtime else f", with --runtime {runtime}"


def notes(found: Plan) -> list[str]:
    """What a user should know of the question itself."""
    a, context = found.model.architecture, found.workload.context
    if not a.cache_layers:
        return [f"{a.name} reads and does not write: it keeps no KV cache"]
    if a.max_context is not None and context > a.max_context:
        return [f"{a.name} has positions for {a.max_context:,} tokens, not for {context:,}"]
    return []


def advice(found: Plan) -> list[str]:
    """What would make the INT8 model fit, each by how much; empty if it fits."""
    if found.budget is None or found.verdict == "fits":
        return []
    model, work, budget = found.model, found.workload, found.budget
    over = found.int8.total.high - budget
    lines = [f"{over / GIB:.2f} GiB ({over / 1e9:.2f} GB) too much a {_device(work)} at most"]
    quantities: tuple[tuple[Quantity, str, int], ...] = (
        ("batch", "batch", work.batch),
        ("context", "context", work.context),
        ("gpus", "GPUs", work.ranks),
    )
    for quantity, word, now in quantities:
        if quantity == "gpus" and work.device == "cpu":
            continue
        value = solve(model, work, budget, quantity)
        if value is not None and value != now:
            by = by_another_runtime(work, value) if quantity == "gpus" else ""
            lines.append(f"{word} {value} instead of {now} fits{by}")
    if work.kv_dtype == "16bit":
        smaller = footprint(model, replace(work, kv_dtype="int8"), "int8")
        if (saved := found.int8.total.high - smaller.total.high) > 0:
            verdict = smaller.judge(budget)
            lines.append(f"--kv-dtype int8 saves {saved / GIB:.2f} GiB: {verdict}")
    return lines


def _device(workload: Workload) -> str:
    return "GPU" if workload.device == "cuda" else "machine"


def require_fit(
    model: Model, workload: Workload, free_bytes: int, *, weights: Weights = "int8"
) -> None:
    """Raise DoesNotFitError if the least that the workload takes exceeds `free_bytes`.

    `free_bytes` is what the process can still allocate, so the overhead is not counted; nor are
    kernel workspace and recorded steps, which a backend may do without.
    """
    found = footprint(model, workload, weights)
    needed = found.allocated - found.bytes_of("kernel workspace", "recorded steps")
    if needed > free_bytes:
        alone = replace(workload, overhead=Range(0, 0, 0))
        batch = solve(model, alone, free_bytes, "batch", weights)
        remedy = f"batch {batch} fits" if batch else "no batch fits at this context"
        raise DoesNotFitError(
            f"batch {workload.batch} of {workload.context} tokens needs {needed / GIB:.2f} GiB, "
            f"{free_bytes / GIB:.2f} GiB are free",
            hint=f"{remedy}; `halfweight plan` shows the parts, --force tries all the same",
        )
