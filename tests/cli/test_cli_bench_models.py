"""`halfweight bench load` and `bench generate` on a tiny model, on this machine."""

import json

import pytest
import torch
from fresh_rows import here
from tiny import make_llama

import halfweight
from halfweight.cli import main
from halfweight.evaluation.speed import generate, load


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    source = make_llama(root / "source", max_position_embeddings=256)
    halfweight.quantize(source, root / "int8")
    return str(source), str(root / "int8")


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    for module in (load, generate):
        monkeypatch.setattr(module, "from_fresh_process", here)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        main(["bench", *arguments])
    captured = capsys.readouterr()
    return left.value.code, captured.out, captured.err


def test_load(pair, capsys):
    code, out, err = run(capsys, "load", *pair, "--repeats", "2", "--json")
    assert code == 0
    found = json.loads(out)
    assert len(found["runs"]) == 4
    assert -0.5 < found["comparison"]["bytes_change"] < -0.4
    assert err.count("halfweight: ") == 2
    code, out, _ = run(capsys, "load", *pair, "--repeats", "1")
    assert code == 0
    assert "x as fast, -4" in out


def test_generate(pair, capsys):
    options = ["--batch", "1", "--prompt-tokens", "4", "--new-tokens", "4"]
    options += ["--long-prompt-tokens", "8"]
    code, out, err = run(capsys, "generate", *pair, *options, "--json")
    assert code == 0
    found = json.loads(out)
    assert list(found["speedups"][0]["decode"]) == ["1"]
    assert "batch 1, eager step: " in err
    code, out, _ = run(capsys, "generate", *pair, *options)
    assert "halfweight, batch 1: " in out


def test_a_model_that_is_not_there(pair, capsys):
    code, _, err = run(capsys, "load", "nowhere/at/all", pair[1])
    assert code == 4
    assert "nowhere/at/all: no such file or folder" in err
