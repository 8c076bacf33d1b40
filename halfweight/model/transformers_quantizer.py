"""transformers' quantizer for our modules: swapped in before loading, or after it from 16 bits.

`AutoModelForCausalLM.from_pretrained(source, quantization_config=HalfweightConfig())` quantizes a
16-bit model while transformers loads it; `loading.load` passes what a file holds in INT8 already.
Importing this module registers both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import (
    HfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from halfweight.errors import UsageError
from halfweight.kernels.operations import backend, choose_backend
from halfweight.model.experts import is_fused
from halfweight.model.packed_weight import whole
from halfweight.model.placement import NoStandIn, Options, check_module, place
from halfweight.model.saving import quantized_weights, saved_config, stored_state_dict
from halfweight.model.weights_read import weights_read
from halfweight.quantization.numerics import QuantizedTensor, quantize
from halfweight.quantization.scheme import Recipe, ScaleChoice, Scheme, TensorInfo

METHOD = "halfweight"
Activations = Literal["exact", "int8"]


@register_quantization_config(METHOD)
class HalfweightConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How transformers quantizes a model while loading it, or what a loaded one holds.

    group_size, scale_format, scale_choice and keep (globs of tensors left in 16 bits) are those of
    Recipe; backend and activations those of `load`. transformers copies a config several times,
    deeply: no tensors in it.
    """

    def __init__(
        self,
        group_size: int = 128,
        scale_format: str = "grid8",
        scale_choice: ScaleChoice = "least_squares",
        keep: tuple[str, ...] | list[str] = (),
        backend: str | None = None,
        activations: Activations = "exact",
        **_: Any,
    ) -> None:
        self.quant_method = METHOD
        self.group_size = group_size
        self.scale_format = scale_format
        self.scale_choice = scale_choice
        self.keep = list(keep)
        self.backend = backend
        self.activations = activations

    @property
    def recipe(self) -> Recipe:
        """What to quantize and how."""
        scheme = Scheme(self.group_size, self.scale_format, self.scale_choice)
        return Recipe(scheme, tuple(self.keep))


@register_quantizer(METHOD)
class HalfweightQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps modules: before loading where the tensors come in INT8, after loading where not."""

    requires_calibration = False

    weight_conversions: list[Any] | None = None
    """What transformers did to the file's names and tensors: saving takes it back."""

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_: Any
    ) -> PreTrainedModel:
        self.weight_conversions = model._weight_conversions
        model._weight_conversions = []
        if not self.pre_quantized:
            _quantize_in_place(model, self.quantization_config)
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        """Never while loading: whole modules are swapped."""
        return False

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
        """The model in the form that `halfweight quantize` writes, and its description."""
        tensors = stored_state_dict(model)
        model.config.quantization_config = saved_config(tensors)
        return tensors, {}

    def _dequantize(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        raise UsageError(
            "a model in INT8 is not dequantized in memory",
            hint="`halfweight export DIR OUT --to dequantized` writes 16 bits to load",
        )

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """`save_pretrained` writes the INT8 checkpoint."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top are: gradients pass through weights in INT8, which stay as they are."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The products are registered operations."""
        return True


def check_activations(backend_name: str, activations: Activations) -> None:
    if activations not in ("exact", "int8"):
        raise UsageError(f"activations is {activations!r}", hint="use 'exact' or 'int8'")
    if activations == "int8" and backend(backend_name).linear_int8 is None:
        raise UsageError(
            f"backend {backend_name!r} has no int8 activations",
            hint="leave activations='exact', or choose another backend",
        )


def _expert_of(name: str, module: nn.Module) -> TensorInfo:
    """A matrix of one expert, as a checkpoint would have it."""
    shape = tuple(module.get_parameter("down_proj").shape[1:])
    return TensorInfo(f"{name}.0.down_proj.weight", "BF16", shape)


def request_backend(model: nn.Module, backend_name: str | None) -> None:
    for module in quantized_weights(model).values():
        module.requested_backend = backend_name


def _quantize_in_place(model: PreTrainedModel, config: HalfweightConfig) -> None:
    """Replace the 16-bit linears and embeddings that the recipe takes, one at a time."""
    for name, module in model.named_modules():
        if is_fused(module) and config.recipe.decide(_expert_of(name, module)).scheme is not None:
            raise UsageError(
                f"{name}: experts merged in one tensor cannot be quantized while loading",
                hint="run `halfweight quantize` on the checkpoint, or keep '*experts*'",
            )
    device = next(model.parameters()).device
    options = Options(choose_backend(device, config.backend), config.activations == "int8")
    check_activations(options.backend_name, config.activations)
    held: dict[str, QuantizedTensor] = {}
    for name, holders in _shared_weights(model):
        module = holders[0]
        weight, turned = module.weight.data, isinstance(module, Conv1D)
        weight = weight.t() if turned else weight
        dtype = {torch.float16: "F16", torch.bfloat16: "BF16"}.get(weight.dtype, "F32")
        decision = config.recipe.decide(TensorInfo(f"{name}.weight", dtype, tuple(weight.shape)))
        if decision.scheme is None:
            continue
        held[name] = quantize(weight, decision.scheme, name=f"{name}.weight")
        packed = whole(name, held[name].shape, weight.dtype, weight.device, turned=turned)
        for holder in holders:
            holder.weight = nn.Parameter(packed, requires_grad=False)
    refused = place(model, lambda: held, options)
    assert not refused
    request_backend(model, config.backend)


def _shared_weights(model: PreTrainedModel) -> Iterator[tuple[str, list[Any]]]:
    """Name and holders of each weight that modules of ours can hold in the place of all of them."""
    read = weights_read(model)
    holders: dict[int, list[tuple[str, str, nn.Module]]] = defaultdict(list)
    for name, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                holders[id(parameter)].append((name, own, module))
    for found in list(holders.values()):
        try:
            for name, own, module in found:
                if own != "weight":
                    raise NoStandIn(own)
                check_module(name, module, read)
        except NoStandIn:
            continue
        yield found[0][0], [module for _, _, module in found]
