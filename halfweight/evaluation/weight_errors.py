"""Where quantization lost most, weight by weight: signal to noise, worst groups, clipped weights.

A folder's manifest records each tensor's error as it was quantized, so `recorded_errors` answers at
once. Which groups are worst and how many weights are clipped only the source can tell:
`measured_errors` reads both, a block of rows at a time.
"""

from __future__ import annotations

import html
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfweight.checkpoint.headers import StoredWeight, quantized_modules, read_headers
from halfweight.checkpoint.manifest import MANIFEST_NAME, read_manifest
from halfweight.checkpoint.shard import StoredTensor
from halfweight.checkpoint.sources import open_source
from halfweight.checkpoint.sources.source import Source
from halfweight.errors import CheckpointError
from halfweight.quantization.float_bytes import as_float32
from halfweight.quantization.scheme import DTYPE_BYTES, TensorInfo

QMAX, OFFSET = 127, 128
BLOCK_WEIGHTS = 2_000_000
NUM_WORST = 3
"""Groups named for each tensor."""

Progress = Callable[[str, int, int], None]
"""Called with a tensor's name, weights compared and weights in all."""


@dataclass(frozen=True)
class GroupError:
    """One group of a weight: its row, its place in the row, |w - w'| / |w|."""

    row: int
    group: int
    relative_error: float


@dataclass(frozen=True)
class TensorError:
    """What quantization did to one weight.

    `sqnr_db` is 10 log10 |w|^2 / |w - w'|^2. `crushed_groups` are those in which most weights read
    back as zero. Clipped is a weight more than half a step beyond the largest value of its group.
    """

    name: str
    group_size: int
    num_weights: int
    sqnr_db: float
    crushed_groups: int
    clipped_weights: int | None = None
    worst_groups: tuple[GroupError, ...] = ()


def recorded_errors(folder: Path) -> tuple[TensorError, ...]:
    """The errors in the manifest of a folder made by halfweight, in the order of the model.

    Raises CheckpointError if the folder has no manifest.
    """
    if not (folder / MANIFEST_NAME).exists():
        raise CheckpointError(
            f"{folder}: no {MANIFEST_NAME}, so no record of errors",
            hint="give the model it was quantized from with --source",
        )
    shapes = {f"{name}.weight": w for name, w in quantized_modules(read_headers(folder)).items()}
    shards = read_manifest(folder)["shards"].values()
    records = {name: record for shard in shards for name, record in shard["tensors"].items()}
    return tuple(
        TensorError(
            name=name,
            group_size=shapes[name].group_size,
            num_weights=math.prod(shapes[name].shape),
            sqnr_db=sqnr_db(record["squared_norm"], record["squared_error"]),
            crushed_groups=record["crushed_groups"],
        )
        for name, record in sorted(records.items(), key=lambda item: natural(item[0]))
    )


def measured_errors(
    folder: Path, source: str | os.PathLike[str], progress: Progress | None = None
) -> tuple[TensorError, ...]:
    """The errors of a quantized folder against the source it was made from, read block by block.

    Raises CheckpointError if the source lacks a tensor of this name and shape.
    """
    modules = quantized_modules(read_headers(folder))
    opened = open_source(source)
    originals = {tensor.name: tensor for tensor in opened.tensors}
    total = sum(math.prod(weight.shape) for weight in modules.values())
    errors, done = [], 0
    for module in sorted(modules, key=natural):
        name, weight = f"{module}.weight", modules[module]
        original = originals.get(name)
        if original is None or original.shape != weight.shape:
            found = "nothing" if original is None else list(original.shape)
            raise CheckpointError(
                f"{opened.name}: tensor {name} is {found}, expected {list(weight.shape)}",
                hint="give the very model that was quantized",
            )
        errors.append(_measure(weight, opened, original))
        done += original.num_elements
        if progress is not None:
            progress(name, done, total)
    return tuple(errors)


def sqnr_db(squared_norm: float, squared_error: float) -> float:
    """Signal to noise in decibels; infinite without an error."""
    return 10 * math.log10(squared_norm / squared_error) if squared_error else math.inf


def natural(name: str) -> list[str | int]:
    """A sort key that puts layer 10 after layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _measure(weight: StoredWeight, source: Source, original: TensorInfo) -> TensorError:
    num_groups = weight.shape[1] // weight.group_size
    blocks = list(_blocks(weight, source, original))
    errors, norms = (np.concatenate([block[i] for block in blocks]) for i in (0, 1))
    ratios = np.sqrt(np.divide(errors, norms, out=np.zeros_like(errors), where=norms > 0)).ravel()
    worst = np.argsort(-ratios, kind="stable")[:NUM_WORST]
    return TensorError(
        name=original.name,
        group_size=weight.group_size,
        num_weights=original.num_elements,
        sqnr_db=sqnr_db(float(norms.sum()), float(errors.sum())),
        crushed_groups=sum(block[2] for block in blocks),
        clipped_weights=sum(block[3] for block in blocks),
        worst_groups=tuple(
            GroupError(int(i) // num_groups, int(i) % num_groups, float(ratios[i])) for i in worst
        ),
    )


Block = tuple[NDArray[np.float64], NDArray[np.float64], int, int]
"""Squared errors and norms [R, K/G], crushed groups, clipped weights."""


def _blocks(weight: StoredWeight, source: Source, original: TensorInfo) -> Iterator[Block]:
    num_rows, num_columns = weight.shape
    row_bytes = num_columns * DTYPE_BYTES[original.dtype]
    step = max(1, BLOCK_WEIGHTS // num_columns)
    num_groups = weight.scale.info.shape[1]
    for begin in range(0, num_rows, step):
        end = min(begin + step, num_rows)
        raw = source.read(original, begin * row_bytes, end * row_bytes)
        shape = (end - begin, num_groups, weight.group_size)
        exact = as_float32(raw, original.dtype).reshape(shape)
        packed = _rows(weight.packed, begin, end).reshape(shape)
        scales = as_float32(_rows(weight.scale, begin, end), weight.scale.info.dtype)
        yield _compare(exact, packed, scales.reshape(shape[:2])[..., None])


def _rows(tensor: StoredTensor, begin: int, end: int) -> NDArray[np.uint8]:
    """Bytes of rows [begin, end) of a stored matrix."""
    row_bytes = tensor.info.num_bytes // tensor.info.shape[0]
    at = tensor.begin + begin * row_bytes
    return np.fromfile(tensor.shard, np.uint8, (end - begin) * row_bytes, offset=at)


def _compare(exact: NDArray[Any], packed: NDArray[Any], scales: NDArray[Any]) -> Block:
    error = exact - (packed.astype(np.float32) - OFFSET) * scales
    errors, norms = (np.square(x, dtype=np.float64).sum(axis=-1) for x in (error, exact))
    lost = ((packed == OFFSET) & (exact != 0)).sum(axis=-1)
    crushed = int((2 * lost > (exact != 0).sum(axis=-1)).sum())
    clipped = int((np.abs(exact) > (QMAX + 0.5) * scales).sum())
    return errors, norms, crushed, clipped


def heat_map(errors: tuple[TensorError, ...], title: str) -> str:
    """One HTML page: layers down, modules across, each cell's colour its signal to noise."""
    cells = {_place(error.name): error for error in errors}
    layers = list(dict.fromkeys(layer for layer, _ in cells))
    modules = list(dict.fromkeys(module for _, module in cells))
    known = sorted(error.sqnr_db for error in errors if math.isfinite(error.sqnr_db))
    low, high = (known[0], known[-1]) if known else (0.0, 1.0)
    head = "".join(f"<th>{html.escape(module)}</th>" for module in modules)
    body = "".join(
        f"<tr><th>{html.escape(layer)}</th>"
        + "".join(_cell(cells.get((layer, module)), low, high) for module in modules)
        + "</tr>\n"
        for layer in layers
    )
    return PAGE.format(title=html.escape(title), low=low, high=high, head=head, body=body)


PAGE = """<!doctype html>
<meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff }}
table {{ border-collapse: collapse }}
th {{ font-weight: 500; padding: .2rem .6rem; text-align: left }}
td {{ padding: .2rem .6rem; text-align: right; font-variant-numeric: tabular-nums; color: #111 }}
</style>
<h1>{title}</h1>
<p>Signal to noise of each quantized weight in decibels: {low:.1f} (darkest) to {high:.1f}. More is
better; 6 dB is half the error. Point at a cell for its worst groups.</p>
<table><tr><th></th>{head}</tr>
{body}</table>
"""


def _place(name: str) -> tuple[str, str]:
    """('layer 3', 'self_attn.q_proj') of a weight in a numbered layer, ('', name) of another."""
    name = name.removesuffix(".weight")
    match = re.match(r".*?\.(\d+)\.(.+)$", name)
    return (f"layer {match[1]}", match[2]) if match else ("", name)


def _cell(error: TensorError | None, low: float, high: float) -> str:
    if error is None:
        return "<td></td>"
    share = (min(error.sqnr_db, high) - low) / (high - low) if high > low else 1.0
    worst = "; ".join(
        f"row {group.row} group {group.group}: {group.relative_error:.2%}"
        for group in error.worst_groups
    )
    tip = html.escape(f"{error.name}, group size {error.group_size}. {worst}".strip())
    colour = f"hsl(12 85% {55 + 43 * share:.0f}%)"
    return f'<td style="background:{colour}" title="{tip}">{error.sqnr_db:.1f}</td>'
