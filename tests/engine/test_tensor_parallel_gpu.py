"""Ranks on GPUs: over NCCL where there are two, recorded as graphs; two on one GPU over gloo."""

import os
import signal
import time

import pytest
import sum_ranks
import torch
import tp_models
from near_ties import assert_same

import halfweight
from halfweight.engine.loop import EngineStoppedError
from halfweight.engine.parallel import ranks as ranks_module
from halfweight.engine.runners.gpu import GpuRunner

pytestmark = pytest.mark.gpu
PROMPTS = [[5, 9, 33, 70, 11, 200, 3], [100, 2, 77, 41], list(range(3, 180))]
OPTIONS = {"max_new_tokens": 24, "temperature": 0, "stop_tokens": (), "num_logprobs": 2}
NEAR = 0.26
"""Nats between the two likeliest tokens of a near tie in bfloat16."""
PLACES = {"nccl": ["cuda:0", "cuda:1"], "gloo": ["cuda:0", "cuda:0"]}


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "mixtral"])
def folder(request, tmp_path_factory):
    return tp_models.make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("link", PLACES)
@pytest.mark.parametrize("kv_cache", ["16bit", "int8"])
def test_ranks_on_gpus_answer_as_one(folder, link, kv_cache):
    if link == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    limits = {"max_context": 256, "max_sequences": 4, "cache_tokens": 2048, "kv_cache": kv_cache}
    with halfweight.Engine(folder, device="cuda:0", **limits) as engine:
        expected = engine.generate(PROMPTS, **OPTIONS)
        own = isinstance(engine._loop._runner, GpuRunner)
    with halfweight.Engine(folder, tensor_parallel=2, devices=PLACES[link], **limits) as engine:
        assert isinstance(engine._loop._runner._own, GpuRunner) == own
        for _ in range(3):  # as it is, recorded, replayed
            found = engine.generate(PROMPTS, **OPTIONS)
            for one, other in zip(found, expected, strict=True):
                assert_same(one, other, NEAR, within=NEAR)
        assert all(rank.peak_bytes > 0 for rank in engine.ranks)


def on_two(folder, **options):
    """An engine over two GPUs."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    limits = {"max_context": 4096, "max_sequences": 4, "cache_tokens": 16384}
    return halfweight.Engine(folder, tensor_parallel=2, devices=PLACES["nccl"], **limits, **options)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tp_models.make("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("reaches", [True, False], ids=["symmetric", "nccl"])
def test_a_rank_that_hangs_ends_the_job_while_the_gpus_wait(llama, reaches, monkeypatch):
    """Rank 0's GPU waits in a kernel, for a sum that never comes, by either way."""
    if not reaches:
        monkeypatch.setenv("HALFWEIGHT_PEER_READS", "0")
    with on_two(llama) as engine:
        assert (engine._loop._runner._link._near is not None) == reaches
        (pid,) = [member.process.pid for member in engine.ranks]
        engine.generate(PROMPTS, **OPTIONS)
        monkeypatch.setattr(ranks_module, "SILENCE_SECONDS", 5)
        request = engine.request(PROMPTS[0], **OPTIONS | {"max_new_tokens": 4000})
        stream = iter(engine.open(request))
        next(stream)
        os.kill(pid, signal.SIGSTOP)
        begin = time.monotonic()
        with pytest.raises(EngineStoppedError, match=r"rank 1 .* has said nothing for"):
            list(stream)
        assert time.monotonic() - begin < 25
        torch.cuda.synchronize()  # nothing waits any more


def test_which_sums_go_by_memory(llama):
    with on_two(llama) as engine:
        near = engine._loop._runner._link._near
        assert near is not None
        sizes = [(torch.bfloat16, 8), (torch.float16, 98304), (torch.float32, 1 << 21)]
        assert all(near.takes(torch.empty(n, dtype=d, device="cuda:0")) for d, n in sizes)
        others = [(torch.bfloat16, 7), (torch.int32, 8), (torch.float32, (1 << 21) + 4)]
        assert not any(near.takes(torch.empty(n, dtype=d, device="cuda:0")) for d, n in others)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_sums_by_memory_are_float32_sums_rounded_once(ranks):
    """In a graph of many replays and outside, of numbers that change, on ranks that are late."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    sum_ranks.on_gpus(sum_ranks.check_sums, ranks, 1000, seconds=100)


def test_sums_that_wait_for_a_lost_rank_end_when_told():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    sum_ranks.on_gpus(sum_ranks.check_giving_up, 2, seconds=60)
