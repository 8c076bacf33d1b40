"""Kill -9 at every step that touches the disk, and at random times; then run the command again."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import hashes, make_llama

from halfweight.conversion.workspace import workspace_folder

CHILD = Path(__file__).parents[1] / "helpers/crash_child.py"
OLD = {"config.json": b"{}", "old.safetensors": b"old"}


class Children:
    """Conversions in forked children of one process that has imported everything once."""

    def __init__(self, source, *form):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, CHILD, source, *form],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def convert(self, source, out, *, overwrite=False, kill_at=None):
        """Steps made, or None if the child was killed."""
        self.process.stdin.write(json.dumps([str(source), str(out), overwrite, kill_at]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("llama"), layers=1)


@pytest.fixture(scope="module")
def children(llama):
    found = Children(llama)
    yield found
    found.process.stdin.close()
    assert found.process.wait() == 0


@pytest.fixture(scope="module")
def expected(children, llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "out"
    assert children.convert(llama, out) > 50
    assert len(list(out.glob("*.safetensors"))) == 4
    return hashes(out)


def test_an_export_killed_at_many_steps(tmp_path):
    """As test_killed_at_every_step; the one .gguf file is journalled in parts."""
    from exportable import make_int8

    source, out = make_int8(tmp_path), tmp_path / "to" / "out"
    children = Children(source, "gguf-q8_0")
    out.parent.mkdir()
    num_steps = children.convert(source, out)
    expected = hashes(out)
    for step in range(0, num_steps, num_steps // 8):
        shutil.rmtree(out)
        assert children.convert(source, out, kill_at=step) is None
        assert not out.exists() or hashes(out) == expected
        children.convert(source, out)
        assert hashes(out) == expected, f"killed at step {step}"
        assert [p.name for p in out.parent.iterdir()] == ["out"]
    children.process.stdin.close()
    assert children.process.wait() == 0


def make_old(out):
    out.mkdir()
    for name, data in OLD.items():
        (out / name).write_bytes(data)


def assert_whole(out, expected, old_allowed):
    """OUT is absent, complete, or still the old one: never in part."""
    if not out.exists():
        return
    found = {p.name: p.read_bytes() for p in out.iterdir()}
    assert (old_allowed and found == OLD) or hashes(out) == expected


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_every_step(children, llama, expected, tmp_path, overwrite):
    out = tmp_path / "out"
    step = 0
    while True:
        if overwrite:
            make_old(out)
        steps = children.convert(llama, out, overwrite=overwrite, kill_at=step)
        assert_whole(out, expected, overwrite)
        if steps is not None:
            break
        children.convert(llama, out, overwrite=overwrite)
        assert hashes(out) == expected, f"killed at step {step}"
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
        shutil.rmtree(out)
        step += 1
    assert step > 50
    assert hashes(out) == expected


def test_killed_again_and_again(children, llama, expected, tmp_path):
    """Each run gets a few steps further than the last: work is kept, and the end is reached."""
    out = tmp_path / "out"
    runs = 0
    while children.convert(llama, out, kill_at=35) is None:
        assert_whole(out, expected, old_allowed=False)
        runs += 1
        assert runs < 20
    assert runs >= 2
    assert hashes(out) == expected


def test_killed_at_random_times(llama, tmp_path):
    """The real command, killed from outside."""
    command = [sys.executable, "-m", "halfweight", "quantize", str(llama)]
    whole = tmp_path / "whole"
    started = time.monotonic()
    subprocess.run([*command, str(whole)], check=True, capture_output=True)
    duration = time.monotonic() - started
    out = tmp_path / "out"
    for fraction in random.Random(0).sample(range(50, 100), 2):
        process = subprocess.Popen([*command, str(out)], stderr=subprocess.DEVNULL)
        time.sleep(duration * fraction / 100)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not out.exists() or hashes(out) == hashes(whole)
    subprocess.run([*command, str(out)], check=True, capture_output=True)
    assert hashes(out) == hashes(whole)
    assert not workspace_folder(out).exists()
