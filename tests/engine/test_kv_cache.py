"""The int8 KV cache: its numbers, its bytes, and a model that generates through it."""

import pytest
import torch
from tiny import small_llama
from torch.testing import assert_close
from transformers import MistralConfig, StaticCache

from halfweight.engine.kv_cache import Int8Cache, Int8Layer, quantize_heads

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def model():
    return small_llama(vocab_size=128, head_dim=64, eos_token_id=None)


def bytes_of(cache):
    names = ("keys", "values", "key_scales", "value_scales")
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in names]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_half_a_scale(dtype):
    x = (torch.randn(3, 2, 50, 64) * torch.logspace(-3, 3, 50)[:, None]).to(dtype)
    q, scales = quantize_heads(x)
    assert (q.dtype, scales.dtype, scales.shape) == (torch.int8, dtype, (3, 2, 50, 1))
    error = (x.double() - q.double() * scales.double()).abs()
    clipped = x.double().abs() > 127.5 * scales.double()
    assert bool((error <= scales.double() * 0.501)[~clipped].all())
    assert bool((error <= scales.double())[clipped].all())
    assert clipped.double().mean() < 0.02


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_and_the_smallest_numbers(dtype):
    tiny = torch.full((1, 64), torch.finfo(dtype).smallest_normal, dtype=dtype)
    for x in (torch.zeros(1, 64, dtype=dtype), tiny):
        q, scales = quantize_heads(x)
        assert bool(torch.isfinite(scales).all())
        assert bool((scales > 0).all())
        assert_close(q * scales, x, rtol=0, atol=float(scales.max()) / 2)


def test_it_takes_half_the_bytes(model):
    ids = torch.randint(128, (3, 5))
    caches = [kind(model.config, max_cache_len=40) for kind in (Int8Cache, StaticCache)]
    for cache in caches:
        model.to(torch.bfloat16)(ids, past_key_values=cache)
    assert bytes_of(caches[0]) / bytes_of(caches[1]) == (64 + 2) / 128


@torch.no_grad()
def test_logits_step_by_step_stay_close_to_the_full_cache(model):
    ids = torch.randint(128, (2, 24))
    logits = []
    for cache in (Int8Cache(model.config, 32), StaticCache(model.config, 32)):
        steps = [model(ids[:, :9], past_key_values=cache).logits]
        steps += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(9, 24)]
        logits.append(torch.cat(steps, dim=1))
    spread = logits[1].std()
    difference = (logits[0] - logits[1]).abs().max()
    assert 0 < difference < 0.05 * spread


@torch.no_grad()
def test_chunks_of_a_prompt_give_what_one_prefill_gives(model):
    ids = torch.randint(128, (1, 20))
    whole, chunked = Int8Cache(model.config, 20), Int8Cache(model.config, 20)
    expected = model(ids, past_key_values=whole).logits
    parts = [model(part, past_key_values=chunked).logits for part in ids.split(7, dim=1)]
    assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-5)
    assert int(chunked.get_seq_length()) == 20


def test_transformers_generate_takes_it(model):
    ids = torch.randint(128, (2, 8))
    cache = Int8Cache(model.config, max_cache_len=24)
    out = model.generate(ids, max_new_tokens=16, do_sample=False, past_key_values=cache)
    assert out.shape == (2, 24)
    assert cache.layers[0].keys.dtype == torch.int8


@torch.no_grad()
def test_reset_forgets_and_keeps_the_memory(model):
    ids = torch.randint(128, (1, 8))
    cache = Int8Cache(model.config, 16)
    first = model(ids, past_key_values=cache).logits
    memory = cache.layers[0].keys.data_ptr()
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    assert float(cache.layers[0].key_scales.abs().sum()) == 0
    assert_close(model(ids, past_key_values=cache).logits, first)
    assert cache.layers[0].keys.data_ptr() == memory


@torch.no_grad()
def test_reordered_beams_carry_their_scales(model):
    ids = torch.randint(128, (3, 6))
    order = torch.tensor([2, 0, 0])
    cache, expected = Int8Cache(model.config, 8), Int8Cache(model.config, 8)
    model(ids, past_key_values=cache)
    model(ids[order], past_key_values=expected)
    cache.reorder_cache(order)
    for layer, other in zip(cache.layers, expected.layers, strict=True):
        assert_close(layer.keys * layer.key_scales, other.keys * other.key_scales)
        assert_close(layer.values * layer.value_scales, other.values * other.value_scales)


def test_sliding_windows_stay_in_16_bits():
    config = MistralConfig(num_hidden_layers=2, sliding_window=16)
    assert not any(isinstance(layer, Int8Layer) for layer in Int8Cache(config, 64).layers)


@pytest.mark.gpu
@torch.no_grad()
def test_a_cuda_graph_replays_a_step(model):
    model = model.cuda().half()
    ids = torch.randint(128, (1, 12), device="cuda")
    eager, cache = Int8Cache(model.config, 16), Int8Cache(model.config, 16)
    expected = [model(ids[:, i : i + 1], past_key_values=eager).logits for i in range(12)]
    token, position = ids[:, :1].clone(), torch.zeros(1, 1, dtype=torch.long, device="cuda")
    model(token, past_key_values=cache, position_ids=position)
    cache.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(token, past_key_values=cache, position_ids=position).logits
    cache.reset()
    for i in range(12):
        token.copy_(ids[:, i : i + 1])
        position.fill_(i)
        graph.replay()
        assert_close(logits, expected[i], rtol=1e-2, atol=1e-2)
