"""`--tensor-parallel` and `--devices`: refusals before anything starts, and Ctrl-C ends all."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run

from halfweight.engine.parallel.outside import NAMES


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (("--tensor-parallel", "3"), "3 GPUs do not divide 4 heads", "legal tensor-parallel sizes"),
        (("--tensor-parallel", "2", "--devices", "cpu"), "1 devices for 2 ranks", "name one"),
        (("--device", "cpu", "--devices", "cpu,cpu"), "--device and --devices", "give one"),
        (("--devices", "cpu"), "one rank with --devices cpu", "give --device"),
        (("--devices", "cpu,moon"), "device 'moon' is not known", "cuda:0"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    capsys, int8_folder, monkeypatch, options, message, hint
):
    monkeypatch.setattr("halfweight.engine.parallel.ranks.Ranks.start", None)
    code, _, err = run(capsys, "generate", int8_folder, "w5", "--max-new-tokens", "2", *options)
    assert code == 2
    assert message in err
    assert hint in " ".join(err.split())


def test_ranks_of_torchrun_must_be_those_asked_for(capsys, int8_folder, monkeypatch):
    for name, value in zip(NAMES, ("0", "4", "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(name, value)
    code, _, err = run(capsys, "generate", int8_folder, "w5", "--tensor-parallel", "2")
    assert code == 2
    assert "this is rank 0 of 4, and 2 ranks were asked for" in err


def children(pid):
    """Processes that a process has started and that run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(stat.parent.name))
    return found


def test_chat_on_two_ranks_until_ctrl_c(capsys, int8_folder, monkeypatch):
    options = (int8_folder, "--max-new-tokens", "4", "--greedy", "--dtype", "float32")
    command = [sys.executable, "-m", "halfweight", "chat", *options, "--devices", "cpu,cpu"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, env=env, text=True
    ) as chat:
        chat.stdin.write("w5 w9\n")
        chat.stdin.flush()
        answer = chat.stdout.readline()
        (rank,) = children(chat.pid)
        assert "parallel.member" in Path(f"/proc/{rank}/cmdline").read_text()
        chat.send_signal(signal.SIGINT)
        assert chat.wait(20) == 130
        assert not Path(f"/proc/{rank}").exists()
        assert "Traceback" not in chat.stderr.read()
    code, alone, _ = run(capsys, "generate", int8_folder, "user w5 w9", *options[1:])
    assert code == 0
    assert answer.split() == alone.split()
