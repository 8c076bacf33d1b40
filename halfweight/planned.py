"""The model that a plan is about: a preset, a config.json, a folder, a .gguf file or a Hub id.

Only headers and configs are read. Of a Hub id that is not here they come by range requests, a few
hundred kilobytes whatever the model's size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halfweight.architecture import architecture
from halfweight.checkpoint import HUB_ID, Checkpoint, StoredWeight, quantized_modules, read_headers
from halfweight.errors import CheckpointError
from halfweight.plan import Model
from halfweight.presets import PRESETS, preset
from halfweight.scheme import GROUP_SIZES, Decision, GroupSize, Recipe, Scheme, TensorInfo
from halfweight.shard import read_json


def planned_model(name: str, recipe: Recipe | None = None) -> Model:
    """The model called `name`, quantized by `recipe`; a quantized folder as it is.

    Raises CheckpointError where there is no such model or its headers or config do not do.
    """
    recipe = recipe or Recipe()
    if name in PRESETS:
        return Model.from_recipe(architecture(preset(name), name), recipe)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        from halfweight.source import open_source

        source = open_source(path, name)
        return Model.from_recipe(architecture(source.config, path.stem, source.tensors), recipe)
    if path.suffix == ".json":
        return Model.from_recipe(architecture(read_json(path), path.parent.name or name), recipe)
    if not path.exists() and HUB_ID.fullmatch(name):
        return _from_hub(name, recipe)
    if not path.exists():
        raise CheckpointError(
            f"{name}: no such file, folder or preset",
            hint=f"give a path, a Hub id such as org/name, or one of {', '.join(PRESETS)}",
        )
    return _from_folder(read_headers(path), path.name, recipe)


def _from_folder(checkpoint: Checkpoint, name: str, recipe: Recipe) -> Model:
    stored = quantized_modules(checkpoint)
    parts = {f"{m}.weight_{part}" for m in stored for part in ("packed", "scale", "shape")}
    plain = [t.info for t in checkpoint.tensors if t.name not in parts]
    if not stored:
        return Model.from_recipe(architecture(checkpoint.config, name, plain), recipe)
    scale_format = _scale_format(checkpoint)
    decisions = [_decision(weight, scale_format) for weight in stored.values()]
    decisions += [Decision(tensor, None, "in 16 bits in the file") for tensor in plain]
    tensors = [decision.tensor for decision in decisions]
    return Model(architecture(checkpoint.config, name, tensors), tuple(decisions))


def _decision(weight: StoredWeight, scale_format: str) -> Decision:
    group_size: GroupSize = weight.group_size
    if group_size not in GROUP_SIZES:
        group_size = "row"
    tensor = TensorInfo(f"{weight.module}.weight", "BF16", weight.shape)
    return Decision(tensor, Scheme(group_size, scale_format), "")


def _scale_format(checkpoint: Checkpoint) -> str:
    """As the manifest says; a file without one may come from elsewhere: its own dtype."""
    manifest = checkpoint.root / "halfweight.json"
    if manifest.exists():
        return str(read_json(manifest)["job"]["recipe"]["scheme"]["scale_format"])
    return "bfloat16"


def _from_hub(name: str, recipe: Recipe) -> Model:
    from huggingface_hub import get_safetensors_metadata, hf_hub_download, snapshot_download

    try:
        local = snapshot_download(name, local_files_only=True)
        return _from_folder(read_headers(local), name, recipe)
    except Exception:
        pass
    try:
        config = read_json(Path(hf_hub_download(name, "config.json")))
        files: Any = get_safetensors_metadata(name).files_metadata.values()
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
    return Model.from_recipe(architecture(config, name, tensors), recipe)
