"""Registers, shared memory and spills of w8a16.cu on every architecture, as nvcc compiles it.

    python benchmarks/architectures.py

No GPU is needed. A row a form and architecture, with float16 activations, one-byte scales and
groups of 128. The table of docs/kernels.md has the worst of each architecture.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from envelope import envelope, write_result

from halfweight.kernels.cuda.backend import source
from halfweight.kernels.cuda.card import Card
from halfweight.kernels.cuda.tiles import SHAPES, Form, form_on

SMALL = Card(82, 101376, 102400, 6 << 20, 936_000, 1695, 512)
"""A consumer card: 99 KB a block."""
LARGE = Card(108, 166912, 167936, 40 << 20, 2_039_000, 1410, 1024)
"""A data centre card: 163 KB."""
CARDS = {
    "sm_80": LARGE,
    "sm_86": SMALL,
    "sm_89": SMALL,
    "sm_90": LARGE,
    "sm_100": LARGE,
    "sm_120": SMALL,
}


def jobs() -> Iterator[tuple[str, Form]]:
    """What is compiled."""
    for architecture, card in CARDS.items():
        for shape in SHAPES:
            form = form_on(card, shape)
            if form.stages >= 2:
                yield architecture, form


def row(job: tuple[str, Form]) -> dict[str, Any]:
    """One compilation."""
    architecture, form = job
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cu"
        path.write_text(source(form, 128, torch.uint8, torch.float16))
        command = ["nvcc", "-cubin", "-std=c++17", f"-arch={architecture}", "-Xptxas", "-v", "-o"]
        done = subprocess.run(
            [*command, path.with_suffix(".cubin"), path], capture_output=True, text=True, check=True
        )
    (registers,) = re.findall(r"Used (\d+) registers", done.stderr)
    (spills,) = re.findall(r"(\d+) bytes spill stores", done.stderr)
    return {
        "architecture": architecture,
        "kernel": f"w8a16 {form.rows}x{form.tokens}x{form.k_bytes}, {form.stages} stages",
        "registers": int(registers),
        "shared_bytes": form.shared_bytes,
        "spills": int(spills),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The worst of each architecture's forms."""
    lines = ["| | forms | registers, most | shared memory, most | spilled bytes, most |"]
    lines.append("|---|---|---|---|---|")
    for architecture in CARDS:
        of = [row for row in rows if row["architecture"] == architecture]
        most = {name: max(row[name] for row in of) for name in ("registers", "spills")}
        shared = max(row["shared_bytes"] for row in of)
        lines.append(
            f"| {architecture} | {len(of)} | {most['registers']} | {shared / 1024:.0f} KB | "
            f"{most['spills']} |"
        )
    return "\n".join(lines)


def main() -> None:
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(row, jobs()))
    compiler = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    (release,) = re.findall(r"release ([\d.]+)", compiler.stdout)
    heading = envelope(torch.device("cpu"), {})
    heading["versions"]["nvcc"] = release
    print(write_result("architectures", heading, rows))
    print(table(rows))


if __name__ == "__main__":
    main()
