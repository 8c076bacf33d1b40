"""How fast INT8 weights are exported to each form, beside a copy of them, and in how much memory.

    python benchmarks/export.py [--layers 32] [--rounds 3] [--work FOLDER]

A Llama-3-8B of random normal weights, quantized first (its 16-bit source, 16 GB with 32 layers, is
then deleted), with a tokenizer of bytes. The INT8 folder and one of 16 bits lie on the disk at
once: 24 GB with 32 layers, 16 GB with 20, and the largest tensor, by which memory is bounded, is
the same. Rounds alternate between the copy and the forms, each from a warm page cache and to a new
folder. Wall time is that of the whole command, imports, checks and fsync included, and of `cp -r`
followed by `sync`. MB/s are of the INT8 folder that is read. Peak memory is the process's maximum
resident set, to be compared with the bound of a conversion: four times the largest tensor and 400
MB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from convert import Run, make_checkpoint, measure
from envelope import envelope, write_result
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from halfweight.conversion.export import FORMS
from halfweight.quantization.scheme import TensorInfo

HALFWEIGHT = (sys.executable, "-m", "halfweight")
COPY = "cp_sync"


def add_tokenizer(folder: Path) -> None:
    """A tokenizer whose tokens are bytes; the rest of the vocabulary is unused."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: i for i, text in enumerate(("<s>", "</s>", *letters))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def make_int8(work: Path, layers: int) -> list[TensorInfo]:
    """The INT8 folder `work/int8`; returns the tensors of its source, which is gone."""
    tensors = make_checkpoint(work / "source", layers)
    add_tokenizer(work / "source")
    subprocess.run([*HALFWEIGHT, "quantize", work / "source", work / "int8"], check=True)
    shutil.rmtree(work / "source")
    return tensors


def main() -> None:
    """Measure and write results/export.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=arguments.work))
    commands = {form: [*HALFWEIGHT, "export", "--to", form] for form in FORMS}
    commands = {COPY: ["sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"'], **commands}
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    try:
        tensors = make_int8(work, arguments.layers)
        facts = envelope(torch.device("cpu"), {})
        for _ in range(arguments.rounds):
            for name, command in commands.items():
                runs[name].append(measure(work / "int8", work, command))
                print(name, runs[name][-1], file=sys.stderr)
        num_bytes = sum(path.stat().st_size for path in (work / "int8").iterdir())
        write_result("export", *summary(facts, arguments.layers, tensors, num_bytes, runs))
    finally:
        shutil.rmtree(work)


def markdown(results: dict[str, Any]) -> str:
    """The table of docs/export.md."""
    lines = [
        "| form | MB/s of the INT8 folder | times `cp -r` and sync | peak memory, MB | bound, MB |",
        "|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        lines.append(
            f"| `{row['form']}` | {row['mb_per_s']:.0f} | {row['ratio_to_copy']:.2f} "
            f"| {row['peak_bytes'] / 1e6:.0f} | {results['peak_bound_bytes'] / 1e6:.0f} |"
        )
    return "\n".join(lines)


def summary(
    facts: dict[str, Any],
    layers: int,
    tensors: list[TensorInfo],
    num_bytes: int,
    runs: dict[str, list[Run]],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The envelope with its ceiling, and the results: medians, ratios, the memory bound."""
    wall = {name: float(np.median([r.wall_s for r in found])) for name, found in runs.items()}
    rows = [
        {
            "form": form,
            "median_wall_s": wall[form],
            "mb_per_s": num_bytes / 1e6 / wall[form],
            "ratio_to_copy": wall[form] / wall[COPY],
            "peak_bytes": max(run.peak_bytes for run in runs[form]),
        }
        for form in FORMS
    ]
    results = {
        "layers": layers,
        "int8_bytes": num_bytes,
        "peak_bound_bytes": 4 * max(tensor.num_bytes for tensor in tensors) + 400_000_000,
        "rows": rows,
        "load_average_at_end": os.getloadavg(),
        "runs": {name: [asdict(r) for r in found] for name, found in runs.items()},
    }
    print(json.dumps({k: v for k, v in results.items() if k != "runs"}, indent=1))
    return {**facts, "ceiling": {"copy_mb_per_s": num_bytes / 1e6 / wall[COPY]}}, results


if __name__ == "__main__":
    main()
