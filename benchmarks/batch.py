"""The largest batch that completes under a hard memory limit: 16 bits, INT8, INT8 with INT8 cache.

    python benchmarks/batch.py [--limit-gb 24] [--context 4096]

The limit is enforced by torch's allocator. A batch completes if there is cache for all of it at
once, prompts that fill all of the context but the last few tokens are read, in chunks, and those
tokens are generated: 16 bits by transformers' forward and static cache, INT8 by the engine and its
pages. The largest is found by running: what `halfweight plan` says, then more until one fails, then
halving the gap.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from arguments import parse, workplace
from envelope import envelope, write_result
from models import DEVICE, folders

from halfweight.engine.engine import Engine
from halfweight.engine.loop import EngineStoppedError
from halfweight.engine.request import Sampling
from halfweight.engine.step import KvCache
from halfweight.evaluation.speed.generate import MOST_PAGE_TOKENS, random_prompts
from halfweight.evaluation.speed.process import from_fresh_process
from halfweight.evaluation.speed.rivals import (
    BY_ENGINE,
    HALFWEIGHT,
    SIXTEEN_BIT,
    Folders,
    open_model,
)
from halfweight.evaluation.speed.static_decoder import StaticDecoder
from halfweight.memory.named_model import planned_model
from halfweight.memory.what_fits import solve
from halfweight.memory.workload import Weights, Workload

NEW_TOKENS = 8
VARIANTS: dict[str, tuple[str, KvCache]] = {
    "16-bit weights and cache": (SIXTEEN_BIT, "16bit"),
    "INT8 weights": (HALFWEIGHT, "16bit"),
    "INT8 weights and cache": (HALFWEIGHT, "int8"),
}


@dataclass(frozen=True)
class Attempt:
    """One batch of one variant: whether it completed, its peak memory, its time."""

    variant: str
    batch_size: int
    completed: bool
    peak_bytes: int
    seconds: float


def next_try(good: int, bad: int | None, most: int, guess: int = 1) -> int | None:
    """The batch to try when `good` completed and `bad` (if any yet) did not; None when done."""
    if bad is not None:
        return (good + bad) // 2 if bad - good > 1 else None
    step = max(1, good if guess == 1 else good // 8)
    return min(max(guess, good + step), most) if good < most else None


def planned_batch(variant: str, found: Folders, context: int, limit_bytes: int) -> int:
    """What the planner says fits; at least 1."""
    rival, kv_cache = VARIANTS[variant]
    weights: Weights = "16bit" if rival == SIXTEEN_BIT else "int8"
    folder = found.source if rival == SIXTEEN_BIT else found.quantized
    work = Workload(context, 1, kv_cache)
    return solve(planned_model(str(folder)), work, limit_bytes, "batch", weights) or 1


def attempts(
    variant: str, found: Folders, context: int, limit_bytes: int, most: int
) -> Iterator[Attempt]:
    """Every attempt of one variant, in this process, which should be a fresh one."""
    if DEVICE.type == "cuda":
        total = torch.cuda.get_device_properties(DEVICE).total_memory
        torch.cuda.set_per_process_memory_fraction(limit_bytes / total, DEVICE)
    rival, kv_cache = VARIANTS[variant]
    model = open_model(rival, found, DEVICE)
    good, bad = 0, None
    guess = planned_batch(variant, found, context, limit_bytes)
    while (batch_size := next_try(good, bad, most, guess)) is not None:
        attempt = _attempt(variant, model, kv_cache, batch_size, context)
        yield attempt
        good, bad = (batch_size, bad) if attempt.completed else (good, batch_size)


def _attempt(variant: str, model: Any, kv_cache: KvCache, batch_size: int, context: int) -> Attempt:
    gc.collect()
    on_gpu = DEVICE.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(DEVICE)
    begin = time.perf_counter()
    run = _run if VARIANTS[variant][0] in BY_ENGINE else _run_static
    try:
        run(model, kv_cache, batch_size, context)
        completed = True
    except torch.OutOfMemoryError:
        completed = False
    except EngineStoppedError as error:
        if "OutOfMemoryError" not in error.message:
            raise
        completed = False
    peak = torch.cuda.max_memory_allocated(DEVICE) if on_gpu else 0
    return Attempt(variant, batch_size, completed, peak, time.perf_counter() - begin)


def _run(model: Any, kv_cache: KvCache, batch_size: int, context: int) -> None:
    each = -(-context // MOST_PAGE_TOKENS) * MOST_PAGE_TOKENS
    with Engine(
        model,
        max_context=context,
        max_sequences=batch_size,
        cache_tokens=batch_size * each,
        kv_cache=kv_cache,
    ) as engine:
        prompts = random_prompts(model, batch_size, context - NEW_TOKENS)
        options = {"max_new_tokens": NEW_TOKENS, "sampling": Sampling(), "stop_tokens": ()}
        for answer in engine.generate(prompts, **options):
            if answer.error is not None:
                raise answer.error


def _run_static(model: Any, kv_cache: KvCache, batch_size: int, context: int) -> None:
    assert kv_cache == "16bit"
    decoder = StaticDecoder(model, batch_size, context)
    tokens = decoder.prefill(random_prompts(model, batch_size, context - NEW_TOKENS)).argmax(-1)
    for _ in range(NEW_TOKENS - 1):
        tokens = decoder.advance(tokens).argmax(dim=-1)
    assert int(tokens.min()) >= 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit-gb", type=float, default=24, help="GB of 10^9 bytes")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--most", type=int, default=256, help="do not try more than this")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options, deadline = parse(parser)
    limit = int(options.limit_gb * 1e9)
    facts = envelope(DEVICE, {"memory_limit_bytes": limit})
    results: dict[str, Any] = {"shape": options.shape, "context": options.context, "attempts": []}
    best: dict[str, int] = {}
    with workplace(options.models) as place:
        found = folders(options.shape, place)
        for variant in options.variants:
            job = (attempts, variant, found, options.context, limit, options.most)
            for row in from_fresh_process(*job, deadline=deadline):
                best[variant] = max(best.get(variant, 0), row.batch_size * row.completed)
                results["attempts"].append(asdict(row))
                results["largest"] = best
                write_result(options.name or "batch", facts, results, out=options.out)
                word = "completes" if row.completed else "does not fit"
                print(
                    f"{variant}, batch {row.batch_size}: {word}, peak "
                    f"{row.peak_bytes / 1e9:.2f} GB, {row.seconds:.1f} s",
                    flush=True,
                )
    print(best)


if __name__ == "__main__":
    main()
