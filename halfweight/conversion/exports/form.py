"""An export as it is planned: the parts to write, what goes beside them, what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from halfweight.checkpoint.layout import OutputShard
from halfweight.checkpoint.sources.int8_folder import Int8Folder
from halfweight.conversion.parts import Part
from halfweight.errors import CheckpointError

SHOWN = 3
"""Weights with rounded scales that are named."""


@dataclass(frozen=True)
class Rounding:
    """What becomes of scales in float16: how many are rounded, of how many; the worst, relative.

    `weights` are the modules that have any.
    """

    num_scales: int = 0
    num_rounded: int = 0
    worst: float = 0.0
    weights: tuple[str, ...] = ()


@dataclass(frozen=True)
class Form:
    """An export that can be written. `shards` are those of its parts that are whole files.

    `num_int8`, `num_dequantized` and `num_kept` count the tensors of the source by what becomes of
    them. `write_beside` and `check` get the folder; `check` raises CheckpointError.
    """

    parts: tuple[Part, ...]
    shards: tuple[OutputShard, ...]
    write_beside: Callable[[Path], None]
    check: Callable[[Path], None]
    num_int8: int
    num_dequantized: int
    num_kept: int
    rounding: Rounding = Rounding()
    notes: tuple[str, ...] = ()


def float16_scales(folder: Int8Folder, module: str) -> NDArray[np.float16]:
    """Scales of a module [N, K/G] in float16, rounded where it does not hold them.

    Raises CheckpointError for a scale that float16 has no positive finite number for.
    """
    with np.errstate(over="ignore"):
        scales = folder.scales(module).astype(np.float16)
    if not (np.isfinite(scales) & (scales > 0)).all():
        found = folder.scales(module)
        raise CheckpointError(
            f"{folder.path}: module {module}: scales from {found.min():.3g} to {found.max():.3g}, "
            f"which float16 cannot hold",
            hint=f"quantize the source again with --keep {module}.weight, or export --to "
            "dequantized",
        )
    return scales


def float16_rounding(folder: Int8Folder, modules: Iterable[str]) -> Rounding:
    """What float16 makes of the scales of `modules`; they are read for it, once."""
    found = [(module, *_rounded(folder, module)) for module in modules]
    return Rounding(
        num_scales=sum(count for _, count, _, _ in found),
        num_rounded=sum(rounded for _, _, rounded, _ in found),
        worst=max((worst for *_, worst in found), default=0.0),
        weights=tuple(module for module, _, rounded, _ in found if rounded),
    )


def rounding_notes(rounding: Rounding) -> Iterator[str]:
    """What a user is told of rounded scales."""
    if rounding.num_rounded:
        names = ", ".join(rounding.weights[:SHOWN])
        more = len(rounding.weights) - SHOWN
        names += f" and {more} more" if more > 0 else ""
        yield (
            f"{rounding.num_rounded} of {rounding.num_scales} scales are rounded to float16, by at "
            f"most {rounding.worst:.2g} of their value: {names}"
        )


def _rounded(folder: Int8Folder, module: str) -> tuple[int, int, float]:
    exact = folder.scales(module)
    error = np.abs(float16_scales(folder, module).astype(np.float32) - exact) / exact
    return exact.size, int(np.count_nonzero(error)), float(error.max())
