"""The engine's GPU runner alone: decode, long contexts, prefill, verifying drafts, host time.

    python benchmarks/engine_gpu.py [--parts check decode ...] [--limit-seconds 230]

Random INT8 weights of Llama-3-8B's shapes, made on the device. Every step is a whole forward to the
logits, without a sampler. The ceiling is the measured read bandwidth: a step reads each weight and
each cached token once. `check` compares with transformers' forward of the same weights; `tune`
times decode's attention alone, of all layers, for other numbers of warps, stages and programs.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from itertools import product
from statistics import median
from typing import Any

import torch
from arguments import parse
from envelope import envelope, write_result
from models import DEVICE, random_model

from halfweight.engine.runners import gpu_attention, gpu_steps
from halfweight.engine.runners.gpu import GpuRunner
from halfweight.engine.runners.gpu_steps import wanted_rows
from halfweight.engine.step import Chunk
from halfweight.evaluation.speed.generate import step_bytes
from halfweight.kernels.timing import read_bandwidth

PARTS = ("check", "decode", "long", "prefill", "tiles", "profile", "tune")
CACHES = ("16bit", "int8")
DECODE = [(batch, 576) for batch in (1, 4, 16, 64, 256)]
LONG = [(1, 32768), (1, 65536), (8, 8192), (32, 2048)]
PREFILL = [(1, 512), (64, 512), (8, 8192), (1, 65536)]
TILES = [(16, 512), (1, 8192)]
"""Prompts of one step."""
STEP_TOKENS = 8192
REPEATS = 25
TUNED = [(warps, stages) for warps in (2, 4) for stages in (2, 3, 4)]
PROGRAMS = (2, 3, 4, 5, 6, 8)


def random_pages(runner: GpuRunner) -> None:
    """Numbers of a usual size in every page, and random token ids."""
    pool = runner._parts.attention._pool
    for tensor in (pool.keys, pool.values):
        for layer in tensor:
            layer.random_(0, 256) if layer.dtype == torch.uint8 else layer.normal_()
    if pool.steps is not None:
        pool.steps.fill_(0.015)
    runner.table.random_(0, runner.vocab_size)


def sequences(runner: GpuRunner, batch: int, tokens: int) -> list[list[int]]:
    """Pages for `batch` sequences of `tokens` tokens, no page in two."""
    each = -(-tokens // runner.page_tokens)
    order = (torch.randperm(runner.num_pages - 1) + 1).tolist()
    assert batch * each <= len(order), (batch, tokens, runner.num_pages)
    return [order[i * each : (i + 1) * each] for i in range(batch)]


def decode_step(pages: list[list[int]], start: int, tokens: int = 1) -> list[Chunk]:
    return [Chunk(slot, start, tokens, tokens, p) for slot, p in enumerate(pages)]


def milliseconds(call: Callable[[int], object], repeats: int = REPEATS, warm_ups: int = 3) -> float:
    """Time of a call on the device, many in a row; `call` is told its number."""
    for i in range(warm_ups):
        call(i)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for i in range(repeats):
        call(i)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats


def host_microseconds(call: Callable[[int], object]) -> float:
    """Median time until a call returns, the device idle before."""
    found = []
    for i in range(20):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call(i)
        found.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return 1e6 * median(found)


def cache_bytes(runner: GpuRunner, tokens: int) -> int:
    return int(runner.cache_bytes / runner.num_pages * tokens / runner.page_tokens)


def decoding(model: Any, runner: GpuRunner, sizes: list[tuple[int, int]], peak: float) -> Any:
    """A row for each (batch, context): decode, and verifying 8 tokens for few sequences."""
    weights = step_bytes(model, 1, 0)
    for batch, context in sizes:
        pages = sequences(runner, batch, context + 64)
        last = context - REPEATS // 2
        ms = milliseconds(lambda i, p=pages, s=last: runner.run(decode_step(p, s + i)))
        num_bytes = weights + cache_bytes(runner, batch * context)
        row = {
            "kv_cache": runner.kv_cache,
            "batch": batch,
            "context": context,
            "milliseconds": ms,
            "tokens_per_second": 1e3 * batch / ms,
            "fraction_of_read_bandwidth": num_bytes / ms * 1e3 / peak,
            "host_microseconds": host_microseconds(
                lambda i, p=pages, s=last: runner.run(decode_step(p, s + i))
            ),
        }
        if batch <= 4:
            row["verify_8_milliseconds"] = milliseconds(
                lambda i, p=pages, s=last: runner.run(decode_step(p, s + i, 8))
            )
        yield row


def prefilling(runner: GpuRunner, sizes: list[tuple[int, int]]) -> Any:
    """Prompts read in steps of STEP_TOKENS, one prompt after the other."""
    for count, length in sizes:
        pages = sequences(runner, count, length)
        steps = prompt_steps(pages, length)

        def read(_: int, steps: Any = steps) -> None:
            for step in steps:
                runner.run(step)

        ms = milliseconds(read, 1 if count * length > 60000 else 3, warm_ups=1)
        yield {
            "kv_cache": runner.kv_cache,
            "prompts": count,
            "prompt_tokens": length,
            "milliseconds": ms,
            "tokens_per_second": 1e3 * count * length / ms,
        }


def prompt_steps(pages: list[list[int]], length: int) -> list[list[Chunk]]:
    steps: list[list[Chunk]] = [[]]
    room = STEP_TOKENS
    for slot, own in enumerate(pages):
        start = 0
        while start < length:
            count = min(room, length - start)
            steps[-1].append(Chunk(slot, start, count, int(start + count == length), own))
            start, room = start + count, room - count
            if room == 0:
                steps.append([])
                room = STEP_TOKENS
    return [step for step in steps if step]


def checking(model: Any, kv_cache: str) -> Any:
    """Error of logits after a prompt in two chunks, of decoded tokens and of drafts verified."""
    prompt = torch.randint(model.config.vocab_size, (711,)).tolist()
    with torch.inference_mode():
        ids = torch.tensor([prompt], device=DEVICE)
        expected = model(ids, logits_to_keep=12).logits[0].float()
    runner = GpuRunner(
        model, max_context=1024, max_sequences=8, cache_tokens=39 * 64, kv_cache=kv_cache
    )
    runner.table[0, : len(prompt)] = ids[0]
    pages = sequences(runner, 1, 768)[0]
    counts = [(300, 0), (400, 1), (1, 1), (1, 1), (1, 1), (8, 8)]
    found, start = [], 0
    for count, wanted in counts:
        logits = runner.run([Chunk(0, start, count, wanted, pages)])
        found.append(logits[:wanted].float().clone())
        start += count
    difference = torch.cat(found).double() - expected.double()
    errors = difference.norm(dim=1) / expected.double().norm(dim=1)
    yield {
        "kv_cache": kv_cache,
        "what": "runner",
        "error_prefill": errors[0].item(),
        "error_decode": errors[1:4].max().item(),
        "error_verify": errors[4:].max().item(),
    }
    runner.close()


def tuning(runner: GpuRunner, size: tuple[int, int], peak: float) -> Any:
    """Decode's attention of all layers, alone, as one graph."""
    batch, context = size
    attention, layers = runner._parts.attention, runner._parts.layers._layers
    width = (attention.shape.heads + 2 * attention.shape.kv_heads) * attention.shape.head_size
    qkv = torch.randn(batch, width, device=DEVICE, dtype=attention.shape.dtype)
    step = decode_step(sequences(runner, batch, context + 64), context)
    num_bytes = cache_bytes(runner, batch * context)
    runner._send_pages(step)
    for warps, stages in TUNED:
        for programs in PROGRAMS:
            gpu_attention.DECODE_WARPS, gpu_attention.DECODE_STAGES = warps, stages
            gpu_attention.DECODE_PROGRAMS = dict.fromkeys(CACHES, programs)
            runner._make_steps(attention.shape.dtype)
            few = gpu_steps.FewTokens(runner._parts, batch, 1, runner._inputs, runner._logits, None)
            few._pack(step, runner._inputs.host_array())
            runner._inputs.send(few._sections.total)

            def launches(few: Any = few) -> None:
                inputs, of = runner._inputs.device_array, few._sections.of
                items = batch + attention.num_decoding_at_once
                lists = of(inputs, "work"), items, of(inputs, "row_parts"), batch, items
                work = gpu_attention.WorkList(*lists)
                for layer in layers:
                    attention.decode(layer, qkv, work)

            try:
                ms = graph_milliseconds(launches)
            except Exception as error:
                print("tune", warps, stages, programs, str(error)[:100])
                break
            yield {
                "kv_cache": runner.kv_cache,
                "batch": batch,
                "context": context,
                "warps": warps,
                "stages": stages,
                "programs": programs,
                "milliseconds": ms,
                "fraction_of_read_bandwidth": num_bytes / ms * 1e3 / peak,
            }


def tiles(runner: GpuRunner) -> Any:
    """A layer's attention of a step of prompts, alone: rotation, writing, tiles."""
    shape, mixed = runner._parts.attention.shape, runner._mixed
    layer = runner._parts.layers._layers[0]
    for count, length in TILES:
        (step,) = prompt_steps(sequences(runner, count, length), length)
        runner._send_pages(step)
        width = (shape.heads + 2 * shape.kv_heads) * shape.head_size
        qkv = torch.randn(STEP_TOKENS, width, device=DEVICE, dtype=shape.dtype)
        for warps, rows in ((8, 128), (4, 64)):
            gpu_attention.TILE_WARPS, gpu_attention.TILE_ROWS = warps, rows
            groups = list(mixed._groups(step))
            sections = gpu_steps._sections(STEP_TOKENS, count, groups)
            mixed._inputs = gpu_steps.Inputs(sections.total, DEVICE)
            mixed._pack(step, sections, groups, list(wanted_rows(step)))
            inputs = mixed._inputs.send(sections.total)
            with torch.inference_mode():
                ms = milliseconds(
                    lambda _, a=(sections, groups, inputs, layer, qkv): mixed._attend(*a)
                )
            operations = 2 * length * length * shape.heads * shape.head_size * count
            yield {
                "kv_cache": runner.kv_cache,
                "prompts": count,
                "prompt_tokens": length,
                "warps": warps,
                "rows": rows,
                "milliseconds": ms,
                "tflops": operations / ms / 1e9,
            }
    gpu_attention.TILE_WARPS, gpu_attention.TILE_ROWS = 8, 128


def profiled(runner: GpuRunner) -> Any:
    """Where the device's time goes: kernels of some steps by their total time."""
    prompts = prompt_steps(sequences(runner, 16, 512), 512)[0]
    steps = {
        "decode 1": decode_step(sequences(runner, 1, 640), 576),
        "decode 64": decode_step(sequences(runner, 64, 640), 576),
        "prompts 16 x 512": prompts,
    }
    for name, step in steps.items():
        for _ in range(3):
            runner.run(step)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            runner.run(step)
            torch.cuda.synchronize()
        found = sorted(profile.key_averages(), key=lambda e: -e.device_time_total)[:16]
        for event in found:
            yield {
                "kv_cache": runner.kv_cache,
                "step": name,
                "kernel": event.key[:60],
                "count": event.count,
                "total_us": float(event.device_time_total),
            }


def graph_milliseconds(call: Callable[[], None]) -> float:
    with torch.inference_mode():
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return milliseconds(lambda _: graph.replay(), 8)


def measured(part: str, model: Any, runner: GpuRunner, peak: float) -> Any:
    """The rows of a part."""
    if part in ("decode", "long"):
        yield from decoding(model, runner, DECODE if part == "decode" else LONG, peak)
    elif part == "prefill":
        yield from prefilling(runner, PREFILL)
    elif part == "tiles":
        yield from tiles(runner)
    elif part == "profile" and runner.kv_cache == "16bit":
        yield from profiled(runner)
    elif part == "tune":
        for size in LONG[1:]:
            yield from tuning(runner, size, peak)


def line(part: str, row: dict[str, Any]) -> str:
    """One row for people."""
    cells = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
    return f"{part}: " + ", ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=list(CACHES))
    parser.add_argument("--pages", type=int, default=3200)
    options, deadline = parse(parser)
    peak = read_bandwidth(DEVICE)
    facts = envelope(DEVICE, {"read_bytes_per_second": peak})
    rows: list[dict[str, Any]] = []

    def save(part: str, found: Any) -> None:
        for row in found:
            rows.append({"part": part, **row})
            write_result(options.name or "engine_gpu", facts, rows, out=options.out)
            print(line(part, row), flush=True)
            if time.monotonic() > deadline:
                raise SystemExit("out of time")

    begin = time.monotonic()
    model = random_model(options.shape)
    print(f"model {time.monotonic() - begin:.1f} s, peak {peak / 1e12:.3f} TB/s", flush=True)
    for kv_cache in options.caches:
        if "check" in options.parts:
            save("check", checking(model, kv_cache))
    timed = [part for part in options.parts if part not in ("check", "tune")]
    tuned = [part for part in options.parts if part == "tune"]
    for parts, kv_cache in product((timed, tuned), options.caches):
        if not parts:
            continue
        gc.collect()
        torch.cuda.empty_cache()
        runner = GpuRunner(
            model,
            max_context=66048,
            max_sequences=256,
            cache_tokens=64 * options.pages,
            kv_cache=kv_cache,
        )
        random_pages(runner)
        for part in parts:
            save(part, measured(part, model, runner, peak))
        runner.close()
        del runner


if __name__ == "__main__":
    main()
