"""The decode loop against transformers' own generate, its refusals, and sampling."""

from __future__ import annotations

import pytest
import torch
from tiny import small_llama
from transformers import LlamaForCausalLM

from halfweight.engine import decoder as module
from halfweight.engine.decoder import Decoder, Generation, Sampling, generate, stream
from halfweight.errors import UsageError

PROMPTS = [[5, 3, 17], [9, 300, 2, 41, 8, 12, 7], [1]]


@pytest.fixture(scope="module")
def model():
    return small_llama(max_position_embeddings=64, eos_token_id=None, pad_token_id=0)


def greedy(model, prompt, num_tokens):
    """transformers' own greedy continuation of one prompt."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, max_new_tokens=num_tokens, do_sample=False)
    return tuple(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("chunk_tokens", [2, 2048])
def test_a_padded_batch_equals_transformers_prompt_by_prompt(model, monkeypatch, chunk_tokens):
    monkeypatch.setattr(module, "CHUNK_TOKENS", chunk_tokens)
    found = generate(model, PROMPTS, max_new_tokens=12)
    assert [g.tokens for g in found] == [greedy(model, prompt, 12) for prompt in PROMPTS]
    assert {g.finish_reason for g in found} == {"length"}


@pytest.mark.filterwarnings("error::FutureWarning")
def test_the_cache_goes_by_the_name_that_this_transformers_uses(model):
    assert len(generate(model, PROMPTS, max_new_tokens=2, step="eager")) == len(PROMPTS)


def test_int8_cache_gives_nearly_the_same_logits(model):
    exact = Decoder(model, 3, 20).prefill(PROMPTS)
    rounded = Decoder(model, 3, 20, kv_cache="int8").prefill(PROMPTS)
    assert 0 < (exact - rounded).abs().max() < 0.01 * exact.abs().max()


def test_a_decoder_can_be_used_again(model):
    decoder = Decoder(model, 1, 20)
    first = decoder.prefill([PROMPTS[1]]).clone()
    decoder.advance(first.argmax(-1))
    assert torch.equal(decoder.prefill([PROMPTS[1]]), first)


def test_a_stop_token_ends_one_sequence_and_is_not_part_of_it(model):
    full = [greedy(model, prompt, 8) for prompt in PROMPTS]
    stop = full[0][3]
    found = generate(model, PROMPTS, max_new_tokens=8, stop_tokens=[stop])
    for whole, result in zip(full, found, strict=True):
        end = whole.index(stop) if stop in whole else None
        assert result.tokens == whole[:end]
        assert result.finish_reason == ("length" if end is None else "stop")


def test_nan_ends_only_its_sequence(model, monkeypatch):
    advance = Decoder.advance

    def poisoned(self, tokens):
        logits = advance(self, tokens).clone()
        logits[1, 5] = float("nan")
        return logits

    monkeypatch.setattr(Decoder, "advance", poisoned)
    found = generate(model, PROMPTS, max_new_tokens=6)
    assert found[1] == Generation(greedy(model, PROMPTS[1], 1), "nan")
    assert found[0].tokens == greedy(model, PROMPTS[0], 6)


def test_sampling_is_repeatable_by_seed_and_differs_without(model):
    options = {"max_new_tokens": 20}
    first, again, other = (
        generate(model, PROMPTS, sampling=Sampling(1.5, top_k=50, top_p=0.95, seed=s), **options)
        for s in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_top_k_of_one_is_greedy(model):
    sampled = generate(model, PROMPTS, max_new_tokens=5, sampling=Sampling(2.0, top_k=1))
    assert sampled == generate(model, PROMPTS, max_new_tokens=5)


def test_repetition_penalty_as_in_transformers(model):
    ids = torch.tensor([PROMPTS[1]])
    expected = model.generate(ids, max_new_tokens=10, do_sample=False, repetition_penalty=1.7)
    (found,) = generate(
        model, [PROMPTS[1]], max_new_tokens=10, sampling=Sampling(repetition_penalty=1.7)
    )
    assert list(found.tokens) == expected[0, len(PROMPTS[1]) :].tolist()


def test_stream_yields_step_by_step(model):
    steps = list(stream(model, PROMPTS[:1], max_new_tokens=3))
    assert [len(step) for step in steps] == [1, 1, 1, 1]
    assert steps[-1] == ["length"]


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([[1, 2], []], "prompt 1 has no tokens"),
        ([[1] * 60], "prompt 0 has 60 tokens, with 8 new ones 68; the model's context is 64"),
        ([[1, 320]], "prompt 0 has token id 320, expected 0 to 319"),
        ([[-1]], "prompt 0 has token id -1"),
    ],
)
def test_what_would_fail_on_the_device_is_refused_before(model, prompts, words):
    with pytest.raises(UsageError, match=words):
        next(iter(stream(model, prompts, max_new_tokens=8)))


@pytest.mark.gpu
@pytest.mark.parametrize("step", ["graph", "compiled"])
def test_recorded_steps_equal_eager_ones(model, step):
    on_gpu = LlamaForCausalLM(model.config).cuda().eval()
    expected = generate(on_gpu, PROMPTS, max_new_tokens=12, step="eager")
    assert generate(on_gpu, PROMPTS, max_new_tokens=12, step=step) == expected
