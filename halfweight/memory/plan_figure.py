"""A plan as a picture: bars against what the device offers, and a heat map. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halfweight.errors import UsageError
from halfweight.memory.cards import Gpus
from halfweight.memory.plan import Plan
from halfweight.memory.what_fits import Cell, grid, grid_axes
from halfweight.memory.workload import Verdict

COLORS = {
    "int8 data": "#2f6fde",
    "scales": "#8db4f4",
    "16-bit weights": "#7a4fbf",
    "KV cache": "#12978a",
    "KV cache, sliding window": "#63c5b5",
    "KV cache, compressed": "#63c5b5",
    "tables": "#5b636c",
    "scratch pages": "#63c5b5",
    "step activations": "#e08a1e",
    "recorded steps": "#c2507a",
    "logits": "#5b636c",
    "kernel workspace": "#5b636c",
    "context etc.": "#8c959f",
}
"""As on the page."""
CELLS: dict[Verdict, tuple[str, str]] = {
    "fits": ("#d7f2de", ""),
    "tight": ("#fbeebc", "!"),
    "does not fit": ("#fbdcd8", "x"),
}


def draw(found: Plan, gpus: Gpus, path: Path) -> None:
    """Write the picture to `path`, in the format that its suffix names.

    Raises UsageError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(
            "a picture needs matplotlib, which is not installed",
            hint="pip install 'halfweight[report]'",
        ) from error
    figure = Figure(figsize=(9, 7), layout="constrained")
    bars, heat = figure.subplots(2, 1, height_ratios=(2, 3))
    work = found.workload
    figure.suptitle(
        f"{found.model.architecture.name}: batch {work.batch} of {work.context:,} tokens on "
        f"{gpus.count} x {gpus.name}"
    )
    _draw_bars(bars, found)
    _draw_heat(heat, found)
    figure.savefig(path, dpi=150)


def _draw_bars(axes: Any, found: Plan) -> None:
    named: set[str] = set()
    for name, made in (("FP16", found.sixteen_bit), ("INT8", found.int8)):
        left = 0.0
        parts = [(part.name, part.num_bytes) for part in made.parts]
        for part, num_bytes in (*parts, ("context etc.", made.overhead.likely)):
            label = None if part in named else part
            named.add(part)
            axes.barh(name, num_bytes / 1e9, left=left, color=COLORS[part], label=label)
            left += num_bytes / 1e9
        verdict = made.judge(found.budget) if found.budget is not None else ""
        axes.text(left, name, f"  {made.total.likely / 1e9:.2f} GB {verdict}", va="center")
    if found.budget is not None:
        axes.axvline(found.budget / 1e9, color="black", lw=2, label="what the card offers")
    axes.set_xlim(0, 1.25 * max(axes.get_xlim()[1], (found.budget or 0) / 1e9))
    axes.invert_yaxis()
    axes.set_xlabel("GB on each device")
    axes.legend(ncols=4, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.25))


def _draw_heat(axes: Any, found: Plan) -> None:
    batches, contexts = grid_axes(found.model, found.workload)
    cells = list(grid(found.model, found.workload, batches, contexts))
    for cell in cells:
        color, mark = CELLS[_verdict(cell, found.budget)]
        x, y = contexts.index(cell.context), batches.index(cell.batch)
        axes.fill((x, x + 1, x + 1, x), (y, y, y + 1, y + 1), color=color, ec="white", lw=2)
        text = f"{cell.total.likely / 1e9:.1f}{mark}"
        axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=8)
    axes.set_xticks([i + 0.5 for i in range(len(contexts))], [f"{n:,}" for n in contexts])
    axes.set_yticks([i + 0.5 for i in range(len(batches))], map(str, batches))
    axes.set_xlim(0, len(contexts))
    axes.set_ylim(len(batches), 0)
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("batch")
    axes.set_title("INT8, likely GB on each (! is tight, x does not fit)", fontsize=9)


def _verdict(cell: Cell, budget: int | None) -> Verdict:
    if budget is None or cell.total.high <= budget:
        return "fits"
    return "tight" if cell.total.likely <= budget else "does not fit"
