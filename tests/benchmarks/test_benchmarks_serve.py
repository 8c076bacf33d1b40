"""The serving benchmark, on a tiny model: rows of every runner, each written when it is there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import serve

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_it_runs_and_writes(tmp_path):
    pytest.importorskip("uvicorn")
    arguments = ["serve.py", "--tiny", "--out", str(tmp_path), "--most", "2"]
    environment = os.environ | {
        "PYTHONPATH": str(BENCHMARKS.parent),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run(
        [sys.executable, *arguments], cwd=BENCHMARKS, check=True, env=environment, timeout=500
    )
    found = json.loads((tmp_path / "serve_cpu.json").read_text())
    assert {"command", "commit", "device", "versions", "ceiling"} <= found.keys()
    rows = found["results"]
    kinds = [(row["workload"], row["runner"], row["concurrency"]) for row in rows]
    assert kinds == [
        *(("at once", runner, 1) for runner in ("steps", "engine", "http")),
        *(("at once", runner, 2) for runner in ("engine", "http")),
        *(
            (workload, runner, 1)
            for runner in ("engine", "http")
            for workload in ("prefix", "prefix again")
        ),
    ]
    for row in rows:
        assert row["tokens_per_second"] > 0
        assert 0 < row["first_token_ms_p50"] <= row["first_token_ms_p95"]
    first, again, *_ = (row["first_token_ms_p50"] for row in rows if "prefix" in row["workload"])
    assert again < first


def test_every_token_of_the_wordy_tokenizer_is_text():
    tokenizer = serve.wordy_tokenizer(700)
    ids = list(range(700))
    assert all(tokenizer.decode([i]) for i in ids)
    assert tokenizer.decode(ids[300:303]) == " w300 w301 w302"


def test_guesses_are_counted_where_a_chunk_asks_for_more_than_one():
    class Runner:
        def run(self, step):
            return len(step)

    runner = Runner()
    drafts = serve.Drafts(runner)
    chunks = [serve.Chunk(0, 0, n, logits, [1]) for n, logits in ((4, 4), (1, 1), (9, 0), (2, 2))]
    assert runner.run(chunks) == 4
    assert drafts.count == 4
