"""The accuracy benchmark on a tiny model: its rows agree with `evaluate`; its page is current."""

import argparse
import json

import accuracy
import accuracy_table
import activations
import numpy as np
import pytest
import torch
import variants
from tiny import make_llama

import halfweight
from halfweight.evaluation.comparison import load_model
from halfweight.evaluation.scoring import TokenScores, summarize
from halfweight.model.modules import QuantizedLinear
from halfweight.quantization.numerics import dequantize

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


def test_a_row_is_what_evaluate_finds_of_the_same_folder(short, pair, tmp_path):
    source, _, text = pair
    out = tmp_path / "out"
    halfweight.quantize(
        source, out, halfweight.Recipe(halfweight.Scheme(64, "grid8", "least_squares"))
    )
    options = {"context": 64, "tokens": 3 * 64, "dtype": torch.float32}
    expected = halfweight.evaluate(out, reference=source, text=text, **options)
    run(source, text, tmp_path / "work", windows=3, only=[PLAIN])
    (file,) = (tmp_path / "work").glob("*.scores")
    found = summarize(np.fromfile(file, TokenScores))
    assert found.num_tokens == expected.num_tokens == 3 * 63
    kl = expected.comparison.kl_mean.value
    assert found.comparison.kl_mean.value == pytest.approx(kl, rel=0.01)
    assert found.perplexity.value == pytest.approx(expected.perplexity.value, rel=1e-6)


def test_a_run_that_was_cut_goes_on(short, pair, tmp_path):
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


def rounded_one_by_one(x, columns):
    """x [T, K] as int8 and back, value by value; Python rounds halves to even."""
    out = np.zeros_like(x)
    for token in range(x.shape[0]):
        for begin in range(0, x.shape[1], columns):
            block = x[token, begin : begin + columns]
            step = np.float32(np.abs(block).max() / np.float32(127))
            for i, value in enumerate(block):
                out[token, begin + i] = np.float32(round(value / step)) * step if step else 0
    return out


@pytest.mark.parametrize("columns", [16, 64, 150, 200])
def test_activations_are_rounded_block_by_block(columns):
    x = torch.randn(5, 150, generator=torch.Generator().manual_seed(0))
    x[1, :64] = 0
    x[2] = 0
    x[3, 149] = 300
    found = activations.round_blocks(x, columns)
    assert np.array_equal(found.numpy(), rounded_one_by_one(x.numpy(), columns))
    assert torch.equal(activations.round_blocks(x[None], columns)[0], found)


def test_halves_are_rounded_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 0.51]])
    expected = torch.tensor([[127.0, 0.0, 2.0, 2.0, 0.0, -2.0, 126.0, 1.0]])
    assert torch.equal(activations.round_blocks(x, 64), expected)


def small_model(tmp_path, **options):
    folder = make_llama(tmp_path / "model", dtype=torch.float32, **options)
    return load_model(folder, "cpu", torch.float32)


def test_a_planted_activation_is_one_column_and_leaves_the_function_as_it_was(tmp_path):
    model, ids, seen = small_model(tmp_path), torch.arange(40)[None], []
    layer = model.model.layers[1]
    for linear in (layer.self_attn.v_proj, layer.mlp.gate_proj):
        linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        before = model(ids).logits
        accuracy.plant_outliers(model, 1 / accuracy.OUTLIER_FACTOR, activations.NUM_PLANTED)
        after = model(ids).logits
    assert torch.allclose(before, after, atol=1e-5)
    for plain, planted in zip(seen[:2], seen[2:], strict=True):
        ratios = (planted / plain).flatten(0, -2).median(dim=0).values
        assert (ratios - accuracy.OUTLIER_FACTOR).abs().lt(0.01).sum() == 1
        assert (ratios - 1).abs().lt(0.01).sum() == len(ratios) - 1


@pytest.mark.parametrize("tied", [True, False])
def test_the_linears_rounded_are_those_that_load_rounds(tmp_path, tied):
    """Product by product, with blocks of 64; the head's too, unless it is tied."""
    linears = activations.quantized_linears(small_model(tmp_path, tied=tied))
    halfweight.quantize(tmp_path / "model", tmp_path / "out")
    model = halfweight.load(tmp_path / "out", dtype=torch.float32, activations="int8")
    modules = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert modules.keys() - linears.keys() == ({"lm_head"} if tied else set())
    for name, module in modules.items():
        x = torch.randn(7, module.in_features, generator=torch.Generator().manual_seed(0))
        weight = dequantize(module.quantized)
        expected = activations.round_blocks(x, 64) if name in linears else x
        error = (module(x) - expected @ weight.T).norm() / (x @ weight.T).norm()
        assert error < 1e-5, name


def test_a_row_with_exact_activations_is_the_plain_model_before_and_after_others(tmp_path):
    model, ids = small_model(tmp_path), torch.arange(40)[None]
    with torch.inference_mode():
        plain = model(ids).logits[0]
        linears, parts = activations.quantized_linears(model), accuracy.Runnable(model)
        for block, same in ((activations.EXACT, True), (activations.ROW, False), (64, False)) * 2:
            used = activations.Rounded(parts, linears, block).use(parts.source)
            assert torch.equal(used.head(used.body(ids)[0]), plain) == same
    assert not any(linear._forward_pre_hooks for linear in linears.values())


def test_the_activations_result(short, pair, tmp_path):
    source, _, text = pair
    options = {"model": source, "texts": [text], "windows": 2, "work": tmp_path, "out": tmp_path}
    activations.run(argparse.Namespace(**options))
    result = json.loads((tmp_path / "activations.json").read_text())
    assert result["command"] == activations.COMMAND
    source_outliers, planted_outliers = (result["outliers"][k] for k in ("source", "planted"))
    assert planted_outliers["gate_proj"] > 3 * source_outliers["gate_proj"]
    assert planted_outliers["down_proj"] == pytest.approx(source_outliers["down_proj"], rel=0.01)
    for planted in (False, True):
        found = accuracy_table.Activations(result, planted)
        assert list(found.by_block) == list(activations.BLOCKS)
        exact, row = found.by_block[activations.EXACT], found.by_block[activations.ROW]
        assert exact["comparison"]["num_tokens"] == 2 * 63
        assert exact["kl_over_exact"]["value"] == 0 < row["kl_over_exact"]["value"]
    run(source, text, tmp_path / "plain", windows=2, only=[variants.DEFAULT])
    plain = np.fromfile(next((tmp_path / "plain").glob("*.scores")), TokenScores)
    assert (plain == np.fromfile(tmp_path / f"exact.{text.stem}.scores", TokenScores)).all()


def test_what_the_page_says_of_int8_activations_holds():
    result = json.loads((accuracy_table.RESULTS / "activations.json").read_text())
    assert accuracy_table.activations(result) in accuracy_table.PAGE.read_text()
    for planted in (False, True):
        found = accuracy_table.Activations(result, planted)
        added = [found.added(block) for block in activations.BLOCKS]
        assert added == sorted(added), "more columns a step are no better"
        assert all(growth < 2 for growth in found.growth)
