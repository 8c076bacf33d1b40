"""A quantized model under lm-evaluation-harness: `lm_eval --model halfweight`.

Versions of the harness that know the entry point group `lm_eval.models` find it by that name; with
any version, `lm_eval.simple_evaluate(model=HalfweightLM("folder"), tasks=[...])`.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from halfweight.model.loading import load
from halfweight.model.transformers_quantizer import Activations


class HalfweightLM(HFLM):  # type: ignore[misc]
    """The harness's own transformers model, its weights loaded by `halfweight.load`.

    `pretrained` is a folder or Hub id; `dtype` names a torch dtype; what is left goes to HFLM.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike[str],
        *,
        device: str = "cpu",
        dtype: str | None = None,
        backend: str | None = None,
        activations: Activations = "exact",
        **options: Any,
    ) -> None:
        model = load(
            pretrained,
            device=device,
            dtype=getattr(torch, dtype) if dtype else None,
            backend=backend,
            activations=activations,
        )
        super().__init__(pretrained=model, tokenizer=str(pretrained), **options)
