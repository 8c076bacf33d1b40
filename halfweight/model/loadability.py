"""What of a checkpoint can be in INT8? The load is rehearsed, by the code that loads, on meta.

The model is built without memory and loaded from tensors without memory, by transformers' own
loader and with PackedWeights where the recipe would quantize. What no module of ours can hold, or
transformers computes with while it loads, or the model does not use, stays in 16 bits; a model
that lacks a tensor is refused. So what is converted can be loaded.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

from halfweight.checkpoint.headers import Checkpoint, quantized_modules
from halfweight.checkpoint.shard import some
from halfweight.errors import CheckpointError
from halfweight.quantization.scheme import Recipe, Scheme, TensorInfo

PACKED_PARTS = ("weight_packed", "weight_scale", "weight_shape")
MAX_REHEARSALS = 8
"""Each keeps what the one before refused; two are the rule."""


@dataclass(frozen=True)
class Fit:
    """What of a checkpoint must stay as it is, by tensor name with the reason.

    `turned` are weights stored as [K, N], to be quantized as [N, K]; `notes` what to tell a user.
    """

    kept: dict[str, str] = field(default_factory=dict)
    turned: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def model_tensors(checkpoint: Checkpoint) -> list[TensorInfo]:
    """A checkpoint's tensors as its source had them: each packed weight as one F16 [N, K]."""
    modules = quantized_modules(checkpoint)
    plain = [
        tensor.info
        for tensor in checkpoint.tensors
        if not (_module(tensor.name) in modules and _part(tensor.name) in PACKED_PARTS)
    ]
    packed = [TensorInfo(f"{name}.weight", "F16", w.shape) for name, w in modules.items()]
    return plain + packed


def check_loads(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Rehearse the load of a quantized folder; returns what a user should know.

    Raises CheckpointError if the model lacks a tensor, has it in another shape, or has no module
    for a weight in INT8.
    """
    packed = frozenset(quantized_modules(checkpoint))
    tensors = model_tensors(checkpoint)
    fit = rehearse(checkpoint.root, checkpoint.config, tensors, {f"{n}.weight" for n in packed})
    for name, reason in fit.kept.items():
        raise CheckpointError(
            f"{checkpoint.root}: {name} is in INT8, but {reason}",
            hint="quantize the source again: it is then kept in 16 bits",
        )
    return fit.notes


def fit_on_meta(
    where: Path | str,
    config: Mapping[str, Any],
    tensors: Iterable[TensorInfo],
    recipe: Recipe,
) -> Fit:
    """What must stay in 16 bits if `recipe` quantizes `tensors` of the model of `config`.

    Raises CheckpointError if the model lacks a tensor or has it in another shape. A model class
    that transformers does not have cannot be asked, which is a note.
    """
    tensors = list(tensors)
    wanted = {d.tensor.name for d in recipe.decide_all(tensors) if d.scheme is not None}
    return rehearse(where, config, tensors, wanted, stored=False)


def rehearse(
    where: Path | str,
    config: Mapping[str, Any],
    tensors: list[TensorInfo],
    packed: set[str],
    stored: bool = True,
) -> Fit:
    """Load with the tensors named `packed` in INT8 until all that are left can be.

    `stored`: shapes are those of a quantized folder, always [N, K].
    """
    from halfweight.model import building

    kind = building.model_class(config)
    if kind is None:
        names = config.get("architectures")
        return Fit(notes=(f"not checked against the model: transformers has no class {names}",))
    try:
        parsed = building.parsed_config(config)
        turned = building.turned_names(
            kind, parsed, [name.removesuffix(".weight") for name in packed]
        )
    except Exception as error:
        raise building.cannot_build(where, error) from error
    turned = {f"{name}.weight" for name in turned}
    kept: dict[str, str] = {}
    for _ in range(MAX_REHEARSALS):
        rehearsal = _Rehearsal(kind, parsed, tensors, packed - kept.keys(), turned, stored)
        refused = rehearsal.run(where)
        if not refused:
            return Fit(kept, tuple(sorted(turned - kept.keys())), rehearsal.notes)
        kept |= refused
    raise CheckpointError(
        f"{where}: after {MAX_REHEARSALS} attempts {some(refused)} cannot be in INT8",
        hint=f"--keep {next(iter(refused))} leaves it in 16 bits",
    )


class _Rehearsal:
    """One load on meta."""

    def __init__(
        self,
        kind: Any,
        config: Any,
        tensors: list[TensorInfo],
        packed: set[str],
        turned: set[str],
        stored: bool,
    ) -> None:
        self._kind, self._config, self._tensors = kind, config, tensors
        self._packed, self._turned, self._stored = packed, turned, stored
        self._refused: dict[str, str] = {}
        self.notes: tuple[str, ...] = ()

    def run(self, where: Path | str) -> dict[str, str]:
        """Tensor names that cannot be in INT8, with the reason; raises where the rest is unfit."""
        from halfweight.model import building, placement

        weights = {tensor.name: self._weight(tensor) for tensor in self._tensors}
        options = {"device_map": {"": "meta"}, "ignore_mismatched_sizes": True}
        try:
            model, found = building.build(self._kind, self._config, weights, **options)
        except Exception as error:
            if self._refused:
                return self._named(self._refused)
            raise building.cannot_build(where, error) from error
        _raise_if_unfit(where, found)
        unexpected = found["unexpected_keys"]
        self.notes = (f"not used by the model: {some(unexpected)}",) if unexpected else ()
        unused = {name.removesuffix(".weight") for name in self._packed}
        unused -= placement.packed_names(model)
        refused = dict.fromkeys(unused, "not used by the model")
        building.rehearse_saving(model)
        return self._named(refused | self._refused | placement.unplaceable(model))

    def _weight(self, tensor: TensorInfo) -> Any:
        import torch

        from halfweight.model.packed_weight import whole

        if tensor.name not in self._packed:
            return torch.empty(tensor.shape, device="meta")
        turned = tensor.name in self._turned
        rows, columns = tensor.shape
        if turned and not self._stored:
            rows, columns = columns, rows
        name, shape = tensor.name.removesuffix(".weight"), (rows, columns)
        return whole(name, shape, torch.float32, "meta", self._refused, turned)

    def _named(self, refused: Mapping[str, str]) -> dict[str, str]:
        return {f"{name}.weight": reason for name, reason in sorted(refused.items())}


def fit_aside(
    where: Path | str,
    config: Mapping[str, Any],
    tensors: Iterable[TensorInfo],
    recipe: Recipe,
) -> Fit:
    """`fit_on_meta`, in a process of its own unless transformers is imported already.

    The import is seconds of pure Python, whose memory a conversion would carry along.
    """
    tensors = list(tensors)
    if "transformers" in sys.modules:
        return fit_on_meta(where, config, tensors, recipe)
    question = {
        "where": str(where),
        "config": config,
        "tensors": [astuple(t) for t in tensors],
        "recipe": asdict(recipe),
    }
    done = subprocess.run(
        [sys.executable, "-m", "halfweight.model.loadability"],
        input=json.dumps(question),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # Ctrl-C is for us to handle
    )
    if done.returncode:
        return fit_on_meta(where, config, tensors, recipe)
    answer = json.loads(done.stdout.splitlines()[-1])
    if "error" in answer:
        raise CheckpointError(answer["error"], hint=answer["hint"])
    return Fit(answer["kept"], tuple(answer["turned"]), tuple(answer["notes"]))


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    tensors = [
        TensorInfo(name, dtype, tuple(shape), Scheme(*int8) if int8 else None)
        for name, dtype, shape, int8 in question["tensors"]
    ]
    asked = question["recipe"]
    scheme, keep = Scheme(**asked.pop("scheme")), tuple(asked.pop("keep"))
    recipe = Recipe(scheme, keep, **asked)
    try:
        return asdict(fit_on_meta(question["where"], question["config"], tensors, recipe))
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


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _part(name: str) -> str:
    return name.rpartition(".")[2]


if __name__ == "__main__":
    print(json.dumps(_answer(json.load(sys.stdin))))
