"""halfweight: run a language model in half its memory. Importing this does no work.

It leaves a note for transformers, should it be imported: folders in INT8 are ours to load
(model/registration.py).
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "ConversionReport": "conversion.convert",
    "Engine": "engine.engine",
    "ExportReport": "conversion.export",
    "HalfweightConfig": "model.transformers_quantizer",
    "HalfweightError": "errors",
    "Recipe": "quantization.scheme",
    "Sampling": "engine.request",
    "Scheme": "quantization.scheme",
    "evaluate": "evaluation.comparison",
    "export": "conversion.export",
    "inspect": "checkpoint.inspection",
    "load": "model.loading",
    "quantize": "conversion.convert",
    "verify": "conversion.verification",
}
"""Public name -> the module of this package that defines it, imported when first asked for."""

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'halfweight' has no attribute {name!r}")
    return getattr(importlib.import_module(f"halfweight.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


importlib.import_module("halfweight.model.registration").register()
