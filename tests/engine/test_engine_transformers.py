"""Runners over transformers' forward: each sequence's logits are those of it alone, whatever runs
beside it, in whatever chunks and pages."""

import logging
from dataclasses import replace

import pytest
import torch
from engine_architectures import tiny
from engine_drive import CLOSE, SIZES, Drive, drive_all, poison, texts_for

from halfweight.engine.runners import UnfitError, make_runner
from halfweight.engine.runners.attention_interface import span_of
from halfweight.engine.runners.paged_attention import (
    Manner,
    PagePool,
    Piece,
    Places,
    Span,
    attend,
)
from halfweight.engine.runners.probe import plain_logits
from halfweight.engine.runners.static import StaticRunner
from halfweight.engine.runners.transformers_paged import TransformersRunner
from halfweight.errors import UsageError
from halfweight.memory.devices import processor_device

PAGED = [
    *("llama", "gemma2", "gemma3_text", "gemma3n_text", "gpt_oss", "mistral", "qwen2_moe"),
    *("mixtral", "opt", "gpt_neox", "gpt2", "cohere", "cohere2", "olmo2", "deepseek_v3"),
    *("granite", "stablelm", "starcoder2", "diffllama", "phi3"),
]
STATIC = [
    *("bloom", "mpt", "falcon", "mamba", "jamba", "rwkv", "qwen3_next", "llama4_text"),
    *("roberta", "recurrent_gemma", "gpt_neo"),
]


@pytest.mark.parametrize("kind", PAGED)
def test_paged_sequences_have_the_logits_of_each_alone(kind):
    model = tiny(kind)
    runner = TransformersRunner(model, **SIZES)
    poison(runner)
    assert drive_all(runner, model) < CLOSE


@pytest.mark.parametrize("kind", STATIC)
def test_static_sequences_have_the_logits_of_each_alone(kind):
    model = tiny(kind)
    with pytest.raises(UnfitError):
        TransformersRunner(model, **SIZES)
    assert drive_all(StaticRunner(model, **SIZES), model) < CLOSE


@pytest.mark.parametrize("kind", [*PAGED, *STATIC])
def test_a_tiny_model_shows_a_wrong_token(kind):
    """Else the tests above could not fail: one token changed far back changes the logits."""
    model = tiny(kind)
    text = texts_for(model, [30])[0]
    other = [*text[:20], text[20] ^ 1, *text[21:]]
    right, wrong = (plain_logits(model, torch.tensor(ids))[-1] for ids in (text, other))
    assert (right - wrong).abs().max() > 100 * CLOSE


def test_decoding_in_buckets_with_padding():
    model = tiny("gemma3_text")
    runner = TransformersRunner(model, **SIZES, fixed_shapes=True)
    poison(runner)
    drive = Drive(runner, model)
    for slot, text in enumerate(texts_for(model, [40, 25, 31])):
        drive.add(slot, text)
        drive.step({slot: (17 + slot, 0)})
    for _ in range(5):
        assert drive.step({0: (1, 1), 1: (1, 0), 2: (1, 1)}) < CLOSE
    assert drive.step({0: (1, 1)}) < CLOSE
    assert {layout.table_shape for layout in runner._buckets} >= {(4, 2), (1, 2)}


def test_drafts_are_read_and_taken_back():
    model = tiny("qwen3")
    drive = Drive(TransformersRunner(model, **SIZES), model)
    text, other = texts_for(model, [30, 30])
    drive.add(0, text[:12] + other[12:])
    assert drive.step({0: (16, 5)}) < CLOSE
    drive.runner.table[0, 12:30] = torch.tensor(text[12:])
    drive.texts[0], drive.read[0] = text, 12
    assert drive.step({0: (4, 4)}) < CLOSE


def test_a_nan_stays_in_its_sequence_and_its_pages_can_be_used_again():
    model = tiny("mixtral")
    runner = TransformersRunner(model, **SIZES, cache_tokens=96)
    model.get_input_embeddings().weight[7] = torch.nan
    drive = Drive(runner, model)
    sick, well = texts_for(model, [20, 20])
    sick[4] = 7
    drive.add(0, [t if t != 7 or i == 4 else 8 for i, t in enumerate(sick)])
    drive.add(1, [t if t != 7 else 8 for t in well])
    chunks = [drive.chunk(0, 10, 10), drive.chunk(1, 10, 10)]
    logits = runner.run(chunks)
    assert logits[4:10].isnan().all()
    assert not logits[10:].isnan().any()
    drive.leave(0)
    drive.read[1] = 10
    drive.add(2, drive.texts[1])
    assert drive.step({1: (1, 1), 2: (20, 20)}) < CLOSE


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 24,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.7 * i for i in range(8)],
}


@pytest.mark.parametrize("kind", ["phi3", "llama"])
def test_longrope_has_the_factors_of_each_whole_length(kind):
    """Prompts short and long beside each other, and one that grows beyond the original context."""
    own = {"original_max_position_embeddings": 24} if kind == "phi3" else {"head_dim": 16}
    model = tiny(kind, rope_parameters=LONGROPE, **own)
    runner = TransformersRunner(model, **SIZES)
    assert not runner.shares_prefixes
    drive = Drive(runner, model)
    for slot, text in enumerate(texts_for(model, [30, 40, 20])):
        drive.add(slot, text)
    assert drive.step({0: (20, 20), 1: (10, 0), 2: (5, 5)}) < CLOSE
    assert drive.step({0: (1, 1), 1: (10, 10), 2: (3, 3)}) < CLOSE
    assert drive.step({0: (1, 1), 1: (15, 15), 2: (1, 1)}) < CLOSE
    for _ in range(5):
        assert drive.step({0: (1, 1), 1: (1, 1), 2: (1, 1)}) < CLOSE
    assert drive.read == {0: 27, 1: 40, 2: 14}


def test_dynamic_factors_depend_on_the_length_not_on_the_chunks():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = tiny("llama", rope_parameters=rope, max_position_embeddings=16)
    runner = TransformersRunner(model, **SIZES)
    drive = Drive(runner, model)
    for slot, text in enumerate(texts_for(model, [16, 32, 40, 9])):
        drive.add(slot, text)
    drive.step({1: (12, 0), 2: (20, 0)})
    assert drive.step({0: (16, 16), 1: (20, 20), 3: (9, 9)}) < CLOSE
    in_chunks = runner.run([drive.chunk(2, 20, 20)])
    drive.read[2] = 0
    at_once = runner.run([drive.chunk(2, 40, 20)])
    assert (in_chunks - at_once).abs().max() < CLOSE


def test_int8_pages_are_near_the_16_bit_ones():
    model = tiny("llama")
    full, small = (TransformersRunner(model, **SIZES, kv_cache=k) for k in ("16bit", "int8"))
    text = texts_for(model, [40])[0]
    both = []
    for runner in (full, small):
        poison(runner)
        drive = Drive(runner, model)
        drive.add(0, text)
        drive.step({0: (30, 0)})
        both.append(runner.run([drive.chunk(0, 10, 10)]))
    off = (both[0] - both[1]).norm() / both[0].norm()
    assert 1e-5 < off < 0.05
    tokens = full.num_pages * full.page_tokens
    assert sum(t.nbytes for p in small.pools for t in p.tensors) == tokens * 4 * 2 * 2 * (32 + 4)


def test_a_quantized_model_runs(tmp_path):
    from transformers import AutoModelForCausalLM

    from halfweight import HalfweightConfig

    tiny("gemma2").save_pretrained(tmp_path)
    options = {"quantization_config": HalfweightConfig(), "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **options).eval()
    assert drive_all(TransformersRunner(model, **SIZES), model) < CLOSE


def test_the_model_is_as_it_was_between_steps():
    model = tiny("mistral")
    before = model.config._attn_implementation
    runner = TransformersRunner(model, **SIZES)
    drive = Drive(runner, model)
    text = texts_for(model, [30])[0]
    ids = torch.tensor([text])
    expected = model(ids).logits
    drive.add(0, text)
    drive.step({0: (20, 1)})
    assert model.config._attn_implementation == before
    torch.testing.assert_close(model(ids).logits, expected)


def test_layers_that_share_keys_share_a_pool():
    runner = TransformersRunner(tiny("gemma3n_text"), **SIZES)
    assert [runner.pools.index(pool) for pool in runner.pools] == [0, 1, 2, 3, 2, 3]
    spans = [Span("window", 12), Span("all")] * 3
    assert [call.span for call in runner._calls] == spans


def test_the_choice_is_logged_with_its_reason(caplog):
    caplog.set_level(logging.INFO, logger="halfweight")
    assert isinstance(make_runner(tiny("opt"), **SIZES), TransformersRunner)
    assert isinstance(make_runner(tiny("bloom"), **SIZES), StaticRunner)
    first, second = caplog.messages
    assert first.startswith("OPTForCausalLM runs by the transformers runner: up to 6 sequences")
    assert "not transformers: its attention does not go through" in second
    assert "one sequence after the other, with the model's own cache" in second


def test_a_context_too_short_for_the_trial_is_refused():
    with pytest.raises(UsageError, match="max_context is 8, expected at least 16"):
        make_runner(tiny("llama"), max_sequences=2, max_context=8)


def test_a_state_cannot_be_in_int8():
    with pytest.raises(UsageError, match="BloomForCausalLM keeps a state of its own"):
        make_runner(tiny("bloom"), **SIZES, kv_cache="int8")


def test_a_model_that_looks_ahead_is_refused():
    with pytest.raises(UsageError, match="XLNetLMHeadModel does not generate token by token"):
        make_runner(tiny("xlnet"), **SIZES)


def test_static_states_are_let_go():
    model = tiny("mamba")
    runner = StaticRunner(model, **SIZES)
    drive = Drive(runner, model)
    for slot, text in enumerate(texts_for(model, [9, 9])):
        drive.add(slot, text)
    drive.step({0: (5, 1), 1: (5, 1)})
    kept, gone = drive.pages[0][0], drive.pages[1][0]
    runner.release([gone])
    assert set(runner._sequences) == {kept}
    assert drive.step({0: (1, 1), 1: (1, 1)}) < CLOSE


def by_kernel(q, pool, places, span, manner):
    """What `attend` does on CUDA, through Triton's interpreter where there is none."""
    from halfweight.engine.runners import paged_attention

    parts = [paged_attention._decode_by_kernel(q[:1], pool, places, span, manner)]
    for piece in places.pieces:
        where = (places.positions[1:], pool, piece)
        parts.append(paged_attention._read_by_kernel(q[1:], *where, span, manner))
    return torch.cat(parts)


@pytest.mark.parametrize("attention", [attend, by_kernel])
@pytest.mark.parametrize("span", [Span(), Span("window", 5), Span("block", 6)])
@pytest.mark.parametrize("manner", [Manner(0.3), Manner(0.3, softcap=2.0), "sinks"])
@pytest.mark.parametrize("length", [19, 600])
def test_attention_over_pages_equals_its_definition(length, span, manner, attention):
    torch.manual_seed(0)
    page, heads, groups = 4, 6, 2
    device = "cuda" if attention is by_kernel and torch.cuda.is_available() else "cpu"
    manner = Manner(0.3, sinks=torch.randn(heads, device=device)) if manner == "sinks" else manner
    num = -(-length // page)
    pool = PagePool((2 * num + 1, page, groups), (8, 6), torch.float32, torch.device(device))
    for tensor in pool.tensors:
        tensor.fill_(torch.nan)
    tables = (1 + torch.randperm(2 * num, device=device)).view(2, num)
    k = torch.randn(2, length, groups, 8, device=device)
    v = torch.randn(2, length, groups, 6, device=device)
    places = torch.arange(length, device=device)
    for table, keys, values in zip(tables, k, v, strict=True):
        pool.write(table[places // page] * page + places % page, keys, values)
    q = torch.randn(1 + 7, heads, 8, device=device)
    positions = torch.cat([places[-1:], places[-7:]])
    piece = Piece(1, length - 7, 7, tables[1])
    found = attention(q, pool, Places(positions, positions, tables[:1], [piece]), span, manner)
    for row, at in enumerate(positions.tolist()):
        for head in range(heads):
            seen = slice(max(0, int(span.first(torch.tensor(at)))), at + 1)
            keys, values = (t[min(row, 1), seen, head // 3] for t in (k, v))
            scores = keys @ q[row, head] * manner.scale
            if manner.softcap:
                scores = manner.softcap * torch.tanh(scores / manner.softcap)
            sinks = [] if manner.sinks is None else [manner.sinks[head : head + 1]]
            weights = torch.cat([scores, *sinks]).softmax(0)[: len(scores)]
            torch.testing.assert_close(found[row, head], weights @ values, atol=1e-5, rtol=1e-5)


def test_the_kernel_reads_int8_pages():
    torch.manual_seed(0)
    pool = PagePool((9, 4, 2), (16, 16), torch.float32, torch.device("cpu"), int8=True)
    places = torch.arange(4, 34)
    pool.write(places, torch.randn(30, 2, 16), torch.randn(30, 2, 16))
    pages = torch.arange(1, 9)
    positions = torch.cat([places[-1:], places[:7]]) - 4
    where = Places(positions, positions, pages[None], [Piece(1, 0, 7, pages)])
    q = torch.randn(8, 4, 16)
    expected = attend(q, pool, where, Span(), Manner(0.25))
    torch.testing.assert_close(by_kernel(q, pool, where, Span(), Manner(0.25)), expected)


def test_spans_are_read_off_mask_functions():
    from transformers.masking_utils import (
        causal_mask_function,
        chunked_causal_mask_function,
        sliding_window_bidirectional_mask_function,
        sliding_window_causal_mask_function,
    )

    none = torch.zeros(1, dtype=torch.long)
    cpu = torch.device("cpu")
    assert span_of(causal_mask_function, 5000, cpu) == Span()
    assert span_of(sliding_window_causal_mask_function(1000), 5000, cpu) == Span("window", 1000)
    assert span_of(sliding_window_causal_mask_function(6000), 5000, cpu) == Span()
    assert span_of(chunked_causal_mask_function(1024, none), 5000, cpu) == Span("block", 1024)
    with pytest.raises(UnfitError, match="neither causal"):
        span_of(sliding_window_bidirectional_mask_function(1000), 5000, cpu)


def test_pages_on_a_cpu_take_half_of_its_memory_at_most(monkeypatch):
    """As many as are wanted where there is room; else a text may be no longer than they hold."""
    model = tiny("gemma2")
    room = {"max_sequences": 2, "max_context": 256}
    runner = TransformersRunner(model, **room)
    assert runner.num_pages == 1 + 2 * 256 // runner.page_tokens
    token_bytes = runner.cache_bytes // (runner.num_pages * runner.page_tokens)
    free = 2 * token_bytes * 100
    here = replace(processor_device(), free_bytes=free)
    monkeypatch.setattr("halfweight.model.share.processor_device", lambda: here)
    small = TransformersRunner(model, **room)
    assert small.num_pages == 1 + -(-100 // small.page_tokens)
