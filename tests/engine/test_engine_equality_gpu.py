"""The same answer in every way that an engine comes to it, on a GPU: greedy, drawn, to the bit."""

from functools import partial

import pytest
import torch
from same_answers import NUM_OTHERS, NUM_PROMPTS, Ways, compare
from transformers import LlamaConfig, LlamaForCausalLM

import halfweight
from halfweight.engine.runners.gpu import GpuRunner
from halfweight.engine.runners.transformers_paged import TransformersRunner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NEAR = 0.02
"""Nats between the two likeliest of a near tie in float16, where logits are about 2."""
NEW_TOKENS = 96
"""Two pages more: a sequence that has to give way has tokens of its own to read again."""
CONFIG = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 16_000,
    "max_position_embeddings": 512,
}
SAMPLING = {"greedy": {}, "drawn": {"temperature": 0.8, "top_p": 0.95}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random weights whose logits are as far apart as a trained model's."""
    root = tmp_path_factory.mktemp("equal")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    model.lm_head.weight.data *= 4
    model.half().save_pretrained(root / "source")
    halfweight.quantize(root / "source", root / "int8")
    return root / "int8"


@pytest.fixture(scope="module")
def prompts():
    """Of 100 to 135 tokens: a page of the GPU runner holds 64."""
    generator = torch.Generator().manual_seed(1)
    sizes = [100 + 7 * i % 36 for i in range(NUM_PROMPTS + NUM_OTHERS)]
    return [tuple(torch.randint(3, 16_000, (n,), generator=generator).tolist()) for n in sizes]


@pytest.mark.parametrize("make", [GpuRunner, TransformersRunner])
def test_greedy_answers_are_the_same_but_for_near_ties(folder, prompts, make):
    model = halfweight.load(folder, device="cuda", dtype=torch.float16)
    ways = Ways(make, model, prompts, new_tokens=NEW_TOKENS)
    alone = ways.alone()
    for way, found in ways.all():
        partings = compare(way, found, alone)
        assert all(gap < NEAR for gap in partings), way
        assert len(partings) < NUM_PROMPTS, way


@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING)
@pytest.mark.parametrize("kv_cache", ["16bit", "int8"])
def test_with_the_invariant_backend_answers_are_the_same_to_the_bit(
    folder, prompts, kv_cache, sampling
):
    model = halfweight.load(folder, device="cuda", dtype=torch.float16, backend="triton-invariant")
    make = partial(GpuRunner, kv_cache=kv_cache)
    ways = Ways(make, model, prompts, new_tokens=NEW_TOKENS, **sampling)
    alone = ways.alone()
    for way, found in ways.all():
        assert compare(way, found, alone) == []
