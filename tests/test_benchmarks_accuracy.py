"""The accuracy benchmark on a tiny model: its rows agree with `evaluate`; its page is current."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli_evaluate import pair  # noqa: F401
from tiny import make_llama

import halfweight
from halfweight.scoring import TokenScores, summarize

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import accuracy
import accuracy_table
import variants

PLAIN = "64-grid8-least_squares"


def run(source, text, work, *, windows, **options):
    given = {"only": [PLAIN, variants.Q8_0], "planted": False, "calibrated": []} | options
    accuracy.run(
        argparse.Namespace(model=source, texts=[text], work=work, windows=windows, **given)
    )
    return {p.name: p.read_bytes() for p in work.glob("*.scores")}


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(accuracy, "CONTEXT", 64)


def test_a_row_is_what_evaluate_finds_of_the_same_folder(short, pair, tmp_path):  # noqa: F811
    source, _, text = pair
    out = tmp_path / "out"
    halfweight.quantize(
        source, out, halfweight.Recipe(halfweight.Scheme(64, "grid8", "least_squares"))
    )
    expected = halfweight.evaluate(out, reference=source, text=text, context=64, tokens=3 * 64)
    run(source, text, tmp_path / "work", windows=3, only=[PLAIN])
    (file,) = (tmp_path / "work").glob("*.scores")
    found = summarize(np.fromfile(file, TokenScores))
    assert found.num_tokens == expected.num_tokens == 3 * 63
    kl = expected.comparison.kl_mean.value
    assert found.comparison.kl_mean.value == pytest.approx(kl, rel=0.01)
    assert found.perplexity.value == pytest.approx(expected.perplexity.value, rel=1e-6)


def test_a_run_that_was_cut_goes_on(short, pair, tmp_path):  # noqa: F811
    source, _, text = pair
    whole = run(source, text, tmp_path / "whole", windows=3)
    first = run(source, text, tmp_path / "cut", windows=2)
    two_windows = 2 * 63 * TokenScores.itemsize
    assert {len(scores) for scores in first.values()} == {two_windows}
    assert first.keys() == whole.keys()
    (file, *_) = (tmp_path / "cut").glob("*.scores")
    file.write_bytes(file.read_bytes()[: 63 * TokenScores.itemsize + 5])
    assert run(source, text, tmp_path / "cut", windows=3) == whole


def test_planted_outliers_leave_the_function_as_it_was(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = make_llama(tmp_path / "model", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        before = model(ids).logits
        largest = model.model.layers[0].mlp.up_proj.weight.abs().max().item()
        accuracy.plant_outliers(model)
        after = model(ids).logits
    assert model.model.layers[0].mlp.up_proj.weight.abs().max() > 5 * largest
    assert torch.allclose(before, after, atol=1e-5)


def test_filled_low_bits_are_within_half_a_step_and_on_no_grid_of_q8_0():
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    on_grid = variants.VARIANTS[variants.Q8_0].store(weight).weight
    filled = on_grid.clone()
    accuracy.fill_low_bits({"w": filled}, seed=0)
    steps = on_grid.view(-1, 32).abs().amax(dim=1, keepdim=True) / 127
    moved = ((filled - on_grid).view(-1, 32) / steps).abs()
    assert 0.45 < float(moved.max()) <= 0.5 + 1e-4

    def noise(source):
        return float((variants.VARIANTS[variants.Q8_0].store(source).weight - source).norm())

    assert noise(filled) > 100 * noise(on_grid)


def test_the_page_is_what_its_results_come_to():
    assert accuracy_table.PAGE.read_text() == accuracy_table.page()
