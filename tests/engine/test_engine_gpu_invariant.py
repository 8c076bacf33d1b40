"""With products that do not depend on the batch, logits on a GPU do not either: to the bit.

Interpreted here; on a GPU test_engine_equality_gpu.py has whole answers.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

import halfweight
from halfweight.engine.runners import gpu, gpu_steps
from halfweight.engine.runners.gpu import GpuRunner
from halfweight.engine.runners.gpu_invariant import InvariantAttention
from halfweight.engine.step import Chunk
from halfweight.quantization.scheme import Recipe

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 67,
    "max_position_embeddings": 256,
}
CASES = {
    "16 bits": (LlamaConfig(**SIZES, attention_bias=True), "16bit", ()),
    "int8 pages": (LlamaConfig(**SIZES), "int8", ()),
    "norms of heads, head in 16 bits": (Qwen3Config(**SIZES), "16bit", ("lm_head*",)),
}
LENGTHS = [70, 30, 12]
PAGES = [[7, 2], [3], [5]]
FIRST_ASKED = 58
"""Logits of the first text are compared from here on: its second page begins at 64."""
LIMITS = {"max_sequences": 4, "max_step_tokens": 256, "cache_tokens": 11 * 64}

WAYS = {
    "in chunks": (0, [[(0, 41)], [(0, 29)]]),
    "in a recorded read": (50, [[(2, 1), (0, 12)]]),
    "as drafts": (60, [[(0, 5)], [(1, 3), (0, 5)]]),
    "decoded": (62, [[(0, 1)]] * 4),
    "decoded among others": (62, [[(0, 1), (1, 1), (2, 1)], [(0, 1), (1, 9)], [(0, 1), (1, 1)]]),
    "in a chunk among others": (58, [[(2, 1), (0, 9), (1, 9)]]),
}
"""Tokens of the first text that lie in its pages already, and steps of (slot, tokens)."""


def model_of(folder, config, keep):
    """A random model in INT8 whose linears have the backend that a user of a GPU would name."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += (0.3 if parameter.dim() == 1 else 0.05) * torch.randn_like(parameter)
    model.to(torch.bfloat16).save_pretrained(folder / "source")
    halfweight.quantize(folder / "source", folder / "int8", Recipe(keep=keep))
    model = halfweight.load(folder / "int8", dtype=torch.float32).to(DEVICE)
    for module in model.modules():
        if hasattr(module, "backend_name"):
            module.backend_name = "triton-invariant"
    return model


def asked_logits(runner, start, steps):
    """Logits of the first text by position, read in these steps from its token `start` on."""
    generator = torch.Generator().manual_seed(1)
    for slot, length in enumerate(LENGTHS):
        text = torch.randint(0, SIZES["vocab_size"], (length,), generator=generator)
        runner.table[slot, :length] = text.to(DEVICE)
    read, found = [start, 0, 0], {}
    for chunks in steps:
        step = [Chunk(s, read[s], n, num_asked(s, read[s] + n, n), PAGES[s]) for s, n in chunks]
        logits = iter(runner.run(step).clone())
        for chunk in step:
            end = read[chunk.slot] = chunk.start + chunk.num_tokens
            rows = {end - chunk.num_logits + i: next(logits) for i in range(chunk.num_logits)}
            found |= rows if chunk.slot == 0 else {}
    return found


def num_asked(slot, end, count):
    return min(count, max(0, end - FIRST_ASKED)) if slot == 0 else count


def differing(runner, ways=tuple(WAYS)):
    """The ways, and positions, in which logits are not those of the whole text in one step."""
    expected = asked_logits(runner, 0, [[(0, LENGTHS[0])]])
    assert sorted(expected) == list(range(FIRST_ASKED, LENGTHS[0]))
    found = {way: asked_logits(runner, *WAYS[way]) for way in ways}
    assert min(len(rows) for rows in found.values()) > 2
    pairs = ((way, at, row) for way, rows in found.items() for at, row in rows.items())
    return [(way, at) for way, at, row in pairs if not torch.equal(row, expected[at])]


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_same_in_every_way(tmp_path, case):
    config, kv_cache, keep = CASES[case]
    runner = GpuRunner(model_of(tmp_path, config, keep), **LIMITS, kv_cache=kv_cache)
    assert differing(runner) == []


def test_in_other_forms_of_attention_they_are_not(tmp_path, monkeypatch):
    """What the test above compares does differ in decode's own kernel, and where tiles are cut."""
    model = model_of(tmp_path, *CASES["16 bits"][::2])
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "has_invariant_products", lambda model: False)
        assert differing(GpuRunner(model, **LIMITS), ["decoded"])
    monkeypatch.setattr(gpu_steps, "LEAST_PAGES_OF_A_PART", 1)
    monkeypatch.setattr(InvariantAttention, "num_tiles_at_once", 6)
    assert differing(GpuRunner(model, **LIMITS), ["in a chunk among others"])
