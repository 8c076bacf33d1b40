"""Launching a Triton kernel: what the device is, and which compiled kernel is meant."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16
"""Triton compiles one kernel for addresses that are multiples of this, another for others."""


@dataclass(frozen=True)
class DeviceInfo:
    """What a choice of kernel depends on; the interpreter's CPU looks like a tiny GPU."""

    architecture: str
    num_processors: int
    is_nvidia: bool
    has_pdl: bool


@cache
def device_info(device: torch.device) -> DeviceInfo:
    """Architecture ('sm_90', 'gfx942'), multiprocessors, and what the compiler may use."""
    if device.type != "cuda":
        return DeviceInfo("interpreter", 2, is_nvidia=False, has_pdl=False)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        name = properties.gcnArchName.split(":")[0]
        return DeviceInfo(name, properties.multi_processor_count, is_nvidia=False, has_pdl=False)
    major, minor = torch.cuda.get_device_capability(device)
    return DeviceInfo(
        f"sm_{major}{minor}", properties.multi_processor_count, is_nvidia=True, has_pdl=major >= 9
    )


_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
"""What a launch depends on -> (compiled kernel, its compile-time arguments)."""


def launch(
    kernel: str, grid: tuple[int, int], tokens: int, operands: tuple[Any, ...], **meta: Any
) -> None:
    """Launch a kernel of the Triton files on the device of its first operand, a tensor.

    Triton's own launch takes most of its time to find out which compiled kernel is meant; here it
    is looked up by what it was compiled for: dtypes, alignment and every number but `tokens`.
    """
    device = operands[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, tokens, operands, **meta)
        return
    parts: list[Any] = [kernel, device]
    arguments: list[Any] = [tokens]
    for operand in operands:
        if isinstance(operand, Tensor):
            address = operand.data_ptr()  # taken as it is, which spares Triton asking the driver
            parts += (operand.dtype, address % ALIGNMENT)
            arguments.append(address)
        else:
            parts.append(operand)
            arguments.append(operand)
    key = (*parts, *meta.values())
    found = _compiled.get(key)
    if found is None:
        _compile_and_launch(key, kernel, device, (*grid, 1), (tokens, *operands), meta)
    else:
        compiled, constants = found
        compiled[(*grid, 1)](*arguments, *constants)


def _compile_and_launch(
    key: tuple[Any, ...],
    kernel: str,
    device: torch.device,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    meta: dict[str, Any],
) -> None:
    function = _function(kernel)
    constants = {**meta, "PDL": device_info(device).has_pdl}
    options = {"launch_pdl": True} if constants["PDL"] else {}
    compiled = function[grid](*arguments, **constants, **options)
    if device.type == "cuda":
        names = function.arg_names[len(arguments) :]
        _compiled[key] = (compiled, tuple(constants[name] for name in names))


def _function(kernel: str) -> Any:
    from halfweight.kernels.triton import between_products, gemv, paged, pages, parts, tiled

    files = (tiled, gemv, between_products, pages, paged, parts)
    return next(getattr(file, kernel) for file in files if hasattr(file, kernel))
