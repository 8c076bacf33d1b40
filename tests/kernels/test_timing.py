"""Timing and tuning of products, on the CPU: real calls, small sizes."""

import time

import torch

from halfweight.kernels import timing, tune
from halfweight.kernels.triton.tables import Config

CPU = torch.device("cpu")


def test_rivals_are_timed_a_call():
    slow = timing.Round([lambda: time.sleep(0.004)] * 3, CPU)
    fast = timing.Round([lambda: time.sleep(0.001)] * 2, CPU)
    times = timing.interleaved({"slow": slow, "fast": fast}, repeats=3)
    assert 4000 < times["slow"] < 40_000
    assert 1000 < times["fast"] < times["slow"]


def test_copies_of_a_weight_do_not_fit_a_cache():
    assert timing.num_copies(100_000_000) * 100_000_000 > timing.COLD_BYTES
    assert timing.num_copies(10**12) == 2
    assert timing.num_copies(1) == timing.MAX_COPIES


def test_read_bandwidth_is_that_of_a_memory():
    assert 1e8 < timing.read_bandwidth(CPU) < 1e13


def test_candidates_cover_every_batch():
    for tokens in tune.BATCHES:
        for shape in tune.SHAPES:
            assert len(tune.exact_candidates(tokens, shape)) >= 4
    assert all(c.kernel == "int8" for c in tune.int8_candidates(1024, (4096, 4096)))


def test_measured_configurations_ran(monkeypatch):
    monkeypatch.setattr(timing, "MAX_COPIES", 2)
    configs = [Config("matmul", tokens=16, rows=16), Config("no such kernel")]
    times = tune.measure_configs(CPU, (16, 128), 1, configs)
    assert list(times) == configs[:1]
    assert times[configs[0]] > 0


def test_tune_keeps_the_fastest(monkeypatch):
    fastest = Config("matmul", rows=99)

    def measured(device, shape, tokens, configs):
        return {configs[0]: 2.0, fastest: 1.0}

    monkeypatch.setattr(tune, "measure_configs", measured)
    lines = []
    table = tune.tune(CPU, [(64, 64)], progress=lines.append)
    assert len(lines) == len(tune.BATCHES) + len(tune.INT8_BATCHES)
    assert table.find(3, (64, 64)) == table.find(3, (64, 64), int8=True) == fastest
