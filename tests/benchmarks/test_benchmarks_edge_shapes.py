"""benchmarks/edge_shapes.py with the driver replaced: what it launches, and that it looks."""

from contextlib import ExitStack
from unittest import mock

import edge_shapes
import pytest
import tiles
import torch

from halfweight.kernels.cuda import tiles as sm80_tiles
from halfweight.quantization.numerics import QuantizedTensor, dequantize

CPU = torch.device("cpu")


@pytest.fixture
def run(monkeypatch, capsys):
    """(--only, factor of w8a16.cu's results) -> names of the launches, texts compiled."""

    def launched(only, factor=1.0):
        compiled = []

        def right(x, packed, scales, exponents, bias, y, plan, steps=None):
            y.copy_(x.float() @ dequantize(QuantizedTensor(packed, scales, exponents)).T)

        def ampere(x, packed, scales, exponents, bias, y, plan):
            right(x, packed, scales, exponents, bias, y, plan)
            y.mul_(factor)

        with ExitStack() as stack:
            for target, attribute, value in (
                (edge_shapes, "DEVICE", CPU),
                (edge_shapes.driver, "card_of", lambda device: tiles.H100),
                (edge_shapes.driver, "cubin", lambda *text: compiled.append(text)),
                (edge_shapes.cuda, "_launch", right),
                (edge_shapes.sm80, "launch", ampere),
                (torch.cuda, "get_device_capability", lambda device: (9, 0)),
            ):
                stack.enter_context(mock.patch.object(target, attribute, value))
            monkeypatch.setattr("sys.argv", ["edge_shapes.py", "--only", only])
            edge_shapes.main()
        lines = capsys.readouterr().out.splitlines()
        return [line.rsplit(": ", 1)[0] for line in lines[1:]], compiled

    return launched


def test_every_form_of_w8a16_with_both_dtypes_and_scales(run):
    names, compiled = run("w8a16.cu")
    plain = [shape for shape in sm80_tiles.SHAPES if not shape.scaled]
    scaled = [shape for shape in sm80_tiles.SHAPES if shape.scaled]
    assert len(names) == len(set(names)) == 4 * len(plain) + 2 * len(scaled)
    assert len(compiled) == len(set(compiled)) == len(names)
    assert {text[1] for text in compiled} == {"sm_90"}
    assert all(shape.name in "".join(names) for shape in sm80_tiles.SHAPES)


def test_hoppers_forms_with_their_first_and_last_schedule(run):
    names, compiled = run("hopper_small.cu")
    assert len(names) == 2 * len(compiled) == 2 * len(edge_shapes.tiles.SMALL)


def test_a_wrong_result_ends_it(run):
    with pytest.raises(AssertionError, match=r"w8a16\.cu .* grid8"):
        run("w8a16.cu", factor=1.01)
