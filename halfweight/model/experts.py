"""Mixtures of experts: on disk one matrix an expert, in transformers one 3-D tensor for all.

transformers merges the experts of a checkpoint into two tensors of a layer's experts module. Ours
stay apart: `QuantizedExperts` takes that module's place, with the linears of each expert in INT8,
as the file has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from halfweight.model.modules import QuantizedLinear
from halfweight.model.packed_weight import Matrix, PackedWeight, gather, upper_and_lower, whole
from halfweight.quantization.numerics import QuantizedTensor


class Expert(nn.Module):
    """The three linears of one expert."""

    gate: QuantizedLinear
    up: QuantizedLinear
    down: QuantizedLinear


class QuantizedExperts(nn.Module):
    """In place of transformers' experts module, whose gating it keeps."""

    def __init__(self, gated: nn.Module, experts: list[Expert]) -> None:
        """`gated` is the module whose place this takes; its weights are let go."""
        super().__init__()
        for name in ("gate_up_proj", "down_proj"):
            gated.register_parameter(name, None)
        self.gated = gated
        self.experts = nn.ModuleList(experts)
        self.after: Callable[[Tensor], Tensor] | None = None
        """What the sum goes through where several ranks hold columns of each expert."""

    @classmethod
    def holding(
        cls,
        module: nn.Module,
        weights: Mapping[str, QuantizedTensor],
        options: Mapping[str, Any],
    ) -> QuantizedExperts:
        """In place of `module`, whose PackedWeights say which of `weights` each expert holds.

        `options` are those of every QuantizedLinear.
        """
        gate_up, down = module.get_parameter("gate_up_proj"), module.get_parameter("down_proj")
        assert isinstance(gate_up, PackedWeight)
        assert isinstance(down, PackedWeight)
        experts = []
        for both, lower in zip(gate_up.matrices, down.matrices, strict=True):
            expert = Expert()
            roles = zip(("gate", "up"), upper_and_lower(both), strict=True)
            for role, matrix in (*roles, ("down", lower)):
                setattr(expert, role, _linear(matrix, weights, options, down.dtype))
            experts.append(expert)
        return cls(module, experts)

    def packed_weights(self, name: str) -> dict[str, PackedWeight]:
        """The two stacks that `holding` takes, with modules' names below `name` as the file's."""
        gate_up, down = [], []
        for index, expert in enumerate(self.experts):
            path = f"{name}.experts.{index}"
            gate_up.append(torch.cat([_whole(path, expert, role) for role in ("gate", "up")]))
            down.append(_whole(path, expert, "down"))
        stacked: dict[str, Any] = {
            f"{name}.gate_up_proj": torch.stack(gate_up),
            f"{name}.down_proj": torch.stack(down),
        }
        return stacked

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], experts and weights [T, k] of the router -> [T, H]."""
        apply_gate: Any = self.gated._apply_gate
        out = torch.zeros_like(hidden_states)
        for index in torch.unique(top_k_index).tolist():
            if index >= len(self.experts):  # tokens that go to another process
                continue
            expert = self.experts[index]
            token, place = torch.where(top_k_index == index)
            x = hidden_states[token]
            gated: Tensor = apply_gate(torch.cat((expert.gate(x), expert.up(x)), -1))
            y = expert.down(gated)
            out.index_add_(0, token, (y * top_k_weights[token, place, None]).to(out.dtype))
        return out if self.after is None else self.after(out)


def has_experts(model: nn.Module) -> bool:
    """Whether some layer asks the host which experts to run: no CUDA graph can hold that."""
    return any(isinstance(module, QuantizedExperts) for module in model.modules())


def is_fused(module: nn.Module) -> bool:
    """Whether it is transformers' plain gated form of experts: two 3-D tensors, a gate between.

    Rows of gate and up lie one below the other, weights as a Linear has them, nothing is added.
    """
    shapes = {name: parameter.dim() for name, parameter in module.named_parameters(recurse=False)}
    other_forms = ("is_transposed", "has_bias", "has_post_expert_norm")
    return (
        shapes == {"gate_up_proj": 3, "down_proj": 3}
        and hasattr(module, "_apply_gate")
        and getattr(module, "is_concatenated", True)
        and not any(getattr(module, form, False) for form in other_forms)
    )


def _linear(
    matrix: Matrix,
    weights: Mapping[str, QuantizedTensor],
    options: Mapping[str, Any],
    dtype: torch.dtype,
) -> QuantizedLinear:
    held = gather(weights, matrix)
    linear = QuantizedLinear(held.shape, dtype=dtype, **options)
    linear.hold(held)
    return linear


def _whole(path: str, expert: nn.Module, role: str) -> Tensor:
    linear: QuantizedLinear = getattr(expert, role)
    shape = (linear.out_features, linear.in_features)
    return whole(f"{path}.{role}", shape, linear.dtype)
