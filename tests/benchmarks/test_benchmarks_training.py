"""The benchmark of training, on a tiny model: a row is measured and becomes a line of the table."""

from dataclasses import asdict

import pytest
import torch
import training
from tiny import make_llama

import halfweight
from halfweight.quantization.scheme import Recipe, Scheme

pytest.importorskip("peft")


@pytest.mark.parametrize(("weights", "checkpointing"), training.CASES)
def test_a_row(tmp_path, weights, checkpointing):
    folder = make_llama(tmp_path / "source", dtype=torch.bfloat16)
    if weights == "INT8":
        halfweight.quantize(folder, tmp_path / "int8", Recipe(Scheme(32)))
        folder = tmp_path / "int8"
    row = training.train(folder, weights, checkpointing, tokens=12, steps=3)
    assert row.last_loss < row.first_loss
    assert row.weight_bytes < (160e3 if weights == "INT8" else 300e3)
    assert row.adapter_bytes == 4 * 8 * 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 192))
    (line,) = training.markdown([asdict(row)]).splitlines()[2:]
    assert line.startswith(f"| {weights} | {'yes' if checkpointing else 'no'} | 0 | ")
