"""What was exported, quantized again: the same int8 values and the same scales, bit for bit."""

import pytest
import torch
from exportable import make_int8
from test_export_gguf import READ_BY_TRANSFORMERS
from tiny import tensors_of

import halfweight
from halfweight.conversion.verification import verify


def assert_same_weights(before, after, modules):
    """Packed bytes are equal; scales too, each as often as its group is divided."""
    for module in modules:
        assert torch.equal(before[f"{module}.weight_packed"], after[f"{module}.weight_packed"])
        found = after[f"{module}.weight_scale"].float()
        scales = before[f"{module}.weight_scale"].float()
        repeats = found.shape[1] // scales.shape[1]
        assert torch.equal(found, scales.repeat_interleave(repeats, 1)), module


def modules_of(tensors):
    return [n.removesuffix(".weight_packed") for n in tensors if n.endswith(".weight_packed")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gptq(tmp_path, dtype):
    folder = make_int8(tmp_path, READ_BY_TRANSFORMERS["qwen3"], dtype=dtype)
    halfweight.export(folder, tmp_path / "gptq", "gptq")
    halfweight.quantize(tmp_path / "gptq", tmp_path / "back")
    assert verify(tmp_path / "back").problems == ()
    before, after = tensors_of(folder), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    layers = [module for module in modules_of(before) if ".layers." in module]
    assert len(layers) == 14
    assert_same_weights(before, after, layers)
    for name in before:
        if name.rpartition(".")[0] not in modules_of(before):
            assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_gguf(tmp_path, name):
    folder = make_int8(tmp_path, READ_BY_TRANSFORMERS[name])
    halfweight.export(folder, tmp_path / "gguf", "gguf-q8_0")
    (path,) = (tmp_path / "gguf").glob("*.gguf")
    halfweight.quantize(path, tmp_path / "back")
    assert verify(tmp_path / "back").problems == ()
    before, after = tensors_of(folder), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert_same_weights(before, after, modules_of(before))
    for norm in (n for n in before if n.endswith("norm.weight")):
        assert torch.equal(before[norm].float(), after[norm].float()), norm
