"""Load time, device bytes and host memory: 16 bits by transformers, INT8 by halfweight.

    python benchmarks/load.py [--shape llama-3-8b] [--models FOLDER] [--repeats 5]

Random weights of the named shape are written to a local folder first (kept in --models, else
dropped). Rivals load in turn, each time in a fresh process, from a warm page cache; imports and the
start of the device are not timed. The ceiling is a copy from pinned host memory to the device.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import torch
from arguments import parse, workplace
from envelope import envelope, write_result
from models import DEVICE, folders

from halfweight.evaluation.speed import load
from halfweight.kernels.timing import Round

COPY_BYTES = 1 << 30


def host_to_device_bandwidth() -> float:
    """Bytes a second of a large copy from (pinned, for a GPU) host memory to the device."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=DEVICE.type == "cuda")
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, device=DEVICE)
    copy = Round([lambda: target.copy_(source, non_blocking=True)], DEVICE)
    return COPY_BYTES / min(copy.microseconds() for _ in range(5)) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    options, deadline = parse(parser)
    facts = envelope(DEVICE, {"host_to_device_bytes_per_second": host_to_device_bandwidth()})
    with workplace(options.models) as place:
        found = folders(options.shape, place)
        results: dict[str, Any] = {"shape": options.shape, "runs": []}

        def save(row: load.LoadTime) -> None:
            results["runs"].append(asdict(row))
            write_result(options.name or "load", facts, results, out=options.out)
            print(
                f"{row.rival}: {row.seconds:.2f} s, {row.resident_bytes:,} bytes on the device "
                f"(peak {row.peak_device_bytes:,}), host +{row.peak_host_bytes / 1e9:.2f} GB",
                flush=True,
            )

        runs = load.compare(found, DEVICE, repeats=options.repeats, deadline=deadline, report=save)
    results["comparison"] = asdict(load.summarize(runs))
    write_result(options.name or "load", facts, results, out=options.out)
    print(results["comparison"])


if __name__ == "__main__":
    main()
