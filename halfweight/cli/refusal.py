"""Refuse, before anything is loaded, what cannot fit on a GPU or cannot read a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from halfweight.errors import UsageError

Force = Annotated[bool, typer.Option("--force", help="Even if the plan says it cannot fit.")]


def require_room(
    model: str,
    device: str | None,
    context: Callable[[], int],
    batch: int,
    kv_cache: Any = "16bit",
    *,
    ranks: Mapping[str, Any],
) -> None:
    """Raise DoesNotFitError if `batch` sequences of `context()` tokens cannot fit beside the model.

    Only on CUDA, whose free memory is known; a CPU can swap. Of several `ranks` (`rank_options`)
    each holds its part on a GPU like the first. Stages are placed by what is free, or refused then.
    """
    import torch

    from halfweight.checkpoint.headers import quantized_modules, read_headers, resolve
    from halfweight.memory.device_memory import available_bytes
    from halfweight.memory.named_model import planned_model
    from halfweight.memory.what_fits import require_fit
    from halfweight.memory.workload import Workload

    count, first = ranks["tensor_parallel"], (ranks["devices"] or [None])[0]
    if first and count == 1:
        return
    free = available_bytes(first or device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if free is None:
        return
    folder = resolve(model)
    weights = "int8" if quantized_modules(read_headers(folder)) else "16bit"
    work = Workload(context(), batch, kv_cache, count)
    require_fit(planned_model(str(folder)), work, free, weights=weights)  # type: ignore[arg-type]


def require_tokenizer(folder: Path) -> None:
    """Raise UsageError for a model that has none, before its weights are read."""
    from halfweight.model.tokenizer import has_tokenizer

    if folder.is_dir() and not has_tokenizer(folder):
        raise UsageError(
            f"{folder}: found no tokenizer, needed to turn text into tokens",
            hint="copy tokenizer.json and tokenizer_config.json from the original model",
        )


def longest_prompt(model: str, texts: Sequence[str]) -> int:
    """Tokens of the longest text."""
    from halfweight.checkpoint.headers import resolve
    from halfweight.model.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(resolve(model))
    return max(len(tokenizer(text)["input_ids"]) for text in texts)
