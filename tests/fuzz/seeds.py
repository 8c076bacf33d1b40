"""The files that are mutated: a tiny Llama in INT8, whole and in shards, in forms of others, a
journal, a GGUF.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from gguf_files import make_gguf
from others import (
    rewritten,
    write_bitsandbytes,
    write_compressed_tensors,
    write_float8,
    write_gptq,
    write_mxfp4,
    write_torchao,
)
from targets import JOURNAL, OTHERS
from tiny import make_llama

import halfweight
from halfweight.checkpoint.manifest import read_manifest
from halfweight.conversion import convert
from halfweight.quantization.scheme import Recipe, Scheme

EXPERTS = "model.layers.0.mlp.experts"
STACKS = ("gate_up_proj", "down_proj")


def make_seeds(root: Path) -> dict[str, Path]:
    """Folders by name: "single" and "sharded"."""
    source = make_llama(root / "source", layers=1)
    single, sharded = root / "single", root / "sharded"
    halfweight.quantize(source, single, Recipe(Scheme(32)))
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    config = json.loads((single / "config.json").read_text())
    config |= {"rope_parameters": rope, "layer_types": ["full_attention"], "sliding_window": 64}
    config |= {"head_dim": 16, "intermediate_size": [192], "text_config": {"hidden_size": 64}}
    (single / "config.json").write_text(json.dumps(config))
    shards = read_manifest(single)["shards"]
    lines = [{"job": {"job": 1}, "source_state": [1]}]
    lines += [{"shard": name, **entry} for name, entry in shards.items()]
    (single / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in lines))
    make_gguf(single / "tiny.gguf")
    (single / "tiny.gguf").write_bytes((single / "tiny.gguf").read_bytes()[:4000])
    convert_sharded(source, sharded)
    return {"single": single, "sharded": sharded, **others(root)}


def others(root: Path) -> dict[str, Path]:
    """The same model in forms of others, one of each reader."""
    source = make_llama(root / "whole", layers=1, shard_size="1GB")
    found = {name: root / name for name in OTHERS}
    write_compressed_tensors(source, found["compressed"], 16)
    write_gptq(source, found["gptq"], 16)
    write_bitsandbytes(source, found["bitsandbytes"])
    write_torchao(source, found["torchao"], 32)
    write_float8(source, found["float8"], (32, 32))

    def stack(tensors: dict[str, Any]) -> dict[str, Any]:
        experts = {f"{EXPERTS}.{name}": torch.randn(2, 64, 64) for name in STACKS}
        return tensors | experts

    stacked = rewritten(source, root / "stacked", stack)
    write_mxfp4(stacked, found["mxfp4"], [f"{EXPERTS}.{name}" for name in STACKS])
    return found


def convert_sharded(source: Path, out: Path) -> None:
    """The 16-bit source, which is in shards with an index."""
    shutil.copytree(source, out)
    assert (out / "model.safetensors.index.json").exists(), convert
