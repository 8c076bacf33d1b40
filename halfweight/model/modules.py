"""The modules that stand in for nn.Linear and nn.Embedding: INT8 weights, one product.

A module holds a weight [N, K] as a plain set of tensors, in the file's own bytes:

    weight_packed    uint8 [N, K]     q + 128
    weight_scale     uint8 [N, K/G]   grid8 codes, or floats where the file's scales lie on no grid
    weight_exponent  int8 [N]         the rows' powers of two, None beside float scales

`weight` answers shape, dtype and device, which is what other modules ask of a neighbour.

They are parameters, not buffers, because tensor parallelism shards only those. A tied head is a
QuantizedLinear that shares the embedding's tensors. Moved to a device of another type, a module
takes a backend that runs there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from halfweight.errors import UsageError
from halfweight.kernels.operations import backend_on, embedding_function, linear_function
from halfweight.model.packed_weight import PackedWeight, whole
from halfweight.quantization.numerics import QuantizedTensor, scales_float32

PARTS = ("weight_packed", "weight_scale", "weight_exponent")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class QuantizedWeight(nn.Module):
    """A weight [out_features, in_features] in INT8, and the backend that multiplies with it."""

    weight_packed: nn.Parameter
    weight_scale: nn.Parameter
    weight_exponent: nn.Parameter | None

    def __init__(self, shape: tuple[int, int], backend_name: str, dtype: torch.dtype) -> None:
        """Without a weight, and no parameters for a loader to look for, until `hold`.

        `dtype` is that of the 16-bit weight it stands in for: UsageError for one that kernels do
        not compute in, here and where the module is brought to one. `requested_backend` is one
        that the user named: it stays wherever it runs.
        """
        nn.Module.__init__(self)
        self._is_hf_initialized = True  # transformers leaves its weight as it is
        self.out_features, self.in_features = shape
        self.dtype = _computed(dtype)
        self.backend_name = backend_name
        self.requested_backend: str | None = None
        self._chosen_for: str | None = None
        for part in PARTS:
            self.register_parameter(part, None)

    @property
    def group_size(self) -> int:
        """Weights along K that share a scale."""
        return self.in_features // self.weight_scale.shape[1]

    @property
    def weight(self) -> PackedWeight:
        """Shape [N, K], dtype and device of the weight; arithmetic with it raises."""
        shape = (self.out_features, self.in_features)
        device = "cpu" if self.weight_packed is None else self.weight_packed.device
        return whole("", shape, self.dtype, device)

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight as the numerics know it."""
        return QuantizedTensor(self.weight_packed, self.weight_scale, self.weight_exponent)

    def hold(self, quantized: QuantizedTensor) -> None:
        """Take these tensors as the weight, without a copy."""
        assert quantized.shape == (self.out_features, self.in_features)
        self._chosen_for = quantized.packed.device.type
        self.weight_packed = _parameter(quantized.packed)
        self.weight_scale = _parameter(quantized.scales)
        exponents = quantized.exponents
        self.weight_exponent = None if exponents is None else _parameter(exponents)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = _computed(fn(torch.empty(0, dtype=self.dtype)).dtype)
        if self.weight_packed is not None:
            device = self.weight_packed.device
            if device.type not in (self._chosen_for, "meta"):
                self.backend_name = backend_on(device, self.requested_backend)
                self._chosen_for = device.type
        return self

    def extra_repr(self) -> str:
        """Shape, groups and backend, for print(model)."""
        scales = "grid8" if self.weight_exponent is not None else str(self.weight_scale.dtype)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"group_size={self.group_size}, scales={scales}, backend={self.backend_name}"
        )


class QuantizedLinear(QuantizedWeight, nn.Linear):  # type: ignore[misc]
    """y = x W^T + bias with W in INT8, dequantized inside the product.

    An nn.Linear, so that what adds to linears takes it for one: peft's adapters among them.
    """

    bias: nn.Parameter | None  # type: ignore[assignment]

    def __init__(
        self,
        shape: tuple[int, int],
        backend_name: str,
        bias: nn.Parameter | None = None,
        int8_activations: bool = False,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """`bias` [N] in 16 bits or None; `int8_activations` rounds x to INT8 (opt-in)."""
        super().__init__(shape, backend_name, dtype)
        self.int8_activations = int8_activations
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> y [..., N] in x's dtype."""
        y: Tensor = torch.ops.halfweight.linear(
            x,
            self.weight_packed,
            self.weight_scale,
            self.weight_exponent,
            self.bias,
            self.backend_name,
            self.int8_activations,
        )
        return y

    def direct(self) -> Callable[[Tensor], Tensor]:
        """`forward` with the weight and the backend of now, without torch's layers around it.

        They take tens of microseconds a call. x must lie where the weight does.
        """
        packed, scales = self.weight_packed.detach(), self.weight_scale.detach()
        exponents, bias = _detached(self.weight_exponent), _detached(self.bias)
        function = linear_function(self.backend_name, packed.device, self.int8_activations)
        return lambda x: function(x, packed, scales, exponents, bias)


class QuantizedEmbedding(QuantizedWeight):
    """Rows of an INT8 table, dequantized as they are gathered; scaled where the model says so."""

    def __init__(
        self,
        shape: tuple[int, int],
        backend_name: str,
        dtype: torch.dtype,
        embed_scale: float | None = None,
    ) -> None:
        """`dtype` of the rows; `embed_scale` multiplies them, as Gemma's embedding does."""
        super().__init__(shape, backend_name, dtype)
        self.embed_scale = embed_scale

    @property
    def num_embeddings(self) -> int:
        """Rows of the table, as nn.Embedding calls them."""
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        """Columns of the table, as nn.Embedding calls them."""
        return self.in_features

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> rows [..., K]."""
        rows: Tensor = torch.ops.halfweight.embedding(
            ids,
            self.weight_packed,
            self.weight_scale,
            self.weight_exponent,
            self.dtype,
            self.backend_name,
        )
        return rows if self.embed_scale is None else rows * self.embed_scale

    def direct(self) -> Callable[[Tensor], Tensor]:
        """`forward` with the table and the backend of now; see QuantizedLinear.direct."""
        packed, scales = self.weight_packed.detach(), self.weight_scale.detach()
        exponents, dtype, scale = _detached(self.weight_exponent), self.dtype, self.embed_scale
        function = embedding_function(self.backend_name, packed.device)

        def rows_of(ids: Tensor) -> Tensor:
            rows = function(ids, packed, scales, exponents, dtype)
            return rows if scale is None else rows * scale

        return rows_of


def _computed(dtype: torch.dtype) -> torch.dtype:
    if dtype not in DTYPES:
        raise UsageError(
            f"dtype is {dtype}, expected one that a model in INT8 computes in",
            hint=f"one of {', '.join(map(str, DTYPES))}",
        )
    return dtype


def stack(linears: Sequence[QuantizedLinear]) -> QuantizedLinear:
    """One linear with the rows of all, which become views of its memory; copies what lies apart.

    All take the same x, with equal groups and scales, and all or none have a bias.
    """
    first = linears[0]
    shape = (sum(linear.out_features for linear in linears), first.in_features)
    stacked = QuantizedLinear(
        shape,
        first.backend_name,
        int8_activations=first.int8_activations,
        dtype=first.dtype,
    )
    heights = [linear.out_features for linear in linears]
    for name in (*PARTS, "bias"):
        parts = [getattr(linear, name) for linear in linears]
        if parts[0] is None:
            continue
        data = _whole(parts)
        setattr(stacked, name, _parameter(data))
        for linear, part in zip(linears, torch.split(data, heights), strict=True):
            setattr(linear, name, _parameter(part))
    return stacked


def disk_tensors(module: str, quantized: QuantizedTensor) -> dict[str, Tensor]:
    """A module's weight as it lies on disk: int32 [N, K/4], scales [N, K/G] float, int64 [2]."""
    scales = quantized.scales
    if quantized.exponents is not None:
        scales = scales_float32(scales, quantized.exponents).to(torch.bfloat16)
    return {
        f"{module}.weight_packed": quantized.packed.contiguous().view(torch.int32),
        f"{module}.weight_scale": scales,
        f"{module}.weight_shape": torch.tensor(quantized.shape, dtype=torch.int64),
    }


def _whole(parts: Sequence[Tensor]) -> Tensor:
    """Tensors as one along their rows: where they lie one behind the other, without a copy."""
    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        if part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return torch.cat(list(parts))
        if part.data_ptr() != end or not part.is_contiguous():
            return torch.cat(list(parts))
        end += part.nbytes
    shape = (sum(len(part) for part in parts), *first.shape[1:])
    return first.detach().as_strided(shape, first.stride())


def _detached(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach()


def _parameter(tensor: Tensor) -> nn.Parameter:
    """The same object where it is one: a tied head then moves with the embedding, not beside it."""
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor.detach(), requires_grad=False)
