"""The benchmark of several ranks, on two of the CPU: its row, and the logits of one rank beside."""

import json
import sys

import tensor_parallel

from halfweight.checkpoint.headers import read_headers


def test_it_compares_and_writes(tmp_path, monkeypatch, capsys):
    options = ["--ranks", "2", "--devices", "cpu,cpu", "--compare", "--batch", "2"]
    options += ["--prompt", "16", "--new", "4", "--context", "64"]
    places = ["--models", str(tmp_path / "models"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["tensor_parallel.py", *options, *places])
    monkeypatch.setattr(tensor_parallel, "SECONDS_TO_BEAT", 0.0)
    tensor_parallel.main()
    found = json.loads((tmp_path / "tensor_parallel.json").read_text())
    (row,) = found["results"]
    assert {"command", "commit", "device", "versions"} <= found.keys()
    named = (row["model"], row["ranks"], row["batch"], row["devices"])
    assert named == ("small", 2, 2, "cpu,cpu")
    assert (row["limit_bytes"], row["planned_bytes"]) == (None, None), "on a CPU there is no plan"
    assert min(row["tokens_per_second"], row["prefill_seconds"], row["peak_bytes"]) > 0
    whole = read_headers(tmp_path / "models" / "small-random-int8").num_bytes
    assert whole / 2 < row["bytes_read_a_rank"] < 0.51 * whole
    assert row["largest_logit"] > 0.5
    assert 0 < row["logits_difference"] < 0.02 * row["largest_logit"]
