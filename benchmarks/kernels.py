"""Matrix products of quantized weights against the vendor's 16-bit one, and against peers.

    python benchmarks/kernels.py --peers --kernels 'halfweight cuda' 'Marlin g128'
    python benchmarks/kernels.py --shapes gate_up --batches 1 16 --limit-seconds 60
    python benchmarks/kernels.py --markdown benchmarks/results/kernels.json

Times are medians over replays of a CUDA graph in which copies of the weight rotate, so that no
cache serves them; all rivals of one shape and batch are replayed in turn. A rival that fails, or
whose product is wrong (kernel_rivals.py), is recorded with its error.

Several rivals compile their kernels when first called, and keep them on disk. Where the GPU's time
is short, run with --repeats 1 first, a process for each such rival, all at the same time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from envelope import RESULTS, envelope, write_result
from kernel_rivals import DEVICE, FLOAT16_BYTES, VENDOR, Product, Rival, products, rivals
from torch import Tensor

from halfweight.kernels import timing

SHAPES = {
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "qkv": (6144, 4096),
    "gate_up_70b": (57344, 8192),
}
"""[N, K] of Llama-3-8B's layers, and of Llama-3-70B's widest."""
BATCHES = (1, 4, 16, 64, 128, 256, 1024, 4096)


Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """What is measured and until when, a time of time.monotonic; bytes a second of a plain read."""

    competitors: dict[str, Rival]
    batches: list[int]
    repeats: int
    peak: float
    deadline: float


def measure_shape(name: str, run: Run, save: Callable[[Rows], None]) -> None:
    """Every rival on one shape, a row a rival and batch, handed to `save` batch by batch."""
    shape = SHAPES[name]
    heading = {"shape": name, "out_features": shape[0], "in_features": shape[1]}
    found, failed = make(name, run)
    for tokens in run.batches:
        if time.monotonic() > run.deadline:
            return
        x = torch.randn(tokens, shape[1], device=DEVICE, dtype=torch.float16)
        rounds, errors = {}, dict(failed)
        for rival, copies in found.items():
            if run.competitors[rival].skips(name, tokens):
                continue
            try:
                rounds[rival] = timing.Round([_bind(f, x) for f in copies], x.device)
            except Exception as error:
                errors[rival] = _one_line(error)
        times = timing.interleaved(rounds, run.repeats)
        rows = _rows(times, errors, run, shape, tokens)
        save([heading | {"tokens": tokens, "kernel": rival} | row for rival, row in rows.items()])


def make(name: str, run: Run) -> tuple[dict[str, list[Product]], dict[str, str]]:
    """Each rival with as many weights of a shape as no cache holds; the errors of those that
    cannot be made or whose product is wrong.
    """
    shape, found, failed = SHAPES[name], {}, {}
    for rival, competitor in run.competitors.items():
        if all(competitor.skips(name, tokens) for tokens in run.batches):
            continue
        copies = timing.num_copies(int(shape[0] * shape[1] * competitor.bytes_per_weight))
        try:
            found[rival] = products(competitor, shape, copies)
        except Exception as error:
            failed[rival] = _one_line(error)
    return found, failed


def _bind(product: Product, x: Tensor) -> timing.Call:
    return lambda: product(x)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _rows(
    times: dict[str, float], errors: dict[str, str], run: Run, shape: tuple[int, int], tokens: int
) -> dict[str, dict[str, Any]]:
    out_features, in_features = shape
    activations = tokens * (out_features + in_features) * FLOAT16_BYTES
    rows: dict[str, dict[str, Any]] = {}
    for name, competitor in run.competitors.items():
        if name in errors:
            rows[name] = {"error": errors[name]}
        if name not in times:
            continue
        microseconds = times[name]
        num_bytes = out_features * in_features * competitor.bytes_per_weight + activations
        rate = num_bytes / microseconds * 1e6
        rows[name] = {
            "microseconds": round(microseconds, 2),
            "gigabytes_per_second": round(rate / 1e9, 1),
            "fraction_of_read_bandwidth": round(rate / run.peak, 4),
            "teraflops": round(2e-6 * tokens * out_features * in_features / microseconds, 1),
            "speedup_over_float16": round(times[VENDOR] / microseconds, 3),
        }
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """One table a shape: speed relative to the vendor's 16-bit product, microseconds of it."""
    lines = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        mine = [row for row in rows if row["shape"] == shape]
        batches = list(dict.fromkeys(row["tokens"] for row in mine))
        lines += [
            f"\n**{shape}** [{mine[0]['out_features']}, {mine[0]['in_features']}]\n",
            "| kernel | " + " | ".join(f"M={m}" for m in batches) + " |",
            "|---" * (len(batches) + 1) + "|",
        ]
        for kernel in dict.fromkeys(row["kernel"] for row in mine):
            cells = {row["tokens"]: _cell(row) for row in mine if row["kernel"] == kernel}
            lines.append(f"| {kernel} | " + " | ".join(cells.get(m, "") for m in batches) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    if "error" in row:
        return "fails"
    if row["kernel"] == VENDOR:
        return f"{row['microseconds']:.1f} µs"
    return f"{row['speedup_over_float16']:.2f}"


def selected(names: Sequence[str] | None, with_peers: bool) -> dict[str, Rival]:
    """The vendor and the rivals of these names, else all. Raises ValueError for another name."""
    found = rivals(with_peers)
    unknown = [name for name in names or () if name not in found]
    if unknown:
        raise ValueError(f"no rival is called {unknown[0]!r}; here there are {', '.join(found)}")
    return {name: found[name] for name in found if not names or name in (VENDOR, *names)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    peers = "also Marlin and Machete of vLLM, humming and gemlite"
    parser.add_argument("--peers", action="store_true", help=peers)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--kernels", nargs="+", metavar="NAME", help="only these beside float16")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--limit-seconds", type=float, default=3600)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="kernels", help="name of the result")
    parser.add_argument("--markdown", type=Path, help="print the tables of a result file and stop")
    options = parser.parse_args()
    if options.markdown:
        print(markdown(json.loads(options.markdown.read_text())["results"]))
        return
    deadline = time.monotonic() + options.limit_seconds
    try:
        competitors = selected(options.kernels, options.peers)
    except ValueError as error:
        parser.error(str(error))
    peak = timing.read_bandwidth(DEVICE)
    facts = envelope(DEVICE, {"read_bytes_per_second": peak})
    rows: Rows = []

    def save(new: Rows) -> None:
        rows.extend(new)
        write_result(options.name, facts, rows, out=options.out)
        cells = [f"{row['kernel']} {_cell(row)}" for row in new]
        told = f"{new[0]['shape']} M={new[0]['tokens']}: " + ", ".join(cells)
        print(f"{deadline - time.monotonic():.0f} s left. {told}", flush=True)

    print(f"read bandwidth {peak / 1e9:.0f} GB/s", flush=True)
    run = Run(competitors, options.batches, options.repeats, peak, deadline)
    for name in options.shapes:
        measure_shape(name, run, save)
    print(markdown(rows))


if __name__ == "__main__":
    main()
