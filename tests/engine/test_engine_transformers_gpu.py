"""Runners over transformers' forward on a GPU: recorded decoding, and 16 bits."""

import pytest
import torch
from engine_architectures import tiny
from engine_drive import SIZES, Drive, drive_all, poison, texts_for

from halfweight.engine.runners.static import StaticRunner
from halfweight.engine.runners.transformers_paged import TransformersRunner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CLOSE = 1e-3
"""Largest error of a logit in float32 on a GPU."""


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss", "gemma3n_text", "deepseek_v3"])
def test_sequences_have_the_logits_of_each_alone(kind):
    model = tiny(kind).to("cuda")
    runner = TransformersRunner(model, **SIZES)
    poison(runner)
    assert drive_all(runner, model) < CLOSE


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "mixtral", "opt"])
def test_recorded_steps_follow_new_tokens_and_pages(kind):
    """transformers' experts in float32 ask the host and cannot be recorded: run as they are."""
    model = tiny(kind).to("cuda")
    runner = TransformersRunner(model, **SIZES)
    poison(runner)
    drive = Drive(runner, model)
    for turn in range(2):
        for slot, text in enumerate(texts_for(model, [40, 25, 31], seed=turn)):
            drive.add(slot, text)
            drive.step({slot: (17 + slot, 0)})
        for _ in range(6):
            assert drive.step({0: (1, 1), 1: (1, 1), 2: (1, 1)}) < CLOSE
        for slot in range(3):
            drive.leave(slot)
    recorded = [bucket.is_recorded for bucket in runner._buckets.values()]
    assert all(recorded) if kind != "mixtral" else not any(recorded)


def test_longrope_in_recorded_steps():
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 24,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.7 * i for i in range(8)],
    }
    model = tiny("llama", rope_parameters=rope, head_dim=16).to("cuda")
    drive = Drive(TransformersRunner(model, **SIZES), model)
    for slot, text in enumerate(texts_for(model, [40, 40])):
        drive.add(slot, text)
    drive.step({0: (20, 0), 1: (30, 0)})
    for _ in range(8):
        assert drive.step({0: (1, 1), 1: (1, 1)}) < CLOSE


@pytest.mark.parametrize("kind", ["bloom", "jamba"])
def test_static_sequences(kind):
    model = tiny(kind).to("cuda")
    assert drive_all(StaticRunner(model, **SIZES), model) < CLOSE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_models_pass_the_trial(dtype):
    for kind in ("llama", "mixtral", "gemma2"):
        TransformersRunner(tiny(kind).to("cuda", dtype), **SIZES)
