"""A weight that a file holds in a form of its own, as the model has it: what a reader describes.

A reader (gptq.py, int8_rows.py, float8.py, mxfp4.py) turns names and shapes into a Matrix for each
such weight. A Matrix holds no data: it is handed the bytes of its parts. What is INT8 comes out as
Int8Rows, bit for bit; all else as float32, to be rounded once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from halfweight.errors import CheckpointError
from halfweight.quantization.scheme import TensorInfo

T = TypeVar("T")
HELD_AT_ONCE = 2
"""Blocks of two neighbouring tensors can be asked for at the same time."""

ReadBytes = Callable[[TensorInfo, int, int], NDArray[np.uint8]]
"""Bytes [begin, end) of one of the file's tensors."""


@dataclass(frozen=True)
class Int8Rows:
    """packed uint8 [R, K], q + 128; scales float32 [R, K/G], exactly those of the file."""

    packed: NDArray[np.uint8]
    scales: NDArray[np.float32]

    def values(self) -> NDArray[np.float32]:
        """The weights that they stand for, float32 [R, K]."""
        q = self.packed.astype(np.float32) - np.float32(128)
        num_rows, num_groups = self.scales.shape
        groups = q.reshape(num_rows, num_groups, -1) * self.scales[:, :, None]
        return groups.reshape(num_rows, -1)

    def sound(self, name: str) -> Int8Rows:
        """The same weights with scales that are positive: a scale of 0 stands for zeros.

        Raises CheckpointError for a scale that is negative or not finite.
        """
        if not (np.isfinite(self.scales) & (self.scales >= 0)).all():
            raise CheckpointError(
                f"tensor {name}: a scale is negative or not finite, expected positive ones",
                hint="download the file again; if it stays so, quantize the 16-bit original",
            )
        zero = self.scales == 0
        if not zero.any():
            return self
        packed = self.packed.reshape(*zero.shape, -1).copy()
        packed[zero] = 128
        scales = np.where(zero, np.float32(1), self.scales)
        return Int8Rows(packed.reshape(self.packed.shape), scales)


class Matrix(Protocol):
    """One weight of the model: `info` as the model has it, `parts` as the file has them.

    `info.int8` is the scheme of INT8 values that are kept. `rows_at_once` leading rows are read
    together; 0 where any can be.
    """

    @property
    def info(self) -> TensorInfo: ...

    @property
    def parts(self) -> tuple[TensorInfo, ...]: ...

    @property
    def rows_at_once(self) -> int: ...

    def check(self, read: ReadBytes) -> None:
        """Look at small parts before any work; raises CheckpointError where they do not do."""
        ...

    def rows(self, read: ReadBytes, begin: int, end: int) -> Int8Rows | NDArray[np.float32]:
        """Leading rows [begin, end) of the weight."""
        ...


class Reader(Protocol):
    """A module of this folder that knows one form."""

    def matrices(
        self, tensors: Mapping[str, TensorInfo], dtype: str, declared: Mapping[str, Any]
    ) -> list[Matrix]:
        """Every weight of the form among a file's `tensors`, in `dtype` where it is decoded.

        `declared` is the quantization_config. Raises CheckpointError for parts that do not fit.
        """
        ...


class Held(Generic[T]):
    """The last few things made, each made once, by whichever thread asks for it first."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._made: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """What was made for `key`, or is made now."""
        with self._lock:
            if key not in self._made:
                self._made[key] = make()
                while len(self._made) > HELD_AT_ONCE:
                    self._made.popitem(last=False)
            return self._made[key]


def whole(read: ReadBytes, part: TensorInfo) -> NDArray[np.uint8]:
    """All bytes of a part."""
    return read(part, 0, part.num_bytes)


def part_of(tensors: Mapping[str, TensorInfo], module: str, part: str) -> TensorInfo:
    """A part that a module must have. Raises CheckpointError."""
    found = tensors.get(f"{module}.{part}")
    if found is None:
        raise CheckpointError(
            f"module {module} has no {part}, which its other tensors need",
            hint="download the checkpoint again; it is not complete",
        )
    return found


def misfit(tensor: TensorInfo, expected: str) -> CheckpointError:
    """The error of a part of another dtype or shape than the form has."""
    return CheckpointError(
        f"tensor {tensor.name} is {tensor.dtype} {list(tensor.shape)}, expected {expected}",
        hint="download the checkpoint again; if it stays so, quantize the 16-bit original",
    )
