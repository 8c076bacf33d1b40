"""Time to the first token of a prompt whose beginning was read before: SmolLM2-135M on this CPU.

    python benchmarks/prefixes.py [--work FOLDER] [--rounds 7]

In each round a text of 2,000 tokens that nobody has read gets a question, then another one; then
a chat gets a second turn after an answer of 64 tokens. Medians of the times from the call to the
first piece, and how many tokens of the prompt were in the cache.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from engine_cpu import load
from envelope import envelope, write_result

from halfweight.engine.engine import Engine
from halfweight.kernels.timing import read_bandwidth

SHARED, QUESTION, ANSWER = 2000, 10, 64
CONTEXT = 2560


def main() -> None:
    """Measure and write results/prefixes_cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder that keeps the converted model")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(load(options.work or Path(folder)), options.rounds)
    cpu = torch.device("cpu")
    about = envelope(cpu, {"read_gb_per_second": read_bandwidth(cpu) / 1e9})
    print(f"wrote {write_result('prefixes_cpu', about, rows)}")


def measure(model: Any, rounds: int) -> list[dict[str, Any]]:
    """A row for each kind of prompt."""
    samples: dict[str, list[tuple[float, int, int]]] = {}
    limits = {"max_context": CONTEXT, "max_sequences": 2, "cache_tokens": 2 * CONTEXT}
    with Engine(model, **limits) as engine:
        for number in range(rounds + 1):
            for name, sample in _round(engine, number).items():
                samples.setdefault(name, []).append(sample)
    rows = []
    first = median(seconds for seconds, *_ in samples["first"][1:])
    for name, found in samples.items():
        seconds = median(sample[0] for sample in found[1:])
        _, num_prompt, num_shared = found[-1]
        rows.append(
            {
                "prompt": name,
                "prompt_tokens": num_prompt,
                "shared_tokens": num_shared,
                "first_token_ms": 1e3 * seconds,
                "part_of_the_first": seconds / first,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def _round(engine: Engine, number: int) -> dict[str, tuple[float, int, int]]:
    """Seconds to the first token, tokens of the prompt and those shared."""
    text = [(1000 + 37 * number + 11 * i) % 40_000 for i in range(SHARED)]
    first, second = ([*text, *range(100 + i, 100 + i + QUESTION)] for i in (0, 50))
    found = {"first": _ask(engine, first)[0], "second question": _ask(engine, second)[0]}
    _, answer = _ask(engine, first, ANSWER)
    found["second turn"] = _ask(engine, [*first, *answer, *range(200, 200 + QUESTION)])[0]
    return found


def _ask(
    engine: Engine, prompt: list[int], new_tokens: int = 1
) -> tuple[tuple[float, int, int], list[int]]:
    begin = time.perf_counter()
    request = engine.request(prompt, max_new_tokens=new_tokens, stop_tokens=(), temperature=0.0)
    pieces = iter(engine.open(request))
    first = next(pieces)
    seconds = time.perf_counter() - begin
    tokens = [*first.tokens, *(token for piece in pieces for token in piece.tokens)]
    return (seconds, len(prompt), first.num_shared_tokens), tokens


if __name__ == "__main__":
    main()
