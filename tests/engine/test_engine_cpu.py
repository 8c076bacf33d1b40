"""The CPU runner against transformers' forward, and against itself in other company."""

import os
import random
import subprocess
import sys

import llvmlite.binding as llvm
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

import halfweight
from halfweight.engine.runners.cpu import CpuRunner, cut, unsupported
from halfweight.engine.runners.unfit import UnfitError
from halfweight.engine.step import Chunk
from halfweight.errors import DoesNotFitError
from halfweight.kernels.cpu import batch_cells

VOCAB = 323
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 1024,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILY = {
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-3": LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    "llama-bias": LlamaConfig(**SIZES, attention_bias=True),
    "groups-of-32": LlamaConfig(**{**SIZES, "hidden_size": 96}, head_dim=16),
    "wide-heads": Qwen3Config(
        **{**SIZES, "num_attention_heads": 6, "num_key_value_heads": 2}, head_dim=80
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Random models in INT8 by family and dtype, their norms and biases away from 1 and 0."""
    loaded = {}

    def of(family, dtype=torch.float32):
        folder = tmp_path_factory.getbasetemp() / f"cpu-runner-{family}"
        if not folder.exists():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(FAMILY[family])
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.data += 0.3 * torch.randn_like(parameter)
            model.to(torch.bfloat16).save_pretrained(folder / "source")
            halfweight.quantize(folder / "source", folder / "int8")
        if (family, dtype) not in loaded:
            loaded[family, dtype] = halfweight.load(folder / "int8", dtype=dtype)
        return loaded[family, dtype]

    return of


class Sequences:
    """A runner with a pool of pages, taken in random order, and what each slot has read."""

    def __init__(self, model, *, max_sequences=32, cache_tokens=8192, max_context=768, **options):
        self.runner = CpuRunner(
            model,
            max_sequences=max_sequences,
            max_context=max_context,
            cache_tokens=cache_tokens,
            **options,
        )
        self.free = list(range(1, self.runner.num_pages))
        random.Random(0).shuffle(self.free)
        self.pages = [[] for _ in range(max_sequences)]
        self.length = [0] * max_sequences

    def write(self, slot, ids):
        """Put ids into the table, behind what the slot has read."""
        begin = self.length[slot]
        self.runner.table[slot, begin : begin + len(ids)] = torch.as_tensor(ids, dtype=torch.int32)

    def chunk(self, slot, num_tokens, num_logits=None):
        """The next tokens of a slot; logits of all of them by default."""
        start, end = self.length[slot], self.length[slot] + num_tokens
        while len(self.pages[slot]) * self.runner.page_tokens < end:
            self.pages[slot].append(self.free.pop())
        self.length[slot] = end
        wanted = num_tokens if num_logits is None else num_logits
        return Chunk(slot, start, num_tokens, wanted, self.pages[slot])

    def run(self, *chunks):
        return self.runner.run(chunks).clone()

    def alone(self, slot, ids, cuts):
        """All logits of ids, read in chunks of these sizes."""
        self.write(slot, ids)
        return torch.cat([self.run(self.chunk(slot, count)) for count in cuts])


def ids_of(length, seed=1):
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("family", FAMILY)
def test_odd_chunks_and_decoding_equal_the_models_forward(models, family):
    model, ids = models(family), ids_of(110)
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    found = Sequences(model).alone(3, ids, [7, 33, 1, 1, 19, 45, 1, 1, 1, 1])
    assert found.dtype == torch.float32
    for position in range(110):
        assert error(found[position], expected[position]) < 5e-6, position


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_pages(models, dtype):
    model, ids = models("llama-3", dtype), ids_of(110)
    with torch.inference_mode():
        forward = model(ids[None]).logits[0].float()
        exact = models("llama-3")(ids[None]).logits[0]
    sequences = Sequences(model)
    found = sequences.alone(0, ids, [64, 45, 1])
    assert error(found, exact) < min(5e-3, error(forward, exact))
    step = sequences.runner._step
    assert {pages.dtype for pages in step._kept[1].keys} == {dtype}


def test_int8_pages(models):
    model, ids = models("qwen3", torch.bfloat16), ids_of(110)
    with torch.inference_mode():
        exact = models("qwen3")(ids[None]).logits[0]
    found = Sequences(model, kv_cache="int8").alone(0, ids, [40, 69, 1])
    assert error(found, exact) < 1e-2
    assert error(found, exact) > 1e-4


CUTS = {0: [110], 1: [1, 32, 31, 1, 45], 2: [3] * 36 + [2], 3: [109, 1], 4: [64, 46]}


@pytest.mark.parametrize("kv_cache", ["16bit", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_however_a_prompt_is_cut(models, dtype, kv_cache):
    model, ids = models("llama-tied", dtype), ids_of(110)
    found = []
    for slot, cuts in CUTS.items():
        found.append(Sequences(model, kv_cache=kv_cache).alone(slot, ids, cuts))
    for other in found[1:]:
        assert torch.equal(other, found[0])


@pytest.mark.parametrize("family", ["llama-tied", "groups-of-32", "qwen2", "wide-heads"])
@pytest.mark.parametrize("count", [2, 5, 8, 17, 32])
def test_the_same_bits_whatever_runs_beside(models, family, count):
    model = models(family, torch.bfloat16)
    texts = [ids_of(5 + 13 * slot % 90, seed=slot) for slot in range(count)]
    alone = []
    for slot, ids in enumerate(texts):
        alone.append(Sequences(model).alone(slot, ids, [len(ids) - 3, 1, 1, 1])[-3:])
    together = Sequences(model)
    for slot, ids in enumerate(texts):
        together.write(slot, ids)
    random.Random(1).shuffle(together.free)
    prompts = [together.chunk(slot, len(ids) - 3, 1) for slot, ids in enumerate(texts)]
    assert together.run(*prompts).shape == (count, VOCAB)
    steps = [together.run(*(together.chunk(slot, 1) for slot in range(count))) for _ in range(3)]
    for slot in range(count):
        assert torch.equal(torch.stack([step[slot] for step in steps]), alone[slot])


def test_prompts_verified_drafts_and_decoding_share_a_step(models):
    model = models("llama-3")
    sequences, texts = Sequences(model), [ids_of(n, seed=n) for n in (41, 70, 200, 9)]
    for slot, ids in enumerate(texts):
        sequences.write(slot, ids)
    for slot, count in ((0, 40), (1, 62), (2, 100)):
        sequences.run(sequences.chunk(slot, count, 0))
    found = sequences.run(
        sequences.chunk(0, 1, 1),
        sequences.chunk(1, 8, 8),
        sequences.chunk(2, 100, 1),
        sequences.chunk(3, 9, 0),
    )
    assert found.shape == (10, VOCAB)
    with torch.inference_mode():
        whole = [model(ids[None]).logits[0] for ids in texts]
    expected = torch.cat([whole[0][-1:], whole[1][-8:], whole[2][-1:]])
    assert error(found, expected) < 5e-6


@pytest.mark.parametrize("length", [31, 32, 33, 63, 64, 65, 300])
def test_at_the_borders_of_pages(models, length):
    model, ids = models("qwen2"), ids_of(length + 1)
    with torch.inference_mode():
        expected = model(ids[None]).logits[0, -2:]
    found = Sequences(model).alone(0, ids, [length, 1])
    assert error(found[-2:], expected) < 5e-6


@pytest.mark.parametrize("kv_cache", ["16bit", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_was_in_the_pages_does_not_leak(models, dtype, kv_cache):
    model, ids = models("llama-3", dtype), ids_of(77)
    clean = Sequences(model, kv_cache=kv_cache)
    poisoned = Sequences(model, kv_cache=kv_cache)
    for sequences, value in ((clean, 0), (poisoned, 0xFF)):
        pages = sequences.runner._step._kept[1]
        for tensor in (*pages.keys, *pages.values):
            tensor.view(torch.uint8).fill_(value)
    found = [s.alone(0, ids, [30, 40, 1, 6]) for s in (clean, poisoned)]
    assert torch.equal(*found)
    assert not found[0].isnan().any()


def test_a_nan_stays_in_its_sequence(models):
    model = models("llama-tied", torch.bfloat16)
    sequences = Sequences(model)
    for slot in range(3):
        sequences.write(slot, ids_of(50, seed=slot))
    sequences.run(*(sequences.chunk(slot, 49, 0) for slot in range(3)))
    clean = Sequences(model)
    expected = [clean.alone(slot, ids_of(50, seed=slot), [49, 1])[-1] for slot in range(3)]
    pages = sequences.runner._step._kept[1]
    pages.values[0][sequences.pages[1][0]] = float("nan")
    found = sequences.run(*(sequences.chunk(slot, 1) for slot in range(3)))
    assert found[1].isnan().all()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[2], expected[2])


def test_a_shared_prefix_is_read_from_the_same_pages(models):
    model, ids = models("qwen3", torch.bfloat16), ids_of(90)
    sequences = Sequences(model)
    first = sequences.alone(0, ids, [90])
    sequences.pages[1] = sequences.pages[0][:2]
    sequences.length[1] = 64
    sequences.write(1, ids[64:])
    assert torch.equal(sequences.run(sequences.chunk(1, 26)), first[64:])


def test_any_number_of_threads_gives_the_same_bits(models):
    model, ids = models("llama-3", torch.bfloat16), ids_of(90)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(Sequences(model).alone(0, ids, [50, 38, 1, 1]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_matrix_unit_gives_the_same_bits(models, dtype):
    model, ids = models("qwen2", dtype), ids_of(90)
    by_matrix, plain = Sequences(model), Sequences(model)
    cells = plain.runner._step._arguments.cells
    if not cells[batch_cells.MATRIX]:
        pytest.skip("this CPU has no matrix unit")
    cells[batch_cells.MATRIX] = 0
    found = [s.alone(0, ids, [32, 20, 9, 29]) for s in (by_matrix, plain)]
    assert torch.equal(*found)


def test_models_without_a_compiled_step_are_unfit(models):
    sizes = {"max_sequences": 1, "max_context": 64}
    phi = AutoModelForCausalLM.from_config(Phi3Config(**SIZES, pad_token_id=0))
    with pytest.raises(UnfitError, match="Phi3ForCausalLM is not one of"):
        CpuRunner(phi, **sizes)
    narrow = models("llama-tied")
    attention = narrow.model.layers[0].self_attn
    try:
        attention.head_dim = 24
        assert unsupported(narrow) == "its heads are not a multiple of 16 wide"
    finally:
        attention.head_dim = 16
    assert unsupported(narrow) is None


def test_what_is_not_in_int8_has_no_compiled_step(tmp_path):
    plain = AutoModelForCausalLM.from_config(FAMILY["llama-bias"])
    assert unsupported(plain) == "not every linear of its layers is in INT8"
    plain.save_pretrained(tmp_path / "source")
    halfweight.quantize(tmp_path / "source", tmp_path / "int8")
    model = halfweight.load(tmp_path / "int8")
    embedding = model.model.embed_tokens
    model.model.embed_tokens = torch.nn.Embedding(VOCAB, 64)
    assert unsupported(model) == "its embedding is not in INT8"
    model.model.embed_tokens = embedding
    model.lm_head = torch.nn.Linear(64, VOCAB)
    assert unsupported(model) == "not every linear is in INT8 on the backend 'cpu'"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_act": "gelu"}, "its activation is gelu, not silu"),
        ({"sliding_window": 8}, "its layers attend to a sliding window"),
    ],
    ids=str,
)
def test_variants_that_differ_have_no_compiled_step(change, reason):
    config = MistralConfig(**{**SIZES, "sliding_window": None, **change})
    assert unsupported(AutoModelForCausalLM.from_config(config)) == reason


def test_pages_for_what_is_asked_or_what_memory_allows(models, monkeypatch):
    model = models("llama-tied", torch.bfloat16)
    sizes = {"max_sequences": 3, "max_context": 100}
    runner = CpuRunner(model, **sizes)
    assert runner.num_pages == 1 + 3 * 4
    assert runner.table.shape == (4, 101)
    assert CpuRunner(model, **sizes, cache_tokens=64).num_pages == 1 + 2
    page = 2 * 2 * 2 * 16 * 2 * runner.page_tokens
    memory = "halfweight.engine.runners.cpu.processor_device"
    device = type("Device", (), {"free_bytes": 2 * 5 * page})
    monkeypatch.setattr(memory, lambda: device)
    assert CpuRunner(model, **sizes).num_pages == 1 + 5
    assert CpuRunner(model, **sizes, kv_cache="int8").num_pages == 1 + 8
    device.free_bytes = 2 * 3 * page
    with pytest.raises(DoesNotFitError, match="a sequence of 100 tokens needs"):
        CpuRunner(model, **sizes)
    shorter = CpuRunner(model, **sizes, shortens=True)
    assert (shorter.num_pages, shorter.max_context, shorter.table.shape) == (4, 96, (4, 97))
    device.free_bytes = page
    with pytest.raises(DoesNotFitError, match="a sequence of 100 tokens needs"):
        CpuRunner(model, **sizes, shortens=True)


def test_a_step_is_cut_into_calls():
    chunks = [Chunk(0, 5, 1, 1, [1]), Chunk(1, 0, 60, 31, [2, 3]), Chunk(2, 0, 3, 0, [4])]
    found = [
        [(c.slot, c.start, c.num_tokens, c.num_logits) for c in pieces]
        for pieces in cut(chunks, 32)
    ]
    assert found == [
        [(0, 5, 1, 1), (1, 0, 31, 2)],
        [(1, 31, 29, 29), (2, 0, 3, 0)],
    ]
    assert list(cut([], 32)) == []


def test_a_cpu_without_vnni_gives_the_same_bits_too():
    """Some of these tests on AVX2 alone, in a process of its own."""
    if not llvm.get_host_cpu_features().get("avx2"):
        pytest.skip("needs a CPU with AVX2")
    environment = os.environ | {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+f16c",
    }
    wanted = "(odd_chunks and (groups or qwen2)) or (beside and 5 and llama) or leak"
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", wanted]
    command += ["-p", "no:cacheprovider"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("." * 7), done.stdout
