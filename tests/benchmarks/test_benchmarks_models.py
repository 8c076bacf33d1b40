"""The benchmarks of whole models, on a tiny one: each writes a result with all it needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import batch
import greedy
import pytest
import torch
from tiny import make_llama

import halfweight

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def search(limit, most, guess=1):
    """What `next_try` finds if batches up to `limit` complete, and what it tried."""
    good, bad, tried = 0, None, []
    while (size := batch.next_try(good, bad, most, guess)) is not None:
        tried.append(size)
        good, bad = (size, bad) if size <= limit else (good, size)
    return good, tried


@pytest.mark.parametrize("most", [1, 5, 64, 200])
@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 13, 28, 63, 64, 500])
def test_the_search_finds_the_largest_batch(limit, most):
    good, tried = search(limit, most)
    assert good == min(limit, most)
    assert len(tried) == len(set(tried)) <= 18
    assert max(tried) <= most


@pytest.mark.parametrize("limit", [0, 5, 12, 26, 40])
def test_a_good_guess_saves_tries(limit):
    good, tried = search(limit, 256, guess=max(1, limit - 1))
    assert good == limit
    assert len(tried) <= 4


def test_a_parting_is_judged_by_the_gap_where_it_happens():
    assert greedy.Parting("p", 3, 9e-4, 1e-6).is_near_tie
    assert not greedy.Parting("p", 3, 2e-3, 0.016).is_near_tie
    assert greedy.parting(None, "p", [1], (1, 2), (1, 2)) is None


@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.float32, torch.int32), (torch.bfloat16, torch.int16)]
)
def test_a_parting_has_the_models_own_gap_and_the_spacing_of_its_numbers(tmp_path, dtype, bits):
    halfweight.quantize(make_llama(tmp_path / "model", dtype=dtype), tmp_path / "out")
    model = halfweight.load(tmp_path / "out", dtype=dtype)
    ids, ours = [1, 2, 3], [5, 6, 7]
    found = greedy.parting(model, "p", ids, ours, [5, 6, 8])
    assert found.position == 2
    logits = model(torch.tensor([[*ids, 5, 6]])).logits[0, -1].float()
    first, second = logits.topk(2).values
    assert found.gap == pytest.approx(float(first - second), abs=1e-5)
    best = first.abs().to(dtype)
    after = (best.view(bits) + 1).view(dtype)
    assert found.spacing == pytest.approx(float(after - best))


@pytest.mark.parametrize(
    ("script", "options", "keys"),
    [
        ("load", ["--repeats", "1"], {"shape", "runs", "comparison"}),
        (
            "generate",
            ["--rivals", "halfweight", "--batches", "1", "--tokens", "4", "4", "--repeats", "1"],
            {"shape", "workload", "rows", "speedups"},
        ),
        (
            "batch",
            ["--most", "2", "--context", "24", "--variants", "INT8 weights and cache"],
            {"shape", "context", "attempts", "largest"},
        ),
    ],
)
def test_a_benchmark_runs_and_writes(tmp_path, script, options, keys):
    arguments = [f"{script}.py", "--tiny", "--out", str(tmp_path), *options]
    environment = os.environ | {
        "PYTHONPATH": str(BENCHMARKS.parent),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run(
        [sys.executable, *arguments], cwd=BENCHMARKS, check=True, env=environment, timeout=500
    )
    found = json.loads((tmp_path / f"{script}.json").read_text())
    assert found["results"].keys() == keys
    assert {"command", "commit", "device", "versions", "ceiling"} <= found.keys()
