"""The plan against the memory of real generation: every workload in a process of its own.

    python benchmarks/plan_accuracy.py [--models FOLDER] [--limit-seconds 1500]

Twelve workloads of Llama-3-8B's shape (random weights): FP16 and INT8 weights, contexts of 512 to
32,768 tokens, batches of 1 to 32, both caches. Nothing else should use the device meanwhile.
`error` is predicted over measured total, less 1, with the assumed overhead; the calibrated errors
are the same where the overhead is what the other workloads showed, as after `halfweight measure`.
The ceiling is the card's memory, of which no plan may miss more than a small part.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from statistics import mean
from typing import Any

from arguments import parse, workplace
from envelope import envelope, write_result
from models import DEVICE, folders

from halfweight.evaluation.memory_run import measure
from halfweight.memory.devices import Device, local_device, processor_device
from halfweight.memory.measurements import Record, calibrated_overhead
from halfweight.memory.named_model import planned_model
from halfweight.memory.workload import DeviceKind, KvDtype, Weights, Workload

Configuration = tuple[Weights, int, int, KvDtype]
CONFIGURATIONS: tuple[Configuration, ...] = (
    ("16bit", 512, 1, "16bit"),
    ("int8", 512, 1, "16bit"),
    ("int8", 4096, 8, "16bit"),
    ("16bit", 4096, 8, "16bit"),
    ("int8", 32768, 1, "16bit"),
    ("16bit", 32768, 1, "16bit"),
    ("int8", 2048, 32, "16bit"),
    ("16bit", 2048, 32, "16bit"),
    ("int8", 8192, 16, "16bit"),
    ("int8", 8192, 16, "int8"),
    ("int8", 16384, 4, "16bit"),
    ("16bit", 512, 32, "16bit"),
)
"""weights, context, batch, cache; the first few already span the range."""
TINY_CONTEXT = 512


def configurations(tiny: bool, count: int) -> list[Configuration]:
    """The first `count`; on the tiny shape with contexts that it has."""
    chosen = CONFIGURATIONS[:count]
    return [(w, min(c, TINY_CONTEXT) if tiny else c, b, kv) for w, c, b, kv in chosen]


def row(record: Record) -> dict[str, Any]:
    """A record as the result keeps it."""
    fields = asdict(record)
    del fields["key"]
    return {**fields, "error": record.error}


def calibrated_errors(records: Sequence[Record], kind: DeviceKind) -> list[float]:
    """Each record's error if only the others had been measured before."""
    found = []
    for record in records:
        others = [other for other in records if other is not record]
        overhead = calibrated_overhead(others, kind)
        predicted = record.allocated + record.slack + overhead.likely
        found.append(predicted / record.measured_total - 1)
    return found


def summary(records: Sequence[Record], card: Device) -> dict[str, float]:
    """Mean and worst error, and the worst that a plan was short of, as a part of the card."""
    plain = [record.error for record in records]
    calibrated = calibrated_errors(records, card.kind)
    short = [(r.measured_total - r.predicted_total) / card.total_bytes for r in records]
    after = [
        -error * record.measured_total / card.total_bytes
        for error, record in zip(calibrated, records, strict=True)
    ]
    return {
        "mean_absolute_error": mean(map(abs, plain)),
        "worst_absolute_error": max(map(abs, plain)),
        "most_short_of_card": max(short),
        "calibrated_mean_absolute_error": mean(map(abs, calibrated)),
        "calibrated_worst_absolute_error": max(map(abs, calibrated)),
        "calibrated_most_short_of_card": max(after),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configurations", type=int, default=len(CONFIGURATIONS))
    options, deadline = parse(parser)
    kind: DeviceKind = "cuda" if DEVICE.type == "cuda" else "cpu"
    card = local_device() if kind == "cuda" else processor_device()
    facts = envelope(DEVICE, {"device_bytes": card.total_bytes})
    results: dict[str, Any] = {
        "shape": options.shape,
        "runs_by": "engine",
        "driver": card.driver,
        "rows": [],
    }
    records: list[Record] = []
    with workplace(options.models) as place:
        found = folders(options.shape, place)
        by_weights = {"16bit": found.source, "int8": found.quantized}
        for weights, context, batch, kv in configurations(
            options.shape == "tiny", options.configurations
        ):
            if time.monotonic() > deadline:
                break
            work = replace(Workload(context, batch, kv), device=kind)
            folder = str(by_weights[weights])
            begin = time.monotonic()
            record = measure(folder, planned_model(folder), work, weights)
            records.append(record)
            results["rows"].append(row(record))
            results["summary"] = summary(records, card)
            write_result(options.name or "plan_accuracy", facts, results, out=options.out)
            print(
                f"{weights} weights, {context} x {batch}, {kv} cache: predicted "
                f"{record.predicted_total / 1e9:.3f} GB, measured "
                f"{record.measured_total / 1e9:.3f} GB, {record.error:+.2%}; "
                + ", ".join(
                    f"{name} {(record.predicted[name] - n) / 1e6:+.0f} MB"
                    for name, n in record.measured.items()
                )
                + f"; in {time.monotonic() - begin:.1f} s",
                flush=True,
            )
    for name, value in results.get("summary", {}).items():
        print(f"{name}: {value:.2%}")


if __name__ == "__main__":
    main()
