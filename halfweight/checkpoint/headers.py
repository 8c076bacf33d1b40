"""A checkpoint on disk, known by its headers: folder, index, shards, Hub cache. Reads no weights.

A checkpoint comes from a stranger, so every name and path in it is checked before it is opened.
After `read_headers` returns, each tensor's bytes are known to lie inside a regular file inside the
checkpoint's folder, exactly once; every fault is one :class:`CheckpointError` naming the file.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfweight.checkpoint.forms import ORIGINAL, Form, form_of
from halfweight.checkpoint.json_files import (
    CompressedTensors,
    Index,
    ModelConfig,
    check_types,
    is_plain_name,
    read_json,
)
from halfweight.checkpoint.shard import Shard, StoredTensor, broken, read_shard, some
from halfweight.errors import CheckpointError, HalfweightError
from halfweight.quantization.scheme import TensorInfo

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TORCH_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
LEGAL_PREFIXES = ("LICENSE", "NOTICE", "USE_POLICY")
"""Files whose terms must travel with the weights, by how their names begin."""


@dataclass(frozen=True)
class Checkpoint:
    """All that can be known of a checkpoint without reading a weight."""

    root: Path
    shards: tuple[Shard, ...]
    config: dict[str, Any]

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """Every tensor, shard by shard, in the order of the bytes."""
        return tuple(tensor for shard in self.shards for tensor in shard.tensors)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors' data."""
        return sum(tensor.info.num_bytes for tensor in self.tensors)

    @property
    def form(self) -> Form | None:
        """The quantized form of others that it is in, None for 16 bits and for our own."""
        return form_of(self.config, (tensor.info for tensor in self.tensors))


@dataclass(frozen=True)
class StoredWeight:
    """One quantized weight [N, K] on disk: `packed` int32 [N, K/4], `scale` [N, K/G]."""

    module: str
    packed: StoredTensor
    scale: StoredTensor
    shape_record: StoredTensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.packed.info.shape[0], self.packed.info.shape[1] * 4

    @property
    def group_size(self) -> int:
        """Weights along K that share a scale."""
        return self.shape[1] // self.scale.info.shape[1]


def resolve(model: str | os.PathLike[str]) -> Path:
    """The local path of a model: a folder, a file, or a Hub id fetched into the Hub's cache.

    Raises CheckpointError if there is no such path and the Hub's cache or the Hub has no such id.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    if not HUB_ID.fullmatch(str(model)):
        raise CheckpointError(
            f"{model}: no such file or folder",
            hint="give a folder, a .gguf file, or a Hub id such as org/name",
        )
    try:
        return _from_hub(str(model))
    except HalfweightError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{model}: not a path here, and the Hub did not give it ({type(error).__name__})",
            hint="check the id, the network and `hf auth login`, or download it and give the path",
        ) from error


def _from_hub(name: str) -> Path:
    """The folder of a Hub id in the Hub's cache, with the files of the model and no others.

    Folders of a repository hold other things (original/, checkpoint-500/, vae/), and beside the
    shards may lie the same weights once more (consolidated.safetensors): shards are those that the
    index names.
    """
    from huggingface_hub import snapshot_download

    def fetch(patterns: list[str]) -> Path:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))

    folder = fetch([*HUB_FILES, *(f"{prefix}*" for prefix in LEGAL_PREFIXES)])
    index = folder / INDEX_NAME
    if index.exists():
        return fetch([glob.escape(shard) for shard in set(_read_weight_map(index).values())])
    if (fetch([SINGLE_NAME]) / SINGLE_NAME).exists():
        return folder
    return fetch(["*.safetensors"])


def read_headers(path: str | os.PathLike[str]) -> Checkpoint:
    """Read and check all headers of a folder, or of one .safetensors file. Reads no weights.

    `config` is config.json, or {} where there is none. Raises CheckpointError naming the file for
    every fault: missing, truncated or over-long shards, a broken header or index, unsafe paths,
    pickles, tensors in two places or in none.
    """
    path = Path(path)
    if path.is_file():
        _refuse_other_formats([path])
        return Checkpoint(path.parent, (read_shard(path),), {})
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder", hint="check the path")
    config = path / "config.json"
    content = read_json(config, ModelConfig) if config.exists() else {}
    try:
        return Checkpoint(path, tuple(_read_shards(path)), content)
    except CheckpointError:
        if (form := form_of(content, ())) is not None and form.name.startswith("EXL"):
            raise form.refused(path) from None  # the index beside it is that of the 16-bit model
        raise


def own_dtype(checkpoint: Checkpoint) -> str:
    """The torch dtype that a checkpoint is in: config.json's, else that of most of its floats."""
    return model_dtype(checkpoint.config, (tensor.info for tensor in checkpoint.tensors))


def model_dtype(config: Mapping[str, Any], tensors: Iterable[TensorInfo]) -> str:
    """`own_dtype` by a config and headers."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        name = str(part.get("dtype") or part.get("torch_dtype")).removeprefix("torch.")
        if name in TORCH_DTYPES.values():
            return name
    totals = dict.fromkeys(TORCH_DTYPES, 0)
    for tensor in tensors:
        if tensor.dtype in totals and not tensor.name.endswith(".weight_scale"):
            totals[tensor.dtype] += tensor.num_bytes
    most = max(totals, key=lambda dtype: totals[dtype])
    return TORCH_DTYPES[most] if totals[most] else "bfloat16"


def quantized_modules(checkpoint: Checkpoint) -> dict[str, StoredWeight]:
    """Module name -> its stored INT8 weight, for every quantized module of a checkpoint.

    Raises CheckpointError if a module is incomplete, or quantized in a way halfweight does not run
    (by others' forms, other than 8 bits, zero points, reordered groups).
    """
    if (form := checkpoint.form) is not None:
        raise form.refused(checkpoint.root)
    tensors = {tensor.name: tensor for tensor in checkpoint.tensors}
    modules = [n.removesuffix(".weight_packed") for n in tensors if n.endswith(".weight_packed")]
    if modules:
        _check_quantization_config(checkpoint)
    return {module: _stored_weight(tensors, module) for module in modules}


def _stored_weight(tensors: dict[str, StoredTensor], module: str) -> StoredWeight:
    for extra in ("weight_zero_point", "weight_g_idx"):
        if f"{module}.{extra}" in tensors:
            raise CheckpointError(
                f"module {module} has {extra}, expected symmetric groups in order", hint=ORIGINAL
            )
    packed = tensors[f"{module}.weight_packed"]
    scale, record = (tensors.get(f"{module}.weight_{part}") for part in ("scale", "shape"))
    if scale is None or record is None:
        part = "weight_scale" if scale is None else "weight_shape"
        raise broken(packed.shard, f"module {module} has weight_packed but no {part}")
    rows, columns = (*packed.info.shape, 0, 0)[:2]
    scale_shape = scale.info.shape
    fits = (
        packed.info.dtype == "I32"
        and len(packed.info.shape) == len(scale_shape) == 2
        and scale_shape[0] == rows
        and scale_shape[1] > 0
        and columns * 4 % scale_shape[1] == 0
        and record.info.shape == (2,)
    )
    if not fits:
        found = f"{packed.info.dtype} {list(packed.info.shape)} with scales {list(scale_shape)}"
        raise broken(packed.shard, f"module {module} is {found}, expected I32 [N, K/4], [N, K/G]")
    return StoredWeight(module, packed, scale, record)


def _check_quantization_config(checkpoint: Checkpoint) -> None:
    config = checkpoint.config.get("quantization_config") or {}
    check_types(checkpoint.root / "config.json", config, CompressedTensors)


def _read_shards(root: Path) -> Iterator[Shard]:
    index, single = root / INDEX_NAME, root / SINGLE_NAME
    if not index.exists():
        yield read_shard(check_inside(root, _only_shard(root).name))
        return
    weight_map = _read_weight_map(index)
    if single.exists() and SINGLE_NAME not in weight_map.values():
        raise CheckpointError(
            f"{root}: both {SINGLE_NAME} and {INDEX_NAME}, which does not name it",
            hint="remove the stale one; a loader may pick either",
        )
    by_shard: dict[str, set[str]] = {}
    for name, shard_name in weight_map.items():
        by_shard.setdefault(shard_name, set()).add(name)
    for shard_name, names in sorted(by_shard.items()):
        path = check_inside(root, shard_name)
        if not path.exists():
            raise broken(path, f"missing; {INDEX_NAME} puts {some(names)} in it")
        shard = read_shard(path)
        _check_against_index(shard, names, weight_map)
        yield shard


def _only_shard(root: Path) -> Path:
    if (root / SINGLE_NAME).exists():
        return root / SINGLE_NAME
    files = sorted(p for p in root.iterdir() if not p.name.startswith("."))
    shards = [p for p in files if p.suffix == ".safetensors"]
    if len(shards) == 1:
        return shards[0]
    if shards:
        raise CheckpointError(
            f"{root}: {len(shards)} safetensors files but no {INDEX_NAME}",
            hint="download the index too; without it a missing shard would go unseen",
        )
    _refuse_other_formats(files)
    raise CheckpointError(f"{root}: no safetensors file", hint="give the folder of a model")


def _refuse_other_formats(files: Iterable[Path]) -> None:
    for path in files:
        if path.suffix == ".gguf":
            raise CheckpointError(
                f"{path}: a GGUF file, expected .safetensors",
                hint=f"halfweight quantize {path} OUT makes safetensors of it",
            )
        if path.suffix in PICKLE_SUFFIXES:
            raise CheckpointError(
                f"{path}: a pickle, which can run code when opened; expected .safetensors",
                hint="convert it where you trust it: load with transformers, save_pretrained()",
            )


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map: dict[str, str] = read_json(index, Index)["weight_map"]
    if not weight_map:
        raise broken(index, "has an empty weight_map")
    return weight_map


def check_inside(root: Path, shard_name: str) -> Path:
    """The shard's path, refused unless it is a plain name whose file lies in the folder.

    Links of the Hub's cache, from snapshots/<revision>/ to ../../blobs/, are allowed.
    """
    if not is_plain_name(shard_name):
        raise CheckpointError(
            f"{root / INDEX_NAME}: shard {shard_name!r} is not a plain file name",
            hint="do not trust this checkpoint: its index points outside its folder",
        )
    allowed = [root.resolve()]
    if root.absolute().parent.name == "snapshots":
        allowed.append((root.absolute().parent.parent / "blobs").resolve())
    target = (root / shard_name).resolve()
    if target.parent not in allowed:
        raise CheckpointError(
            f"{root / shard_name}: a link to {target}, outside the checkpoint",
            hint="copy the file into the folder if you trust it",
        )
    return root / shard_name


def _check_against_index(shard: Shard, names: set[str], weight_map: dict[str, str]) -> None:
    held = {tensor.name for tensor in shard.tensors}
    if absent := names - held:
        raise broken(shard.path, f"lacks {some(absent)}, which {INDEX_NAME} puts in it")
    for name in sorted(held - names):
        if name in weight_map:
            where = f"also in {weight_map[name]} by {INDEX_NAME}"
        else:
            where = f"not listed in {INDEX_NAME}"
        raise broken(shard.path, f"holds tensor {name}, {where}")
