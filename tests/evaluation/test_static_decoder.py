"""The baselines' harness against transformers' own generate."""

from __future__ import annotations

import pytest
import torch
from tiny import small_llama
from transformers import LlamaForCausalLM

from halfweight.evaluation.speed import static_decoder
from halfweight.evaluation.speed.static_decoder import StaticDecoder

PROMPTS = [[5, 3, 17], [9, 300, 2, 41, 8, 12, 7], [1]]


@pytest.fixture(scope="module")
def model():
    return small_llama(max_position_embeddings=64, eos_token_id=None, pad_token_id=0)


def greedy(model, prompt, num_tokens):
    """transformers' own greedy continuation of one prompt."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, max_new_tokens=num_tokens, do_sample=False)
    return out[0, len(prompt) :].tolist()


def written(decoder, num_tokens):
    """What a decoder writes after PROMPTS."""
    tokens = [decoder.prefill(PROMPTS).argmax(-1)]
    while len(tokens) < num_tokens:
        tokens.append(decoder.advance(tokens[-1]).argmax(-1))
    return torch.stack(tokens, dim=1).tolist()


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("chunk_tokens", [2, 2048])
def test_a_padded_batch_equals_transformers_prompt_by_prompt(model, monkeypatch, chunk_tokens):
    monkeypatch.setattr(static_decoder, "CHUNK_TOKENS", chunk_tokens)
    decoder = StaticDecoder(model, 3, 20)
    expected = [greedy(model, prompt, 12) for prompt in PROMPTS]
    assert written(decoder, 12) == expected
    assert written(decoder, 12) == expected, "a decoder can be used again"


@pytest.mark.gpu
@pytest.mark.parametrize("step", ["graph", "compiled"])
def test_recorded_steps_equal_eager_ones(model, step):
    on_gpu = LlamaForCausalLM(model.config).cuda().eval()
    expected = written(StaticDecoder(on_gpu, 3, 20), 12)
    assert written(StaticDecoder(on_gpu, 3, 20, step=step), 12) == expected
