"""An INT8 weight of a vLLM layer, from what was loaded to what our kernels take.

vLLM loads `weight_packed` int32 [N, K/4] and `weight_scale` [N, K/G] of its shard. The bytes stay
where they are and are looked at as uint8 [N, K]. Scales were loaded as float32, which holds any
file's exactly; they become one byte each on a grid8 grid, else the smallest dtype that holds them.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from halfweight.kernels.operations import backend, choose_backend
from halfweight.quantization.numerics import grid8_from_scales

GROUP_SIZES = (32, 64, 128, 256)
"""Groups that every backend takes; one scale a row is taken too."""
DUMMY_SCALE = 2.0**-7
"""vLLM's random scales for dummy weights are partly negative, which no file's are."""
ZERO = 128
"""The byte of a weight of 0."""

PACKED, SCALE, EXPONENT = "weight_packed", "weight_scale", "weight_exponent"


def hold(layer: nn.Module, packed: Tensor, scales: Tensor) -> None:
    """Give `layer` its weight, from int32 [N, K/4] and scales [N, K/G], and the backend for it.

    Rows with scale 0 are vLLM's padding of a vocabulary: they become weights of 0.
    """
    data = packed.detach().contiguous().view(torch.uint8)
    codes, exponents = _smallest(_without_padding(data, scales.detach().contiguous()))
    _replace(layer, PACKED, data)
    _replace(layer, SCALE, codes)
    _replace(layer, EXPONENT, exponents)
    layer.halfweight_backend = choose_backend(data.device)  # type: ignore[assignment]
    if layer.halfweight_backend == "cpu":
        _ask_for_matrix_unit()


def prepare(layer: nn.Module, dtype: torch.dtype) -> None:
    """Begin to compile what products with this weight may need, while vLLM compiles the model."""
    packed, scales, _ = _parts(layer)
    name: str = layer.halfweight_backend  # type: ignore[assignment]
    _prepare(name, packed.device, packed.shape[1] // scales.shape[1], dtype)


@cache
def _prepare(name: str, device: torch.device, group_size: int, dtype: torch.dtype) -> None:
    backend(name).prepare(device, group_size, dtype)


@cache
def _ask_for_matrix_unit() -> None:
    """vLLM's attention uses AMX, for which Linux must be asked: so far vLLM's products did."""
    from halfweight.kernels.cpu.backend import has_matrix_unit

    has_matrix_unit()


def product(layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] times the weight [N, K] that `layer` holds, in x's dtype."""
    y: Tensor = torch.ops.halfweight.linear(x, *_parts(layer), bias, layer.halfweight_backend)
    return y


def rows(layer: nn.Module, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows `ids` [...] of the weight that `layer` holds, as [..., K] in `dtype`."""
    found: Tensor = torch.ops.halfweight.embedding(
        ids, *_parts(layer), dtype, layer.halfweight_backend
    )
    return found


def _parts(layer: nn.Module) -> tuple[Tensor, Tensor, Tensor | None]:
    return layer.weight_packed, layer.weight_scale, layer.weight_exponent  # type: ignore[return-value]


def _replace(layer: nn.Module, name: str, value: Tensor | None) -> None:
    if name in layer._parameters:
        delattr(layer, name)
    parameter = None if value is None else nn.Parameter(value, requires_grad=False)
    layer.register_parameter(name, parameter)


def _without_padding(packed: Tensor, scales: Tensor) -> Tensor:
    padding = (scales == 0).any(dim=1)
    if not bool(padding.any()):
        return scales
    packed[padding] = ZERO
    return torch.where(padding[:, None], torch.ones_like(scales), scales)


def _smallest(scales: Tensor) -> tuple[Tensor, Tensor | None]:
    """Codes and exponents of grid8, or scales in the smallest dtype that holds them and None."""
    on_grid = grid8_from_scales(scales)
    if on_grid is not None:
        return on_grid
    for dtype in (torch.bfloat16, torch.float16):
        rounded = scales.to(dtype)
        if bool((rounded == scales).all()):
            return rounded, None
    return scales, None
