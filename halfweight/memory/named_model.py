"""The model that a plan is about: a preset, a config.json, a folder, a .gguf file or a Hub id.

Only headers and configs are read. Of a Hub id that is not here they come by range requests, a few
hundred kilobytes whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from halfweight.checkpoint.forms import Form, form_of
from halfweight.checkpoint.gguf_header import read_gguf_header
from halfweight.checkpoint.headers import HUB_ID, Checkpoint, quantized_modules, read_headers
from halfweight.checkpoint.json_files import ModelConfig, read_json
from halfweight.checkpoint.scale_formats import stored_scheme, stored_schemes
from halfweight.checkpoint.sources.source import is_tied
from halfweight.errors import CheckpointError
from halfweight.memory.architecture import architecture
from halfweight.memory.plan import Model
from halfweight.memory.presets import PRESETS, preset
from halfweight.quantization.scheme import (
    Q8_0_SCHEME,
    Decision,
    Recipe,
    Scheme,
    TensorInfo,
)


def planned_model(name: str, recipe: Recipe | None = None) -> Model:
    """The model called `name`, quantized by `recipe`; a quantized folder as it is.

    Raises CheckpointError where there is no such model or its headers or config do not do.
    """
    recipe = recipe or Recipe()
    if name in PRESETS:
        return Model.from_recipe(architecture(preset(name), name), recipe)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        return _from_gguf(path, recipe)
    if path.suffix == ".json":
        return Model.from_recipe(
            architecture(read_json(path, ModelConfig), path.parent.name or name), recipe
        )
    if not path.exists() and HUB_ID.fullmatch(name):
        return _from_hub(name, recipe)
    if not path.exists():
        raise CheckpointError(
            f"{name}: no such file, folder or preset",
            hint=f"give a path, a Hub id such as org/name, or one of {', '.join(PRESETS)}",
        )
    return _from_folder(read_headers(path), path.name, recipe)


def _from_gguf(path: Path, recipe: Recipe) -> Model:
    """By its header alone if that accounts for every number in the file, else as the converter."""
    if (header := read_gguf_header(path)) is not None:
        found = architecture(header.config, path.stem)
        if found.num_parameters == header.num_parameters:
            tensors = (
                replace(tensor, int8=Q8_0_SCHEME) if tensor.name in header.int8 else tensor
                for tensor in found.tensors
            )
            return Model.from_recipe(replace(found, tensors=tuple(tensors)), recipe)
    from halfweight.checkpoint.sources import open_source

    source = open_source(path)
    return Model.from_recipe(architecture(source.config, path.stem, source.tensors), recipe)


def _from_folder(checkpoint: Checkpoint, name: str, recipe: Recipe) -> Model:
    form = checkpoint.form
    modules = {} if form and form.is_read else quantized_modules(checkpoint)
    tensors = [tensor.info for tensor in checkpoint.tensors]
    return _model(checkpoint.config, name, tensors, recipe, stored_schemes(checkpoint, modules))


def _model(
    config: dict[str, Any],
    name: str,
    tensors: Sequence[TensorInfo],
    recipe: Recipe,
    schemes: Mapping[str, Scheme],
) -> Model:
    """The model of these headers: by the recipe, or as it is where it is quantized already.

    `schemes` of its modules in INT8; what is not named is taken to be held as the file has it.
    """
    if (form := form_of(config, tensors)) is not None:
        tensors = _of_others(form, config, name, tensors)
    by_name = {tensor.name: tensor for tensor in tensors}
    modules = [n.removesuffix(".weight_packed") for n in by_name if n.endswith(".weight_packed")]
    if not modules:
        return Model.from_recipe(architecture(config, name, _own(config, tensors)), recipe)
    parts = {f"{m}.weight_{part}" for m in modules for part in ("packed", "scale", "shape")}
    decisions = [_decision(m, by_name, schemes) for m in modules]
    kept = [tensor for tensor in tensors if tensor.name not in parts]
    decisions += [Decision(tensor, None, "in 16 bits in the file") for tensor in kept]
    found = architecture(config, name, [decision.tensor for decision in decisions])
    return Model(found, tuple(decisions))


def _of_others(
    form: Form, config: Mapping[str, Any], name: str, tensors: Sequence[TensorInfo]
) -> list[TensorInfo]:
    """What `quantize` would find in a checkpoint of others."""
    if not form.is_read:
        raise form.refused(name)
    from halfweight.checkpoint.sources.others import as_the_model_has_them

    plain, matrices = as_the_model_has_them(form, config, tensors)
    return [*plain, *(matrix.info for matrix in matrices)]


def _own(config: dict[str, Any], tensors: Sequence[TensorInfo]) -> list[TensorInfo]:
    """Without a head that the file stores beside the embedding that it is tied to."""
    tied = is_tied(config)
    return [tensor for tensor in tensors if not (tied and tensor.name.endswith("lm_head.weight"))]


def _decision(
    module: str, by_name: Mapping[str, TensorInfo], schemes: Mapping[str, Scheme]
) -> Decision:
    packed = by_name[f"{module}.weight_packed"]
    scheme = schemes.get(module) or stored_scheme(packed, by_name[f"{module}.weight_scale"])
    shape = (packed.shape[0], 4 * packed.shape[1])
    return Decision(TensorInfo(f"{module}.weight", "BF16", shape), scheme, "")


def _from_hub(name: str, recipe: Recipe) -> Model:
    """From the Hub's cache where the whole model is there, else config and headers by request."""
    from huggingface_hub import get_safetensors_metadata, hf_hub_download, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return _from_folder(
            read_headers(snapshot_download(name, local_files_only=True)), name, recipe
        )
    except (LocalEntryNotFoundError, CheckpointError):
        pass  # not there, or in part only
    try:
        config = read_json(Path(hf_hub_download(name, "config.json")), ModelConfig)
        files: Any = get_safetensors_metadata(name).files_metadata.values()
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{name}: neither in the Hub's cache nor given by the Hub ({type(error).__name__})",
            hint="check the id, the network and `hf auth login`",
        ) from error
    tensors = [
        TensorInfo(tensor, info.dtype, tuple(info.shape))
        for file in files
        for tensor, info in file.tensors.items()
    ]
    return _model(config, name, tensors, recipe, {})
