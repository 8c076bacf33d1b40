"""The transformers model of a checkpoint, its weights in INT8.

`load` builds the model that config.json names without memory, swaps in our modules for what the
file holds in INT8, and lets transformers' own loader place all other tensors (its renamings, ties
and buffers count). Weights in INT8 are on their way meanwhile (weight_streaming.py). The other
tensors are views of the mapped file; for a GPU each is then read from the file to its place, once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from halfweight.checkpoint.headers import (
    Checkpoint,
    StoredWeight,
    own_dtype,
    quantized_modules,
    read_headers,
    resolve,
)
from halfweight.checkpoint.shard import StoredTensor, some
from halfweight.errors import CheckpointError
from halfweight.kernels.operations import choose_backend
from halfweight.memory.device_memory import indexed, out_of_memory, require
from halfweight.model.experts import (
    AwaitedExperts,
    QuantizedExperts,
)
from halfweight.model.loadability import PACKED_PARTS, quiet
from halfweight.model.modules import (
    QuantizedWeight,
)
from halfweight.model.saving import quantized_weights, saved_config
from halfweight.model.transformers_quantizer import (
    METHOD,
    Activations,
    check_activations,
    request_backend,
    share_table,
)
from halfweight.model.weight_reader import Progress, Tally, map_tensors, read_into
from halfweight.model.weight_streaming import arriving
from halfweight.quantization.numerics import QuantizedTensor

log = logging.getLogger("halfweight")

LOAD_HINT = "`halfweight plan` shows what would fit; free the device or use a smaller model"


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
    check_activations(chosen, activations)
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
            request_backend(loaded, backend)
        if device.type != "cpu":
            source = {t.data_ptr(): s for s in checkpoint.tensors if (t := mapped[s.name]).numel()}
            _move(loaded, device, source, tally)
    _finish(loaded, checkpoint)
    return loaded


def _model_config(checkpoint: Checkpoint, dtype: torch.dtype | None) -> Any:
    content = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    try:
        config = AutoConfig.for_model(**content)
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint.root / 'config.json'}: {str(error).partition(chr(10))[0]}",
            hint="a newer transformers may know this architecture",
        ) from error
    config.dtype = dtype or getattr(torch, own_dtype(checkpoint))
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
    share_table(model)


def _check_shapes(
    checkpoint: Checkpoint, model: PreTrainedModel, stored: Mapping[str, StoredWeight]
) -> None:
    """Raise CheckpointError where a packed weight is not of the shape that config.json says."""
    for name, module in quantized_weights(model).items():
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


def _finish(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    model.config.quantization_config = saved_config(model)
    model.requires_grad_(False)
    model.eval()
    if (checkpoint.root / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.root)
    model.config.name_or_path = model.name_or_path = os.fspath(checkpoint.root)
