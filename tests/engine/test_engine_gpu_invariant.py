"""With products that do not depend on the batch, logits on a GPU do not either: to the bit.

Interpreted here; on a GPU test_engine_equality_gpu.py has whole answers.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

import halfweight
from halfweight.engine.runners import gpu
from halfweight.engine.runners.gpu import GpuRunner
from halfweight.engine.runners.gpu_invariant import has_invariant_products
from halfweight.engine.step import Chunk
from halfweight.quantization.scheme import Recipe

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 323,
    "max_position_embeddings": 256,
}
CONFIGS = {"llama": LlamaConfig(**SIZES, attention_bias=True), "qwen3": Qwen3Config(**SIZES)}
LENGTHS = [140, 70, 12]
PAGES = [[7, 2, 9], [3, 8], [5]]
FIRST_ASKED = 120
"""Logits of the first text are compared from here on: its third page begins at 128."""
LIMITS = {"max_sequences": 4, "max_step_tokens": 256, "cache_tokens": 11 * 64}

# Each way is steps of (slot, tokens): sequences that decode first.
WHOLE = [[(0, 140)]]
WAYS = {
    "in chunks": [[(0, 53)], [(0, 77)], [(0, 10)]],
    "in short chunks": [[(0, 119)], *[[(0, 7)]] * 3],
    "decoded": [[(0, 126)], *[[(0, 1)]] * 5],
    "decoded among others": [
        [(0, 126), (1, 30), (2, 3)],
        *[[(0, 1), (1, 1), (2, 1)]] * 2,
        [(0, 1), (1, 20)],
        [(0, 1), (2, 5)],
    ],
    "in chunks among others": [[(2, 1), (0, 70), (1, 50)], [(2, 1), (1, 9), (0, 60)]],
}


def invariant(folder, config, dtype, keep=()):
    """A random model in INT8 whose linears have the backend that a GPU would be asked for."""
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += (0.3 if parameter.dim() == 1 else 0.05) * torch.randn_like(parameter)
    model.to(torch.bfloat16).save_pretrained(folder / "source")
    halfweight.quantize(folder / "source", folder / "int8", Recipe(keep=keep))
    model = halfweight.load(folder / "int8", dtype=dtype).to(DEVICE)
    for module in model.modules():
        if hasattr(module, "backend_name"):
            module.backend_name = "triton-invariant"
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def model(request, tmp_path_factory):
    torch.manual_seed(0)
    return invariant(tmp_path_factory.mktemp("model"), CONFIGS[request.param], torch.float32)


def asked_logits(runner, steps):
    """Logits of the first text by position, read in these steps."""
    generator = torch.Generator().manual_seed(1)
    for slot, length in enumerate(LENGTHS):
        text = torch.randint(0, SIZES["vocab_size"], (length,), generator=generator)
        runner.table[slot, :length] = text.to(DEVICE)
    read, found = [0] * len(LENGTHS), {}
    for chunks in steps:
        step = [Chunk(s, read[s], n, num_asked(s, read[s] + n, n), PAGES[s]) for s, n in chunks]
        logits = iter(runner.run(step).clone())
        for chunk in step:
            end = read[chunk.slot] = chunk.start + chunk.num_tokens
            rows = {end - chunk.num_logits + i: next(logits) for i in range(chunk.num_logits)}
            found |= rows if chunk.slot == 0 else {}
    return found


def num_asked(slot, end, count):
    return min(count, max(0, end - FIRST_ASKED)) if slot == 0 else 1


def differing(found, expected):
    assert len(found) > 4
    return [at for at, row in found.items() if not torch.equal(row, expected[at])]


@pytest.mark.parametrize("kv_cache", ["16bit", "int8"])
def test_logits_are_the_same_in_every_way(model, kv_cache):
    runner = GpuRunner(model, **LIMITS, kv_cache=kv_cache)
    expected = asked_logits(runner, WHOLE)
    assert sorted(expected) == list(range(FIRST_ASKED, LENGTHS[0]))
    for way, steps in WAYS.items():
        assert differing(asked_logits(runner, steps), expected) == [], way
