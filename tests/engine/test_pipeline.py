"""Stages on several devices give what one device gives: on CPUs to the bit."""

import pytest
import torch
import tp_models

import halfweight
from halfweight.checkpoint.headers import read_headers
from halfweight.engine.pipeline.runner import StagedRunner
from halfweight.engine.runners import make_runner
from halfweight.engine.runners.cpu import CpuRunner
from halfweight.engine.runners.gpu import GpuRunner
from halfweight.engine.step import Chunk
from halfweight.memory.pipeline import Stage
from halfweight.model.stage import load_stage

LAYERS = 4
DEEP = {"num_hidden_layers": LAYERS, "layer_types": ["full_attention"] * LAYERS}
CHANGES = {
    "llama": {"num_hidden_layers": LAYERS},
    "qwen2": DEEP,
    "qwen3": DEEP,
    "mixtral": {"num_hidden_layers": LAYERS},
    "qwen3_moe": DEEP | {"mlp_only_layers": [2]},
}
KINDS = ("llama", "qwen2", "qwen3", "mixtral", "qwen3_moe")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of models of four layers by kind, made when asked for."""
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = tp_models.make(kind, tmp_path_factory.mktemp(kind), **CHANGES[kind])
        return made[kind]

    return of


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """The same of two layers."""
    return lambda kind: tp_models.make(kind, tmp_path_factory.mktemp(kind))


def stages_at(*ends):
    """Stages on the CPU that end at these layers."""
    begins = (0, *ends[:-1])
    return [
        Stage("cpu", "cpu", begin, end, begin == 0, end == ends[-1])
        for begin, end in zip(begins, ends, strict=True)
    ]


def staged(folder, stages, dtype, makers=None, **limits):
    """A runner over these stages; `makers` of their own runners."""
    checkpoint = read_headers(folder)
    loaded = [load_stage(checkpoint, stage, STEP_TOKENS, dtype=dtype) for stage in stages]
    makers = makers or [make_runner] * len(stages)
    limits = LIMITS | limits
    runners = [make(model, **limits) for make, model in zip(makers, loaded, strict=True)]
    return StagedRunner(loaded, runners, STEP_TOKENS)


STEP_TOKENS = 96


LIMITS = {"max_sequences": 4, "max_context": 128, "cache_tokens": 256}
TEXT = 75
"""Tokens of each text: more than a page of any runner."""


def steps(page_tokens):
    """A prompt in chunks, one beside another, both decoding, drafts, tokens without logits."""

    def chunk(slot, start, num, num_logits):
        pages = range(1 + slot, 100, 2)[: -(-(start + num) // page_tokens)]
        return Chunk(slot, start, num, num_logits, list(pages))

    yield [chunk(0, 0, 40, 0)]
    yield [chunk(0, 40, 20, 1), chunk(1, 0, 30, 3)]
    yield [chunk(1, 30, 30, 30)]
    for at in range(60, 64):
        yield [chunk(0, at, 1, 1), chunk(1, at, 1, int(at != 61))]
    yield [chunk(1, 64, 1, 1), chunk(0, 64, 5, 5)]
    yield [chunk(0, 69, 4, 4), chunk(1, 65, 3, 3)]


def logits_of(runner, steps=steps):
    """All logits of `steps`, in float32."""
    for slot in range(2):
        ids = [(7 * i * i + 3 * i + 11 * slot + 1) % runner.vocab_size for i in range(TEXT)]
        runner.table[slot, :TEXT] = torch.tensor(ids, dtype=torch.int32)
    with torch.inference_mode():
        found = [runner.run(step).float().clone() for step in steps(runner.page_tokens)]
    return torch.cat(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stages_on_cpus_are_one_cpu_to_the_bit(models, kind, dtype):
    folder = models(kind)
    whole = make_runner(halfweight.load(folder, dtype=dtype), **LIMITS)
    expected = logits_of(whole)
    assert expected.argmax(dim=1).unique().numel() > 10
    assert isinstance(whole, CpuRunner) == (kind in ("llama", "qwen2", "qwen3"))
    for ends in ((2, 4), (1, 3, 4)):
        runner = staged(folder, stages_at(*ends), dtype)
        assert {type(stage.runner) for stage in runner.stages} == {type(whole)}
        assert torch.equal(logits_of(runner), expected), ends


def short_steps(page_tokens):
    """Each way that the GPU's runner has for a step: reads, decodes, verifies, and one by one."""

    def chunk(slot, start, num, num_logits):
        return Chunk(slot, start, num, num_logits, [1 + slot])

    yield [chunk(0, 0, 5, 0)]
    yield [chunk(0, 5, 3, 1), chunk(1, 0, 9, 2)]
    yield [chunk(0, 8, 1, 0), chunk(1, 9, 1, 1)]
    yield [chunk(1, 10, 1, 1), chunk(0, 9, 4, 3)]
    yield [chunk(0, 13, 12, 12)]


@pytest.mark.parametrize(("kind", "kv_cache"), [("llama", "16bit"), ("qwen3", "int8")])
def test_stages_on_gpus_are_one_gpu_to_the_bit(shallow, kind, kv_cache):
    """By the GPU's runner, interpreted."""
    folder, dtype, limits = shallow(kind), torch.bfloat16, LIMITS | {"kv_cache": kv_cache}
    expected = logits_of(GpuRunner(halfweight.load(folder, dtype=dtype), **limits), short_steps)
    runner = staged(folder, stages_at(1, 2), dtype, [GpuRunner] * 2, kv_cache=kv_cache)
    assert torch.equal(logits_of(runner, short_steps), expected)


@pytest.mark.parametrize("makers", [(GpuRunner, CpuRunner), (CpuRunner, GpuRunner)])
def test_a_gpu_and_a_cpu_are_near_one_device(shallow, makers):
    """Pages of 64 tokens here and 32 there, states in the model's dtype and in float32."""
    folder, dtype = shallow("qwen2"), torch.float32
    whole = CpuRunner(halfweight.load(folder, dtype=dtype), **LIMITS)
    expected = logits_of(whole, short_steps)
    runner = staged(folder, stages_at(1, 2), dtype, makers)
    assert (runner.page_tokens, runner.num_pages) == (64, 4)
    error = (logits_of(runner, short_steps) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5
