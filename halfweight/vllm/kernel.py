"""Our product as a kernel for vLLM's weight-only linear layers.

It stands before vLLM's own on CUDA and is the only one for INT8 in groups on a CPU. What it cannot
take is left to vLLM, with a reason that vLLM prints if nothing else can take it either.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.kernels.linear import MPLinearKernel, MPLinearLayerConfig
from vllm.scalar_type import scalar_types

from halfweight.kernels import operations  # noqa: F401  registers torch.ops.halfweight
from halfweight.vllm import weights

ACTIVATIONS = (torch.bfloat16, torch.float16, torch.float32)
MIN_CAPABILITY = 75


class HalfweightLinearKernel(MPLinearKernel):  # type: ignore[misc]
    """y = x W^T with the weight in the file's own bytes."""

    @classmethod
    def get_min_capability(cls) -> int:
        """The lowest compute capability, of the Triton backend."""
        return MIN_CAPABILITY

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Whether a layer of this form can be run, and why not."""
        reason = refusal(c)
        return reason is None, reason

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Take the loaded weight; GPTQ's is [K/4, N] and is turned."""
        packed, scales, _ = self._get_weight_params(layer)[:3]
        if packed.input_dim == 0:
            packed, scales = packed.t(), scales.t()
        hold_loaded(layer, packed, scales)
        weights.prepare(layer, self.config.act_type)

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> y [..., N]."""
        return weights.product(layer, x, bias)


def refusal(c: MPLinearLayerConfig) -> str | None:
    """Why our kernels do not take a layer of this form, or None."""
    in_features = c.partition_weight_shape[0]
    if c.weight_type != scalar_types.uint8b128:
        return f"weights are {c.weight_type}, not symmetric INT8"
    if c.zero_points:
        return "weights have zero points"
    if getattr(c, "has_g_idx", False):
        return "weights are in activation order"
    if c.act_type not in ACTIVATIONS:
        return f"activations are {c.act_type}"
    if c.group_size != -1 and c.group_size not in weights.GROUP_SIZES:
        return f"group size {c.group_size}, not one of {weights.GROUP_SIZES} or a row"
    if c.group_size != -1 and in_features % c.group_size:
        return f"group size {c.group_size} does not divide this shard's {in_features} columns"
    return None


def hold_loaded(layer: nn.Module, packed: Any, scales: Any) -> None:
    """Give `layer` what vLLM loaded; dummy scales are put on a grid, as a file's are."""
    config = get_current_vllm_config_or_none()
    if config is not None and config.load_config.load_format == "dummy":
        scales = torch.full_like(scales, weights.DUMMY_SCALE)
    weights.hold(layer, packed, scales)
