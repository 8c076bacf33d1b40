"""What rounding activations to int8 costs in accuracy, by how many columns share a step.

    python benchmarks/accuracy_source.py SmolLM2-135M-Instruct.Q4_1.gguf MODEL
    python benchmarks/texts.py unpacked texts
    python benchmarks/activations.py MODEL texts/handbook.txt texts/austen.txt
    python benchmarks/accuracy_table.py

The model and its rows are those of accuracy.py: float32, with the weights of the default format
dequantized into it. A row differs from the next by the inputs of its linears alone, which are
rounded as `activations="int8"` rounds them, with a step for each token and block of columns. Every
row is measured on the model as it is, and on one with an outlier planted in the output of each
norm. A run that was cut goes on where it was; --work keeps scores and weights (1.1 GB). On few
cores, one process a text with OMP_NUM_THREADS=1 and then one with both texts is fastest.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accuracy import (
    OUTLIER_FACTOR,
    PLANTED,
    Row,
    Runnable,
    by,
    kl_difference,
    measure,
    plant_outliers,
    samples,
    weights_of,
)
from envelope import RESULTS, envelope, write_result
from torch import Tensor, nn
from variants import DEFAULT, VARIANTS

from halfweight.evaluation.comparison import SplitModel, load_model
from halfweight.evaluation.scoring import Sample, TokenScores, summarize

COMMAND = "python benchmarks/activations.py MODEL TEXTS"
"""As recorded: without the paths of a machine."""
STEPS = 127
"""Of int8, from zero to the largest magnitude of a block."""
EXACT: Literal["exact"] = "exact"
ROW: Literal["row"] = "row"
Block = int | Literal["exact", "row"]
"""Columns that share a step: a number of them, all, or no rounding at all."""
BLOCKS: tuple[Block, ...] = (EXACT, 64, 128, 256, 512, ROW)
NUM_PLANTED = 1
"""Outlier columns that each norm's output gets."""


def round_blocks(x: Tensor, columns: int) -> Tensor:
    """What is left of x [..., K] as int8: a step of absmax / 127 a token and `columns` of K.

    Values are rounded to the nearest step, halves to the even one. The last block may be shorter.
    """
    blocks = nn.functional.pad(x, (0, -x.shape[-1] % columns)).unflatten(-1, (-1, columns))
    steps = blocks.abs().amax(dim=-1, keepdim=True) / STEPS
    rounded = torch.where(steps > 0, blocks / steps, 0).round_().mul_(steps)
    return rounded.flatten(-2)[..., : x.shape[-1]]


def quantized_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears whose inputs `activations="int8"` rounds, by name: a tied head is not among them.

    Its weight is the embedding's, and halfweight.load leaves its input exact.
    """
    names = [name.removesuffix(".weight") for name in weights_of(model)]
    modules = {name: model.get_submodule(name) for name in names}
    return {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}


@contextmanager
def rounded_inputs(linears: dict[str, nn.Linear], block: Block) -> Iterator[None]:
    """Meanwhile, the linears multiply with inputs [..., K] that were rounded to int8."""
    if block == EXACT:
        yield
        return

    def rounded(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = inputs
        return (round_blocks(x, x.shape[-1] if block == ROW else block),)

    hooks = [linear.register_forward_pre_hook(rounded) for linear in linears.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Rounded:
    """A model whose weights can be exchanged, and how the inputs of its linears are rounded."""

    model: Runnable
    linears: dict[str, nn.Linear]
    block: Block

    def use(self, weights: dict[str, Tensor]) -> SplitModel:
        """The model with these weights, until the next call; it rounds while it runs."""
        parts = self.model.use(weights)

        def body(ids: Tensor) -> Tensor:
            with rounded_inputs(self.linears, self.block):
                return parts.body(ids)

        def head(states: Tensor) -> Tensor:
            with rounded_inputs(self.linears, self.block):
                return parts.head(states)

        return SplitModel(body, head)


def row_name(planted: bool, block: Block) -> str:
    """'64', 'planted row'."""
    return f"{PLANTED if planted else ''}{block}"


def rows_of(model: nn.Module, planted: bool, work: Path) -> tuple[Runnable, list[Row]]:
    """The model in parts, and its rows: one for each of BLOCKS, with the same INT8 weights."""
    if planted:
        plant_outliers(model, 1 / OUTLIER_FACTOR, NUM_PLANTED)
    linears = quantized_linears(model)
    parts = Runnable(model)
    stored = Row.stored(row_name(planted, EXACT), parts, by(VARIANTS[DEFAULT]), work)
    return parts, [
        Row(row_name(planted, block), Rounded(parts, linears, block), stored.weights)
        for block in BLOCKS
    ]


@torch.inference_mode()
def outliers(part: Sample, row: Row) -> dict[str, float]:
    """How far the largest input of a row's linears stands out, by their kind ('q_proj').

    Its magnitude over the root mean square of the token's other columns, the mean over tokens and
    layers, in the first window.
    """
    assert isinstance(row.model, Rounded)
    found: dict[str, list[float]] = {}

    def recorder(kind: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def record(_: nn.Module, inputs: tuple[Tensor]) -> None:
            found.setdefault(kind, []).append(standing_out(inputs[0]))

        return record

    hooks = [
        linear.register_forward_pre_hook(recorder(name.rpartition(".")[2]))
        for name, linear in row.model.linears.items()
    ]
    row.model.use(row.weights).body(part.inputs(part.windows[:1]))
    for hook in hooks:
        hook.remove()
    return {kind: statistics.fmean(values) for kind, values in found.items()}


def standing_out(x: Tensor) -> float:
    """The largest magnitude of x [..., K] over the root mean square of the rest, in the mean."""
    squares = x.square()
    largest = squares.amax(dim=-1)
    others = (squares.sum(dim=-1) - largest) / (x.shape[-1] - 1)
    return float((largest / others).sqrt().mean())


def scores_of(row: Row, runs: dict[str, Sample], work: Path) -> dict[str, Any]:
    """Text -> TokenScores of a row, of the windows asked for."""
    return {
        text: np.fromfile(work / f"{row.name}.{text}.scores", TokenScores, part.num_scored)
        for text, part in runs.items()
    }


def entries_of(rows: list[Row], runs: dict[str, Sample], work: Path) -> list[dict[str, Any]]:
    """The figures of a model's rows; `kl_over_exact` is paired, over the same tokens."""
    exact = scores_of(rows[0], runs, work)
    entries = []
    for row, block in zip(rows, BLOCKS, strict=True):
        scores = scores_of(row, runs, work)
        entries.append(
            {
                "activations": block,
                "planted": row.name.startswith(PLANTED),
                "comparison": asdict(summarize(np.concatenate(list(scores.values())))),
                "texts": {text: asdict(summarize(part)) for text, part in scores.items()},
                "kl_over_exact": asdict(kl_difference(scores, exact)),
            }
        )
    return entries


def run(arguments: argparse.Namespace) -> None:
    """Measure every row on every window, and write what the scores come to."""
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    runs = samples(arguments.model, arguments.texts, arguments.windows)
    whole = load_model(arguments.model, "cpu", torch.float32)
    width = whole.config.hidden_size
    _, planted = rows_of(copy.deepcopy(whole), True, work)
    reference, plain = rows_of(whole, False, work)
    for text, part in runs.items():
        for number, window in enumerate(part.windows):
            one = replace(part, windows=(window,))
            measure(one, number, reference, [*plain, *planted], work, text)
    entries = [*entries_of(plain, runs, work), *entries_of(planted, runs, work)]
    first = next(iter(runs.values()))
    facts = envelope(torch.device("cpu"), {}) | {
        "command": COMMAND,
        "width": width,
        "outliers": {"source": outliers(first, plain[0]), "planted": outliers(first, planted[0])},
    }
    write_result("activations", facts, entries, out=arguments.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--work", type=Path, default=Path("build/activations"))
    parser.add_argument("--windows", type=int, default=8, help="of 1024 tokens, from each text")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
