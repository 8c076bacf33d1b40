"""Does a checkpoint fit the model that its config.json describes? Asked of transformers, on meta.

The model is built without memory and loaded from tensors without memory, by transformers' own
loader, so its renamings, merged experts, ties and prefixes count as they will count at load. A
quantized weight stands in as the matrix it dequantizes to.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Any

from halfweight.checkpoint.headers import Checkpoint, quantized_modules
from halfweight.checkpoint.shard import some
from halfweight.errors import CheckpointError
from halfweight.quantization.scheme import TensorInfo

PACKED_PARTS = ("weight_packed", "weight_scale", "weight_shape")


def model_tensors(checkpoint: Checkpoint) -> list[TensorInfo]:
    """A checkpoint's tensors as the model knows them: each packed weight as one F16 [N, K]."""
    modules = quantized_modules(checkpoint)
    plain = [
        tensor.info
        for tensor in checkpoint.tensors
        if not (_module(tensor.name) in modules and _part(tensor.name) in PACKED_PARTS)
    ]
    packed = [TensorInfo(f"{name}.weight", "F16", w.shape) for name, w in modules.items()]
    return plain + packed


def load_on_meta(
    where: Path | str, config: Mapping[str, Any], tensors: Iterable[TensorInfo]
) -> tuple[str, ...]:
    """Load tensors without data into the model of `config`; returns what a user should know.

    Raises CheckpointError if the model lacks a tensor or has it in another shape. A model class
    that transformers does not have cannot be checked, which is returned as a note.
    """
    model_class = _model_class(config)
    if model_class is None:
        names = config.get("architectures")
        return (f"not checked against the model: transformers has no class {names}",)
    import torch
    from transformers import AutoConfig

    try:
        parsed = AutoConfig.for_model(**_without_quantization(config))
        weights = {t.name: torch.empty(t.shape, device="meta") for t in tensors}
        with quiet():
            _, found = model_class.from_pretrained(
                None,
                config=parsed,
                state_dict=weights,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{where}: transformers cannot build this model ({type(error).__name__}: {first_line})",
            hint="check config.json; a newer transformers may know this architecture",
        ) from error
    _raise_if_unfit(where, found)
    unexpected = found["unexpected_keys"]
    return (f"not used by the model: {some(unexpected)}",) if unexpected else ()


def load_aside(
    where: Path | str, config: Mapping[str, Any], tensors: Iterable[TensorInfo]
) -> tuple[str, ...]:
    """`load_on_meta`, in a process of its own unless transformers is imported already.

    The import is seconds of pure Python, which would hold up every thread of this process.
    """
    tensors = list(tensors)
    if "transformers" in sys.modules:
        return load_on_meta(where, config, tensors)
    question = {"where": str(where), "config": config, "tensors": [astuple(t) for t in tensors]}
    done = subprocess.run(
        [sys.executable, "-m", "halfweight.model.loadability"],
        input=json.dumps(question),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # Ctrl-C is for us to handle
    )
    if done.returncode:
        return load_on_meta(where, config, tensors)
    answer = json.loads(done.stdout.splitlines()[-1])
    if "error" in answer:
        raise CheckpointError(answer["error"], hint=answer["hint"])
    return tuple(answer["notes"])


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    tensors = [TensorInfo(name, dtype, tuple(shape)) for name, dtype, shape in question["tensors"]]
    try:
        return {"notes": load_on_meta(question["where"], question["config"], tensors)}
    except CheckpointError as error:
        return {"error": error.message, "hint": error.hint}


def _raise_if_unfit(where: Path | str, found: Mapping[str, Any]) -> None:
    hint = "config.json and weights do not belong together: download both again"
    if found["mismatched_keys"]:
        name, stored, expected = sorted(found["mismatched_keys"])[0]
        raise CheckpointError(
            f"{where}: tensor {name} is {list(stored)}, config.json makes it {list(expected)}",
            hint=hint,
        )
    if missing := found["missing_keys"]:
        raise CheckpointError(
            f"{where}: no weights for {some(missing)}, which the model of config.json has",
            hint=hint,
        )


def _model_class(config: Mapping[str, Any]) -> Any:
    import transformers

    names = config.get("architectures") or ()
    return next((getattr(transformers, n) for n in names if hasattr(transformers, n)), None)


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "quantization_config"}


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


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _part(name: str) -> str:
    return name.rpartition(".")[2]


if __name__ == "__main__":
    print(json.dumps(_answer(json.load(sys.stdin))))
