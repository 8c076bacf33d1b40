"""How fast a checkpoint is converted, beside `cp -r` of it, and how much memory that takes.

    python benchmarks/convert.py [--layers 14] [--rounds 3] [--work FOLDER]

A Llama-3-8B of fewer layers, random normal BF16 weights in shards of 500 MB (8.2 GB with 14
layers). Rounds alternate between cp and conversion, each from a warm page cache and each to a new
folder. Wall time is that of the whole command, imports and checks and fsync included, though cp
does not fsync; `cp -r` followed by `sync` is measured too. Peak memory is the process's maximum
resident set.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from envelope import envelope, write_result

from halfweight.checkpoint.layout import header, index, plan_shards
from halfweight.quantization.scheme import Decision, TensorInfo

HIDDEN, FFN, KV, VOCAB = 4096, 14336, 1024, 128256
SHARD_BYTES = 500_000_000
PATTERN_BYTES = 30_000_002
RATIO_LIMIT, RATIO_GOAL = 2.0, 1.2


@dataclass(frozen=True)
class Run:
    """One command: wall and processor seconds, peak resident bytes.

    The system counts the memory of this program, which starts the command, as the command's own.
    """

    wall_s: float
    cpu_s: float
    peak_bytes: int


def llama(layers: int) -> Iterator[TensorInfo]:
    """Every tensor of the model."""
    shapes = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN)}
    shapes |= {"self_attn.k_proj": (KV, HIDDEN), "self_attn.v_proj": (KV, HIDDEN)}
    shapes |= {"mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN)}
    shapes |= {"mlp.down_proj": (HIDDEN, FFN)}
    yield TensorInfo("model.embed_tokens.weight", "BF16", (VOCAB, HIDDEN))
    for i in range(layers):
        for name, shape in shapes.items():
            yield TensorInfo(f"model.layers.{i}.{name}.weight", "BF16", shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield TensorInfo(f"model.layers.{i}.{name}.weight", "BF16", (HIDDEN,))
    yield TensorInfo("model.norm.weight", "BF16", (HIDDEN,))
    yield TensorInfo("lm_head.weight", "BF16", (VOCAB, HIDDEN))


def make_checkpoint(folder: Path, layers: int) -> list[TensorInfo]:
    """Write the model; one long random pattern, repeated, stands for its weights."""
    folder.mkdir(parents=True)
    weights = np.random.default_rng(0).standard_normal(PATTERN_BYTES // 2, np.float32)
    weights *= np.float32(0.02)
    pattern = (weights.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    tensors = list(llama(layers))
    shards = plan_shards([Decision(t, None, "") for t in tensors], SHARD_BYTES)
    for shard in shards:
        with open(folder / shard.name, "wb") as file:
            file.write(header(shard.tensors))
            rest = shard.source_bytes
            while rest:
                rest -= file.write(pattern[:rest])
    (folder / "model.safetensors.index.json").write_text(json.dumps(index(shards)))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": VOCAB,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def run(command: list[str]) -> Run:
    """Run to the end; raises if it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    if status:
        raise RuntimeError(f"{command} ended with {status}")
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def warm(folder: Path) -> None:
    """Read every file once, so that it is in the page cache."""
    buffer = bytearray(16_000_000)
    for path in folder.iterdir():
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def measure(source: Path, work: Path, command: list[str]) -> Run:
    """Run `command source out` from a warm cache into a folder that is then deleted."""
    os.sync()
    warm(source)
    out = work / "out"
    found = run([*command, str(source), str(out)])
    shutil.rmtree(out)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=arguments.work))
    commands = {
        "cp": ["cp", "-r"],
        "cp_sync": ["sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"'],
        "quantize": [sys.executable, "-m", "halfweight", "quantize"],
    }
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    try:
        tensors = make_checkpoint(work / "source", arguments.layers)
        facts = envelope(torch.device("cpu"), {})
        for _ in range(arguments.rounds):
            for name, command in commands.items():
                runs[name].append(measure(work / "source", work, command))
                print(name, runs[name][-1], file=sys.stderr)
        write_result("convert", *summary(facts, tensors, runs))
    finally:
        shutil.rmtree(work)


def summary(
    facts: dict[str, Any], tensors: list[TensorInfo], runs: dict[str, list[Run]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The envelope with its ceiling, and the results: medians, ratios, the memory bound."""
    num_bytes = sum(tensor.num_bytes for tensor in tensors)
    wall = {name: float(np.median([r.wall_s for r in found])) for name, found in runs.items()}
    peak = max(r.peak_bytes for r in runs["quantize"])
    bound = 4 * max(tensor.num_bytes for tensor in tensors) + 400_000_000
    results = {
        "source_bytes": num_bytes,
        "num_tensors": len(tensors),
        "median_wall_s": wall,
        "source_gb_per_s": num_bytes / 1e9 / wall["quantize"],
        "ratio_to_cp": wall["quantize"] / wall["cp"],
        "ratio_to_cp_and_sync": wall["quantize"] / wall["cp_sync"],
        "ratio_limit": RATIO_LIMIT,
        "ratio_goal": RATIO_GOAL,
        "load_average_at_end": os.getloadavg(),
        "peak_bytes": peak,
        "peak_bound_bytes": bound,
        "runs": {name: [asdict(r) for r in found] for name, found in runs.items()},
    }
    ceiling = {"cp_source_gb_per_s": num_bytes / 1e9 / wall["cp"]}
    print(json.dumps({k: v for k, v in results.items() if k != "runs"}, indent=1))
    return {**facts, "ceiling": ceiling}, results


if __name__ == "__main__":
    main()
