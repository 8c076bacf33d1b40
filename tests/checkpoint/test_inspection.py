"""What headers alone tell, on Llama-3-8B's: a sparse file of its size, none of its weights."""

import json
import os

import pytest

from halfweight.checkpoint.inspection import inspect
from halfweight.checkpoint.layout import header
from halfweight.memory.architecture import architecture
from halfweight.memory.presets import preset

HIDDEN, FFN, KV, VOCAB, LAYERS = 4096, 14336, 1024, 128256, 32
ROWS = {"a layer": 2 * HIDDEN + 2 * KV + 2 * FFN + HIDDEN, "tables": 2 * VOCAB}
WEIGHTS = LAYERS * (2 * HIDDEN**2 + 2 * KV * HIDDEN + 3 * FFN * HIDDEN) + 2 * VOCAB * HIDDEN
NORMS = (2 * LAYERS + 1) * HIDDEN
NUM_LINEARS = 7 * LAYERS + 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("llama")
    tensors = architecture(preset("llama-3-8b")).tensors
    (found / "config.json").write_text(json.dumps(preset("llama-3-8b")))
    head = header(tensors)
    (found / "model.safetensors").write_bytes(head)
    size = len(head) + sum(tensor.num_bytes for tensor in tensors)
    os.truncate(found / "model.safetensors", size)
    return found


def test_llama_3_8b_to_the_byte(folder):
    found = inspect(folder)
    assert found.num_params == WEIGHTS + NORMS == 8_030_261_248
    assert found.data_bytes == 2 * (WEIGHTS + NORMS)
    rows = LAYERS * ROWS["a layer"] + ROWS["tables"]
    assert found.plan.resident_bytes == WEIGHTS + WEIGHTS // 128 + rows + 2 * NORMS
    records = 16 * NUM_LINEARS
    assert found.plan.disk_bytes == WEIGHTS + 2 * WEIGHTS // 128 + records + 2 * NORMS


def test_the_reductions_of_the_readme(folder):
    found = inspect(folder)
    assert round(100 * (found.plan.resident_bytes / found.data_bytes - 1), 2) == -49.60
    assert round(100 * (found.plan.disk_bytes / found.data_bytes - 1), 2) == -49.22
    assert round(found.plan.resident_bytes / 1e9, 3) == 8.095
    assert round(found.plan.disk_bytes / 1e9, 3) == 8.156
