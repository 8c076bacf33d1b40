"""A loaded model in the form that `halfweight quantize` writes: its tensors and its config."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from halfweight.checkpoint.layout import quantization_config
from halfweight.model.experts import (
    QuantizedExperts,
)
from halfweight.model.modules import (
    QuantizedWeight,
)
from halfweight.quantization.scheme import Decision, Scheme, TensorInfo


def saved_config(model: PreTrainedModel) -> dict[str, Any]:
    """The `quantization_config` of config.json for the modules of `model`."""
    decisions, stored_names = [], file_names(model)
    for name, module in model.named_modules():
        name = stored_names.get(name, name)
        if isinstance(module, QuantizedWeight):
            shape = (module.out_features, module.in_features)
            scheme = Scheme(module.group_size)
        elif isinstance(module, nn.Linear):
            shape, scheme = (module.out_features, module.in_features), None
        else:
            continue
        decisions.append(Decision(TensorInfo(f"{name}.weight", "BF16", shape), scheme, ""))
    return quantization_config(decisions)


def stored_state_dict(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every tensor of `model` as it lies on disk; a tied head is not stored twice."""
    modules = quantized_weights(model)
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    stored_names = file_names(model)
    for name, module in modules.items():
        name = stored_names.get(name, name)
        if module.weight_packed.data_ptr() in seen:
            continue
        seen.add(module.weight_packed.data_ptr())
        found |= {f"{name}.{part}": t for part, t in module.stored_tensors().items()}
    parts = ("weight_packed", "weight_scale", "weight_exponent")
    for name, tensor in model.state_dict().items():
        owner, _, part = name.rpartition(".")
        if not (owner in modules and part in parts):
            found[name] = tensor
    return found


def file_names(model: PreTrainedModel) -> dict[str, str]:
    """Of modules that the file calls otherwise: name in the model -> name in the file."""
    return {
        f"{name}.{own}": file_name
        for name, module in model.named_modules()
        if isinstance(module, QuantizedExperts)
        for own, file_name in module.file_names.items()
    }


def quantized_weights(model: nn.Module) -> dict[str, QuantizedWeight]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedWeight)}
