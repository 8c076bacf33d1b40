"""Memory of training LoRA adapters on INT8 weights and on 16-bit ones, beside each other.

    python benchmarks/training.py MODEL INT8

MODEL is a 16-bit folder, INT8 what `halfweight quantize MODEL INT8` made of it. Each row runs in a
process of its own, on the CPU: the model is loaded, every linear but the head gets an adapter of
rank 8, and `--steps` steps of AdamW see the same `--tokens` random tokens. `peak_bytes` is the
largest resident memory of the process over what it had before the model, so touched pages of mapped
weights count; what the INT8 kernels take once, whatever the model, is `kernel_bytes` and not in it.
`weight_bytes` are the frozen parameters. The ceiling is the weights themselves: no
training holds less. Times on a CPU say little, and are there to be compared within a run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from envelope import envelope, write_result

from halfweight.memory.devices import process_bytes


@dataclass(frozen=True)
class Row:
    """One run: what was trained on, and what it took."""

    weights: str
    checkpointing: bool
    tokens: int
    steps: int
    weight_bytes: int
    adapter_bytes: int
    kernel_bytes: int
    peak_bytes: int
    seconds_per_step: float
    first_loss: float
    last_loss: float


CASES = tuple((weights, kept) for kept in (False, True) for weights in ("bfloat16", "INT8"))
"""Weights and gradient checkpointing of each row."""


def train(folder: Path, weights: str, checkpointing: bool, tokens: int, steps: int) -> Row:
    """Run one row in this process, whose memory it measures."""
    import peft
    from transformers import AutoModelForCausalLM

    import halfweight

    loaders: dict[str, Any] = {"INT8": halfweight.load}
    load = loaders.get(weights, AutoModelForCausalLM.from_pretrained)
    kernel_bytes = _load_kernels() if weights == "INT8" else 0
    before = process_bytes("VmRSS")
    model = load(folder, dtype=torch.bfloat16)
    config = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    made = peft.get_peft_model(model, config).train()
    if checkpointing:
        made.enable_input_require_grads()
        made.gradient_checkpointing_enable()
    trained = [parameter for parameter in made.parameters() if parameter.requires_grad]
    frozen = [parameter for parameter in made.parameters() if not parameter.requires_grad]
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(made.named_parameters()):
        if "lora_A" in name:  # peft draws them in no fixed order
            parameter.data.uniform_(-0.05, 0.05, generator=generator)
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=generator)
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses, begin = [], time.perf_counter()
    for _ in range(steps):
        loss = made(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Row(
        weights,
        checkpointing,
        tokens,
        steps,
        sum(parameter.nbytes for parameter in frozen),
        sum(parameter.nbytes for parameter in trained),
        kernel_bytes,
        process_bytes("VmHWM") - before,
        (time.perf_counter() - begin) / steps,
        losses[0],
        losses[-1],
    )


def _load_kernels() -> int:
    """What the process grows by at the first products, of few tokens and of many."""
    from halfweight.kernels import operations
    from halfweight.quantization.numerics import quantize
    from halfweight.quantization.scheme import Scheme

    before = process_bytes("VmRSS")
    weight = quantize(torch.ones(64, 64), Scheme(64))
    parts = (weight.packed, weight.scales, weight.exponents)
    for tokens in (1, 64):
        operations.linear(torch.ones(tokens, 64, dtype=torch.bfloat16), *parts, None, "cpu")
    return process_bytes("VmRSS") - before


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table of docs/training.md."""
    lines = [
        "| weights | checkpointing | weights, MB | peak, MB | s a step | loss, first to last |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['weights']} | {'yes' if row['checkpointing'] else 'no'} "
            f"| {row['weight_bytes'] / 1e6:.0f} | {row['peak_bytes'] / 1e6:.0f} "
            f"| {row['seconds_per_step']:.1f} | {row['first_loss']:.3f} to {row['last_loss']:.3f} |"
        )
    return "\n".join(lines)


def _in_a_process(arguments: argparse.Namespace, weights: str, checkpointing: bool) -> Row:
    folder = arguments.int8 if weights == "INT8" else arguments.model
    words = [str(folder), "--row", weights, "--tokens", str(arguments.tokens)]
    words += ["--steps", str(arguments.steps), *(["--checkpointing"] if checkpointing else [])]
    done = subprocess.run(
        [sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True
    )
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("int8", type=Path, nargs="?")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = arguments.tokens, arguments.steps
    if arguments.row:
        row = train(arguments.model, arguments.row, arguments.checkpointing, *shape)
        print(json.dumps(asdict(row)))
        return
    if arguments.int8 is None:
        parser.error("give the INT8 folder too")
    rows: list[dict[str, Any]] = []
    for weights, checkpointing in CASES:
        rows.append(asdict(_in_a_process(arguments, weights, checkpointing)))
        ceiling = {f"{row['weights']}_weight_bytes": float(row["weight_bytes"]) for row in rows}
        write_result("training", envelope(torch.device("cpu"), ceiling), rows)
    print(markdown(rows))


if __name__ == "__main__":
    main()
