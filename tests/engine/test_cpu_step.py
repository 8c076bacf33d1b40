"""The decode kernel against the model's own forward, for each model family it takes."""

import pytest
import torch
from llama_like import FAMILY, SIZES, quantized
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    Phi3Config,
    StaticCache,
)

from halfweight.engine.cpu_step import CpuStep, step_for, unsupported
from halfweight.engine.decoder import Decoder, generate


def cache_after(model, ids, max_length=40):
    cache = StaticCache(model.config, max_cache_len=max_length)
    with torch.inference_mode():
        model(ids, past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.parametrize("family", FAMILY)
def test_equals_the_models_forward(tmp_path, family):
    model = quantized(tmp_path, FAMILY[family])
    ids = torch.randint(0, 323, (1, 30))
    with torch.inference_mode():
        expected = model(ids).logits[0]
        step = CpuStep(model, cache_after(model, ids[:, :20]))
        for position in range(20, 30):
            logits = step(int(ids[0, position]), position)[0]
            error = (logits - expected[position]).norm() / expected[position].norm()
            assert error < 5e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_caches(tmp_path, dtype):
    model = quantized(tmp_path, FAMILY["llama-3"], dtype)
    ids = torch.randint(0, 323, (1, 30))
    with torch.inference_mode():
        expected = model(ids).logits[0, -1].float()
        cache = cache_after(model, ids[:, :20])
        step = CpuStep(model, cache)
        for position in range(20, 30):
            logits = step(int(ids[0, position]), position)[0]
        assert (logits - expected).norm() / expected.norm() < 3e-2
        whole = cache_after(model, ids)
    for mine, theirs in zip(cache.layers, whole.layers, strict=True):
        assert mine.keys.dtype == dtype
        for a, b in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            assert (a - b).norm() / b.norm() < 2e-2


def test_any_number_of_threads_gives_the_same_bits(tmp_path):
    model = quantized(tmp_path, FAMILY["llama"])
    step = CpuStep(model, cache_after(model, torch.randint(0, 323, (1, 10))))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append([step(t, 10 + t).clone() for t in range(5)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_other_models_and_batches_have_no_step(tmp_path):
    model = quantized(tmp_path, FAMILY["llama"])
    cache = cache_after(model, torch.zeros(1, 3, dtype=torch.long))
    assert step_for(model, cache, 1) is not None
    assert step_for(model, cache, 2) is None
    phi = AutoModelForCausalLM.from_config(Phi3Config(**SIZES, pad_token_id=0))
    assert "Phi3ForCausalLM is not one of" in unsupported(phi)
    plain = AutoModelForCausalLM.from_config(FAMILY["llama"])
    assert unsupported(plain) == "not every linear of its layers is in INT8"
    embedding = model.model.embed_tokens
    model.model.embed_tokens = torch.nn.Embedding(323, 64)
    assert unsupported(model) == "its embedding is not in INT8"
    model.model.embed_tokens = embedding
    model.lm_head = torch.nn.Linear(64, 323)
    assert unsupported(model) == "not every linear is in INT8 on the backend 'cpu'"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_act": "gelu"}, "its activation is gelu, not silu"),
        ({"sliding_window": 8}, "its layers attend to a sliding window"),
    ],
    ids=str,
)
def test_variants_that_differ_are_refused(change, reason):
    config = MistralConfig(**{**SIZES, "sliding_window": None, **change})
    assert unsupported(AutoModelForCausalLM.from_config(config)) == reason


def test_generate_takes_the_kernel_and_says_the_same(tmp_path):
    model = quantized(tmp_path, FAMILY["llama"])
    prompts = [[5, 3, 9], [7, 7]]
    calls = []
    by_forward = [generate(model, [p], max_new_tokens=12, step="eager")[0] for p in prompts]
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    by_kernel = [generate(model, [p], max_new_tokens=12)[0] for p in prompts]
    hook.remove()
    assert by_kernel == by_forward
    assert len(calls) == len(prompts)


def test_generate_without_a_kernel_takes_the_forward(tmp_path):
    model = quantized(tmp_path, FAMILY["llama"])
    prompts = [[5, 3, 9], [7, 7, 1]]
    together = generate(model, prompts, max_new_tokens=6)
    assert together == generate(model, prompts, max_new_tokens=6, step="eager")
    assert len(generate(model, prompts[:1], max_new_tokens=6, kv_cache="int8")[0].tokens) == 6


def test_a_decoder_serves_one_prompt_after_the_other(tmp_path):
    model = quantized(tmp_path, FAMILY["llama"])
    decoder = Decoder(model, 1, 30, step="kernel")
    for prompt in ([5, 3, 9, 11], [7, 7]):
        (found,) = generate(model, [prompt], max_new_tokens=8, decoder=decoder)
        assert found == generate(model, [prompt], max_new_tokens=8)[0]
    assert decoder.step == "kernel"
