"""transformers' quantizer for our modules: swapped in before loading, or after it from 16 bits.

`AutoModelForCausalLM.from_pretrained(source, quantization_config=HalfweightConfig())` quantizes a
16-bit model while transformers loads it; `loading.load` passes what a file holds in INT8 already.
Importing this module registers both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import (
    HfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from halfweight.errors import CheckpointError, UsageError
from halfweight.kernels.operations import backend, choose_backend
from halfweight.model.experts import (
    AwaitedExperts,
    experts_place,
    is_fused,
    stored_experts,
)
from halfweight.model.modules import (
    PARTS,
    QuantizedEmbedding,
    QuantizedLinear,
    stand_in,
)
from halfweight.model.saving import quantized_weights, saved_config, stored_state_dict
from halfweight.quantization.numerics import quantize
from halfweight.quantization.scheme import Recipe, ScaleChoice, Scheme, TensorInfo

METHOD = "halfweight"
Activations = Literal["exact", "int8"]


@register_quantization_config(METHOD)
class HalfweightConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How transformers quantizes a model while loading it, or what a loaded one holds.

    group_size, scale_format, scale_choice and keep (globs of tensors left in 16 bits) are those of
    Recipe; backend and activations those of `load`, which alone passes `stored`: packed module ->
    file. Strings only: transformers copies a config several times, deeply.
    """

    def __init__(
        self,
        group_size: int = 128,
        scale_format: str = "grid8",
        scale_choice: ScaleChoice = "least_squares",
        keep: tuple[str, ...] | list[str] = (),
        backend: str | None = None,
        activations: Activations = "exact",
        stored: Mapping[str, str] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = METHOD
        self.stored = stored
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

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        config = self.quantization_config
        stored = config.stored or {}
        layers = stored_experts(stored)
        of_experts = {name for found in layers for name in found.names}
        for name in (name for name in stored if name not in of_experts):
            module = _submodule(model, name, stored[name])
            int8 = config.activations == "int8"
            replacement = stand_in(module, config.backend, model.dtype, int8)
            if replacement is None:
                raise CheckpointError(
                    f"module {name} is packed in the file but a {type(module).__name__} in the "
                    "model, expected a Linear or an Embedding",
                    hint="quantize again with --keep for this module",
                )
            model.set_submodule(name, replacement)
        for found in layers:
            place = experts_place(model, found)
            model.set_submodule(place, AwaitedExperts(found, model.get_submodule(place).act_fn))
        _tie_head(model)

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_: Any
    ) -> PreTrainedModel:
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
        model.config.quantization_config = saved_config(model)
        return stored_state_dict(model), {}

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """`save_pretrained` writes the INT8 checkpoint."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Weights in INT8 have no gradients."""
        return False

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


def _submodule(model: PreTrainedModel, name: str, file_name: str) -> nn.Module:
    try:
        found: nn.Module = model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(
            f"{file_name}: module {name} is not in the model of config.json",
            hint="halfweight does not run this architecture yet, or config.json is another's",
        ) from None
    return found


def _tie_head(model: PreTrainedModel) -> None:
    """A head tied to a quantized embedding becomes a linear that waits for `share_table`."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, QuantizedEmbedding) or not isinstance(head, nn.Linear):
        return
    target = _name_of(model, head)
    if model.all_tied_weights_keys.pop(f"{target}.weight", None) is None:
        return
    shape = (embedding.out_features, embedding.in_features)
    model.set_submodule(target, QuantizedLinear(shape, embedding.backend_name, head.bias))


def share_table(model: PreTrainedModel) -> None:
    """Let a head that has no weight of its own hold the embedding's."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(head, QuantizedLinear) or head.weight_packed is not None:
        return
    head.hold(embedding.quantized)
    source, target = _name_of(model, embedding), _name_of(model, head)
    model.all_tied_weights_keys |= {f"{target}.{part}": f"{source}.{part}" for part in PARTS}


def _name_of(model: nn.Module, module: nn.Module) -> str:
    names: Iterator[str] = (name for name, found in model.named_modules() if found is module)
    return next(names)


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
    name_of_backend = choose_backend(device, config.backend)
    check_activations(name_of_backend, config.activations)
    tied = model.config.get_text_config().tie_word_embeddings
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear | nn.Embedding) or (tied and module is head):
            continue
        weight = module.weight
        dtype = {torch.float16: "F16", torch.bfloat16: "BF16"}.get(weight.dtype, "F32")
        decision = config.recipe.decide(TensorInfo(f"{name}.weight", dtype, tuple(weight.shape)))
        if decision.scheme is None:
            continue
        held = quantize(weight.data, decision.scheme, name=f"{name}.weight")
        int8 = config.activations == "int8"
        replacement = stand_in(module, name_of_backend, model.dtype, int8)
        assert replacement is not None
        replacement.hold(held)
        model.set_submodule(name, replacement)
    _tie_head(model)
    share_table(model)
    request_backend(model, config.backend)
