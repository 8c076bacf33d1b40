"""The GPU runner and its kernels: interpreted here, compiled on a GPU.

Attention is compared with float64 over pages that hold NaN wherever no token is, the runner with
the model's own forward.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen3Config,
)

import halfweight
from halfweight.engine.kv_cache import quantize_heads
from halfweight.engine.runners import gpu_attention, gpu_steps
from halfweight.engine.runners.gpu import GpuRunner, unfit
from halfweight.engine.runners.gpu_attention import (
    PAGE_TOKENS,
    PagedAttention,
    Pool,
    Scratch,
    Shape,
    WorkList,
)
from halfweight.engine.runners.gpu_inputs import Queries, cut, tiles
from halfweight.engine.runners.gpu_layers import Layer
from halfweight.engine.runners.gpu_read import READ_TOKENS, ReadStep, read_buckets
from halfweight.engine.step import Chunk
from halfweight.model.modules import stack

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
MAX_PAGES = 40
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
"""Relative error of attention's output."""


class Case:
    """Sequences of given lengths in the pages of one layer, in a random order, NaN elsewhere."""

    def __init__(self, lengths, heads, head_size, dtype, kv_cache="16bit", norms=False, new=0):
        """`new`: tokens of each sequence that are in no page, the last of `lengths`."""
        self.heads, self.kv_heads = heads
        self.head_size, self.dtype, self.lengths = head_size, dtype, lengths
        self.model = attention_only(heads, head_size, dtype)
        self.layer = Layer(0, *[None] * 8)
        if norms:
            weights = (1 + 0.3 * torch.randn(2, head_size, device=DEVICE)).to(dtype)
            self.layer = Layer(0, None, None, weights[0], weights[1], *[None] * 4)
        self.tables = torch.zeros(len(lengths) + 1, MAX_PAGES, dtype=torch.int32, device=DEVICE)
        num_pages = [-(-length // PAGE_TOKENS) for length in lengths]
        order = (torch.randperm(sum(num_pages) + 3) + 1).tolist()
        for row, count in enumerate(num_pages):
            self.tables[row, :count] = torch.tensor([order.pop() for _ in range(count)])
        self.pool = Pool(Shape.of(self.model), 1, sum(num_pages) + 4, kv_cache, DEVICE)
        poison(self.pool)
        scratch = Scratch.make(Shape.of(self.model), sum(num_pages), DEVICE)
        self.attention = PagedAttention(
            self.model, self.pool, self.tables, MAX_PAGES * PAGE_TOKENS, scratch
        )
        self.keys, self.values = [], []
        new = [new] * len(lengths) if isinstance(new, int) else new
        for row, (length, count) in enumerate(zip(lengths, new, strict=True)):
            self.fill(row, length - count)

    def fill(self, row, length):
        """Random keys and values into a sequence's pages; what the pages then hold, in float64."""
        found = []
        for part, stored in enumerate((self.pool.keys, self.pool.values)):
            x = torch.randn(length, self.kv_heads, self.head_size, device=DEVICE) * (1, 0.05)[part]
            x = x.to(self.dtype)
            place = torch.arange(length, device=DEVICE)
            pages = self.tables[row].long()[place // PAGE_TOKENS]
            at = (0, pages, slice(None), place % PAGE_TOKENS)
            if self.pool.steps is None:
                stored[at] = x
                found.append(x.double())
            else:
                q, steps = quantize_heads(x)
                stored[at] = (q.int() + 128).to(torch.uint8)
                self.pool.steps[(*at, part)] = steps[..., 0]
                found.append(q.double() * steps.double())
        self.keys.append(found[0])
        self.values.append(found[1])

    def with_held(self, row, start, k, v):
        """A sequence's keys and values with the new ones as the pages hold them now; checks these
        against k and v.
        """
        place = torch.arange(start, start + len(k), device=DEVICE)
        at = (0, self.tables[row].long()[place // PAGE_TOKENS], slice(None), place % PAGE_TOKENS)
        found = []
        for part, (stored, true) in enumerate(((self.pool.keys, k), (self.pool.values, v))):
            held = stored[at].double()
            if self.pool.steps is None:
                assert error(held, true) < TOLERANCE[self.dtype]
            else:
                steps = self.pool.steps[(*at, part)].double()[..., None]
                held = (held - 128) * steps
                assert ((held - true).abs() <= steps * 0.51 + TOLERANCE[self.dtype]).all()
            found.append(held)
        return torch.cat((self.keys[row], found[0])), torch.cat((self.values[row], found[1]))

    def tiles(self, queries, out, starts, counts, first, table, at_once):
        """`PagedAttention.tiles` of chunks, in INT8 with all their pages as sources."""
        size, sources = self.attention.tile_queries, None
        if self.pool.steps is not None:
            num = pages_of(starts + counts)
            some = [self.tables[row, :n] for row, n in enumerate(num)]
            sources, table = torch.cat(some), (num.cumsum() - num).astype("int32")
        found = tiles(first.astype("int32"), counts, starts, table, size, PAGE_TOKENS)
        work = self.work(cut(found, len(queries), at_once))
        self.attention.tiles(self.layer, queries, out, work, sources)

    def qkv(self, tokens):
        width = (self.heads + 2 * self.kv_heads) * self.head_size
        return torch.randn(tokens, width, device=DEVICE).to(self.dtype)

    def split(self, qkv, positions):
        """Rotated queries and keys, and values of projected tokens, in float64."""
        heads = qkv.double().view(len(qkv), -1, self.head_size)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if self.layer.q_norm is not None:
            q, k = normed(q, self.layer.q_norm), normed(k, self.layer.k_norm)
        at = torch.tensor([positions], device=DEVICE)
        angles = self.model.model.rotary_emb(torch.empty(1, device=DEVICE), at)
        cos, sin = (t[0].double()[:, None] for t in angles)
        return rotated(q, cos, sin), rotated(k, cos, sin), v

    def expected(self, q, keys, values, position):
        """Attention of one rotated query [heads, D] over tokens up to `position`."""
        group = self.heads // self.kv_heads
        k = keys[: position + 1].repeat_interleave(group, dim=1)
        v = values[: position + 1].repeat_interleave(group, dim=1)
        scores = torch.einsum("hd,thd->ht", q, k) * self.head_size**-0.5
        return torch.einsum("ht,thd->hd", scores.softmax(dim=1), v)

    def new_token_work(self, at_once):
        """Work of decoding each sequence's last token."""
        rows, starts = array(range(len(self.lengths))), array(self.lengths) - 1
        ones = np.ones_like(rows)
        queries = Queries(rows, ones, starts, rows * MAX_PAGES, pages_of(starts))
        return cut(queries, len(rows), at_once)

    def check_new_tokens(self, qkv, found):
        """Attention [B, heads head_size] of each sequence's last token, and what the pages hold."""
        starts = [length - 1 for length in self.lengths]
        q, k, v = self.split(qkv, starts)
        for row, start in enumerate(starts):
            keys, values = self.with_held(row, start, k[row : row + 1], v[row : row + 1])
            expected = self.expected(q[row], keys, values, start)
            assert error(found[row].view_as(expected), expected) < TOLERANCE[self.dtype]

    def work(self, work):
        items, rows = (
            torch.from_numpy(a.reshape(-1)).to(DEVICE) for a in (work.items, work.row_parts)
        )
        return WorkList(items, len(work.items), rows, len(work.row_parts), work.num_parts)


def attention_only(heads, head_size, dtype):
    """A Llama of which only the sizes of attention are used."""
    config = LlamaConfig(
        hidden_size=8 * heads[0],
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=head_size,
        vocab_size=8,
    )
    return LlamaForCausalLM(config).to(dtype).to(DEVICE)


def poison(pool):
    """NaN everywhere: as steps where the numbers are bytes."""
    for tensor in (pool.keys, pool.values, pool.steps):
        if tensor is not None:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 255)


def normed(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()


def rotated(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def array(values):
    return np.array(values, np.int32)


def on_device(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def pages_of(tokens):
    return -(-tokens // PAGE_TOKENS)


def error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Every tensor made by torch.empty holds NaN, so that an element never written shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


ATTENTION = [
    # lengths, heads, head size, dtype, kv_cache, norms
    ((1, 64, 65), (4, 4), 64, torch.float32, "16bit", False),
    ((63, 200), (6, 2), 128, torch.float32, "16bit", True),
    ((130,), (8, 2), 64, torch.float16, "16bit", False),
    ((129, 3), (8, 1), 128, torch.bfloat16, "16bit", False),
    ((1, 64, 65), (4, 4), 64, torch.float32, "int8", True),
    ((190, 66), (8, 2), 128, torch.float16, "int8", False),
    ((129,), (8, 1), 64, torch.bfloat16, "int8", False),
]


@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize(("lengths", "heads", "head_size", "dtype", "kv_cache", "norms"), ATTENTION)
def test_a_new_token_of_each_sequence(lengths, heads, head_size, dtype, kv_cache, norms, at_once):
    skip_what_is_not_interpreted(dtype)
    case = Case(lengths, heads, head_size, dtype, kv_cache, norms, new=1)
    qkv = case.qkv(len(lengths))
    work = case.work(case.new_token_work(at_once))
    case.check_new_tokens(qkv, case.attention.decode(case.layer, qkv, work))


MERGED = [
    # heads, head size, dtype, kv_cache, norms
    ((6, 2), 128, torch.float32, "16bit", True),
    ((8, 2), 64, torch.float16, "int8", False),
    ((8, 1), 128, torch.bfloat16, "16bit", False),
    ((4, 4), 64, torch.bfloat16, "int8", False),
]


@pytest.mark.parametrize("least", [4, 5])
@pytest.mark.parametrize(("heads", "head_size", "dtype", "kv_cache", "norms"), MERGED)
def test_the_last_program_of_a_sequence_merges_its_parts_each_time(
    heads, head_size, dtype, kv_cache, norms, least, monkeypatch
):
    skip_what_is_not_interpreted(dtype)
    monkeypatch.setattr(gpu_attention, "LEAST_MERGED_AT_ONCE", least)
    case = Case((1, 200, 1100, 70), heads, head_size, dtype, kv_cache, norms, new=1)
    work, qkv = case.new_token_work(20), case.qkv(4)
    assert work.row_parts[:, 1].tolist() == [1, 2, 9, 2]
    launched = launches(monkeypatch)
    found = [case.attention.decode(case.layer, qkv, case.work(work)) for _ in range(3)]
    assert launched == 3 * (["attend_pages"] + ["merge_parts"] * (least > 4))
    case.check_new_tokens(qkv, found[0])
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])
    assert not case.attention._arrived.any()


def launches(monkeypatch):
    """Names of the kernels of attention that are launched from now on."""
    found, launch = [], gpu_attention.launch

    def recorded(kernel, *operands, **meta):
        found.append(kernel)
        launch(kernel, *operands, **meta)

    monkeypatch.setattr(gpu_attention, "launch", recorded)
    return found


@pytest.mark.parametrize("kind", ["few", "tiles"])
@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize(("lengths", "heads", "head_size", "dtype", "kv_cache", "norms"), ATTENTION)
def test_new_tokens_of_chunks(
    lengths, heads, head_size, dtype, kv_cache, norms, at_once, kind, monkeypatch
):
    skip_what_is_not_interpreted(dtype)
    monkeypatch.setattr(gpu_attention, "TILE_ROWS", 32)  # so that there are several tiles
    new = [min(length, 5 if kind == "few" else 70) for length in lengths]
    case = Case(lengths, heads, head_size, dtype, kv_cache, norms, new=new)
    counts = array(new)
    starts, first = array(lengths) - counts, counts.cumsum() - counts
    table = array(range(len(new))) * MAX_PAGES
    positions = [start + i for start, n in zip(starts, new, strict=True) for i in range(n)]
    qkv = case.qkv(len(positions))
    q, k, v = case.split(qkv, positions)
    queries = case.attention.write(
        case.layer, qkv, torch.from_numpy(table.repeat(new)).to(DEVICE), on_device(positions)
    )
    assert error(queries, q) < TOLERANCE[dtype]
    out = torch.empty_like(queries)
    if kind == "few":
        work = Queries(first.astype("int32"), counts, starts, table, pages_of(starts + counts))
        work = case.work(cut(work, len(positions), at_once))
        case.attention.few(case.layer, queries, out, work, 5)
    else:
        case.tiles(queries, out, starts, counts, first, table, at_once)
    for row, (start, count, begin) in enumerate(zip(starts, counts, first, strict=True)):
        some = slice(begin, begin + count)
        keys, values = case.with_held(row, start, k[some], v[some])
        for i in range(count):
            expected = case.expected(q[begin + i], keys, values, start + i)
            assert error(out[begin + i], expected) < TOLERANCE[dtype]


def skip_what_is_not_interpreted(dtype):
    if DEVICE.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter has no bfloat16 products")


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
MODELS = {
    "llama-bias": LlamaConfig(**SIZES, attention_bias=True),
    "qwen3": Qwen3Config(**SIZES),
    "qwen2-tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
}
LIMITS = {"max_sequences": 4, "max_step_tokens": 128, "cache_tokens": 11 * 64}


class Texts:
    """Sequences of random tokens and a runner that reads them as the test says."""

    def __init__(self, model, lengths, **options):
        self.model = model
        self.runner = GpuRunner(model, **(LIMITS | options))
        self.tokens = [torch.randint(0, model.config.vocab_size, (n,)) for n in lengths]
        size = self.runner.page_tokens
        order = (torch.randperm(self.runner.num_pages - 1) + 1).tolist()
        self.pages = [[order.pop() for _ in range(-(-n // size))] for n in lengths]
        self.read = [0] * len(lengths)
        for slot, text in enumerate(self.tokens):
            self.runner.table[slot, : len(text)] = text.to(DEVICE)

    def step(self, *chunks):
        """Read (slot, tokens, logits wanted); logits of each chunk and what they should be."""
        step = [
            Chunk(slot, self.read[slot], count, wanted, self.pages[slot])
            for slot, count, wanted in chunks
        ]
        found = self.runner.run(step).clone()
        expected = []
        for slot, count, wanted in chunks:
            self.read[slot] += count
            text = self.tokens[slot][: self.read[slot]].to(DEVICE)
            with torch.inference_mode():
                expected.append(self.model(text[None]).logits[0, len(text) - wanted :])
        return found, torch.cat(expected)


def quantized(tmp_path, config, dtype):
    """A random model of `config` in INT8, its norms and biases away from 1 and 0."""
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    halfweight.quantize(tmp_path / "source", tmp_path / "int8")
    return halfweight.load(tmp_path / "int8", dtype=dtype).to(DEVICE)


@pytest.mark.parametrize("kv_cache", ["16bit", "int8"])
@pytest.mark.parametrize("family", MODELS)
def test_the_runner_equals_the_models_forward(tmp_path, family, kv_cache):
    model = quantized(tmp_path, MODELS[family], torch.float32)
    texts = Texts(model, [110, 10, 80], kv_cache=kv_cache)
    steps = [
        [(0, 80, 0), (1, 3, 1)],
        [(1, 1, 1), (0, 20, 1), (2, 70, 70)],
        [(0, 1, 1), (1, 1, 0), (2, 1, 1)],
        [(1, 1, 1), (0, 3, 3), (2, 2, 1)],
        [(2, 1, 1)],
        [(0, 6, 6)],
    ]
    for chunks in steps:
        found, expected = texts.step(*chunks)
        assert found.shape == expected.shape
        assert error(found, expected) < (5e-6 if kv_cache == "16bit" else 3e-2)


def test_recorded_steps_whose_parts_are_merged_at_once_equal_the_models_forward(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(gpu_attention, "LEAST_MERGED_AT_ONCE", 2)
    monkeypatch.setattr(PagedAttention, "num_decoding_at_once", 8)
    texts = Texts(quantized(tmp_path, MODELS["llama-bias"], torch.float32), [90, 10, 72])
    for chunk in ((0, 80, 0), (1, 2, 0), (2, 66, 0)):
        texts.step(chunk)
    everyone = [(0, 1, 1), (1, 1, 1), (2, 1, 1)]
    for chunks in (everyone, everyone, [(2, 1, 1), (0, 1, 1)], [(1, 3, 3)], everyone):
        found, expected = texts.step(*chunks)
        assert error(found, expected) < 5e-6
        assert not texts.runner._parts.attention._arrived.any()
    assert texts.runner._few(3, 1)._last[1].num_parts > 0


@pytest.mark.parametrize("in_parts", [False, True])
def test_a_padded_read_equals_the_models_forward_and_the_mixed_step(
    tmp_path, in_parts, monkeypatch
):
    if in_parts:
        monkeypatch.setattr(gpu_steps, "LEAST_PAGES_OF_A_PART", 1)
        monkeypatch.setattr(PagedAttention, "num_tiles_at_once", 6)
    model = quantized(tmp_path, MODELS["llama-bias"], torch.float32)
    texts = Texts(model, [190, 12, 90])
    runner = texts.runner
    poison(runner._parts.attention._pool)
    mixed, runner._mixed = runner._mixed, None
    steps = [
        [(0, 107, 1)],
        [(0, 33, 1), (1, 9, 0), (2, 33, 2)],
        [(1, 1, 1), (0, 50, 1), (2, 57, 0)],
    ]
    for chunks in steps:
        step = [Chunk(s, texts.read[s], count, n, texts.pages[s]) for s, count, n in chunks]
        found, expected = texts.step(*chunks)
        assert error(found, expected) < 5e-6
        with torch.inference_mode():
            assert error(mixed(step), found) < 2e-6
    assert (runner._parts.prompt_work(step, 128).num_parts > 0) == in_parts


def test_which_steps_are_recorded_reads(tmp_path):
    model = quantized(tmp_path, MODELS["llama-bias"], torch.float32)
    parts = GpuRunner(model, **LIMITS)._parts
    assert ReadStep.takes(parts, [Chunk(i, 0, READ_TOKENS // 8, 1, ()) for i in range(8)])
    assert not ReadStep.takes(parts, [Chunk(i, 0, 9, 1, ()) for i in range(9)])
    assert not ReadStep.takes(parts, [Chunk(0, 0, READ_TOKENS + 1, 1, ())])
    assert not ReadStep.takes(parts, [Chunk(0, 0, 20, 9, ())])
    parts = GpuRunner(model, **LIMITS, kv_cache="int8")._parts
    assert not ReadStep.takes(parts, [Chunk(0, 0, 20, 1, ())])


def test_a_nan_in_the_pages_reaches_its_own_sequence_only(tmp_path):
    texts = Texts(quantized(tmp_path, MODELS["llama-bias"], torch.float32), [12, 12, 12])
    texts.step(*((slot, 10, 1) for slot in range(3)))
    texts.runner._parts.attention._pool.values[0, texts.pages[1][0], :, 5] = float("nan")
    for count, wanted in ((1, 1), (1, 1)):
        found, _ = texts.step(*((slot, count, wanted) for slot in range(3)))
        assert found.isnan().any(dim=1).tolist() == [False, True, False]


def test_stacked_projections_share_memory_and_still_save(tmp_path):
    model = quantized(tmp_path, MODELS["qwen2-tied"], torch.float32)
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
    ids = torch.tensor([[5, 3, 17, 9]], device=DEVICE)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_what_has_no_step_says_why(tmp_path):
    model = quantized(tmp_path, MODELS["llama-bias"], torch.float32)
    assert unfit(model) is None
    layer = model.model.layers[0]
    layer.self_attn.head_dim = 96
    assert unfit(model) == "its heads have 96 numbers, expected a power of two from 32"
    layer.self_attn.head_dim = 32
    up = layer.mlp.up_proj
    up.bias = torch.nn.Parameter(torch.zeros(up.out_features))
    assert unfit(model) == "projections that share their input differ in group size, scales or bias"
    plain = LlamaForCausalLM(MODELS["llama-bias"])
    assert unfit(plain) == "not every linear of its layers is in INT8"


MIDDLE = LlamaConfig(
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=1000,
    max_position_embeddings=2048,
)
COMPILED = {"max_sequences": 48, "max_step_tokens": 4096, "cache_tokens": 699 * 64}
WHOLE = {torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""How far logits may be from the model's own forward."""


@pytest.mark.gpu
@pytest.mark.parametrize("kv_cache", ["16bit", "int8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 3, 40])
def test_recorded_and_mixed_steps(tmp_path, batch, dtype, kv_cache):
    model = quantized(tmp_path, MIDDLE, dtype)
    lengths = [760 - 7 * i for i in range(batch)]
    texts = Texts(model, lengths, kv_cache=kv_cache, **COMPILED)
    half = batch // 2
    steps = [[(i, 300 - 7 * i, 1)] for i in range(half)]
    steps.append(
        [(i, 1, 1) for i in range(half)] + [(i, 300 - 7 * i, 1) for i in range(half, batch)]
    )
    steps += [[(i, 1, 1) for i in range(batch)]] * 4
    steps += [[(i, 8 - i, 2) for i in range(min(batch, 4))]] * 3
    for chunks in steps:
        found, expected = texts.step(*chunks)
        assert error(found, expected) < WHOLE[dtype] + 2e-2 * (kv_cache == "int8")


@pytest.mark.gpu
@pytest.mark.parametrize("kv_cache", ["16bit", "int8"])
def test_parts_merged_at_once_are_the_same_in_many_launches(kv_cache):
    lengths = tuple(2500 - 101 * i for i in range(24))
    case = Case(lengths, (32, 8), 128, torch.float16, kv_cache, new=1)
    assert len(lengths) >= gpu_attention.LEAST_MERGED_AT_ONCE
    work, qkv = case.work(case.new_token_work(100)), case.qkv(len(lengths))
    found = [case.attention.decode(case.layer, qkv, work) for _ in range(300)]
    case.check_new_tokens(qkv, found[0])
    assert all(torch.equal(again, found[0]) for again in found)
    assert not case.attention._arrived.any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_reads_of_every_bucket_plain_recorded_and_replayed(tmp_path, dtype):
    texts = Texts(quantized(tmp_path, MIDDLE, dtype), [2000] * 3, **COMPILED)
    runner = texts.runner
    for slot in range(3):
        found, expected = texts.step((slot, 2000, 1))
        assert error(found, expected) < WHOLE[dtype]
    mixed, runner._mixed = runner._mixed, None
    for tokens in [*(bucket - 19 for bucket in read_buckets(READ_TOKENS)), READ_TOKENS]:
        for turn in range(3):
            counts = tokens - tokens // 2 - tokens // 3, tokens // 3, tokens // 2
            starts = 0, 800 * turn, 37 * turn
            step = [Chunk(i, starts[i], counts[i], 1, texts.pages[i]) for i in range(3)]
            found = runner.run(step).clone()
            with torch.inference_mode():
                assert error(found, mixed(step)) < WHOLE[dtype]


@pytest.mark.gpu
def test_the_pool_fills_what_is_free_and_a_largest_step_still_fits(tmp_path):
    model = quantized(tmp_path, MIDDLE, torch.float16)
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(6e9 / total, DEVICE)
    try:
        runner = GpuRunner(model, max_sequences=64, max_context=65536, max_step_tokens=8192)
        assert runner.num_pages * 64 * 2 * 2 * 2 * 128 * 2 > 3e9
        pages = list(range(1, 129))
        runner.run([Chunk(0, 0, 8192, 1, pages)])
        runner.run([Chunk(i, 100, 1, 1, [200 + 2 * i, 201 + 2 * i]) for i in range(16)])
        torch.cuda.synchronize()
        runner.close()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
