"""The 16-bit model of a .gguf file, by transformers: what conversions are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from halfweight.checkpoint.gguf_header import TORCH_DTYPES, file_dtype, gguf_files
from halfweight.checkpoint.shard import some
from halfweight.checkpoint.sources import open_source
from halfweight.errors import CheckpointError, HalfweightError
from halfweight.model.building import build, model_class, parsed_config, quiet


def load_gguf(
    path: Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model of a .gguf file on a device, by default in the dtype that `quantize` decodes to.

    Raises CheckpointError for a file that cannot be read or lacks weights of its model.
    """
    is_split = len(gguf_files(path)) > 1
    dtype = dtype or getattr(torch, file_dtype(path))
    try:
        model, found = (_of_all_files if is_split else _of_one_file)(path, dtype)
    except HalfweightError:
        raise
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path}: transformers cannot read this file ({type(error).__name__}: {first_line})",
            hint="download it again, or use the safetensors of this model",
        ) from error
    if missing := set(found["missing_keys"]) - set(model.all_tied_weights_keys):
        raise CheckpointError(
            f"{path}: no weights for {some(missing)}, which its model has",
            hint="download the file again",
        )
    return model.eval().to(device)


def _of_one_file(path: Path, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    with quiet():
        found: tuple[Any, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype, output_loading_info=True
        )
    return found


def _of_all_files(path: Path, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """Of a split model, which transformers does not read: the tensors that a conversion reads."""
    source = open_source(path)
    tensors = {
        tensor.name: torch.from_numpy(source.read(tensor, 0, tensor.num_bytes))
        .view(getattr(torch, TORCH_DTYPES[tensor.dtype]))
        .reshape(tensor.shape)
        for tensor in source.tensors
    }
    config = parsed_config(source.config)
    return build(model_class(source.config), config, tensors, dtype=dtype)
