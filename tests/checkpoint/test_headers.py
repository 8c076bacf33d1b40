"""Headers, index and paths of a checkpoint: what is accepted, and every fault with its message."""

import json

import pytest
import torch
from safetensors.torch import save_file

from halfweight.checkpoint.headers import read_headers
from halfweight.errors import CheckpointError
from halfweight.quantization.scheme import TensorInfo


def write(folder, shards, index=True):
    weight_map = {}
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard)
        weight_map |= dict.fromkeys(tensors, shard)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_one_shard_without_an_index(tmp_path):
    save_file({"b": torch.ones(2, 3), "a": torch.ones(5).half()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = read_headers(tmp_path)
    assert checkpoint.config == {"model_type": "llama"}
    assert {tensor.info for tensor in checkpoint.tensors} == {
        TensorInfo("a", "F16", (5,)),
        TensorInfo("b", "F32", (2, 3)),
    }
    assert checkpoint.num_bytes == 34


def test_an_index_without_metadata_is_accepted(tmp_path):
    write(tmp_path, {"one.safetensors": {"a": torch.ones(2)}, "two.safetensors": {}})
    assert [tensor.name for tensor in read_headers(tmp_path).tensors] == ["a"]


def test_pickles_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"a pickle.*expected \.safetensors"):
        read_headers(tmp_path)
