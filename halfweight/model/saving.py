"""A loaded model in the form that `halfweight quantize` writes: its tensors and its config.

Names on disk are those of the file that was loaded: transformers' own way back from its names to
the file's is taken with a PackedWeight in place of each weight in INT8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from halfweight.checkpoint.layout import quantization_config
from halfweight.model.experts import QuantizedExperts
from halfweight.model.modules import PARTS, QuantizedWeight, disk_tensors
from halfweight.model.packed_weight import PackedWeight, gather, whole
from halfweight.model.placement import DTYPE_HOLDER
from halfweight.quantization.scheme import Decision, Scheme, TensorInfo, stored_group_size

SUFFIX = ".weight_packed"


def saved_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The `quantization_config` of config.json for a folder of these tensors."""
    decisions = []
    for name, tensor in tensors.items():
        if name.endswith(SUFFIX):
            module = name.removesuffix(SUFFIX)
            shape = (tensor.shape[0], tensor.shape[1] * 4)
            num_groups = tensors[f"{module}.weight_scale"].shape[1]
            scheme = Scheme(stored_group_size(shape[1], num_groups))
            info = TensorInfo(f"{module}.weight", "BF16", shape)
            decisions.append(Decision(info, scheme, ""))
        elif name.endswith(".weight") and tensor.dim() == 2:
            info = TensorInfo(name, "BF16", (tensor.shape[0], tensor.shape[1]))
            decisions.append(Decision(info, None, ""))
    return quantization_config(decisions)


def stored_state_dict(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every tensor of `model` as it lies on disk, by the file's names; what is tied lies once."""
    modules = quantized_weights(model)
    tied = set(model.all_tied_weights_keys)
    state: dict[str, Tensor] = dict(_packed(model, tied))
    for name, tensor in model.state_dict().items():
        owner, _, part = name.rpartition(".")
        ours = name == DTYPE_HOLDER or (owner in modules and part in PARTS)
        if not ours and name not in tied:
            state[name] = tensor
    held = {name: module.quantized for name, module in modules.items()}
    found: dict[str, Tensor] = {}
    for name, tensor in _in_the_files_names(model, state).items():
        if isinstance(tensor, PackedWeight):
            found |= disk_tensors(name.removesuffix(".weight"), gather(held, tensor.matrices[0]))
        else:
            found[name] = tensor
    return found


def _packed(model: nn.Module, tied: set[str]) -> Iterator[tuple[str, PackedWeight]]:
    """Every weight in INT8 by its name in transformers' model, but those tied to another."""
    of_experts: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedExperts):
            of_experts |= {id(linear) for linear in module.modules()}
            yield from module.packed_weights(name).items()
        elif not isinstance(module, QuantizedWeight) or id(module) in of_experts:
            continue
        elif f"{name}{SUFFIX}" not in tied:
            shape = (module.out_features, module.in_features)
            yield f"{name}.weight", whole(name, shape, module.dtype)


def _in_the_files_names(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What transformers does while saving, which finds nothing left to do afterwards."""
    model._weight_conversions = model.hf_quantizer.weight_conversions
    try:
        with torch.no_grad():
            named: dict[str, Tensor] = revert_weight_conversion(model, state)
    finally:
        model._weight_conversions = []
    return named


def quantized_weights(model: nn.Module) -> dict[str, QuantizedWeight]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedWeight)}
