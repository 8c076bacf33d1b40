"""The plug-in beside a stand-in for vLLM: off, too old, or lacking a hook, in one line each."""

import logging
import sys
from importlib.metadata import entry_points
from types import ModuleType

import pytest

import halfweight.vllm as room


@pytest.fixture
def register(monkeypatch, caplog):
    """`register(version)` beside a vLLM of that version that has nothing else; the log's lines."""

    def run(version):
        stand_in = ModuleType("vllm")
        stand_in.__version__ = version
        for name in [n for n in sys.modules if n == "vllm" or n.startswith("vllm.")]:
            monkeypatch.delitem(sys.modules, name)
        for name in [n for n in sys.modules if n.startswith("halfweight.vllm.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(room, "plugin", raising=False)
        monkeypatch.setitem(sys.modules, "vllm", stand_in)
        monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
        with caplog.at_level(logging.INFO, logger="vllm.halfweight"):
            room.register()
        return [record.getMessage() for record in caplog.records]

    return run


def test_a_vllm_that_is_too_old_runs_as_it_is(register):
    expected = "halfweight: vLLM 0.21.3 is too old, 0.22 or later is needed; vLLM runs without it"
    assert register("0.21.3") == [expected]


def test_a_vllm_that_lacks_a_hook_runs_as_it_is(register):
    (line,) = register("0.99.0")
    assert line.startswith("halfweight: vLLM 0.99.0 lacks what the plug-in hooks into (No module")
    assert line.endswith("; vLLM runs without it")


def test_the_switch_is_asked_before_vllm(register, monkeypatch):
    monkeypatch.setenv("HALFWEIGHT_VLLM", "0")
    assert register("0.99.0") == ["halfweight: off by HALFWEIGHT_VLLM=0"]


@pytest.mark.parametrize("version", ["0.22.0", "0.32.1+cpu", "1.0", "dev"])
def test_later_versions_are_not_refused_by_their_number(version):
    assert room.unfit_version(version) is None


def test_vllm_finds_it():
    (found,) = (e for e in entry_points(group="vllm.general_plugins") if e.name == "halfweight")
    assert found.value == "halfweight.vllm:register"
