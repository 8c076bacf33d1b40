"""Timing and tuning of products, on the CPU: real calls, small sizes."""

import time

import pytest
import torch

from halfweight.errors import HalfweightError
from halfweight.kernels import timing, tune
from halfweight.kernels.cuda import backend, driver, tuned
from halfweight.kernels.cuda.card import Card
from halfweight.kernels.cuda.tiles import LAUNCH_US
from halfweight.kernels.triton.tables import Config

CPU = torch.device("cpu")
A_CARD = Card(82, 101376, 102400, 6 << 20, 936_000, 1695, 512)


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


def test_forms_that_are_slower_than_their_model_says_are_chosen_less(monkeypatch, tmp_path):
    """A card on which everything takes twice as long as expected, and the favourite nine times."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(driver, "card_of", lambda device: A_CARD)
    monkeypatch.setattr(tuned, "num_multiprocessors", lambda device: 82)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    backend.tune(0, {})
    sizes = (16, 6144, 4096)
    favourite = backend._plan(0, sizes, True).config.shape

    def measured(device, shape, tokens, plans):
        slowness = {plan: 9 if plan.config.shape == favourite else 2 for plan in plans}
        return {plan: slowness[plan] * (LAUNCH_US + plan.microseconds) for plan in plans}

    monkeypatch.setattr(tune, "measure_plans", measured)
    lines, a_gpu = [], torch.device("cuda", 0)
    ratios = tune.tune_tiles(a_gpu, [(6144, 4096), (512, 512)], progress=lines.append)
    assert len(lines) == 2 * len(tune.TILE_BATCHES)
    assert ratios[favourite] == pytest.approx(9)
    assert {round(ratio, 6) for shape, ratio in ratios.items() if shape != favourite} == {2}
    path = backend.tune(0, ratios)
    assert path == tmp_path / "halfweight" / "tiles-sm_86-82.json"
    assert backend._plan(0, sizes, True).config.shape != favourite
    tuned.ratios_of.cache_clear()  # another process
    assert tuned.ratios_of(0) == pytest.approx(ratios)
    assert tune.tune_tiles(a_gpu, limit_seconds=-1) == {}


def test_plans_are_timed_in_turn_and_what_does_not_compile_is_left_out(monkeypatch):
    monkeypatch.setattr(driver, "card_of", lambda device: A_CARD)
    plans, calls = tune._plans(CPU, (512, 512), 8), []

    def launch(x, packed, scales, exponents, bias, y, plan):
        calls.append(plan)
        if plan == plans[0]:
            raise HalfweightError("the kernel does not compile", hint="")

    monkeypatch.setattr(backend, "launch", launch)
    monkeypatch.setattr(timing, "MAX_COPIES", 2)
    times = tune.measure_plans(CPU, (512, 512), 8, plans)
    assert set(times) == set(plans[1:])
    assert all(us > 0 for us in times.values())
    assert set(calls) == set(plans)
