"""Files that torchao and bitsandbytes write through transformers, where they are installed."""

import pytest
import torch
from tiny import make_llama
from transformers import AutoModelForCausalLM

import halfweight
from halfweight.checkpoint.inspection import inspect
from halfweight.quantization.numerics import scales_float32

SIZES = {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 4}


def torchao(module):
    """q [N, K] and scales [N, 1] of a linear."""
    return module.weight.qdata, module.weight.scale


def bitsandbytes(module):
    found = module.state if module.weight.SCB is None else module.weight
    return module.weight.data, found.SCB[:, None] / 127


def quantized_by_torchao():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig(version=2))


def quantized_by_bitsandbytes():
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


@pytest.mark.parametrize(
    ("config", "parts"),
    [(quantized_by_torchao, torchao), (quantized_by_bitsandbytes, bitsandbytes)],
    ids=["torchao", "bitsandbytes"],
)
def test_what_they_save_is_read_bit_for_bit(tmp_path, config, parts):
    asked = config()
    source = make_llama(tmp_path / "source", shard_size="1GB", **SIZES)
    theirs = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=asked, dtype=torch.bfloat16, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "theirs")
    assert inspect(tmp_path / "theirs").form == f"a {parts.__name__} 8-bit checkpoint"
    halfweight.quantize(tmp_path / "theirs", tmp_path / "out")
    ours, compared = halfweight.load(tmp_path / "out"), 0
    for name, module in theirs.named_modules():
        if name.endswith("_proj"):
            q, scales = parts(module)
            found = ours.get_submodule(name).quantized
            assert torch.equal(found.packed.to(torch.int16) - 128, q.to(torch.int16)), name
            mine = scales_float32(found.scales, found.exponents)
            torch.testing.assert_close(mine, scales.float().reshape(mine.shape), rtol=1e-6, atol=0)
            compared += 1
    assert compared == 14
