"""Decoding and time to the first token: 16 bits, INT8, INT8 activations and torchao.

    python benchmarks/generate.py [--batches 1 16 64] [--steps graph compiled]
    python benchmarks/generate.py --rivals halfweight --batches 1 --limit-seconds 120

INT8 runs by the engine, the others with a static cache in the `steps` named. Random weights of the
named shape; 128 prompt tokens, then 256 tokens; the prompt of the first token's time has 2,048. The
ceiling is the measured read bandwidth: a step reads each weight and
each cached token once. A rival that fails (torchao not installed, say) is recorded with its error.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from arguments import parse, workplace
from envelope import envelope, write_result
from models import DEVICE, folders

from halfweight.evaluation.speed import generate
from halfweight.evaluation.speed.rivals import (
    HALFWEIGHT,
    HALFWEIGHT_INT8,
    RIVALS,
    SIXTEEN_BIT,
    TORCHAO,
)
from halfweight.kernels.timing import read_bandwidth


def line(row: generate.Row) -> str:
    """One row for people."""
    if isinstance(row, generate.FirstTokenTime):
        return f"first token of {row.prompt_tokens}: {row.milliseconds:.1f} ms"
    return (
        f"batch {row.batch_size} {row.step}: {row.tokens_per_second:.1f} tokens/s, "
        f"{row.step_milliseconds:.3f} ms, {row.fraction_of_read_bandwidth:.1%} of read bandwidth "
        f"(warm-up {row.warm_up_seconds:.0f} s)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = [SIXTEEN_BIT, HALFWEIGHT, HALFWEIGHT_INT8, TORCHAO]
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=default)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--steps", nargs="+", choices=("eager", "graph", "compiled"))
    parser.add_argument("--tokens", nargs=2, type=int, default=[128, 256], metavar=("OLD", "NEW"))
    parser.add_argument("--long-prompt", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    options, deadline = parse(parser)
    steps = options.steps or (["graph", "compiled"] if DEVICE.type == "cuda" else ["eager"])
    workload = generate.Workload(
        tuple(options.batches), *options.tokens, options.long_prompt, options.repeats, tuple(steps)
    )
    facts = envelope(DEVICE, {"read_bytes_per_second": read_bandwidth(DEVICE)})
    results: dict[str, Any] = {"shape": options.shape, "workload": asdict(workload), "rows": []}

    def save(rival: str, row: generate.Row | str) -> None:
        fields = {"rival": rival, "error": row} if isinstance(row, str) else asdict(row)
        results["rows"].append(fields)
        write_result(options.name or "generate", facts, results, out=options.out)
        print(f"{rival}: {row if isinstance(row, str) else line(row)}", flush=True)

    with workplace(options.models) as place:
        found = folders(options.shape, place)
        rows = generate.compare(
            options.rivals, found, DEVICE, workload, deadline=deadline, report=save
        )
    results["speedups"] = [asdict(speedup) for speedup in generate.speedups(rows)]
    write_result(options.name or "generate", facts, results, out=options.out)
    for speedup in generate.speedups(rows):
        print(speedup)


if __name__ == "__main__":
    main()
