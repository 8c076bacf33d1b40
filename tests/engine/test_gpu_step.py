"""The GPU's decode step against the model's own forward: interpreted here, compiled on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from llama_like import FAMILY, quantized
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import halfweight
from halfweight.engine import decoder as generation
from halfweight.engine import gpu_step
from halfweight.engine.decoder import Decoder, generate
from halfweight.engine.gpu_step import GpuStep, step_for, unsupported
from halfweight.engine.kv_cache import Int8Cache
from halfweight.model.modules import stack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPTS = [[5, 3, 17, 9], [9, 300, 2, 41, 8, 12, 7], [1]]
NEW_TOKENS = 3
SHORT = {"num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 1}
"""One layer, heads of 32: the least that Triton's products take."""
MIDDLE = LlamaConfig(
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=1000,
    max_position_embeddings=2048,
)
LEAST = {torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""How far compiled kernels may be from the model's own forward."""


def small(family):
    """A model of FAMILY whose heads are wide enough."""
    config = FAMILY[family].to_dict() | SHORT
    return type(FAMILY[family])(**{k: v for k, v in config.items() if k != "layer_types"})


def model_of(tmp_path, family, dtype):
    return quantized(tmp_path, small(family), dtype).to(DEVICE)


def padded():
    longest = max(map(len, PROMPTS))
    starts = torch.tensor([longest - len(p) for p in PROMPTS], dtype=torch.int32, device=DEVICE)
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS], device=DEVICE)
    return ids, starts


def steps(model, kv_cache, tokens, monkeypatch, share=64):
    """Logits of each of `tokens` [T, B] by GpuStep after PROMPTS, and the cache."""
    monkeypatch.setattr(gpu_step, "SPLIT_TOKENS", share)
    decoder = Decoder(model, len(PROMPTS), 24, kv_cache=kv_cache)
    decoder.prefill(PROMPTS)
    ids, starts = padded()
    slot = torch.tensor([ids.shape[1] - 1], dtype=torch.int32, device=DEVICE)
    current = torch.zeros(len(PROMPTS), 1, dtype=torch.long, device=DEVICE)
    step = GpuStep(model, decoder._cache, current, slot, starts)
    found = []
    for token in tokens:
        current.copy_(token[:, None])
        slot += 1
        found.append(step().clone())
    return torch.stack(found), decoder._cache


def expected_logits(model, kv_cache, tokens):
    """The same by the model's own forward."""
    decoder = Decoder(model, len(PROMPTS), 24, kv_cache=kv_cache)
    decoder.prefill(PROMPTS)
    return torch.stack([decoder.advance(token).clone() for token in tokens]), decoder._cache


def error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Every tensor made by torch.empty holds NaN, so that an element never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("family", "share"), [("llama-bias", 16), ("qwen3", 64)])
def test_equals_the_models_forward(tmp_path, monkeypatch, family, share):
    model = model_of(tmp_path, family, torch.float32)
    tokens = torch.randint(0, 323, (NEW_TOKENS, len(PROMPTS)), device=DEVICE)
    expected, their_cache = expected_logits(model, "16bit", tokens)
    found, cache = steps(model, "16bit", tokens, monkeypatch, share)
    assert error(found, expected) < 5e-6
    longest = max(map(len, PROMPTS))
    for mine, theirs in zip(cache.layers, their_cache.layers, strict=True):
        new = slice(longest, longest + NEW_TOKENS)
        assert error(mine.keys[:, :, new], theirs.keys[:, :, new]) < 5e-6
        assert torch.equal(mine.values[:, :, :longest], theirs.values[:, :, :longest])
        assert error(mine.values[:, :, new], theirs.values[:, :, new]) < 5e-6
        assert not mine.keys[:, :, longest + NEW_TOKENS :].any()


@pytest.mark.parametrize("kv_cache", ["16bit", "int8"])
def test_sixteen_bit_activations_and_both_caches(tmp_path, monkeypatch, kv_cache):
    model = model_of(tmp_path, "llama-3", torch.float16)
    tokens = torch.randint(0, 323, (NEW_TOKENS, len(PROMPTS)), device=DEVICE)
    expected, their_cache = expected_logits(model, kv_cache, tokens)
    found, cache = steps(model, kv_cache, tokens, monkeypatch, share=16)
    assert error(found, expected) < 5e-3
    (mine,), (theirs,) = cache.layers, their_cache.layers
    if kv_cache == "int8":
        assert isinstance(cache, Int8Cache)
        for part in ("key_scales", "value_scales"):
            assert error(getattr(mine, part), getattr(theirs, part)) < 1e-3
    for part in ("keys", "values"):
        difference = (getattr(mine, part).float() - getattr(theirs, part).float()).abs()
        assert difference.max() <= (1 if kv_cache == "int8" else 2e-3)
        assert (difference > 0).float().mean() < 0.2


@pytest.mark.parametrize("family", ["llama-bias", "qwen3"])
@pytest.mark.parametrize("chunk", [7, 3, 1])
def test_a_prompt_alone_is_read_like_the_models_forward(tmp_path, family, chunk):
    model = model_of(tmp_path, family, torch.float32)
    prompt = PROMPTS[1]
    plain = Decoder(model, 1, 24)
    expected = plain.prefill([prompt])
    cache, ids = StaticCache(model.config, max_cache_len=24), torch.tensor([prompt], device=DEVICE)
    none = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    step = GpuStep(model, cache, ids[:, :1], none, none)
    for begin in range(0, len(prompt), chunk):
        logits = step.prefill(ids[:, begin : begin + chunk], begin)
    assert error(logits, expected) < 5e-6
    for mine, theirs in zip(cache.layers, plain._cache.layers, strict=True):
        assert error(mine.keys, theirs.keys) < 5e-6
        assert error(mine.values, theirs.values) < 5e-6
        assert not mine.keys[:, :, len(prompt) :].any()


def test_only_a_prompt_alone_with_a_16_bit_cache_has_a_reader(tmp_path, monkeypatch):
    model = model_of(tmp_path, "llama", torch.float16)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    for batch, options, found in (
        (1, {"step": "kernel"}, True),
        (2, {"step": "kernel"}, False),
        (1, {"step": "graph"}, False),
        (1, {"step": "kernel", "kv_cache": "int8"}, False),
    ):
        reader = Decoder(model, batch, 24, **options)._prompt_reader()
        assert isinstance(reader, GpuStep) == found
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert Decoder(model, 1, 24, step="kernel")._prompt_reader() is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    model = model_of(tmp_path, "llama", torch.float32)
    assert Decoder(model, 1, 24, step="kernel")._prompt_reader() is None  # flash takes 16 bits only


def test_generate_says_the_same_by_either_step(tmp_path, monkeypatch):
    model = model_of(tmp_path, "llama", torch.float32)
    expected = generate(model, PROMPTS, max_new_tokens=4, step="eager")
    monkeypatch.setattr(Decoder, "_cpu_step", Decoder._gpu_step)
    calls = []
    monkeypatch.setattr(GpuStep, "_norm", counted(GpuStep._norm, calls))
    assert generate(model, PROMPTS, max_new_tokens=4) == expected
    assert len(calls) == 3 * (2 + 1)


def counted(function, calls):
    def call(*arguments):
        calls.append(1)
        return function(*arguments)

    return call


def test_a_nan_in_the_cache_reaches_its_own_sequence_only(tmp_path):
    model = model_of(tmp_path, "llama", torch.float32)
    decoder = Decoder(model, len(PROMPTS), 24)
    decoder.prefill(PROMPTS)
    with torch.inference_mode():
        decoder._cache.layers[0].values[1, :, 5] = float("nan")
    decoder._slot += 1
    logits = GpuStep(model, decoder._cache, decoder._ids, decoder._slot, decoder._starts)()
    assert logits.isnan().any(dim=1).tolist() == [False, True, False]


def test_stacked_projections_share_memory_and_still_save(tmp_path):
    model = model_of(tmp_path, "qwen2", torch.float32)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    x = torch.randn(2, parts[0].in_features, device=DEVICE)
    apart = torch.cat([part(x) for part in parts], dim=1)
    whole = stack(parts)
    assert torch.equal(whole(x), apart)
    assert torch.equal(torch.cat([part(x) for part in parts], dim=1), apart)
    assert stack(parts).weight_packed.data_ptr() == whole.weight_packed.data_ptr()
    stack([mlp.gate_proj, mlp.up_proj])
    model.save_pretrained(tmp_path / "saved")
    again = halfweight.load(tmp_path / "saved", dtype=torch.float32).to(DEVICE)
    ids = torch.tensor([PROMPTS[0]], device=DEVICE)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_what_has_no_step_says_why(tmp_path):
    model = model_of(tmp_path, "llama", torch.float32)
    cache = StaticCache(model.config, max_cache_len=8)
    assert step_for(model, object(), None, None, None) is None
    assert unsupported(model) is None
    model.model.layers[0].self_attn.head_dim = 96
    assert unsupported(model) == "its heads have 96 numbers, expected a power of two from 32"
    model.model.layers[0].self_attn.head_dim = 32
    up = model.model.layers[0].mlp.up_proj
    up.bias = torch.nn.Parameter(torch.zeros(up.out_features))
    assert unsupported(model) == (
        "projections that share their input differ in group size, scales or bias"
    )
    assert step_for(model, cache, None, None, None) is None
    plain = LlamaForCausalLM(small("llama"))
    assert unsupported(plain) == "not every linear of its layers is in INT8"


def test_kernels_compile_for_gpus_that_are_not_here():
    """The interpreter takes programs that the compiler does not."""
    shared_memory = {"75": 64 << 10, "90": 227 << 10}
    child = Path(__file__).parents[1] / "helpers/compile_step.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, child, *shared_memory]
    result = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    for capability, kernels in json.loads(result.stdout).items():
        assert max(kernels.values()) <= shared_memory[capability]


@pytest.mark.gpu
@pytest.mark.parametrize("kv_cache", ["16bit", "int8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 3, 40])
def test_recorded_steps_equal_the_models_forward(tmp_path, batch, dtype, kv_cache):
    model = quantized(tmp_path, MIDDLE, dtype).to(DEVICE)
    prompts = [torch.randint(0, 1000, (700 - 17 * i,)).tolist() for i in range(batch)]
    recorded, plain = (
        Decoder(model, batch, 720, kv_cache=kv_cache, step=step) for step in ("kernel", "eager")
    )
    least = LEAST[dtype]
    found, expected = recorded.prefill(prompts), plain.prefill(prompts)
    assert error(found, expected) <= (least if batch == 1 and kv_cache == "16bit" else 0)
    for _ in range(6):
        tokens = torch.randint(0, 1000, (batch,), device=DEVICE)
        found, expected = recorded.advance(tokens), plain.advance(tokens)
        assert error(found, expected) < least
    assert recorded.step == "kernel"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_long_prompt_alone_in_chunks(tmp_path, monkeypatch, dtype):
    model = quantized(tmp_path, MIDDLE, dtype).to(DEVICE)
    prompt = torch.randint(0, 1000, (1500,)).tolist()
    monkeypatch.setattr(generation, "CHUNK_TOKENS", 600)
    recorded, plain = (Decoder(model, 1, 1504, step=step) for step in ("kernel", "eager"))
    least = LEAST[dtype]
    for _ in range(2):
        assert error(recorded.prefill([prompt]), plain.prefill([prompt])) < least
        for token in (7, 8):
            tokens = torch.tensor([token], device=DEVICE)
            assert error(recorded.advance(tokens), plain.advance(tokens)) < least
