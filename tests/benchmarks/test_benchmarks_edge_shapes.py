"""benchmarks/edge_shapes.py with the driver replaced: what it launches, and that it looks."""

from contextlib import ExitStack
from unittest import mock

import edge_shapes
import pytest
import tiles
import torch

from halfweight.kernels.cuda import tiles as sm80_tiles
from halfweight.kernels.hopper import gemv
from halfweight.kernels.hopper import tiles as hopper
from halfweight.quantization.numerics import QuantizedTensor, dequantize

CPU = torch.device("cpu")


@pytest.fixture
def run(monkeypatch, capsys):
    """(--only, other options, factor of w8a16.cu's results) -> names of the launches, texts."""

    def launched(only, *others, factor=1.0):
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
            monkeypatch.setattr("sys.argv", ["edge_shapes.py", "--only", only, *others])
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


def test_hoppers_forms_with_three_schedules(run):
    names, compiled = run("hopper_small.cu")
    assert len(names) == 3 * len(compiled) == 3 * len(edge_shapes.tiles.SMALL)


@pytest.mark.parametrize("form", [*hopper.SMALL, *hopper.LARGE, *hopper.INT8], ids=str)
def test_every_ring_goes_round_and_blocks_have_several_runs(form):
    tokens = form.tokens if isinstance(form, hopper.Small) else form.tokens + 1
    whole, shared, *of_few = edge_shapes.hopper_plans(form, tokens, tiles.H100)
    assert whole.k_blocks * getattr(form, "chain", 1) // form.split > form.stages
    assert bool(shared.shared_blocks) == (form.shares_tiles and form.split == 1)
    assert len(of_few) == (form.split == 1)
    assert all(plan.num_workers < plan.tiles_m * plan.tiles_n for plan in of_few)


def texts():
    """Of a form of each of Hopper's kernels, with a cluster where there is one."""
    forms = (hopper.SMALL[0], hopper.LARGE[0], hopper.INT8[-1])
    clusters = [form for form in (*hopper.LARGE, *hopper.INT8) if form.cluster > 1]
    of_tiles = [(edge_shapes.cuda.source, (form, 1, torch.float16)) for form in (*forms, *clusters)]
    return [*of_tiles, (gemv.source, (gemv.names_of(1, 1, 8), torch.float16))]


@pytest.mark.parametrize(("source", "names"), texts())
def test_every_lane_arrives_for_itself_where_racecheck_is_to_see_it(source, names):
    """At two places or more: how many are awaited, and who arrives."""
    before, after = source(*names), edge_shapes.by_lane(source)(*names)
    found = [old for old, _ in edge_shapes.BY_LANE if old in before]
    has_cluster = "#define CLUSTER 2" in before
    assert not has_cluster or "if (lane < CLUSTER)" in found
    assert sum("barrier_init" in old for old in found) == 1
    assert len(found) >= 2
    assert not any(old in after for old in found)


def test_the_flag_changes_what_is_compiled(run):
    names, usual = run("hopper_small.cu")
    again, changed = run("hopper_small.cu", "--arrive-by-lane")
    assert names == again
    assert not set(usual) & set(changed)


def test_a_wrong_result_ends_it(run):
    with pytest.raises(AssertionError, match=r"w8a16\.cu .* grid8"):
        run("w8a16.cu", factor=1.01)
