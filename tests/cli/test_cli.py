"""Exit codes and messages of the command line itself."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from command_line import run
from typer.main import get_command

from halfweight.cli import app
from halfweight.kernels import operations
from halfweight.kernels.cuda import driver
from halfweight.kernels.cuda.card import Card
from halfweight.kernels.triton import backend as portable
from halfweight.kernels.triton.launch import DeviceInfo


def test_version(capsys):
    code, out, _ = run(capsys, "--version")
    assert code == 0
    assert out.startswith("halfweight ")


def test_usage_errors_exit_2(capsys):
    code, _, err = run(capsys, "nonsense")
    assert code == 2
    assert "nonsense" in err


def test_no_help_loses_words_that_look_like_markup():
    def commands(found):
        yield found
        for child in getattr(found, "commands", {}).values():
            yield from commands(child)

    found = [(c.name, p.help) for c in commands(get_command(app)) for p in c.params]
    assert len(found) > 100
    assert [(name, text) for name, text in found if "[" in (text or "")] == []


def test_help_names_the_default(capsys):
    _, out, _ = run(capsys, "export", "--help")
    assert "Threads (default: all cores)" in " ".join(out.replace("│", " ").split())


def test_what_the_system_refuses_is_one_line(capsys, tmp_path):
    page = tmp_path / "none" / "page.html"
    code, _, err = run(capsys, "plan", "llama-3-8b", "--gpus", "24GB", "--html", str(page))
    assert code == 1
    assert err.splitlines()[0] == f"error: {page}: No such file or directory"
    assert err.splitlines()[1].startswith("hint: ")


def test_a_full_stdout_is_one_line():
    command = (sys.executable, "-m", "halfweight", "plan", "llama-3-8b", "--gpus", "24GB")
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: No space left on device\nhint: ")
    assert len(ended.stderr.splitlines()) == 2


def test_backends_lists_the_reference(capsys):
    code, out, _ = run(capsys, "backends", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["reference"]["cpu"] is None
    assert found["kernels"] == {}


@pytest.fixture
def a_gpu(monkeypatch):
    """(architecture, backends that run there) -> a machine that has one such GPU."""

    def make(architecture, runs):
        real = operations.backend
        card = Card(132, 232448, 233472, 60 << 20, 4_814_304, 1980, 1300)
        info = DeviceInfo(architecture, 132, is_nvidia=True, has_pdl=True)

        def backend(name):
            reason = None if name in runs else "not here"
            return replace(real(name), unavailable=lambda device: reason)

        monkeypatch.setattr(operations, "backend", backend)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A Card")
        monkeypatch.setattr(driver, "card_of", lambda device: card)
        monkeypatch.setattr(portable, "device_info", lambda device: info)

    return make


@pytest.mark.parametrize(
    ("architecture", "runs", "chosen", "kernels"),
    [
        (
            "sm_90",
            ("cuda", "sm80", "triton"),
            "cuda",
            [(1, "hopper_gemv.cu"), (3, "hopper_small.cu"), (33, "hopper_large.cu")],
        ),
        (
            "sm_86",
            ("sm80", "triton"),
            "sm80",
            [(1, "gemv"), (2, "w8a16.cu"), (257, "dequantize")],
        ),
        ("sm_80", ("triton",), "triton", None),
    ],
)
def test_backends_says_which_kernel_how_many_tokens_take(
    a_gpu, capsys, architecture, runs, chosen, kernels
):
    a_gpu(architecture, runs)
    code, out, _ = run(capsys, "backends", "--json")
    assert code == 0
    rows = json.loads(out)["kernels"]["cuda:0"]
    assert {row["backend"] for row in rows} == set(runs)
    assert {row["backend"] for row in rows if row["chosen"]} == {chosen}
    by_backend = {
        name: [(row["first"], row["kernel"]) for row in rows if row["backend"] == name]
        for name in runs
    }
    assert by_backend["triton"][0] == (1, "gemv")
    assert by_backend["triton"][-1][1] == "dequantize"
    assert by_backend[chosen] == (kernels or by_backend[chosen])
    firsts = [first for first, _ in by_backend["triton"]]
    assert firsts == sorted(set(firsts))
    assert all(row["reason"] for row in rows)
    code, out, _ = run(capsys, "backends")
    assert code == 0
    assert f"cuda:0, A Card: {chosen} is chosen" in " ".join(out.split())
    assert ("w8a16.cu" in out) == ("sm80" in runs)
