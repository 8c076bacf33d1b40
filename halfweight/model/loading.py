"""The transformers model of a checkpoint, its weights in INT8.

`load` lets transformers' own loader place every tensor of the file in the model that config.json
names (its renamings, merges, ties and buffers count), with a PackedWeight in place of each weight
in INT8; our modules then take the places where those ended up. Weights in INT8 are on their way
meanwhile (weight_streaming.py). The other tensors are views of the mapped file; for a GPU each is
then read from the file to its place, once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

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
from halfweight.kernels.operations import backend as backend_of
from halfweight.kernels.operations import choose_backend
from halfweight.memory.device_memory import indexed, out_of_memory, require
from halfweight.model.building import build, cannot_build, model_class, parsed_config, turned_names
from halfweight.model.device_map import one_device
from halfweight.model.loadability import PACKED_PARTS
from halfweight.model.packed_weight import PackedWeight, whole
from halfweight.model.placement import Options, misshapen, packed_names, place
from halfweight.model.saving import saved_config, stored_state_dict
from halfweight.model.transformers_quantizer import (
    METHOD,
    Activations,
    check_activations,
    request_backend,
)
from halfweight.model.weight_reader import Progress, Tally, map_tensors, read_into
from halfweight.model.weight_streaming import arriving

log = logging.getLogger("halfweight")

KEPT_HINT = "quantize the source again: it is then kept in 16 bits"
LOAD_HINT = "`halfweight plan` shows what would fit; free the device or use a smaller model"


def load(
    model: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    activations: Activations = "exact",
    device_map: Any = None,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """The transformers model of a halfweight folder (or Hub id), with its weights in INT8.

    dtype is that of activations and of what is kept in 16 bits, by default the checkpoint's own.
    backend names one of `halfweight backends`; activations="int8" rounds activations too (opt-in).
    device_map is transformers' word for device: one device, or "auto". A folder that holds no
    INT8 weights is loaded in 16 bits. Raises CheckpointError where files and model do not fit each
    other, UsageError for a map over several devices, DoesNotFitError where the device lacks memory.
    """
    checkpoint = read_headers(resolve(os.fspath(model)))
    return load_checkpoint(
        checkpoint,
        device=device if device_map is None else one_device(device_map),
        dtype=dtype,
        backend=backend,
        activations=activations,
        progress=progress,
    )


def load_checkpoint(
    checkpoint: Checkpoint,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    activations: Activations = "exact",
    progress: Progress | None = None,
) -> PreTrainedModel:
    """`load` of a checkpoint whose headers are read, or of one rank's part of it (share.py)."""
    device = indexed(device)
    chosen = choose_backend(device, backend)
    check_activations(chosen, activations)
    stored = quantized_modules(checkpoint)
    kind = _model_class(checkpoint)
    config = _model_config(checkpoint, dtype)
    for group_size in {weight.group_size for weight in stored.values()}:
        backend_of(chosen).prepare(device, group_size, config.dtype)
    packed = awaited(kind, config, stored)
    config.quantization_config = {
        "quant_method": METHOD,
        "backend": chosen,
        "activations": activations,
    }
    what = f"loading {checkpoint.root.name}"
    require(checkpoint.num_bytes, device, what, hint=LOAD_HINT)
    mapped = map_tensors(checkpoint)
    tally = Tally(checkpoint.num_bytes, progress)
    with out_of_memory(device, what, hint=LOAD_HINT):
        with arriving(stored, mapped, device, tally) as weights:
            tensors = other_tensors(mapped, stored, dtype) | packed
            loaded = _built(checkpoint, kind, config, tensors)
            refused = place(loaded, weights, Options(chosen, activations == "int8"))
            raise_if_refused(checkpoint, refused, KEPT_HINT)
            request_backend(loaded, backend)
        if device.type != "cpu":
            move_to(loaded, device, stored_by_address(checkpoint, mapped), tally)
    _finish(loaded, checkpoint)
    return loaded


def _model_class(checkpoint: Checkpoint) -> Any:
    if not checkpoint.config:
        raise CheckpointError(
            f"{checkpoint.shards[0].path}: no config.json read with it, expected a model folder",
            hint="give the folder that holds config.json and the weights",
        )
    kind = model_class(checkpoint.config)
    if kind is None:
        names = checkpoint.config.get("architectures")
        raise CheckpointError(
            f"{checkpoint.root / 'config.json'}: transformers has no class {names}",
            hint="a newer transformers may know this architecture",
        )
    return kind


def _model_config(checkpoint: Checkpoint, dtype: torch.dtype | None) -> Any:
    try:
        config = parsed_config(checkpoint.config)
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint.root / 'config.json'}: {str(error).partition(chr(10))[0]}",
            hint="a newer transformers may know this architecture",
        ) from error
    except Exception as error:  # what a config's own checks raise
        raise cannot_build(checkpoint.root / "config.json", error) from error
    config.dtype = dtype or getattr(torch, own_dtype(checkpoint))
    return config


def awaited(kind: Any, config: Any, stored: Mapping[str, StoredWeight]) -> dict[str, Tensor]:
    """What transformers gets in place of the weights in INT8."""
    turned = turned_names(kind, config, list(stored))
    return {
        f"{name}.weight": whole(name, weight.shape, config.dtype, turned=name in turned)
        for name, weight in stored.items()
    }


def other_tensors(
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


def _built(checkpoint: Checkpoint, kind: Any, config: Any, tensors: dict[str, Tensor]) -> Any:
    """The model; raises CheckpointError where it needs other tensors than there are.

    What the model does not use is left out: conversion said so and kept it.
    """
    options = {"dtype": config.dtype, "ignore_mismatched_sizes": True}
    try:
        loaded, found = build(kind, config, tensors, **options)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise cannot_build(checkpoint.root / "config.json", error) from error
    if found["unexpected_keys"]:
        log.info("%s: not used: %s", checkpoint.root.name, some(found["unexpected_keys"]))
    misfits = {
        "missing": found["missing_keys"],
        "of another shape": {key[0] for key in found["mismatched_keys"]} | misshapen(loaded),
    }
    wrong = "; ".join(f"{what}: {some(keys)}" for what, keys in misfits.items() if keys)
    if wrong:
        raise CheckpointError(
            f"{checkpoint.root}: the files do not fit the model of config.json ({wrong})",
            hint="download the checkpoint again, or quantize its source again",
        )
    packed = [t for t in tensors.values() if isinstance(t, PackedWeight)]
    unknown = {name for weight in packed for name in weight.names} - packed_names(loaded)
    for name in sorted(unknown):
        raise CheckpointError(
            f"{checkpoint.root}: module {name} is not in the model of config.json",
            hint="quantize the source again: what the model does not use is then kept in 16 bits",
        )
    return loaded


def raise_if_refused(checkpoint: Checkpoint, refused: Mapping[str, str], hint: str) -> None:
    """Raise CheckpointError for the first weight in INT8 that no module of the model can hold."""
    for name, reason in refused.items():
        raise CheckpointError(
            f"{checkpoint.root}: module {name} is in INT8, but {reason}", hint=hint
        )


def stored_by_address(
    checkpoint: Checkpoint, mapped: Mapping[str, Tensor]
) -> dict[int, StoredTensor]:
    """Where in the files each mapped tensor lies, by its address."""
    stored = checkpoint.tensors
    return {t.data_ptr(): s for s in stored if (t := mapped[s.name]).numel()}


def move_to(
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
    declared = checkpoint.config.get("quantization_config")
    model.config.quantization_config = declared or saved_config(stored_state_dict(model))
    model.requires_grad_(False)
    model.eval()
    if (checkpoint.root / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.root)
    model.config.name_or_path = model.name_or_path = os.fspath(checkpoint.root)
