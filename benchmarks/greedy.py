"""Does the GPU write what the CPU writes? Greedy text of one INT8 model on both, token by token.

    python benchmarks/greedy.py MODEL [--tokens 64] [--dtypes float32 float16]

MODEL is a folder made by `halfweight quantize`, with a tokenizer. Twenty prompts are continued on
the CPU and on the GPU with the same activation dtype. Where they part, the CPU's two best logits at
that token are compared: closer than 0.001 is a near-tie, listed; anything else is a difference.
Beside the gap stands the spacing of the dtype's numbers at the best logit: 0.0156 for a logit of 16
in float16, whose gaps are multiples of that.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from envelope import RESULTS, envelope, write_result
from transformers import AutoTokenizer

from halfweight.engine.engine import Engine
from halfweight.engine.request import Sampling
from halfweight.model.loading import load

NEAR_TIE = 1e-3
DTYPES = ("float32", "bfloat16", "float16")
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, there was a",
    "The three primary colors are",
    "In 1969, astronauts",
    "A prime number is a number that",
    "The largest planet in our solar system is",
    "To make a cup of tea, first",
    "Photosynthesis is the process by which",
    "The opposite of hot is",
    "def fibonacci(n):",
    "Dear Sir or Madam,",
    "The best way to learn a new language is",
    "Shakespeare wrote many plays, including",
    "The human heart has",
    "If it rains tomorrow, we will",
    "Electricity flows through",
    "My favorite book is",
    "The Great Wall of China was built",
    "Two plus two equals",
)


@dataclass(frozen=True)
class Parting:
    """Where both texts of a prompt part, how far apart the CPU's two best logits are there, and how
    far the number after the best is from it.
    """

    prompt: str
    position: int
    gap: float
    spacing: float

    @property
    def is_near_tie(self) -> bool:
        """Whether rounding alone can have decided."""
        return self.gap < NEAR_TIE


def parting(model: Any, prompt: str, ids: list[int], ours: Any, other: Any) -> Parting | None:
    """None if both token sequences are equal; `model` is the one that wrote `ours`."""
    if ours == other:
        return None
    pairs = zip(ours, other, strict=False)
    shortest = min(len(ours), len(other))
    position = next((i for i, (a, b) in enumerate(pairs) if a != b), shortest)
    with torch.inference_mode():
        text = torch.tensor([[*ids, *ours[:position]]])
        best = model(text, logits_to_keep=1).logits[0, -1].float()
    first, second = best.topk(2).values.tolist()
    spacing = math.ldexp(torch.finfo(model.dtype).eps, math.frexp(first)[1] - 1)
    return Parting(prompt, position, first - second, spacing)


def written(model: Any, prompts: list[list[int]], num_tokens: int) -> list[tuple[int, ...]]:
    """What a model's engine writes after each prompt alone."""
    longest = max(map(len, prompts)) + num_tokens
    with Engine(model, max_sequences=1, max_context=longest) as engine:
        found = engine.generate(prompts, max_new_tokens=num_tokens, sampling=Sampling())
    return [answer.tokens for answer in found]


def compare(options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """All prompts with activations of `dtype`: how many are equal, and where the others part."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    here, there = (
        load(options.model, device=name, dtype=getattr(torch, dtype))
        for name in ("cpu", options.device)
    )
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS[: options.prompts]]
    texts = [written(model, prompts, options.tokens) for model in (here, there)]
    partings = []
    for prompt, ids, ours, other in zip(PROMPTS, prompts, *texts, strict=False):
        found = parting(here, prompt, ids, ours, other)
        if found is not None:
            partings.append(found)
            print(f"{dtype}: {found}", flush=True)
    different = sum(not p.is_near_tie for p in partings)
    equal = options.prompts - len(partings)
    print(f"{dtype}: {equal} equal, {len(partings) - different} near-ties, {different} different")
    listed = [asdict(p) | {"near_tie": p.is_near_tie} for p in partings]
    return {"dtype": dtype, "equal": equal, "different": different, "partings": listed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "float16"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="only the first so many")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    facts = envelope(torch.device(options.device), {})
    heading = {"tokens": options.tokens, "near_tie_below": NEAR_TIE, "prompts": options.prompts}
    found = []
    for dtype in options.dtypes:
        found.append(compare(options, dtype))
        write_result("greedy", facts, {**heading, "dtypes": found}, out=options.out)


if __name__ == "__main__":
    main()
