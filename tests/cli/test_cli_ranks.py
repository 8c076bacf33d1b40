"""`--tensor-parallel` and `--devices`: refusals before anything starts, and Ctrl-C ends all."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run

from halfweight.cli.ranks import as_many_as_needed, rank_options
from halfweight.engine.parallel.outside import NAMES
from halfweight.memory import device_memory
from halfweight.memory.architecture import architecture
from halfweight.memory.plan import Model
from halfweight.memory.presets import preset


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (("--tensor-parallel", "3"), "3 GPUs do not divide 4 heads", "legal tensor-parallel sizes"),
        (("--tensor-parallel", "2", "--devices", "cpu"), "1 devices for 2 ranks", "name one"),
        (("--device", "cpu", "--devices", "cpu,cpu"), "--device and --devices", "give one"),
        (("--devices", "cpu"), "one device in --devices cpu", "give --device"),
        (("--devices", "cpu,moon"), "device 'moon' is not known", "cuda:0"),
        (("--devices", "cpu,meta"), "device 'meta' is not known", "cuda:0"),
        (("--devices", "cpu,cuda:9"), "there is no cuda:9: this machine has ", "--devices auto"),
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


@pytest.mark.parametrize(("free_gib", "expected"), [(100, 1), (23, 4), (3, 1)])
def test_serve_takes_as_many_gpus_as_the_plan_says(
    int8_folder, monkeypatch, capsys, free_gib, expected
):
    seventy = Model.from_recipe(architecture(preset("llama-3-70b")))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr(device_memory, "available_bytes", lambda device: free_gib << 30)
    monkeypatch.setattr("halfweight.model.share.described", lambda folder: seventy)
    options = rank_options(None, None, None)
    found = as_many_as_needed(int8_folder, options, None, 4096, "16bit")
    assert found == options | {"tensor_parallel": expected}
    assert ("uses 4 of 4 GPUs" in capsys.readouterr().err) == (expected == 4)
    assert as_many_as_needed(int8_folder, options, "cuda:1", 4096, "16bit") == options


RANKS = ("--tensor-parallel", "2", "--devices", "cpu,cpu")


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
    command = [sys.executable, "-m", "halfweight", "chat", *options, *RANKS]
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
        assert chat.wait(60) == 130  # 2 s alone, 20 beside busy programs
        assert not Path(f"/proc/{rank}").exists()
        assert "Traceback" not in chat.stderr.read()
    code, alone, _ = run(capsys, "generate", int8_folder, "user w5 w9", *options[1:])
    assert code == 0
    assert answer.split() == alone.split()


def test_generate_over_stages_says_what_lies_where(capsys, int8_folder):
    options = (int8_folder, "w5 w9", "--max-new-tokens", "6", "--greedy")
    code, alone, _ = run(capsys, "generate", *options, "--device", "cpu")
    assert code == 0
    code, text, err = run(capsys, "generate", *options, "--devices", "cpu,cpu")
    assert code == 0
    assert text == alone
    lines = err.splitlines()
    assert lines[0].startswith("cpu: embedding, layers 0 to 0, ")
    assert lines[1].startswith("cpu: layers 1 to 1, head, ")
    assert re.match(
        r"at most [\d.]+ tokens a second of one text, by the bytes read: cpu ", lines[2]
    )


def test_plan_on_devices_of_this_machine(capsys, int8_folder):
    code, text, _ = run(capsys, "plan", int8_folder, "--devices", "cpu,cpu", "--context", "64")
    assert code == 0
    assert "cpu: layers 1 to 1, head, " in text
    options = ("--devices", "auto", "--context", "64", "--json")
    code, text, _ = run(capsys, "plan", int8_folder, *options)
    assert code == 0
    found = json.loads(text)
    assert sum(end - begin for begin, end in (s["layers"] for s in found["stages"])) == 2
    seconds = sum(s["read_bytes"] / s["read_bandwidth"] for s in found["stages"])
    assert found["tokens_per_second"] == pytest.approx(1 / seconds)
    code, _, err = run(capsys, "plan", "llama-3.1-405b", "--devices", "cpu,cpu")
    assert code == 3
    assert "error: 126 layers, each beside 4096 tokens of KV cache, do not fit: cpu holds " in err
    code, _, err = run(capsys, "plan", int8_folder, "--devices", "cpu,cpu", "--gpus", "24GB")
    assert code == 2
    assert "--devices beside --gpus or --tensor-parallel" in err
