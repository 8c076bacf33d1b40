"""transformers' model of a config and named tensors: what loading and its rehearsal share.

Tensors may be values, without memory (on meta), or PackedWeights in place of weights in INT8:
transformers' own loader places them all, so its renamings, splits, merges and ties count.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from halfweight.errors import CheckpointError


def parsed_config(content: Mapping[str, Any]) -> Any:
    """The config object of a config.json, without what it says of quantization.

    Raises KeyError, ValueError or TypeError where transformers does not take it.
    """
    plain = {key: value for key, value in content.items() if key != "quantization_config"}
    return AutoConfig.for_model(**PreTrainedConfig._decode_special_floats(plain))


def model_class(content: Mapping[str, Any]) -> Any:
    """The class that config.json names, or None if transformers has none of that name."""
    names = content.get("architectures") or ()
    return next((getattr(transformers, n) for n in names if hasattr(transformers, n)), None)


def build(
    kind: Any, config: Any, tensors: Mapping[str, Tensor], **options: Any
) -> tuple[Any, dict[str, Any]]:
    """A model of class `kind` with `tensors` in it, and what did not fit, as transformers has it.

    Keys of the second: missing_keys, unexpected_keys, mismatched_keys.
    """
    with quiet():
        model, found = kind.from_pretrained(
            None, config=config, state_dict=dict(tensors), output_loading_info=True, **options
        )
    missing = set(found["missing_keys"]) - set(model.all_tied_weights_keys)
    return model, {**found, "missing_keys": missing}


def rehearse_saving(model: Any) -> None:
    """Take transformers' way back to the file's names, so that PackedWeights note what it needs."""
    with suppress(Exception), torch.no_grad():
        revert_weight_conversion(model, model.state_dict())


def turned_names(kind: Any, config: Any, names: list[str]) -> set[str]:
    """Which of the file's modules are a Conv1D [K, N] in the model: GPT-2's layers.

    Files with and without the model's own prefix are known: a name may be the end of the other.
    """
    if not hasattr(_source_module(kind), "Conv1D"):
        return set()
    with torch.device("meta"):
        model = kind(config)
    turned = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    return {name for name in names if any(_same_end(name, other) for other in turned)}


def stored_turned(config: Mapping[str, Any], modules: Iterable[str]) -> set[str]:
    """`turned_names` of a config.json; none where transformers has no class of its name."""
    kind = model_class(config)
    return set() if kind is None else turned_names(kind, parsed_config(config), list(modules))


def _source_module(kind: Any) -> Any:
    return sys.modules[kind.__module__]


def _same_end(one: str, other: str) -> bool:
    short, long = sorted((one, other), key=len)
    return long == short or long.endswith(f".{short}")


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar and no load report from transformers meanwhile."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def cannot_build(where: Path | str, error: Exception) -> CheckpointError:
    """What to raise where transformers raised this while it built a model."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    what = " ".join(lines[:2])[:300]
    return CheckpointError(
        f"{where}: transformers cannot build this model ({type(error).__name__}: {what})",
        hint="check config.json; a newer transformers may know this architecture",
    )
