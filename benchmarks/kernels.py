"""Matrix products of quantized weights against the vendor's 16-bit one, and against peers.

    python benchmarks/kernels.py --peers
    python benchmarks/kernels.py --shapes gate_up --batches 1 16 --limit-seconds 60
    python benchmarks/kernels.py --markdown benchmarks/results/kernels.json

Times are medians over replays of a CUDA graph in which copies of the weight rotate, so that no
cache serves them; all rivals of one shape and batch are replayed in turn. Peers quantize weights
of their own with their own tools. A rival that fails is recorded with its error.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from envelope import RESULTS, envelope, write_result
from torch import Tensor

from halfweight.kernels import operations, timing

SHAPES = {
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "qkv": (6144, 4096),
    "gate_up_70b": (57344, 8192),
}
"""[N, K] of Llama-3-8B's layers, and of Llama-3-70B's widest."""
BATCHES = (1, 4, 16, 64, 128, 256, 1024, 4096)
GROUP_SIZE = 128
FLOAT16_BYTES = 2
VENDOR = "float16"
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rival:
    """`make(shape)` gives the product with a new random weight; `weight_bytes` what it reads."""

    make: Callable[[tuple[int, int]], Product]
    bytes_per_weight: float
    int8_activations: bool = False


def vendor(shape: tuple[int, int]) -> Product:
    weight = torch.randn(shape, device=DEVICE, dtype=torch.float16)
    return lambda x: torch.nn.functional.linear(x, weight)


def ours(backend: str, int8: bool = False) -> Callable[[tuple[int, int]], Product]:
    found = operations.backend(backend)
    function = found.linear_int8 if int8 else found.linear
    assert function is not None

    def make(shape: tuple[int, int]) -> Product:
        weight = timing.random_weight(shape, DEVICE, GROUP_SIZE)
        parts = (weight.packed, weight.scales, weight.exponents)
        return lambda x: function(x, *parts, None)

    return make


def humming(shape: tuple[int, int]) -> Product:
    from humming.layer import HummingLayer

    config = {"dtype": "int8", "group_size": GROUP_SIZE, "scale_dtype": "float16"}
    layer: Any = HummingLayer(
        shape_n=shape[0], shape_k=shape[1], weight_config=config, torch_dtype=torch.float16
    ).to(DEVICE)
    layer.load_from_unquantized(torch.randn(shape, device=DEVICE, dtype=torch.float16))
    layer.transform()
    return lambda x: layer(x)


def gemlite(group_size: int | None) -> Callable[[tuple[int, int]], Product]:
    def make(shape: tuple[int, int]) -> Product:
        from gemlite import helper

        if group_size is None:
            weight = torch.randn(shape, device=DEVICE, dtype=torch.float16)
            return helper.A16W8_INT8(device=str(DEVICE), dtype=torch.float16).from_weights(weight)
        q = torch.randint(0, 256, shape, device=DEVICE, dtype=torch.uint8)
        groups = (shape[0] * shape[1] // group_size, 1)
        scales = torch.rand(groups, device=DEVICE, dtype=torch.float16) * 1e-3
        zeros = torch.full(groups, 128, device=DEVICE, dtype=torch.float16)
        processor = helper.A16Wn(device=str(DEVICE), dtype=torch.float16)
        return processor.from_weights(q, scales, zeros, 8, group_size)

    return make


def gemlite_int8(shape: tuple[int, int]) -> Product:
    from gemlite import helper

    weight = torch.randn(shape, device=DEVICE, dtype=torch.float16)
    return helper.A8W8_int8_dynamic(device=str(DEVICE), dtype=torch.float16).from_weights(weight)


def torchao(group_size: int | None) -> Callable[[tuple[int, int]], Product]:
    def make(shape: tuple[int, int]) -> Product:
        from torchao.quantization import Int8WeightOnlyConfig, PerGroup, PerRow, quantize_

        layer = torch.nn.Linear(shape[1], shape[0], bias=False, device=DEVICE, dtype=torch.float16)
        granularity = PerRow() if group_size is None else PerGroup(group_size)
        quantize_(layer, Int8WeightOnlyConfig(granularity=granularity))
        return torch.compile(layer)

    return make


def rivals(with_peers: bool) -> dict[str, Rival]:
    """Name -> rival: the vendor, our backends that run here, peers that are installed."""
    scales = 1 / GROUP_SIZE
    found = {VENDOR: Rival(vendor, FLOAT16_BYTES)}
    for name in ("cuda", "sm80", "triton", "cpu"):
        if operations.backend(name).unavailable(DEVICE) is not None:
            continue
        found[f"halfweight {name}"] = Rival(ours(name), 1 + scales)
        if operations.backend(name).linear_int8 is not None and name != "sm80":  # triton's
            found[f"halfweight {name} int8"] = Rival(ours(name, True), 1 + scales, True)
    if with_peers:
        found |= {
            "humming g128": Rival(humming, 1 + 2 * scales),
            "gemlite row": Rival(gemlite(None), 1),
            "gemlite g128": Rival(gemlite(GROUP_SIZE), 1 + 4 * scales),
            "gemlite int8 row": Rival(gemlite_int8, 1, True),
            "torchao row": Rival(torchao(None), 1),
            "torchao g128": Rival(torchao(GROUP_SIZE), 1 + 2 * scales),
        }
    return found


def measure_shape(
    name: str,
    competitors: dict[str, Rival],
    batches: list[int],
    peak: float,
    deadline: float,
    save: Callable[[list[dict[str, Any]]], None],
) -> None:
    """Every rival on one shape, a row a rival and batch, handed to `save` batch by batch."""
    shape = SHAPES[name]
    products: dict[str, list[Product]] = {}
    failed: dict[str, str] = {}
    for rival, competitor in competitors.items():
        copies = timing.num_copies(int(shape[0] * shape[1] * competitor.bytes_per_weight))
        try:
            products[rival] = [competitor.make(shape) for _ in range(copies)]
        except Exception as error:
            failed[rival] = _one_line(error)
    for tokens in batches:
        if time.monotonic() > deadline:
            return
        x = torch.randn(tokens, shape[1], device=DEVICE, dtype=torch.float16)
        rounds, errors = {}, dict(failed)
        for rival, copies in products.items():
            try:
                rounds[rival] = timing.Round([_bind(f, x) for f in copies], x.device)
            except Exception as error:
                errors[rival] = _one_line(error)
        times = timing.interleaved(rounds)
        heading = {"shape": name, "out_features": shape[0], "in_features": shape[1]}
        save(
            [
                heading | {"tokens": tokens, "kernel": rival} | row
                for rival, row in _rows(times, errors, competitors, shape, tokens, peak).items()
            ]
        )


def _bind(product: Product, x: Tensor) -> timing.Call:
    return lambda: product(x)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _rows(
    times: dict[str, float],
    errors: dict[str, str],
    competitors: dict[str, Rival],
    shape: tuple[int, int],
    tokens: int,
    peak: float,
) -> dict[str, dict[str, Any]]:
    out_features, in_features = shape
    activations = tokens * (out_features + in_features) * FLOAT16_BYTES
    rows: dict[str, dict[str, Any]] = {name: {"error": text} for name, text in errors.items()}
    for name, microseconds in times.items():
        num_bytes = out_features * in_features * competitors[name].bytes_per_weight + activations
        rate = num_bytes / microseconds * 1e6
        rows[name] = {
            "microseconds": round(microseconds, 2),
            "gigabytes_per_second": round(rate / 1e9, 1),
            "fraction_of_read_bandwidth": round(rate / peak, 4),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", action="store_true", help="also humming, gemlite and torchao")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--kernels", nargs="+", help="only rivals whose names contain one of these")
    parser.add_argument("--limit-seconds", type=float, default=3600)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="kernels", help="name of the result")
    parser.add_argument("--markdown", type=Path, help="print the tables of a result file and stop")
    options = parser.parse_args()
    if options.markdown:
        print(markdown(json.loads(options.markdown.read_text())["results"]))
        return
    deadline = time.monotonic() + options.limit_seconds
    peak = timing.read_bandwidth(DEVICE)
    facts = envelope(DEVICE, {"read_bytes_per_second": peak})
    competitors = {
        name: rival
        for name, rival in rivals(options.peers).items()
        if name == VENDOR or not options.kernels or any(part in name for part in options.kernels)
    }
    rows: list[dict[str, Any]] = []

    def save(new: list[dict[str, Any]]) -> None:
        rows.extend(new)
        write_result(options.name, facts, rows, out=options.out)
        cells = [f"{row['kernel']} {_cell(row)}" for row in new]
        print(f"{new[0]['shape']} M={new[0]['tokens']}: " + ", ".join(cells), flush=True)

    print(f"read bandwidth {peak / 1e9:.0f} GB/s", flush=True)
    for name in options.shapes:
        measure_shape(name, competitors, options.batches, peak, deadline, save)
    print(markdown(rows))


if __name__ == "__main__":
    main()
