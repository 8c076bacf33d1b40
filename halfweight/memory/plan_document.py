"""A plan as one JSON document of a stated version; docs/plan.md describes its fields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from halfweight.memory.cards import Gpus
from halfweight.memory.costs import Conversion, Loading, Serving
from halfweight.memory.plan import Footprint, Plan, legal_ranks, regrouped_ranks
from halfweight.memory.what_fits import Cell, advice, notes
from halfweight.memory.workload import Verdict

SCHEMA = "halfweight.plan"
VERSION = 3
"""Raised when a field changes its meaning or goes; new fields leave it."""


def document(
    found: Plan,
    gpus: Gpus | None,
    loading: Loading,
    *,
    conversion: Conversion | None = None,
    serving: Serving | None = None,
    solution: dict[str, Any] | None = None,
    cells: Sequence[Cell] = (),
    calibration: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """All that a plan says, in bytes and seconds."""
    model, a = found.model, found.model.architecture
    work = asdict(found.workload)
    del work["overhead"]
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "model": {
            "name": a.name,
            "num_parameters": a.num_parameters,
            "max_context": a.max_context,
            "sixteen_bit_bytes": model.sixteen_bit_bytes,
            "int8_disk_bytes": model.disk_bytes,
            "int8_resident_bytes": model.resident_bytes,
        },
        "workload": work,
        "device": asdict(gpus) if gpus else None,
        "budget_bytes": found.budget,
        "footprints": {
            "16bit": _footprint(found.sixteen_bit, found.sixteen_bit_verdict),
            "int8": _footprint(found.int8, found.verdict),
        },
        "verdict": found.verdict,
        "notes": notes(found),
        "advice": advice(found),
        "legal_tensor_parallel": legal_ranks(model),
        "regrouped_tensor_parallel": regrouped_ranks(model),
        "loading": asdict(loading),
        "conversion": asdict(conversion) if conversion else None,
        "serving": asdict(serving) | {"relative_cost": serving.relative_cost} if serving else None,
        "solution": solution,
        "grid": [asdict(cell) for cell in cells] or None,
        "calibration": calibration,
    }


def _footprint(found: Footprint, verdict: Verdict | None) -> dict[str, Any]:
    parts = [{**asdict(part), "bytes": part.num_bytes} for part in found.parts]
    return {
        "parts": parts,
        "allocated_bytes": found.allocated,
        "overhead_bytes": asdict(found.overhead),
        "total_bytes": asdict(found.total),
        "verdict": verdict,
    }
