"""What 8-bit formats cost in accuracy: one table of bits, weight error, perplexity and divergence.

    python benchmarks/accuracy_source.py SmolLM2-135M-Instruct.Q4_1.gguf MODEL
    python benchmarks/texts.py unpacked texts
    python benchmarks/accuracy.py run MODEL texts/handbook.txt texts/austen.txt
    python benchmarks/accuracy.py run MODEL texts/handbook.txt texts/austen.txt --planted
    python benchmarks/accuracy.py spread MODEL texts/handbook.txt texts/austen.txt
    python benchmarks/accuracy.py collect
    python benchmarks/accuracy.py encoder ENCODER texts/handbook.txt
    python benchmarks/accuracy_table.py

All arithmetic but that of the weights is float32, and the weights are dequantized into the plain
model, so a row differs from the next by its weights alone. Rows are scored window by window beside
each other, with the reference's logits of the window in memory and shared. A run that was cut goes
on where it was; with a larger --windows it extends what is in --work, which also keeps each row's
weights (540 MB). `collect` writes the result, the last line docs/accuracy.md. On few cores, one
process a text with OMP_NUM_THREADS=1 is fastest.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from envelope import envelope, write_result
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from variants import (
    CALIBRATED,
    DEFAULT,
    FLOAT32_SAME_GROUP,
    Q8_0,
    SMALLEST_GROUP,
    TENSOR,
    VARIANTS,
    Stored,
    Variant,
)

from halfweight.checkpoint.headers import quantized_modules, read_headers
from halfweight.checkpoint.shard import StoredTensor
from halfweight.evaluation.comparison import SplitModel, load_model, split, tokenize
from halfweight.evaluation.scoring import Estimate, Sample, TokenScores, sample, score, summarize
from halfweight.quantization.float_bytes import as_float32
from halfweight.quantization.numerics import QuantizedTensor, dequantize
from halfweight.quantization.scheme import Recipe, TensorInfo

CONTEXT = 1024
COMMAND = "python benchmarks/accuracy.py {}"
"""As recorded: without the paths of a machine."""
OUTLIER_FACTOR, OUTLIER_COLUMNS = 20.0, 4
PLANTED = "planted "
"""Before the names of rows that were measured on the model with planted outliers."""
PLANTED_VARIANTS = (TENSOR, "bitsandbytes row", DEFAULT, Q8_0)
SPREAD = (DEFAULT, FLOAT32_SAME_GROUP, SMALLEST_GROUP, Q8_0)
"""Rows close to each other, measured on several sources: what is chance, what is the format."""
NOISE_BLOCK = 32
NORM_BEFORE = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
}
"""Linears of a Llama layer, and the norm whose output they read."""


Store = Callable[[str, Tensor], Stored | None]
"""What a format makes of a weight, by its name."""


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
    store: Store,
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


def by(variant: Variant) -> Store:
    """A store that does not care for names."""
    return lambda _, weight: variant.store(weight)


def in_folder(folder: Path) -> Store:
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
def plant_outliers(
    model: nn.Module, factor: float = OUTLIER_FACTOR, num_columns: int = OUTLIER_COLUMNS
) -> None:
    """Multiply a few input columns by `factor`, in place, and undo each in the norm before it.

    The columns are drawn at random for each norm. A factor above 1 plants outliers among weights,
    below 1 among activations. The function the model computes stays the same up to float32
    rounding.
    """
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(0)
    columns: dict[str, Tensor] = {}
    for name, norm in [(n, p) for n, p in parameters.items() if n.endswith("layernorm.weight")]:
        columns[name] = torch.randperm(len(norm), generator=generator)[:num_columns]
        norm[columns[name]] /= factor
    for name, weight in parameters.items():
        for linear, norm_name in NORM_BEFORE.items():
            if name.endswith(f".{linear}.weight"):
                layer = name.removesuffix(f".{linear}.weight")
                weight[:, columns[f"{layer}.{norm_name}.weight"]] *= factor


def samples(model: Path, texts: list[Path], num_windows: int) -> dict[str, Sample]:
    """The first `num_windows` windows of each text."""
    found = {text.stem: tokenize(model, text) for text in texts}
    return {
        name: sample(text, context=CONTEXT, tokens=num_windows * (CONTEXT - len(text.start)))
        for name, text in found.items()
    }


class Runnable:
    """A model in two parts whose quantized weights can be exchanged without a copy."""

    def __init__(self, model: nn.Module) -> None:
        self.source = weights_of(model)
        self._parameters = {name: model.get_parameter(name) for name in self.source}
        self._parts = split(model)

    def use(self, weights: dict[str, Tensor]) -> SplitModel:
        """The model with these weights, until the next call."""
        for name, parameter in self._parameters.items():
            parameter.data = weights[name]
        return self._parts


class Usable(Protocol):
    """A model that runs with the weights it is given."""

    def use(self, weights: dict[str, Tensor]) -> SplitModel:
        """The model with these weights, until the next call."""


@dataclass(frozen=True)
class Row:
    """A row of the table: a model, and what a format makes of its weights."""

    name: str
    model: Usable
    weights: dict[str, Tensor]

    @classmethod
    def stored(cls, name: str, model: Runnable, store: Store, work: Path) -> Row:
        """Quantize, or map what an earlier run left in `work`."""
        path = work / f"{name}.safetensors"
        if not path.exists():
            weights = {key: torch.empty_like(weight) for key, weight in model.source.items()}
            error = install(weights, model.source, store)
            (work / f"{name}.json").write_text(json.dumps(asdict(error)))
            unfinished = path.with_suffix(f".{os.getpid()}")
            save_file(weights, unfinished)
            unfinished.rename(path)
        return cls(name, model, load_file(path))


def run(arguments: argparse.Namespace) -> None:
    """Extend the score files of the chosen rows in the work folder."""
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    runs = samples(arguments.model, arguments.texts, arguments.windows)
    whole = load_model(arguments.model, "cpu", torch.float32)
    planted = copy.deepcopy(whole) if arguments.planted else None
    model = Runnable(whole)
    if planted is not None:
        plant_outliers(planted)
        model_planted = Runnable(planted)
        rows = [
            Row.stored(PLANTED + name, model_planted, by(VARIANTS[name]), work)
            for name in PLANTED_VARIANTS
        ]
    elif arguments.calibrated:
        rows = [
            Row.stored(f"{CALIBRATED} {name}", model, in_folder(Path(folder)), work)
            for name, _, folder in (pair.partition("=") for pair in arguments.calibrated)
        ]
    else:
        names = arguments.only or VARIANTS
        rows = [Row.stored(name, model, by(VARIANTS[name]), work) for name in names]
    for text, part in runs.items():
        for number, window in enumerate(part.windows):
            measure(replace(part, windows=(window,)), number, model, rows, work, text)


def fill_low_bits(weights: dict[str, Tensor], seed: int) -> None:
    """Add noise of an 8-bit step's width, absmax / 127 of each 32 of a row, to weights in place."""
    generator = torch.Generator().manual_seed(seed)
    for weight in weights.values():
        blocks = weight.view(-1, NOISE_BLOCK)
        steps = blocks.abs().amax(dim=1, keepdim=True) / 127
        blocks += (torch.rand(blocks.shape, generator=generator) - 0.5) * steps


def spread(arguments: argparse.Namespace) -> None:
    """Some rows on sources that differ by noise no larger than an 8-bit step."""
    runs = samples(arguments.model, arguments.texts, arguments.windows)
    entries = []
    for seed in range(1, arguments.seeds + 1):
        work: Path = arguments.work / f"seed-{seed}"
        work.mkdir(parents=True, exist_ok=True)
        whole = load_model(arguments.model, "cpu", torch.float32)
        fill_low_bits(weights_of(whole), seed)
        model = Runnable(whole)
        rows = [Row.stored(name, model, by(VARIANTS[name]), work) for name in SPREAD]
        for text, part in runs.items():
            for number, window in enumerate(part.windows):
                measure(replace(part, windows=(window,)), number, model, rows, work, text)
        for row in rows:
            scores = np.concatenate(list(scores_of(work / f"{row.name}.json").values()))
            found = asdict(summarize(scores))
            entries.append({"seed": seed, "variant": row.name, "comparison": found})
            (work / f"{row.name}.safetensors").unlink()
        facts = envelope(torch.device("cpu"), {})
        facts |= {"command": COMMAND.format("spread MODEL TEXTS")}
        write_result("accuracy_spread", facts, entries)


@torch.inference_mode()
def measure(
    part: Sample, number: int, reference: Runnable, rows: list[Row], work: Path, text: str
) -> None:
    """Score one window for every row that lacks it; all share the reference's logits."""
    files = {row.name: work / f"{row.name}.{text}.scores" for row in rows}
    begin = number * (CONTEXT - len(part.start) - 1) * TokenScores.itemsize
    end = begin + part.num_scored * TokenScores.itemsize
    pending = [row for row in rows if size_of(files[row.name]) < end]
    if not pending:
        return
    started = time.monotonic()
    (batch,) = part.batches()
    parts = reference.use(reference.source)
    logits = parts.head(part.scored_states(parts.body, batch))
    shared = (torch.arange(len(logits)), lambda tokens: logits[tokens])
    for row in pending:
        parts = row.model.use(row.weights)
        states = part.scored_states(parts.body, batch)
        scores = score(states, parts.head, part.targets(batch), shared)
        with open(files[row.name], "ab") as file:
            file.truncate(begin)
            file.write(scores.data)
    seconds = time.monotonic() - started
    print(f"{text} window {number}: {len(pending)} rows in {seconds:.1f} s", flush=True)


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


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
    """Write what the score files of a work folder come to: per row, and per row and text.

    Differences between rows are paired, over the tokens that both have.
    """
    found = {path.stem: scores_of(path) for path in sorted(arguments.work.glob("*.json"))}
    entries = [
        {
            "variant": key,
            **json.loads((arguments.work / f"{key}.json").read_text()),
            "comparison": asdict(summarize(np.concatenate(list(scores.values())))),
            "texts": {text: asdict(summarize(part)) for text, part in scores.items()},
            "kl_over": {
                other: asdict(kl_difference(scores, found[other])) for other in (DEFAULT, Q8_0)
            },
            "kl_share": {
                text: asdict(kl_share(part, found[DEFAULT][text])) for text, part in scores.items()
            },
        }
        for key, scores in found.items()
        if scores
    ]
    facts = envelope(torch.device("cpu"), {"promised_perplexity_change": 0.01})
    write_result("accuracy", facts | {"command": COMMAND.format("run MODEL TEXTS")}, entries)


def kl_difference(one: dict[str, Any], other: dict[str, Any]) -> Estimate:
    """How much more divergence the first has, over the tokens that both scored."""
    parts = []
    for text in one.keys() & other.keys():
        count = min(len(one[text]), len(other[text]))
        parts.append(one[text]["kl"][:count] - other[text]["kl"][:count])
    return Estimate.of(np.concatenate(parts))


def kl_share(one: Any, default: Any) -> Estimate:
    """The first's divergence over the default's, on the tokens that both scored."""
    count = min(len(one), len(default))
    kl, others = one["kl"][:count], default["kl"][:count]
    share = kl.mean() / others.mean()
    return Estimate(float(share), Estimate.of((kl - share * others) / others.mean()).error)


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
    runs.add_argument(
        "--calibrated", nargs="*", default=[], metavar="TEXT=FOLDER", help="of `--calibrate TEXT`"
    )
    runs.set_defaults(function=run)
    spreads = commands.add_parser("spread", help="close rows, on several sources")
    spreads.add_argument("model", type=Path)
    spreads.add_argument("texts", type=Path, nargs="+")
    spreads.add_argument("--work", type=Path, default=Path("build/accuracy"))
    spreads.add_argument("--windows", type=int, default=1, help="of 1024 tokens, from each text")
    spreads.add_argument("--seeds", type=int, default=6)
    spreads.set_defaults(function=spread)
    collecting = commands.add_parser("collect", help="write the result of a work folder")
    collecting.add_argument("work", type=Path, nargs="?", default=Path("build/accuracy"))
    collecting.set_defaults(function=collect)
    encoders = commands.add_parser("encoder", help="embeddings of a float32 encoder")
    encoders.add_argument("model", type=Path)
    encoders.add_argument("text", type=Path)
    encoders.set_defaults(function=encoder)
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
