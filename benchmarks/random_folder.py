"""An INT8 folder of any sizes with random weights, written as fast as the disk takes it.

The packed bytes are one random block again and again, the scales of a row alike and small enough
that activations stay finite: nothing that reads or multiplies them can tell.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from halfweight.checkpoint.headers import INDEX_NAME
from halfweight.checkpoint.layout import index, lay_out, quantization_config
from halfweight.memory.architecture import architecture
from halfweight.quantization.scheme import Recipe, TensorInfo

BLOCK_BYTES = 16 << 20
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def write_random(config: dict[str, Any], folder: Path, recipe: Recipe | None = None) -> None:
    """A folder that `halfweight.load` takes; one that is complete is left as it is."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    layout = lay_out(architecture(config).tensors, recipe or Recipe())
    random = np.random.default_rng(0)
    block = random.integers(1, 256, BLOCK_BYTES, dtype=np.uint8)  # q from -127 on
    for shard in layout.shards:
        with (folder / shard.name).open("wb") as file:
            file.write(shard.header)
            for tensor in shard.tensors:
                for part in _parts(tensor, block):
                    file.write(part)
    if len(layout.shards) > 1:
        (folder / INDEX_NAME).write_text(json.dumps(index(layout.shards)))
    named = {"architectures": [CLASSES[config["model_type"]]], "dtype": "bfloat16"}
    declared = {"quantization_config": quantization_config(layout.decisions)}
    (folder / "config.json").write_text(json.dumps({**config, **named, **declared}))


def _parts(tensor: TensorInfo, block: np.ndarray) -> Any:
    """The tensor's bytes in pieces."""
    if tensor.name.endswith("weight_shape"):
        yield np.zeros(2, np.int64).tobytes()
        return
    if tensor.dtype == "I32":
        whole, rest = divmod(tensor.num_bytes, len(block))
        yield from islice(iter(lambda: block.data, None), whole)
        yield block[:rest].data
        return
    value = 1.0  # of a norm
    if tensor.name.endswith("weight_scale"):
        value = 2.0**-13
    elif tensor.name.endswith("bias"):
        value = 0.0
    bfloat16 = np.array([value], np.float32).view(np.uint32) >> 16
    yield np.full(tensor.num_elements, bfloat16[0], np.uint16).tobytes()
