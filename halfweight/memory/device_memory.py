"""Memory of a device: what is free, and one clear error instead of an allocator's traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from halfweight.errors import DoesNotFitError, UsageError

GIB = 1 << 30
DEVICE_HINT = "`halfweight backends` shows the devices of this machine"


def indexed(device: torch.device | str) -> torch.device:
    """The device with its number: "cuda" is the current one.

    Raises UsageError for what is no device, for one that is neither the CPU nor a GPU of CUDA, and
    for a GPU that is not there.
    """
    device = named_device(device)
    if device.type in ("cpu", "meta"):
        return device
    if device.type != "cuda":
        raise UsageError(f"device is {device}, expected cpu or a CUDA GPU", hint=DEVICE_HINT)
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise UsageError(f"device is {device}, and torch finds {count} GPUs here", hint=DEVICE_HINT)
    return torch.device(
        "cuda", torch.cuda.current_device() if device.index is None else device.index
    )


def named_device(name: torch.device | str) -> torch.device:
    """The device of a name. Raises UsageError for what is none."""
    try:
        return torch.device(name)
    except RuntimeError:
        raise UsageError(
            f"device {name!r} is not known", hint="devices are named cuda:0, cuda:1 or cpu"
        ) from None


def available_bytes(device: torch.device | str) -> int | None:
    """Bytes this process can still allocate on a CUDA device; None for the CPU, which swaps.

    Counts what the driver has free, what the allocator holds unused, and the limit set by
    `torch.cuda.set_per_process_memory_fraction`.
    """
    device = indexed(device)
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    limit = int(total * torch.cuda.get_per_process_memory_fraction(device))
    return max(0, min(free + reserved, limit) - allocated)


def require(num_bytes: int, device: torch.device | str, what: str, *, hint: str) -> None:
    """Raise DoesNotFitError naming needed and free bytes unless `num_bytes` fit on `device`."""
    free = available_bytes(device)
    if free is not None and num_bytes > free:
        raise _does_not_fit(what, num_bytes, free, device, hint)


@contextmanager
def out_of_memory(device: torch.device | str, what: str, *, hint: str) -> Iterator[None]:
    """Turn the allocator's own error inside the block into DoesNotFitError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise _does_not_fit(what, None, available_bytes(device) or 0, device, hint) from error


def _does_not_fit(
    what: str, needed: int | None, free: int, device: torch.device | str, hint: str
) -> DoesNotFitError:
    found = f"{free / GIB:.2f} GiB free on {device}"
    if needed is None:
        return DoesNotFitError(f"out of memory in {what}: {found}", hint=hint)
    return DoesNotFitError(f"{what} needs {needed / GIB:.2f} GiB, {found}", hint=hint)
