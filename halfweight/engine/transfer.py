"""Small arrays between host and device, through pinned memory, without waiting."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A copy on the device, in the order of its stream; on the CPU the array itself."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


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
