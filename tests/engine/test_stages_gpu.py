"""Stages on GPUs, recorded as graphs, give what one GPU gives; on a GPU and the CPU nearly so."""

import pytest
import torch
import tp_models
from near_ties import assert_same
from stage_steps import LIMITS, logits_of, short_steps, staged, stages_at

import halfweight
from halfweight.engine.pipeline.runner import StagedRunner
from halfweight.engine.runners import make_runner
from halfweight.engine.runners.gpu import GpuRunner

pytestmark = pytest.mark.gpu
PROMPTS = [[5, 9, 33, 70, 11, 200, 3], [100, 2, 77, 41], list(range(3, 180))]
OPTIONS = {"max_new_tokens": 24, "temperature": 0, "stop_tokens": (), "num_logprobs": 2}
NEAR = 0.26
"""Nats between the two likeliest tokens of a near tie in bfloat16."""
PLACES = (("cuda:0", "cuda:0"), ("cuda:0", "cuda:1"), ("cuda:1", "cuda:0"))


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "mixtral"])
def folder(request, tmp_path_factory):
    return tp_models.make(request.param, tmp_path_factory.mktemp(request.param))


def skip_without(places):
    if "cuda:1" in places and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")


@pytest.mark.parametrize("places", PLACES, ids="-".join)
@pytest.mark.parametrize("kv_cache", ["16bit", "int8"])
def test_states_that_pass_between_gpus_are_those_of_one(folder, places, kv_cache):
    skip_without(places)
    limits = {"kv_cache": kv_cache}
    whole = make_runner(halfweight.load(folder, device=places[0]), **LIMITS | limits)
    runner = staged(folder, stages_at(1, 2, devices=places), None, **limits)
    for _ in range(3):  # steps run as they are, are recorded, and are replayed
        found, expected = logits_of(runner, short_steps), logits_of(whole, short_steps)
        if isinstance(whole, GpuRunner):
            assert torch.equal(found, expected)
        assert (found - expected).abs().max() <= 2e-2 * expected.abs().max()


@pytest.mark.parametrize("places", [*PLACES, ("cuda:0", "cpu"), ("cpu", "cuda:0")], ids="-".join)
@pytest.mark.parametrize("kv_cache", ["16bit", "int8"])
def test_an_engine_over_stages_answers_as_one_gpu(folder, places, kv_cache, monkeypatch):
    skip_without(places)
    limits = {"max_sequences": 8, "max_context": 256, "cache_tokens": 2048, "kv_cache": kv_cache}
    with halfweight.Engine(folder, device="cuda:0", **limits) as engine:
        expected = engine.generate(PROMPTS, **OPTIONS)
    monkeypatch.setattr("halfweight.memory.pipeline._most_layers", lambda *_: 1)  # of two
    with halfweight.Engine(folder, devices=list(places), **limits) as engine:
        runner = engine._loop._runner
        assert isinstance(runner, StagedRunner)
        assert [str(stage.runner.device) for stage in runner.stages] == list(places)
        for _ in range(2):
            found = engine.generate(PROMPTS, **OPTIONS)
            for one, other in zip(found, expected, strict=True):
                assert_same(one, other, NEAR)
