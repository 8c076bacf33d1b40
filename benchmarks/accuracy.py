"""What 8-bit formats cost in accuracy: one table of bits, weight error, perplexity and divergence.

    python benchmarks/texts.py unpacked texts
    python benchmarks/accuracy.py run MODEL texts/handbook.txt texts/austen.txt --work WORK
    halfweight quantize MODEL OUT --calibrate other-text.txt
    python benchmarks/accuracy.py run MODEL texts/... --work WORK --calibrated OUT
    python benchmarks/accuracy.py collect WORK
    python benchmarks/accuracy.py encoder ENCODER texts/handbook.txt
    python benchmarks/accuracy_table.py

MODEL is a folder of 16-bit or 32-bit safetensors. All arithmetic but that of the weights is
float32, and the weights are dequantized into the plain model, so a row differs from the next by its
weights alone. A run that was cut goes on where it was; with a larger --windows it extends what is
in WORK, and `collect` writes the result. The last line writes docs/accuracy.md.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from envelope import envelope, write_result
from torch import Tensor, nn
from variants import CALIBRATED, DEFAULT, Q8_0, TENSOR, VARIANTS, Stored, Variant

from halfweight.checkpoint import quantized_modules, read_headers
from halfweight.evaluation import SplitModel, compare, split
from halfweight.numerics import QuantizedTensor, dequantize
from halfweight.numerics_cpu import as_float32
from halfweight.scheme import Recipe, TensorInfo
from halfweight.scoring import Estimate, Sample, TokenScores, sample, summarize
from halfweight.shard import StoredTensor

CONTEXT = 1024
COMMAND = "python benchmarks/accuracy.py {}"
"""As recorded: without the paths of a machine."""
OUTLIER_FACTOR, OUTLIER_COLUMNS = 20.0, 4
PLANTED = (TENSOR, "bitsandbytes row", DEFAULT, Q8_0)
"""Variants that are also measured on the model with planted outliers."""
NORM_BEFORE = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
}
"""Linears of a Llama layer, and the norm whose output they read."""


@dataclass(frozen=True)
class WeightError:
    """Of all quantized weights of a model: bits each with scales, signal to noise in decibels."""

    num_weights: int
    bits_per_weight: float
    sqnr_db: float


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The weights that halfweight quantizes, by name; a tied head once."""
    parameters = dict(model.named_parameters())
    infos = [TensorInfo(name, "F32", tuple(p.shape)) for name, p in parameters.items()]
    decisions = Recipe().decide_all(infos)
    return {d.tensor.name: parameters[d.tensor.name].data for d in decisions if d.scheme}


@torch.no_grad()
def install(
    weights: dict[str, Tensor],
    source: dict[str, Tensor],
    store: Callable[[str, Tensor], Stored | None],
) -> WeightError:
    """Overwrite `weights` by what `store` makes of `source`."""
    num_bytes = num_weights = 0
    noise = signal = 0.0
    for name, original in source.items():
        stored = store(name, original)
        assert stored is not None, f"{name} cannot be stored"
        weights[name].copy_(stored.weight)
        num_bytes += stored.num_bytes
        num_weights += original.numel()
        noise += float((stored.weight - original).double().square().sum())
        signal += float(original.double().square().sum())
    sqnr = 10 * math.log10(signal / noise)
    return WeightError(num_weights, 8 * num_bytes / num_weights, sqnr)


def by(variant: Variant) -> Callable[[str, Tensor], Stored | None]:
    """A store that does not care for names."""
    return lambda _, weight: variant.store(weight)


def in_folder(folder: Path) -> Callable[[str, Tensor], Stored | None]:
    """A store that gives what is in a folder made by halfweight, one byte a scale and row."""
    modules = quantized_modules(read_headers(folder))

    def read(tensor: StoredTensor) -> np.ndarray:
        return np.fromfile(tensor.shard, np.uint8, tensor.info.num_bytes, offset=tensor.begin)

    def store(name: str, weight: Tensor) -> Stored:
        found = modules[name.removesuffix(".weight")]
        packed = torch.from_numpy(read(found.packed)).reshape(weight.shape)
        scales = as_float32(read(found.scale), found.scale.info.dtype)
        scales = torch.from_numpy(scales).reshape(found.scale.info.shape)
        decoded = dequantize(QuantizedTensor(packed, scales, None)).to(weight.device)
        return Stored(decoded, packed.numel() + scales.numel() + len(packed))

    return store


@torch.no_grad()
def plant_outliers(model: nn.Module) -> dict[str, Tensor]:
    """The weights with a few input columns x 20, each undone in the norm before it, in place.

    The function the model computes stays the same up to float32 rounding.
    """
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(0)
    columns: dict[str, Tensor] = {}
    for name, norm in [(n, p) for n, p in parameters.items() if n.endswith("layernorm.weight")]:
        columns[name] = torch.randperm(len(norm), generator=generator)[:OUTLIER_COLUMNS]
        norm[columns[name]] /= OUTLIER_FACTOR
    for name, weight in parameters.items():
        for linear, norm_name in NORM_BEFORE.items():
            if name.endswith(f".{linear}.weight"):
                layer = name.removesuffix(f".{linear}.weight")
                weight[:, columns[f"{layer}.{norm_name}.weight"]] *= OUTLIER_FACTOR
    return {name: weight.clone() for name, weight in weights_of(model).items()}


def load(path: Path, device: torch.device) -> nn.Module:
    """The model in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().to(device)


def samples(model: Path, texts: list[Path], num_windows: int) -> dict[str, Sample]:
    """The first `num_windows` windows of each text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    found = {}
    for text in texts:
        ids = torch.tensor(tokenizer(text.read_text())["input_ids"])
        found[text.stem] = sample(ids, context=CONTEXT, tokens=num_windows * CONTEXT)
    return found


def run(arguments: argparse.Namespace) -> None:
    """Extend the score files of the chosen variants in the work folder."""
    device = torch.device(arguments.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    arguments.work.mkdir(parents=True, exist_ok=True)
    runs = samples(arguments.model, arguments.texts, arguments.windows)
    reference = split(load(arguments.model, device))
    model = load(arguments.model, device)
    weights = weights_of(model)
    source = {name: weight.clone() for name, weight in weights.items()}
    parts = split(model)
    rest = (parts, reference, runs, arguments.work)
    for variant in chosen(arguments.only) if not arguments.calibrated else []:
        measure(variant.name, install(weights, source, by(variant)), *rest)
    if arguments.calibrated:
        measure(CALIBRATED, install(weights, source, in_folder(arguments.calibrated)), *rest)
    if arguments.planted:
        whole = load(arguments.model, device)
        source = plant_outliers(whole)
        weights, parts = weights_of(whole), split(whole)
        for name in PLANTED:
            error = install(weights, source, by(VARIANTS[name]))
            measure(f"planted {name}", error, parts, reference, runs, arguments.work)


def chosen(names: list[str]) -> list[Variant]:
    return [VARIANTS[name] for name in names] if names else list(VARIANTS.values())


def measure(
    key: str,
    error: WeightError,
    parts: SplitModel,
    reference: SplitModel,
    runs: dict[str, Sample],
    work: Path,
) -> None:
    """Extend the score files of the weights installed in `parts` to all of `runs`."""
    (work / f"{key}.json").write_text(json.dumps(asdict(error)))
    for text, part in runs.items():
        scores = compare(
            lambda: parts,
            lambda: reference,
            part,
            work / f"{text}.states",
            work / f"{key}.{text}.scores",
        )
        change = summarize(scores).comparison
        print(f"{key:32} {text:10} {len(scores):7} KL {change.kl_mean.value:.3e}", flush=True)


ENCODER_LINES, ENCODER_TOKENS = 64, 128


def encoder(arguments: argparse.Namespace) -> None:
    """Cosine between embeddings of a float32 encoder before and after, line by line of a text."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModel.from_pretrained(arguments.model, dtype=torch.float32).eval()
    lines = [line for line in arguments.text.read_text().splitlines() if len(line) > 80]
    inputs = tokenizer(
        lines[:ENCODER_LINES],
        padding=True,
        truncation=True,
        max_length=ENCODER_TOKENS,
        return_tensors="pt",
    )
    weights = weights_of(model)
    source = {name: weight.clone() for name, weight in weights.items()}
    expected = embeddings(model, inputs)
    entries = []
    for variant in VARIANTS.values():
        error = install(weights, source, by(variant))
        cosines = (embeddings(model, inputs) * expected).sum(-1)
        distances = {"mean": float((1 - cosines).mean()), "max": float((1 - cosines).max())}
        entries.append({"variant": variant.name, **asdict(error), "cosine_distance": distances})
        print(f"{variant.name:32} 1 - cosine {distances['mean']:.3e}", flush=True)
    facts = envelope(torch.device("cpu"), {}) | {"command": COMMAND.format("encoder MODEL TEXT")}
    write_result("accuracy_encoder", facts, entries)


@torch.inference_mode()
def embeddings(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Unit vectors [B, H] in float64: the mean of the last states of a line's tokens."""
    states = model(**inputs).last_hidden_state.double()
    mask = inputs["attention_mask"].unsqueeze(-1)
    return nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def collect(arguments: argparse.Namespace) -> None:
    """Write what all score files of a work folder come to.

    Each variant has figures over the tokens that all variants have, where their differences from
    the default are paired, and over all tokens that it has itself.
    """
    found = {path.stem: scores_of(path) for path in sorted(arguments.work.glob("*.json"))}
    found = {key: scores for key, scores in found.items() if scores}
    texts = sorted(set.intersection(*(set(scores) for scores in found.values())))
    common = {t: min(len(scores[t]) for scores in found.values()) for t in texts}
    entries = []
    for key, scores in found.items():
        part = np.concatenate([scores[t][: common[t]] for t in texts])
        default = np.concatenate([found[DEFAULT][t][: common[t]] for t in texts])
        entries.append(
            {
                "variant": key,
                **json.loads((arguments.work / f"{key}.json").read_text()),
                "common": asdict(summarize(part)),
                "kl_over_default": asdict(Estimate.of(part["kl"] - default["kl"])),
                "all": asdict(summarize(np.concatenate(list(scores.values())))),
                "texts": {t: asdict(summarize(scores[t])) for t in texts},
            }
        )
    facts = envelope(torch.device("cpu"), {"promised_perplexity_change": 0.01})
    write_result("accuracy", facts | {"command": COMMAND.format("run MODEL TEXTS")}, entries)


def scores_of(path: Path) -> dict[str, Any]:
    """Text -> TokenScores, of the variant whose weight error is at `path`."""
    files = [f for f in path.parent.glob("*.scores") if f.name.startswith(f"{path.stem}.")]
    scores = {f.name.split(".")[-2]: np.fromfile(f, TokenScores) for f in files}
    return {text: part for text, part in scores.items() if len(part)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run", help="perplexity and divergence of a language model")
    runs.add_argument("model", type=Path)
    runs.add_argument("texts", type=Path, nargs="+")
    runs.add_argument("--work", type=Path, default=Path("build/accuracy"))
    runs.add_argument("--windows", type=int, default=49, help="of 1024 tokens, from each text")
    runs.add_argument("--only", nargs="*", default=[], choices=list(VARIANTS))
    runs.add_argument("--planted", action="store_true", help="also with planted outliers")
    runs.add_argument("--calibrated", type=Path, help="only this folder, of `quantize --calibrate`")
    runs.add_argument("--device", default="cpu")
    runs.set_defaults(function=run)
    collecting = commands.add_parser("collect", help="write the result of a work folder")
    collecting.add_argument("work", type=Path)
    collecting.set_defaults(function=collect)
    encoders = commands.add_parser("encoder", help="embeddings of a float32 encoder")
    encoders.add_argument("model", type=Path)
    encoders.add_argument("text", type=Path)
    encoders.set_defaults(function=encoder)
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
