"""The 16-bit model of a .gguf file, by transformers: what conversions are compared with."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from halfweight.checkpoint.gguf_header import file_dtype, refuse_split
from halfweight.checkpoint.shard import some
from halfweight.errors import CheckpointError
from halfweight.model.building import quiet


def load_gguf(
    path: Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model of a .gguf file on a device, by default in the dtype that `quantize` decodes to.

    Raises CheckpointError for a file that cannot be read or lacks weights of its model.
    """
    refuse_split(path)
    dtype = dtype or getattr(torch, file_dtype(path))
    try:
        with quiet():
            model, found = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=dtype, output_loading_info=True
            )
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
