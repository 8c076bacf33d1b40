"""The roofline picture of one weight, from a result of benchmarks/kernels.py.

    cd benchmarks/results
    python ../roofline.py kernels.json ../../docs/images/roofline.png

Each point is a kernel at one batch. Its height is measured; its place along the axis follows from
the bytes its weight takes, so INT8 kernels stand further right than 16-bit ones at the same batch.
The sloping roof is the read bandwidth measured in the same run, the flat one the fastest product
shown.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

STYLES = {
    "float16": ("#888888", "o", "16-bit weights, vendor"),
    "halfweight cuda": ("#0b6e4f", "s", "halfweight, CUDA"),
    "halfweight triton": ("#2a9d8f", "^", "halfweight, Triton"),
    "humming g128": ("#b5838d", "x", "humming"),
    "gemlite row": ("#6d6875", "+", "gemlite, one scale a row"),
    "Marlin g128": ("#457b9d", "d", "Marlin"),
    "Machete g128": ("#e9c46a", "v", "Machete"),
}


def points(rows: list[dict[str, Any]], shape: str, kernel: str) -> list[tuple[float, float, int]]:
    """(operations a byte, TFLOP/s, batch) of one kernel on one weight."""
    found = []
    for row in rows:
        if row["shape"] != shape or row["kernel"] != kernel or "error" in row:
            continue
        num_bytes = row["gigabytes_per_second"] * 1e9 * row["microseconds"] / 1e6
        operations = 2 * row["tokens"] * row["out_features"] * row["in_features"]
        found.append((operations / num_bytes, row["teraflops"], row["tokens"]))
    return found


def draw(result: dict[str, Any], shape: str, out: Path) -> None:
    """Write the picture of `shape` to `out`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["results"]
    bandwidth = result["ceiling"]["read_bytes_per_second"] / 1e12
    shown = [row for row in rows if row["kernel"] in STYLES and "error" not in row]
    fastest = max(row["teraflops"] for row in shown)
    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=150)
    left, right = 0.7, 8000.0
    ridge = fastest / bandwidth
    roof = ([left, ridge, right], [left * bandwidth, fastest, fastest])
    axes.plot(*roof, color="black", linewidth=1, label=f"measured: {bandwidth:.2f} TB/s")
    for kernel, (color, marker, label) in STYLES.items():
        found = points(rows, shape, kernel)
        if found:
            intensity, height, batches = zip(*found, strict=True)
            axes.plot(intensity, height, marker, color=color, label=label, markersize=5)
            for x, y, batch in zip(intensity, height, batches, strict=True):
                if kernel in ("float16", "halfweight cuda"):
                    axes.annotate(f"{batch}", (x, y), fontsize=6, xytext=(3, -8),
                                  textcoords="offset points", color=color)  # fmt: skip
    sizes = next((r["out_features"], r["in_features"]) for r in rows if r["shape"] == shape)
    axes.set(xscale="log", yscale="log", xlim=(left, right))
    axes.set_xlabel("operations a byte moved (small numbers: tokens in the batch)")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"{shape} [{sizes[0]}, {sizes[1]}] on {result['device']}")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=7, loc="lower right")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", default="gate_up")
    options = parser.parse_args()
    draw(json.loads(options.result.read_text()), options.shape, options.out)


if __name__ == "__main__":
    main()
