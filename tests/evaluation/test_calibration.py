"""Error-compensating rounding: better outputs on the same grid, in the same file."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from command_line import run
from tiny import tensors_of

import halfweight
from halfweight.checkpoint.headers import quantized_modules, read_headers
from halfweight.evaluation import calibration, comparison
from halfweight.evaluation.calibration import compensate
from halfweight.quantization.numerics import dequantize, quantize, scales_float32
from halfweight.quantization.scheme import Scheme


def correlated_inputs(num_tokens, columns):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    scale = torch.linspace(0.1, 3, columns)
    return torch.randn(num_tokens, columns, generator=generator) @ mixing * scale


@pytest.mark.parametrize("rows", [7, 5000])
def test_outputs_change_less_than_by_nearest_rounding(rows, monkeypatch):
    monkeypatch.setattr(calibration, "BLOCK_ROWS", 4096)
    weight = torch.randn(rows, 192, generator=torch.Generator().manual_seed(1))
    nearest = quantize(weight, Scheme(64))
    scales = scales_float32(nearest.scales, nearest.exponents)
    seen, unseen = correlated_inputs(4096, 192).split(2048)
    rounded, packed = compensate(weight, seen.T @ seen, scales)
    steps = scales.repeat_interleave(64, dim=1)
    assert torch.equal((packed.float() - 128) * steps, rounded)
    assert int(packed.min()) >= 1
    errors = [(unseen @ (w - weight).T).norm() for w in (rounded, dequantize(nearest))]
    assert errors[0] < 0.7 * errors[1]


def test_independent_inputs_get_nearest_rounding():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    nearest = quantize(weight, Scheme(64, "float32", "absmax"))
    for moment in (torch.eye(64), torch.zeros(64, 64)):
        rounded, packed = compensate(weight, moment, nearest.scales)
        assert torch.equal(packed, nearest.packed)
        assert torch.equal(rounded, dequantize(nearest))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("calibration") / "text.txt"
    rng = np.random.default_rng(0)
    words = ["happy", "families", "are", "all", "alike", "every", "unhappy", "family", "own"]
    path.write_text(" ".join(rng.choice(words, 1200)))
    return path


@pytest.fixture(scope="module")
def calibrated(pair, text, tmp_path_factory):
    source, _, _ = pair
    out = tmp_path_factory.mktemp("calibrated") / "out"
    halfweight.quantize(source, out, refine=calibration.calibration(source, text))
    return out


def test_only_packed_bytes_change_and_the_folder_verifies(pair, calibrated):
    _, nearest, _ = pair
    before, after = tensors_of(nearest), tensors_of(calibrated)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    packed = {f"{module}.weight_packed" for module in quantized_modules(read_headers(nearest))}
    assert changed == packed - {"model.embed_tokens.weight_packed"}
    assert halfweight.verify(calibrated).problems == ()
    manifest = json.loads((calibrated / "halfweight.json").read_text())
    assert manifest["job"]["calibration"]["num_tokens"] % 1024 == 0


def test_the_record_holds_the_new_errors(pair, calibrated):
    from halfweight.evaluation.weight_errors import measured_errors, recorded_errors

    source, _, _ = pair
    recorded, measured = recorded_errors(calibrated), measured_errors(calibrated, source)
    for record, measure in zip(recorded, measured, strict=True):
        assert record.sqnr_db == pytest.approx(measure.sqnr_db, abs=1e-3)


def test_divergence_falls(pair, calibrated, text):
    source, nearest, unseen = pair
    options = {"reference": source, "text": unseen, "context": 256}
    before, after = (
        halfweight.evaluate(m, **options).comparison.kl_mean.value for m in (nearest, calibrated)
    )
    assert after < before


def test_quantize_calibrate_twice_is_the_same_and_resumes(capsys, pair, text, tmp_path):
    source, _, _ = pair
    out, again = tmp_path / "out", tmp_path / "again"
    for folder in (out, again):
        code, _, _ = run(capsys, "quantize", str(source), str(folder), "--calibrate", str(text))
        assert code == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in again.iterdir()
    }
    code, _, err = run(capsys, "quantize", str(source), str(out))
    assert code == 2  # another job is in the way
    assert "exists and is not empty" in err


def test_a_short_text_is_refused(capsys, pair, tmp_path):
    source, _, short = pair
    arguments = ("quantize", str(source), str(tmp_path / "out"), "--calibrate", str(short))
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert "504 tokens, calibration needs 1024" in err


@pytest.mark.parametrize("option", ["--calibrate", "--check"])
def test_ctrl_c_ends_what_follows_the_shards_and_the_same_command_goes_on(
    capsys, pair, text, tmp_path, monkeypatch, option
):
    place, name = (calibration, "compensate") if option == "--calibrate" else (comparison, "score")
    whole = getattr(place, name)
    calls = []

    def interrupted(*arguments):
        calls.append(name)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return whole(*arguments)

    monkeypatch.setattr(place, name, interrupted)
    command = ("quantize", str(pair[0]), str(tmp_path / "out"), option, str(text))
    code, _, err = run(capsys, *command)
    assert code == 130
    assert "error: interrupted; all shards are kept" in err
    assert len(calls) == 1
    assert not (tmp_path / "out").exists()
    code, _, err = run(capsys, *command)
    assert code == 0, err
    assert halfweight.verify(tmp_path / "out").problems == ()
