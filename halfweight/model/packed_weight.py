"""A weight as transformers sees it while its values are INT8 elsewhere.

transformers' loader renames tensors, splits, joins and stacks them, and ties parameters, by rules
of hundreds of model classes. A `PackedWeight` goes through all that in place of a 16-bit matrix:
it has a shape, a dtype and a device, and knows which rows of which packed matrices of the file it
stands for. Operations along rows give another PackedWeight; any other is refused, and noted in
`refused`, so that its matrices can be kept in 16 bits. It is a Tensor subclass for that alone: a
loaded model holds plain tensors (modules.py), and their `weight` answers as one of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfweight.quantization.numerics import QuantizedTensor, scales_float32


@dataclass(frozen=True)
class Rows:
    """Rows [begin, end) of the packed matrix of module `name` in the file."""

    name: str
    begin: int
    end: int


Matrix = tuple[Rows, ...]
"""Rows of one or more packed matrices, one below the other."""
Refused = dict[str, str]
"""Names of packed matrices -> why they cannot stay packed."""


class PackedWeight(Tensor):
    """One matrix [N, K], or a stack of them [E, N, K]; `turned` where it is shown as [K, N]."""

    matrices: tuple[Matrix, ...]
    turned: bool
    refused: Refused

    @staticmethod
    def __new__(
        cls,
        matrices: tuple[Matrix, ...],
        shape: Iterable[int],
        dtype: torch.dtype,
        device: torch.device | str,
        refused: Refused,
        turned: bool = False,
    ) -> PackedWeight:
        """`shape` is what transformers sees; `refused` is shared by all weights of one loading."""
        made: PackedWeight = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=torch.device(device)
        )
        made.matrices, made.refused, made.turned = matrices, refused, turned
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Operations along rows; NotImplementedError for all that needs values."""
        packed = [a for a in _flat((args, kwargs or {})) if isinstance(a, PackedWeight)]
        operation = _OPERATIONS.get(func.overloadpacket.__name__)
        try:
            if operation is not None:
                return operation(*args, **(kwargs or {}))
        except _NotRows:
            pass
        for name in {rows.name for w in packed for matrix in w.matrices for rows in matrix}:
            packed[0].refused.setdefault(name, "its values are needed while it is loaded")
        raise NotImplementedError(
            f"{func.overloadpacket.__name__} of a weight in INT8, which has shape and dtype only; "
            "run the module, or keep it in 16 bits (--keep)"
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PackedWeight({list(self.shape)}, {self.dtype}, {self.device})"

    @property
    def names(self) -> set[str]:
        """The packed matrices of the file that it stands for."""
        return {rows.name for matrix in self.matrices for rows in matrix}

    def like(
        self, matrices: tuple[Matrix, ...], shape: Iterable[int], **other: Any
    ) -> PackedWeight:
        """The same kind of weight with other rows."""
        dtype, device = other.get("dtype") or self.dtype, other.get("device") or self.device
        return PackedWeight(matrices, shape, dtype, device, self.refused, self.turned)


def whole(
    name: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    refused: Refused | None = None,
    turned: bool = False,
) -> PackedWeight:
    """All rows of the packed matrix [N, K] of a module; shown as [K, N] where `turned`."""
    shown = shape[::-1] if turned else shape
    matrix = (Rows(name, 0, shape[0]),)
    return PackedWeight((matrix,), shown, dtype, device, {} if refused is None else refused, turned)


def upper_and_lower(matrix: Matrix) -> tuple[Matrix, Matrix]:
    """The two halves of a matrix, row by row."""
    height = sum(rows.end - rows.begin for rows in matrix)
    return _cut(matrix, 0, height // 2), _cut(matrix, height // 2, height)


def gather(weights: Mapping[str, QuantizedTensor], matrix: Matrix) -> QuantizedTensor:
    """The rows of `matrix` as one weight: the very tensors where they are all of one, else copies.

    Rows of several matrices need equal groups; scales become float32 where not all are grid8.
    """
    parts = [_rows(weights[rows.name], rows) for rows in matrix]
    if len(parts) == 1:
        return parts[0]
    packed = torch.cat([part.packed for part in parts])
    exponents = [part.exponents for part in parts if part.exponents is not None]
    if len(exponents) == len(parts):
        return QuantizedTensor(packed, torch.cat([p.scales for p in parts]), torch.cat(exponents))
    scales = torch.cat([scales_float32(part.scales, part.exponents) for part in parts])
    return QuantizedTensor(packed, scales, None)


def _rows(weight: QuantizedTensor, rows: Rows) -> QuantizedTensor:
    if (rows.begin, rows.end) == (0, weight.shape[0]):
        return weight
    span = slice(rows.begin, rows.end)
    exponents = None if weight.exponents is None else weight.exponents[span]
    return QuantizedTensor(weight.packed[span], weight.scales[span], exponents)


class _NotRows(Exception):
    """The operation is known, but not along rows."""


def _require(condition: bool) -> None:
    if not condition:
        raise _NotRows


def _flat(values: Any) -> Iterable[Any]:
    if isinstance(values, dict):
        values = values.values()
    for value in values:
        if isinstance(value, list | tuple | dict):
            yield from _flat(value)
        else:
            yield value


def _same(weight: PackedWeight, *_: Any, **kwargs: Any) -> PackedWeight:
    return weight.like(weight.matrices, weight.shape, **kwargs)


def _view(weight: PackedWeight, shape: Iterable[int], **_: Any) -> PackedWeight:
    _require(tuple(shape) == tuple(weight.shape))
    return _same(weight)


def _cut(matrix: Matrix, begin: int, end: int) -> Matrix:
    """Rows [begin, end) of a matrix made of rows."""
    found, position = [], 0
    for rows in matrix:
        height = rows.end - rows.begin
        first, last = max(begin - position, 0), min(end - position, height)
        if first < last:
            found.append(Rows(rows.name, rows.begin + first, rows.begin + last))
        position += height
    return tuple(found)


def _join(parts: Iterable[Matrix]) -> Matrix:
    """Matrices one below the other; neighbours of one file matrix become one run of rows."""
    found: list[Rows] = []
    for rows in (rows for part in parts for rows in part):
        if found and (found[-1].name, found[-1].end) == (rows.name, rows.begin):
            found[-1] = Rows(rows.name, found[-1].begin, rows.end)
        else:
            found.append(rows)
    return tuple(found)


def _slice(
    weight: PackedWeight, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> PackedWeight:
    dim = dim % weight.dim()
    begin, stop, step = slice(start, end, step).indices(weight.shape[dim])
    if (begin, stop, step) == (0, weight.shape[dim], 1):
        return _same(weight)
    _require(step == 1 and begin < stop and not weight.turned and dim < weight.dim() - 1)
    shape = [*weight.shape]
    shape[dim] = stop - begin
    if weight.dim() == 3 and dim == 0:
        return weight.like(weight.matrices[begin:stop], shape)
    return weight.like(tuple(_cut(matrix, begin, stop) for matrix in weight.matrices), shape)


def _split(weight: PackedWeight, sizes: int | list[int], dim: int = 0) -> list[PackedWeight]:
    height = weight.shape[dim]
    if isinstance(sizes, int):
        starts = range(0, height, sizes)
        sizes = [min(sizes, height - start) for start in starts]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [_slice(weight, dim, end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _select(weight: PackedWeight, dim: int, index: int) -> PackedWeight:
    _require(weight.dim() == 3 and dim == 0)
    return weight.like((weight.matrices[index],), weight.shape[1:])


def _unbind(weight: PackedWeight, dim: int = 0) -> list[PackedWeight]:
    return [_select(weight, dim, index) for index in range(weight.shape[dim])]


def _squeeze(weight: PackedWeight, dim: int | list[int] = 0) -> PackedWeight:
    _require(dim in (0, [0]) and weight.dim() == 3 and weight.shape[0] == 1)
    return _select(weight, 0, 0)


def _all_packed(weights: list[PackedWeight]) -> None:
    _require(all(isinstance(weight, PackedWeight) and not weight.turned for weight in weights))
    _require(len({weight.shape[-1] for weight in weights}) == 1)


def _cat(weights: list[PackedWeight], dim: int = 0) -> PackedWeight:
    _all_packed(weights)
    first, dim = weights[0], dim % weights[0].dim()
    _require(dim < first.dim() - 1)
    shape = [*first.shape]
    shape[dim] = sum(weight.shape[dim] for weight in weights)
    if first.dim() == 3 and dim == 0:
        return first.like(tuple(m for weight in weights for m in weight.matrices), shape)
    columns = zip(*(weight.matrices for weight in weights), strict=True)
    return first.like(tuple(_join(column) for column in columns), shape)


def _stack(weights: list[PackedWeight], dim: int = 0) -> PackedWeight:
    _all_packed(weights)
    _require(dim == 0 and all(weight.shape == weights[0].shape for weight in weights))
    _require(weights[0].dim() == 2)
    matrices = tuple(weight.matrices[0] for weight in weights)
    return weights[0].like(matrices, (len(weights), *weights[0].shape))


def _equal(one: Tensor, other: Tensor) -> bool:
    if isinstance(one, PackedWeight) and isinstance(other, PackedWeight):
        return one.matrices == other.matrices
    return False


_OPERATIONS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("detach", "alias", "clone", "_to_copy", "lift_fresh", "contiguous"), _same),
    **dict.fromkeys(("view", "_unsafe_view", "reshape"), _view),
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    "slice": _slice,
    "select": _select,
    "unbind": _unbind,
    "squeeze": _squeeze,
    "cat": _cat,
    "stack": _stack,
    "equal": _equal,
}
"""ATen operation -> what it is on rows."""
