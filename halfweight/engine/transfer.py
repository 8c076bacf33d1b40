"""Small arrays between host and device, through pinned memory, without waiting."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A copy on the device, in the order of its stream; on the CPU the array itself."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """In which kernels, streams, events and graphs are the device's."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Staging:
    """Whole numbers to a device, a call at a time, through two pinned buffers that take turns.

    Pinning memory for each call would take longer than all else that it asks of the host.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """Buffers grow with what is sent; on the CPU there are none."""
        self._device, self._dtype, self._turn = device, dtype, 0
        self._hosts = [torch.empty(0, dtype=dtype)] * 2
        self._copied: list[Any] = [None, None]

    def send(self, array: NDArray[Any]) -> Tensor:
        """A copy of an array of `dtype`, in the stream's order; on the CPU the array itself."""
        if self._device.type != "cuda":
            return torch.from_numpy(array)
        sent = self._host(array).view(array.shape).to(self._device, non_blocking=True)
        self._copied[self._turn].record()
        return sent

    def scatter(self, array: NDArray[Any], targets: Sequence[Tensor]) -> None:
        """Copy the parts of an array [n] to vectors on the device that take all of it in order."""
        on_gpu = self._device.type == "cuda"
        host = self._host(array) if on_gpu else torch.from_numpy(array)
        begin = 0
        for target in targets:
            end = begin + len(target)
            target.copy_(host[begin:end], non_blocking=True)
            begin = end
        if on_gpu:
            self._copied[self._turn].record()

    def _host(self, array: NDArray[Any]) -> Tensor:
        """The numbers in the next buffer; waits if its copy, two calls ago, is not done."""
        self._turn ^= 1
        if self._copied[self._turn] is None:
            self._copied[self._turn] = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied[self._turn].synchronize()
        if len(self._hosts[self._turn]) < array.size:
            room = 1 << array.size.bit_length()
            self._hosts[self._turn] = torch.empty(room, dtype=self._dtype, pin_memory=True)
        host = self._hosts[self._turn][: array.size]
        host.numpy()[:] = array.reshape(-1)
        return host


class HostCopy:
    """Tensors on their way to the host."""

    def __init__(self, *tensors: Tensor) -> None:
        """Starts the copies; on the CPU there is nothing to copy."""
        self._event: torch.cuda.Event | None = None
        self._host = tensors
        if tensors[0].is_cuda:
            self._host = tuple(_pinned_copy(tensor) for tensor in tensors)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def ready(self) -> bool:
        """Whether `wait` returns at once."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> list[NDArray[Any]]:
        """The arrays, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return [tensor.numpy() for tensor in self._host]


def _pinned_copy(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class Lane:
    """Buffers that take int32 rows to a GPU and results back, used again step after step.

    Allocating and freeing them for each step would take longer than all else that a step's
    sampling asks of the host.
    """

    def __init__(self, device: torch.device, num_rows: int, widths: tuple[int, int]) -> None:
        """For at most `num_rows` rows of widths[0] numbers there and widths[1] back."""
        there, back = ((num_rows, width) for width in widths)
        self._rows_host = torch.empty(there, dtype=torch.int32, pin_memory=True)
        self._rows = torch.empty(there, dtype=torch.int32, device=device)
        self._result_host = torch.empty(back, dtype=torch.int32, pin_memory=True)
        self._result = torch.empty(back, dtype=torch.int32, device=device)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._returning: Returning | None = None
        self.num_rows = num_rows

    def send(self, rows: NDArray[np.int32]) -> tuple[Tensor, Tensor]:
        """The rows on the device, and where their results belong."""
        if self._returning is not None:
            self._returning.wait()
        count = len(rows)
        self._rows_host.numpy()[:count] = rows
        self._rows.copy_(self._rows_host, non_blocking=True)
        return self._rows, self._result[:count]

    def fetch(self, count: int) -> Returning:
        """The first `count` results, on their way to the host."""
        self._result_host.copy_(self._result, non_blocking=True)
        self._event.record()
        self._returning = Returning(self._result_host.numpy()[:count], self._event)
        return self._returning


class Returning:
    """Results on their way to the host, in a buffer that is used again once they were read."""

    def __init__(self, array: NDArray[np.int32], event: Any = None) -> None:
        """`array` is filled when `event` has come; without one it is already."""
        self._array, self._event = array, event

    def ready(self) -> bool:
        """Whether `wait` returns at once."""
        return self._event is None or bool(self._event.query())

    def wait(self) -> NDArray[np.int32]:
        """The results, once they are there."""
        if self._event is not None:
            self._event.synchronize()
            self._array, self._event = self._array.copy(), None
        return self._array
