"""The sweep of tiles from its first line to its result, the driver and the clock replaced."""

import json
from contextlib import ExitStack
from dataclasses import replace
from unittest import mock

import pytest
import tiles
import torch

from halfweight.quantization.numerics import QuantizedTensor, dequantize

SMALL = dict.fromkeys(tiles.SHAPE_LIST, (128, 256))
CPU = torch.device("cpu")


def launch_right(x, packed, scales, exponents, bias, y, plan, steps=None):
    y.copy_(x.float() @ dequantize(QuantizedTensor(packed, scales, exponents)).T)


def launch_wrong(x, packed, scales, exponents, bias, y, plan, steps=None):
    launch_right(x, packed, scales, exponents, bias, y, plan)
    if plan.rows == 64:
        y[0, 0] = torch.nan


@pytest.fixture
def sweep(monkeypatch, tmp_path):
    """(family's name, launch) -> the result's rows."""

    def run(name, launch):
        compiled = []
        family = replace(tiles.FAMILIES[name], launch=launch)
        with ExitStack() as stack:
            for target, attribute, value in (
                (tiles.driver, "card_of", lambda device: tiles.H100),
                (torch.cuda, "get_device_capability", lambda device: (9, 0)),
                (tiles.timing, "read_bandwidth", lambda device: 1e12),
                (tiles.timing, "num_copies", lambda num_bytes: 2),
                (tiles.driver, "cubin", lambda *text: compiled.append(text)),
                (tiles.torch, "device", lambda *name: CPU),
            ):
                stack.enter_context(mock.patch.object(target, attribute, value))
            stack.enter_context(mock.patch.dict(tiles.SHAPE_LIST, SMALL))
            stack.enter_context(mock.patch.dict(tiles.FAMILIES, {name: family}))
            options = ["--batches", "16", "--shapes", "qkv", "--repeats", "1", "--most", "3"]
            arguments = ["tiles.py", name, *options, "--out", str(tmp_path)]
            monkeypatch.setattr("sys.argv", arguments)
            tiles.main()
        assert len(compiled) == len(set(compiled)) > 2
        return json.loads((tmp_path / f"{name}_tiles.json").read_text())["results"]

    return run


@pytest.mark.parametrize("name", tiles.FAMILIES)
def test_a_sweep_times_every_form(sweep, name, capsys):
    (row,) = sweep(name, launch_right)
    assert row["errors"] == {}
    assert row["card"]["multiprocessors"] == 132
    assert {"float16"} < set(row["microseconds"])
    assert "qkv 16: " in capsys.readouterr().out


def test_a_plan_that_computes_something_else_is_an_error_and_no_time(sweep):
    (row,) = sweep("sm80", launch_wrong)
    assert row["errors"]
    assert len(row["microseconds"]) > 1
    assert not set(row["errors"]) & set(row["microseconds"])
    assert all("relative error nan" in error for error in row["errors"].values())
