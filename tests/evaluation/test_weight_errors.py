"""What quantization did to each weight, against direct computation."""

import json
import math

import pytest
import torch
from command_line import run
from tiny import make_llama, rewrite, tensors_of

import halfweight
from halfweight.errors import CheckpointError
from halfweight.evaluation.weight_errors import (
    heat_map,
    measured_errors,
    natural,
    recorded_errors,
    sqnr_db,
)
from halfweight.quantization.numerics import dequantize, quantize
from halfweight.quantization.scheme import Scheme

SPIKED = "model.layers.1.mlp.up_proj.weight"
ROW, COLUMN = 5, 40


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A model with one huge weight in a small group, and its quantized form."""
    source = make_llama(tmp_path_factory.mktemp("errors") / "source")

    def spike(tensors):
        if SPIKED in tensors:
            weight = tensors[SPIKED].clone()
            weight[ROW, COLUMN] = 30.0
            tensors[SPIKED] = weight

    rewrite(source, spike)
    out = source.parent / "int8"
    halfweight.quantize(source, out)
    return source, out


def test_recorded_and_measured_errors_are_those_of_the_definition(pair):
    source, out = pair
    originals = tensors_of(source)
    recorded, measured = recorded_errors(out), measured_errors(out, source)
    assert [e.name for e in recorded] == [e.name for e in measured]
    assert len(recorded) == 16
    for record, measure in zip(recorded, measured, strict=True):
        weight = originals[record.name].float()
        error = dequantize(quantize(weight, Scheme(record.group_size))) - weight
        expected = sqnr_db(float(weight.square().sum()), float(error.square().sum()))
        assert record.sqnr_db == pytest.approx(expected, abs=1e-4)
        assert measure.sqnr_db == pytest.approx(expected, abs=1e-4)
        assert record.crushed_groups == measure.crushed_groups
        groups = error.reshape(-1, record.group_size).norm(dim=-1) / weight.reshape(
            -1, record.group_size
        ).norm(dim=-1)
        assert measure.worst_groups[0].relative_error == pytest.approx(float(groups.max()))


def test_the_worst_group_and_clipped_weights_are_found(pair):
    source, out = pair
    (spiked,) = [error for error in measured_errors(out, source) if error.name == SPIKED]
    assert spiked.crushed_groups == 1
    weight = tensors_of(source)[SPIKED].float()
    stored = quantize(weight, Scheme(64))
    steps = (dequantize(stored) / (stored.packed.float() - 128)).nan_to_num()
    clipped = (stored.packed.float() - 128).abs().eq(127) & (weight.abs() > 127.5 * steps.abs())
    assert spiked.clipped_weights == int(clipped.sum())


def test_another_model_is_refused(pair, tmp_path):
    _, out = pair
    other = make_llama(tmp_path / "other", dtype=torch.float32)
    rewrite(other, lambda tensors: tensors.pop(SPIKED, None))
    index = other / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][SPIKED]
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"up_proj.weight is nothing, expected \[192, 64\]"):
        measured_errors(out, other)


def test_a_folder_without_a_manifest_has_no_record(pair):
    source, _ = pair
    with pytest.raises(CheckpointError, match=r"no halfweight\.json, so no record of errors"):
        recorded_errors(source)


def test_heat_map_has_a_cell_for_every_weight(pair):
    source, out = pair
    errors = measured_errors(out, source)
    page = heat_map(errors, "a <b>")
    assert page.count("<td style") == len(errors)
    assert "a &lt;b&gt;" in page
    assert "<th>layer 1</th>" in page
    assert "<th>mlp.up_proj</th>" in page
    assert f"row {errors[0].worst_groups[0].row} group" in page


def test_exact_weights_have_no_noise_and_names_sort_by_number():
    assert sqnr_db(1.0, 0.0) == math.inf
    assert sorted(["l.10.x", "l.9.x", "a"], key=natural) == ["a", "l.9.x", "l.10.x"]


def test_inspect_errors(capsys, pair, tmp_path):
    source, out = pair
    code, text, _ = run(capsys, "inspect", str(out), "--errors")
    assert code == 0
    assert len(text.splitlines()) == 16
    assert "dB  group size 64, crushed groups 0" in text
    page = tmp_path / "map.html"
    arguments = ("--source", str(source), "--html", str(page), "--json")
    code, text, err = run(capsys, "inspect", str(out), "--errors", *arguments)
    assert code == 0
    assert f"wrote {page}" in err
    assert page.read_text().startswith("<!doctype html>")
    fields = {entry["name"]: entry for entry in json.loads(text)}[SPIKED]
    assert fields["crushed_groups"] == 1
    assert len(fields["worst_groups"]) == 3
    code, text, _ = run(capsys, "inspect", str(out), "--errors", "--source", str(source))
    assert "clipped 0." in text
    assert " off by " in text
