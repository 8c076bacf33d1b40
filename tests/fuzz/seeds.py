"""The files that are mutated: a tiny Llama in INT8, whole and in shards, a journal, a GGUF."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from gguf_files import make_gguf
from targets import JOURNAL
from tiny import make_llama

import halfweight
from halfweight.checkpoint.manifest import read_manifest
from halfweight.conversion import convert
from halfweight.quantization.scheme import Recipe, Scheme


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
    return {"single": single, "sharded": sharded}


def convert_sharded(source: Path, out: Path) -> None:
    """The 16-bit source, which is in shards with an index."""
    shutil.copytree(source, out)
    assert (out / "model.safetensors.index.json").exists(), convert
