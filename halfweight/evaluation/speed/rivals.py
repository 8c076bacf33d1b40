"""The rivals: how each opens one of a model's two checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SIXTEEN_BIT = "transformers 16-bit"
HALFWEIGHT = "halfweight"
HALFWEIGHT_INT8 = "halfweight int8 activations"
TORCHAO = "torchao int8 weight-only"
BY_ENGINE = (HALFWEIGHT, HALFWEIGHT_INT8)
"""Those that run by the package's engine; the others are plain models of transformers."""


@dataclass(frozen=True)
class Folders:
    """One model twice: the 16-bit checkpoint and what `halfweight quantize` made of it."""

    source: Path
    quantized: Path


def open_model(rival: str, folders: Folders, device: torch.device) -> Any:
    """The model as `rival` loads it, on `device`, ready for inference."""
    opened = RIVALS[rival](folders, device)
    return opened.eval().requires_grad_(False)


def _sixteen_bit(folders: Folders, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    dtype = activation_dtype(device)
    return AutoModelForCausalLM.from_pretrained(
        folders.source, dtype=dtype, device_map={"": device}
    )


def _halfweight(folders: Folders, device: torch.device, activations: Any = "exact") -> Any:
    from halfweight.model.loading import load

    dtype = activation_dtype(device)
    return load(folders.quantized, device=device, dtype=dtype, activations=activations)


def _torchao(folders: Folders, device: torch.device) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = _sixteen_bit(folders, device)
    quantize_(model, Int8WeightOnlyConfig())
    return model


RIVALS: dict[str, Callable[[Folders, torch.device], Any]] = {
    SIXTEEN_BIT: _sixteen_bit,
    HALFWEIGHT: _halfweight,
    HALFWEIGHT_INT8: lambda folders, device: _halfweight(folders, device, "int8"),
    TORCHAO: _torchao,
}


def activation_dtype(device: torch.device) -> torch.dtype:
    """float16 on a GPU; bfloat16 on a CPU."""
    return torch.float16 if device.type == "cuda" else torch.bfloat16


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
