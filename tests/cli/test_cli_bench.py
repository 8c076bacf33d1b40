"""`halfweight bench kernels` on the CPU: real products of small weights."""

import json

import pytest
import torch

from halfweight.cli import main
from halfweight.kernels import timing


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        main(["bench", *arguments])
    captured = capsys.readouterr()
    return left.value.code, captured.out, captured.err


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(timing, "MAX_COPIES", 2)


def test_kernels_prints_a_table(capsys):
    code, out, _ = run(capsys, "kernels", "--shape", "64x256", "--batch", "2")
    assert code == 0
    assert "torch 16-bit" in out
    assert "64 x 256" in out


def test_kernels_json(capsys):
    code, out, _ = run(capsys, "kernels", "--shape", "64x256", "--batch", "1", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert rows["torch 16-bit"]["speedup"] == 1
    cpu = rows["cpu"]
    assert cpu["bytes_per_second"] == pytest.approx(
        (64 * 256 + 64 * 2 + 64) / cpu["microseconds"] * 1e6
    )


def test_kernels_refuses_a_shape_it_cannot_read(capsys):
    code, _, err = run(capsys, "kernels", "--shape", "64x100")
    assert code == 2
    assert "shape '64x100' is not OUTxIN with IN a multiple of 128" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is something to tune")
def test_there_is_nothing_to_tune_on_a_cpu(capsys):
    code, _, err = run(capsys, "kernels", "--tune")
    assert code == 2
    assert "nothing to tune on cpu: the Triton backend needs a GPU" in err
