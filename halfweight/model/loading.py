"""halfweight models in transformers: load a checkpoint, or quantize while loading.

`load` builds the model that config.json names without memory, swaps in our modules for what the
file holds in INT8, and lets transformers' own loader place all other tensors (its renamings, ties
and buffers count). Weights in INT8 are on their way meanwhile (weight_streaming.py). The other
tensors are views of the mapped file; for a GPU each is then read from the file to its place, once.

`HalfweightConfig` does the same to a 16-bit model that transformers loads:
`AutoModelForCausalLM.from_pretrained(source, quantization_config=HalfweightConfig())`.
Importing this module registers it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.quantizers import (
    HfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from halfweight.checkpoint.headers import (
    Checkpoint,
    StoredWeight,
    quantized_modules,
    read_headers,
    resolve,
)
from halfweight.checkpoint.layout import quantization_config
from halfweight.checkpoint.shard import StoredTensor, some
from halfweight.errors import CheckpointError, UsageError
from halfweight.kernels.operations import backend, choose_backend
from halfweight.memory.device_memory import indexed, out_of_memory, require
from halfweight.model.experts import (
    AwaitedExperts,
    QuantizedExperts,
    experts_place,
    is_fused,
    stored_experts,
)
from halfweight.model.loadability import PACKED_PARTS, quiet
from halfweight.model.modules import (
    PARTS,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedWeight,
    stand_in,
)
from halfweight.model.weight_reader import Progress, Tally, map_tensors, read_into
from halfweight.model.weight_streaming import arriving
from halfweight.quantization.numerics import QuantizedTensor, quantize
from halfweight.quantization.scheme import Decision, Recipe, ScaleChoice, Scheme, TensorInfo

log = logging.getLogger("halfweight")

METHOD = "halfweight"
LOAD_HINT = "`halfweight plan` shows what would fit; free the device or use a smaller model"
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


def load(
    model: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    activations: Activations = "exact",
    progress: Progress | None = None,
) -> PreTrainedModel:
    """The transformers model of a halfweight folder (or Hub id), with its weights in INT8.

    dtype is that of activations and of what is kept in 16 bits, by default the checkpoint's own.
    backend names one of `halfweight backends`; activations="int8" rounds activations too (opt-in).
    A folder that holds no INT8 weights is loaded in 16 bits. Raises CheckpointError where files and
    model do not fit each other, DoesNotFitError where the device lacks the memory.
    """
    checkpoint = read_headers(resolve(os.fspath(model)))
    device = indexed(device)
    chosen = choose_backend(device, backend)
    _check_activations(chosen, activations)
    stored = quantized_modules(checkpoint)
    config = _model_config(checkpoint, dtype)
    config.quantization_config = {
        "quant_method": METHOD,
        "backend": chosen,
        "activations": activations,
        "stored": {name: weight.packed.shard.name for name, weight in stored.items()},
    }
    what = f"loading {checkpoint.root.name}"
    require(checkpoint.num_bytes, device, what, hint=LOAD_HINT)
    mapped = map_tensors(checkpoint)
    tally = Tally(checkpoint.num_bytes, progress)
    with out_of_memory(device, what, hint=LOAD_HINT):
        with arriving(stored, mapped, device, tally) as weights:
            loaded = _from_tensors(checkpoint, config, _other_tensors(mapped, stored, dtype))
            _check_shapes(checkpoint, loaded, stored)
            _fill(loaded, weights())
            _request(loaded, backend)
        if device.type != "cpu":
            source = {t.data_ptr(): s for s in checkpoint.tensors if (t := mapped[s.name]).numel()}
            _move(loaded, device, source, tally)
    _finish(loaded, checkpoint)
    return loaded


def saved_config(model: PreTrainedModel) -> dict[str, Any]:
    """The `quantization_config` of config.json for the modules of `model`."""
    decisions, file_names = [], _file_names(model)
    for name, module in model.named_modules():
        name = file_names.get(name, name)
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
    modules = _quantized(model)
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    file_names = _file_names(model)
    for name, module in modules.items():
        name = file_names.get(name, name)
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


def _check_activations(backend_name: str, activations: Activations) -> None:
    if activations not in ("exact", "int8"):
        raise UsageError(f"activations is {activations!r}", hint="use 'exact' or 'int8'")
    if activations == "int8" and backend(backend_name).linear_int8 is None:
        raise UsageError(
            f"backend {backend_name!r} has no int8 activations",
            hint="leave activations='exact', or choose another backend",
        )


def _model_config(checkpoint: Checkpoint, dtype: torch.dtype | None) -> Any:
    content = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    try:
        config = AutoConfig.for_model(**content)
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint.root / 'config.json'}: {str(error).partition(chr(10))[0]}",
            hint="a newer transformers may know this architecture",
        ) from error
    if dtype is not None:
        config.dtype = dtype
    if not isinstance(config.dtype, torch.dtype):
        config.dtype = torch.bfloat16
    return config


def _other_tensors(
    mapped: Mapping[str, Tensor], stored: Iterable[str], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Mapped tensors that are no part of a packed weight, those in 16 bits in `dtype`.

    transformers 5.17 does not bring tensors that it renames to the model's dtype.
    """
    parts = {f"{name}.{part}" for name in stored for part in PACKED_PARTS}
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in mapped.items()
        if name not in parts
    }


def _fill(model: PreTrainedModel, weights: Mapping[str, QuantizedTensor]) -> None:
    """Give the modules that wait for a weight theirs."""
    config = model.config.quantization_config
    options = {
        "backend_name": config.backend,
        "int8_activations": config.activations == "int8",
    }
    for name, module in list(model.named_modules()):
        if isinstance(module, AwaitedExperts):
            model.set_submodule(name, QuantizedExperts(module, weights, options))
        elif isinstance(module, QuantizedWeight) and name in weights:
            module.hold(weights[name])
    _share_table(model)


def _file_names(model: PreTrainedModel) -> dict[str, str]:
    """Of modules that the file calls otherwise: name in the model -> name in the file."""
    return {
        f"{name}.{own}": file_name
        for name, module in model.named_modules()
        if isinstance(module, QuantizedExperts)
        for own, file_name in module.file_names.items()
    }


def _check_shapes(
    checkpoint: Checkpoint, model: PreTrainedModel, stored: Mapping[str, StoredWeight]
) -> None:
    """Raise CheckpointError where a packed weight is not of the shape that config.json says."""
    for name, module in _quantized(model).items():
        expected = (module.out_features, module.in_features)
        if name in stored and stored[name].shape != expected:
            raise _misfit(checkpoint, {"of another shape": {f"{name}.weight_packed"}})


def _misfit(checkpoint: Checkpoint, words: Mapping[str, Collection[str]]) -> CheckpointError:
    wrong = "; ".join(f"{what}: {some(keys)}" for what, keys in words.items() if keys)
    return CheckpointError(
        f"{checkpoint.root}: the files do not fit the model of config.json ({wrong})",
        hint="download the checkpoint again, or quantize its source again",
    )


def _from_tensors(checkpoint: Checkpoint, config: Any, tensors: dict[str, Tensor]) -> Any:
    names = config.architectures or []
    model_class = getattr(transformers, names[0], None) if names else None
    if model_class is None:
        raise CheckpointError(
            f"{checkpoint.root / 'config.json'}: transformers has no class {names}",
            hint="a newer transformers may know this architecture",
        )
    with quiet():
        loaded, found = model_class.from_pretrained(
            None, config=config, state_dict=tensors, dtype=config.dtype, output_loading_info=True
        )
    missing = set(found["missing_keys"]) - set(loaded.all_tied_weights_keys)
    if missing or found["mismatched_keys"] or found["unexpected_keys"]:
        words = {
            "missing": missing,
            "of another shape": {key[0] for key in found["mismatched_keys"]},
            "not in the model": set(found["unexpected_keys"]),
        }
        raise _misfit(checkpoint, words)
    return loaded


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
    """A head tied to a quantized embedding becomes a linear that waits for `_share_table`."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, QuantizedEmbedding) or not isinstance(head, nn.Linear):
        return
    target = _name_of(model, head)
    if model.all_tied_weights_keys.pop(f"{target}.weight", None) is None:
        return
    shape = (embedding.out_features, embedding.in_features)
    model.set_submodule(target, QuantizedLinear(shape, embedding.backend_name, head.bias))


def _share_table(model: PreTrainedModel) -> None:
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


def _move(
    model: PreTrainedModel,
    device: torch.device,
    source: Mapping[int, StoredTensor],
    tally: Tally,
) -> None:
    """Give what is not yet on `device` a place there, filled from the file where it is mapped."""
    places: dict[int, Tensor] = {}
    targets: list[tuple[StoredTensor, Tensor]] = []
    for owner, name, tensor in _tensors(model):
        if tensor.device == device:
            continue
        if id(tensor) not in places:
            stored = source.get(tensor.data_ptr())
            if stored is not None and stored.info.num_bytes == tensor.nbytes:
                place = torch.empty_like(tensor, device=device)
                targets.append((stored, place))
            else:
                place = tensor.detach().to(device)
            if isinstance(tensor, nn.Parameter):
                place = nn.Parameter(place, requires_grad=False)
            places[id(tensor)] = place
        setattr(owner, name, places[id(tensor)])
    read_into(targets, tally)
    tally.finish()


def _tensors(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield module, name, tensor


def _request(model: nn.Module, backend_name: str | None) -> None:
    for module in _quantized(model).values():
        module.requested_backend = backend_name


def _quantized(model: nn.Module) -> dict[str, QuantizedWeight]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedWeight)}


def _finish(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    model.config.quantization_config = saved_config(model)
    model.requires_grad_(False)
    model.eval()
    if (checkpoint.root / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.root)
    model.config.name_or_path = model.name_or_path = os.fspath(checkpoint.root)


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
    _check_activations(name_of_backend, config.activations)
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
    _share_table(model)
    _request(model, config.backend)
