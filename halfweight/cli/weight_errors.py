"""`halfweight inspect --errors`: what quantization did to each weight."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfweight.cli.output import print_json, stderr, stdout

if TYPE_CHECKING:
    from halfweight.evaluation.weight_errors import TensorError


def show_errors(path: Path, source: str | None, page: Path | None, json_output: bool) -> None:
    """Print each weight's error, worst first, and write the heat map to `page`."""
    from halfweight.checkpoint.headers import resolve
    from halfweight.evaluation import weight_errors

    if source is None:
        errors = weight_errors.recorded_errors(path)
    else:
        errors = weight_errors.measured_errors(path, resolve(source))
    if page is not None:
        page.write_text(weight_errors.heat_map(errors, f"{path.resolve().name}: error by weight"))
        stderr.print(f"wrote {page}", markup=False, highlight=False, soft_wrap=True)
    if json_output:
        print_json([_fields(error) for error in errors])
        return
    width = max((len(error.name) for error in errors), default=0)
    for error in sorted(errors, key=lambda error: error.sqnr_db):
        line = f"{error.name:<{width}}  {error.sqnr_db:6.2f} dB  group size {error.group_size}"
        stdout.print(line + _details(error), markup=False, highlight=False, soft_wrap=True)


def _details(error: TensorError) -> str:
    parts = [f"crushed groups {error.crushed_groups}"]
    if error.clipped_weights is not None:
        parts.append(f"clipped {error.clipped_weights / error.num_weights:.3%}")
    parts += [
        f"row {g.row} group {g.group} off by {g.relative_error:.2%}" for g in error.worst_groups
    ]
    return "".join(f", {part}" for part in parts)


def _fields(error: TensorError) -> dict[str, Any]:
    """JSON has no infinity: a weight without error has a null `sqnr_db`."""
    return {**asdict(error), "sqnr_db": error.sqnr_db if math.isfinite(error.sqnr_db) else None}
