"""Is a tiny model in INT8 the same model? Equal to plain transformers with the stored weights.

A model goes the user's way: saved in 16 bits, quantized, verified, loaded by us and by
from_pretrained, its ties worked out again, saved again. What it must equal is not the 16-bit model
but transformers' own, loaded from a file whose weights are those that INT8 stands for: every weight
of every module, and the logits, to float tolerance.
"""

from __future__ import annotations

import inspect
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config
from torch import Tensor, nn

import halfweight
from halfweight.checkpoint.headers import quantized_modules, read_headers
from halfweight.conversion.verification import verify
from halfweight.errors import HalfweightError
from halfweight.model.modules import QuantizedWeight
from halfweight.quantization.numerics import QuantizedTensor, dequantize
from halfweight.quantization.scheme import Recipe

TOLERANCE = 2e-4
"""Of the largest logit: float32 sums in another order."""
NUM_TOKENS = 12
MOST_PARAMETERS = 150e6


@dataclass(frozen=True)
class Outcome:
    """What came of one model: right, refused (before conversion), crash, wrong or not run."""

    outcome: str
    note: str = ""


class NotRun(Exception):
    """transformers itself does not build or run the tiny model: says nothing about INT8."""


def outcome_of(model_type: str, class_name: str, folder: Path) -> Outcome:
    """Take one architecture all the way, in an empty folder."""
    try:
        save_source(model_type, class_name, folder / "source")
    except Exception as error:
        return Outcome("not run", f"no tiny model: {_line(error)}")
    try:
        return check_folder(folder)
    except NotRun as error:
        return Outcome("not run", str(error))


def save_source(model_type: str, class_name: str, folder: Path) -> None:
    """A random model in bfloat16, its norms and biases away from 1 and 0."""
    kind, config = getattr(transformers, class_name), tiny_config(model_type, class_name)
    with torch.device("meta"):
        number = sum(parameter.numel() for parameter in kind(config).parameters())
    if number > MOST_PARAMETERS:
        raise ValueError(f"{number / 1e6:.0f} million parameters are not tiny")
    torch.manual_seed(0)
    model = kind(config)
    randomize(model)
    model.to(torch.bfloat16).save_pretrained(folder)


def randomize(model: nn.Module) -> None:
    """Weights whose loss would show: no zeros, ones or equal rows."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 2:
            parameter.data = noise / parameter.shape[1] ** 0.5
        else:
            parameter.data = parameter.data.nan_to_num(0, 0, 0).clamp(-4, 4) + 0.05 * noise


def check_folder(folder: Path, keep: tuple[str, ...] = ()) -> Outcome:
    """Quantize folder/source and compare what is loaded with what is stored."""
    source, int8 = folder / "source", folder / "int8"
    try:
        report = halfweight.quantize(source, int8, Recipe(keep=keep), jobs=1)
    except HalfweightError as error:
        if "'*experts*'" in error.hint and not keep:
            found = check_folder(folder, keep=("*experts*",))
            return Outcome(found.outcome, f"with --keep '*experts*'; {found.note}".rstrip("; "))
        return Outcome("refused", f"{error}; {error.hint}".replace(f"{folder}/", ""))
    except Exception as error:
        return Outcome("crash", f"quantize: {_line(error)}")
    stage = "verify"
    try:
        if problems := verify(int8).problems:
            return Outcome("crash", f"verify: {problems[0]}")
        stage = "load"
        model = halfweight.load(int8, dtype=torch.float32)
        reference = reference_model(type(model), source, int8, folder / "plain")
        if fault := unequal_weights(model, reference):
            return Outcome("wrong", fault)
        stage = "forward"
        if fault := unequal_logits(model, reference):
            return Outcome("wrong", fault)
        stage = "ties again"
        model.tie_weights()
        if fault := unequal_weights(model, reference):
            return Outcome("wrong", f"ties again: {fault}")
        stage = "from_pretrained"
        by_transformers = type(model).from_pretrained(int8, dtype=torch.float32)
        if fault := unequal_weights(by_transformers, reference):
            return Outcome("wrong", f"from_pretrained: {fault}")
        stage = "save"
        model.save_pretrained(folder / "again")
        if fault := other_tensors(int8, folder / "again"):
            return Outcome("wrong", fault)
    except NotRun:
        raise
    except Exception as error:
        return Outcome("crash", f"{stage}: {_line(error)}")
    kept = [note for note in report.notes if "group size" not in note and "groups one" not in note]
    return Outcome("right", "; ".join(kept)[:300])


def reference_model(model_class: Any, source: Path, int8: Path, plain: Path) -> Any:
    """transformers' own model of a float32 folder with the weights that the INT8 folder stores."""
    before = {
        name: t for shard in source.glob("*.safetensors") for name, t in load_file(shard).items()
    }
    stored = {
        name: t for shard in int8.glob("*.safetensors") for name, t in load_file(shard).items()
    }
    tensors = {n: t for n, t in stored.items() if n in before}
    for module in quantized_modules(read_headers(int8)):
        packed = stored[f"{module}.weight_packed"].view(torch.uint8)
        weight = dequantize(QuantizedTensor(packed, stored[f"{module}.weight_scale"].float(), None))
        original = before[f"{module}.weight"].float()
        tensors[f"{module}.weight"] = _as_stored(weight, original)
    plain.mkdir()
    tensors = {
        n: (t.float() if t.is_floating_point() else t).contiguous() for n, t in tensors.items()
    }
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    (plain / "config.json").write_bytes((source / "config.json").read_bytes())
    try:
        return model_class.from_pretrained(plain, dtype=torch.float32).eval()
    except Exception as error:
        raise NotRun(f"transformers does not load it: {_line(error)}") from error


def _as_stored(weight: Tensor, original: Tensor) -> Tensor:
    """The weight in the orientation of the source: Conv1D is quantized transposed."""
    if weight.shape != original.shape:
        return weight.t()
    if weight.shape[0] == weight.shape[1]:
        straight, turned = ((w - original).norm() for w in (weight, weight.t()))
        return weight if straight <= turned else weight.t()
    return weight


def unequal_weights(model: nn.Module, reference: nn.Module) -> str:
    """The first weight of `model` that is not the reference's, or nothing."""
    expected = dict(reference.state_dict())
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedWeight) or f"{name}.weight" not in expected:
            continue
        weight = dequantize(module.quantized)
        wanted = expected.pop(f"{name}.weight")
        if isinstance(reference.get_submodule(name), transformers.pytorch_utils.Conv1D):
            wanted = wanted.t()
        if not torch.equal(weight, wanted):
            return f"weight of {name} differs"
    found = model.state_dict()
    for name, wanted in expected.items():
        if name in found and not torch.equal(found[name].float(), wanted.float()):
            return f"{name} differs"
    return ""


def unequal_logits(model: Any, reference: Any) -> str:
    """Where the outputs for the same inputs differ, or nothing."""
    inputs = model_inputs(reference)
    with torch.no_grad():
        torch.manual_seed(0)
        try:
            wanted = _logits(reference(**inputs))
        except Exception as error:
            raise NotRun(
                f"weights are right; transformers does not run it: {_line(error)}"
            ) from error
        torch.manual_seed(0)
        found = _logits(model(**inputs))
    if not wanted.isfinite().all():
        raise NotRun("transformers' own logits are not finite")
    off = (found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9)
    return "" if off <= TOLERANCE else f"logits off by {off:.1e} of the largest"


def model_inputs(model: Any) -> dict[str, Any]:
    """Token ids, and what else the forward of this class cannot do without."""
    names = inspect.signature(model.forward).parameters
    ids = torch.arange(5, 5 + NUM_TOKENS).view(1, -1)
    inputs: dict[str, Any] = {}
    if "musicgen" in model.config.model_type:
        ids = ids.repeat(model.config.num_codebooks, 1)
    if "input_ids" in names:
        inputs["input_ids"] = ids
    for name in ("decoder_input_ids", "labels_ids"):
        if name in names:
            inputs[name] = ids[:, :6]
    if "input_ids" not in names or model.main_input_name != "input_ids":
        inputs |= _other_inputs(model, names)
    return inputs


def _other_inputs(model: Any, names: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    config = model.config
    if "pixel_values" in names:
        size = getattr(getattr(config, "vision_config", config), "image_size", 32)
        return {"pixel_values": torch.randn(1, 3, size, size)}
    if "input_features" in names:
        bins = getattr(config, "num_mel_bins", None) or getattr(
            config, "input_feat_per_channel", 80
        )
        frames = 2 * getattr(config, "max_source_positions", 100)
        return {"input_features": torch.randn(1, bins, frames)}
    if "input_values" in names:
        return {"input_values": torch.randn(1, 16000)}
    return {}


def _logits(output: Any) -> Tensor:
    for name in ("logits", "last_hidden_state", "image_embeds"):
        if isinstance(getattr(output, name, None), Tensor):
            return output[name].float()
    return next(v for v in output.values() if isinstance(v, Tensor)).float()


def other_tensors(folder: Path, again: Path) -> str:
    """The first name that only one of two folders has, or nothing."""
    names = [{t.name for t in read_headers(path).tensors} for path in (folder, again)]
    differing = sorted(names[0] ^ names[1])
    return f"saved again, {differing[0]} is in one of the two folders only" if differing else ""


def _line(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{where}"
