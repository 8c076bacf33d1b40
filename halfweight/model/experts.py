"""Mixtures of experts: on disk one matrix an expert, in transformers one 3-D tensor for all.

transformers merges the experts of a checkpoint into two tensors of a layer's experts module. Ours
stay apart: `QuantizedExperts` takes that module's place, with the linears of each expert in INT8
under the names of the file, so that what is saved is what was loaded.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from halfweight.errors import CheckpointError
from halfweight.model.modules import QuantizedLinear
from halfweight.quantization.numerics import QuantizedTensor

EXPERT = re.compile(r"(?P<parent>.+\.experts)\.(?P<index>\d+)\.(?P<role>\w+)")
ROLES = {
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "w1": "gate",
    "w3": "up",
    "w2": "down",
}
"""An expert's linear in a file -> what it is for: down(act(gate(x)) * up(x))."""


@dataclass
class StoredExperts:
    """The experts of one layer as the file holds them: index -> role -> module name."""

    parent: str
    modules: dict[int, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))

    @property
    def names(self) -> list[str]:
        """The modules of all experts, by the file's names."""
        return [name for roles in self.modules.values() for name in roles.values()]


def stored_experts(stored: Iterable[str]) -> list[StoredExperts]:
    """Those of the packed modules of a file that are an expert's, by layer.

    Raises CheckpointError if an expert lacks one of its three matrices.
    """
    found: dict[str, StoredExperts] = {}
    for name in stored:
        match = EXPERT.fullmatch(name)
        if match is None or match["role"] not in ROLES:
            continue
        experts = found.setdefault(match["parent"], StoredExperts(match["parent"]))
        experts.modules[int(match["index"])][ROLES[match["role"]]] = name
    for experts in found.values():
        _check_complete(experts)
    return list(found.values())


def _check_complete(experts: StoredExperts) -> None:
    for index in range(max(experts.modules) + 1):
        missing = set(ROLES.values()) - experts.modules[index].keys()
        if missing:
            raise CheckpointError(
                f"{experts.parent}.{index}: its matrix {sorted(missing)[0]} is not in INT8, "
                "expected all matrices of all experts of a layer",
                hint="quantize again, with --keep '*experts*' or without",
            )


class Expert(nn.Module):
    """The three linears of one expert."""

    gate: QuantizedLinear
    up: QuantizedLinear
    down: QuantizedLinear


class AwaitedExperts(nn.Module):
    """Holds the place of a layer's experts, and nothing, while transformers loads the rest."""

    def __init__(self, found: StoredExperts, act_fn: nn.Module) -> None:
        super().__init__()
        self.found = found
        self.act_fn = act_fn


class QuantizedExperts(nn.Module):
    """In place of transformers' experts module; `file_names`: name in here -> name in the file."""

    def __init__(
        self,
        awaited: AwaitedExperts,
        weights: Mapping[str, QuantizedTensor],
        options: Mapping[str, Any],
    ) -> None:
        """`weights` by their names in the file; `options` of every QuantizedLinear."""
        super().__init__()
        self.act_fn = awaited.act_fn
        self.experts = nn.ModuleList()
        self.file_names: dict[str, str] = {}
        modules = awaited.found.modules
        for index in range(len(modules)):
            expert = Expert()
            for role, name in sorted(modules[index].items()):
                linear = QuantizedLinear(weights[name].shape, **options)
                linear.hold(weights[name])
                setattr(expert, role, linear)
                self.file_names[f"experts.{index}.{role}"] = name
            self.experts.append(expert)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], experts and weights [T, k] of the router -> [T, H]."""
        out = torch.zeros_like(hidden_states)
        for index in torch.unique(top_k_index).tolist():
            if index >= len(self.experts):  # tokens that go to another process
                continue
            expert = self.experts[index]
            token, place = torch.where(top_k_index == index)
            x = hidden_states[token]
            y = expert.down(self.act_fn(expert.gate(x)) * expert.up(x))
            out.index_add_(0, token, (y * top_k_weights[token, place, None]).to(out.dtype))
        return out


def experts_place(model: nn.Module, found: StoredExperts) -> str:
    """The name in `model` of the experts module that `found` are for.

    Raises CheckpointError where there is none, or one that computes something else.
    """
    layer = re.match(r".*?\.\d+\.", found.parent)
    prefix = layer[0] if layer else ""
    places: list[str] = [
        name
        for name, module in model.named_modules()
        if name.startswith(prefix) and name.endswith(".experts") and is_fused(module)
    ]
    if len(places) != 1:
        raise CheckpointError(
            f"{found.parent}: experts are in the file, expected one gated experts module at "
            f"{prefix}* in the model of config.json, found {len(places)}",
            hint="quantize again with --keep '*experts*'",
        )
    return places[0]


def has_experts(model: nn.Module) -> bool:
    """Whether some layer asks the host which experts to run: no CUDA graph can hold that."""
    return any(isinstance(module, QuantizedExperts) for module in model.modules())


def is_fused(module: nn.Module) -> bool:
    """Whether it is transformers' plain gated form of experts: two 3-D tensors, an activation."""
    shapes = {name: parameter.dim() for name, parameter in module.named_parameters(recurse=False)}
    return shapes == {"gate_up_proj": 3, "down_proj": 3} and hasattr(module, "act_fn")
