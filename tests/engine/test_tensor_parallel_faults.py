"""A rank that is lost ends the job on all of them, with one error that names it."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tp_models
from near_ties import assert_same

import halfweight
from halfweight.engine.loop import EngineStoppedError
from halfweight.engine.parallel import outside
from halfweight.engine.parallel import ranks as ranks_module
from halfweight.engine.parallel.channel import Channel, Kind
from halfweight.engine.parallel.faults import BrokenLinkError, RankError, from_message, to_message
from halfweight.engine.parallel.job import Job, hello
from halfweight.engine.parallel.ranks import Member, Ranks
from halfweight.engine.parallel.start import choose_devices
from halfweight.engine.parallel.steps import StepReader, StepWriter
from halfweight.engine.step import Chunk
from halfweight.errors import CheckpointError, DoesNotFitError, UsageError

PROMPTS = [[5, 9, 33, 70, 11, 200, 3], [100, 2, 77, 41]]
OPTIONS = {"max_new_tokens": 12, "temperature": 0, "stop_tokens": (), "num_logprobs": 2}
DRAWN = {"temperature": 0.9, "seed": 7, "max_new_tokens": 12}
NEAR = 1e-3
"""Nats between the two likeliest tokens, below which another order of sums may choose."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tp_models.make("qwen2", tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="module")
def expected(folder):
    """What one device answers."""
    with open_engine(folder) as engine:
        return {
            "greedy": engine.generate(PROMPTS, **OPTIONS),
            "drawn": engine.generate(PROMPTS[0], **DRAWN),
        }


def open_engine(folder, **options):
    limits = {"max_context": 128, "max_sequences": 4, "device": "cpu", "dtype": torch.float32}
    return halfweight.Engine(folder, **limits | options)


def alive(pid):
    """Whether a process runs, and is no zombie."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_two_ranks_answer_as_one_device_until_one_is_stopped(folder, expected, monkeypatch):
    with open_engine(folder, tensor_parallel=2, cache_tokens=64) as engine:
        (pid,) = [member.process.pid for member in engine.ranks]
        assert "2 ranks" in engine.description
        assert_all_same(engine.generate(PROMPTS, **OPTIONS), expected["greedy"])
        assert engine.generate(PROMPTS[0], **DRAWN) == expected["drawn"]
        many = engine.generate(PROMPTS * 6, **OPTIONS)  # more than there are pages for
        for i in range(6):
            assert_all_same(many[2 * i : 2 * i + 2], expected["greedy"])
        monkeypatch.setattr(ranks_module, "SILENCE_SECONDS", 2.5)
        os.kill(pid, signal.SIGSTOP)
        begin = time.monotonic()
        with pytest.raises(EngineStoppedError, match=r"rank 1 .* has said nothing for"):
            engine.generate(PROMPTS, **OPTIONS)
        assert time.monotonic() - begin < 20
    assert not alive(pid)


def assert_all_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other, NEAR, within=1e-4)


def wait_until(holds, seconds=20):
    """Whether it holds within so many seconds."""
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.02)
    return holds()


def test_ranks_that_torchrun_starts_meet_and_end_together(folder, expected, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in where.items():
        monkeypatch.setenv(name, value)
    program = "from halfweight.engine.parallel import outside as o; o.follow(o.Place.found())"
    env = os.environ | {"RANK": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    other = subprocess.Popen([sys.executable, "-c", program], env=env, stderr=subprocess.DEVNULL)
    monkeypatch.setenv("RANK", "0")
    with open_engine(folder, tensor_parallel=2) as engine:
        assert_all_same(engine.generate(PROMPTS, **OPTIONS), expected["greedy"])
        other.kill()
        assert wait_until(lambda: engine.fault is not None)
        assert str(engine.fault).startswith(f"rank 1 (pid {other.pid} on ")
        with pytest.raises(EngineStoppedError, match="is gone"):
            engine.generate(PROMPTS, **OPTIONS)
    other.wait()


def test_a_folder_that_one_rank_has_not_is_one_error_of_that_rank(folder, monkeypatch):
    to_bytes = Job.to_bytes
    elsewhere = "/nowhere/model"
    monkeypatch.setattr(Job, "to_bytes", lambda job: to_bytes(replace(job, model=elsewhere)))
    begin = time.monotonic()
    with pytest.raises(CheckpointError, match=r"^rank 1 \(.*\): /nowhere/model: no such file"):
        open_engine(folder, tensor_parallel=2)
    assert time.monotonic() - begin < 25


def test_a_port_in_use_is_one_line(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for name, value in zip(outside.NAMES, ("0", "2", "127.0.0.1", str(port)), strict=True):
            monkeypatch.setenv(name, value)
        with pytest.raises(UsageError, match=f"127.0.0.1:{port}, .* is in use") as caught:
            outside.lead(2)
    assert "--master-port" in caught.value.hint


def test_who_does_not_know_the_secret_is_no_rank():
    secret = bytes(range(32))
    for said, expected in ((secret + (5).to_bytes(4, "little"), 5), (b"x" * 36, None), (b"", None)):
        ours, theirs = socket.socketpair()
        theirs.sendall(said)
        theirs.shutdown(socket.SHUT_WR)
        assert outside._admitted(ours, secret) == expected


class Program:
    """A program in place of rank 1, its channel in this process's hands."""

    def __init__(self, *arguments):
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-c", *arguments]
        piped = subprocess.PIPE
        process = subprocess.Popen(command, stdout=piped, stderr=subprocess.STDOUT)
        self.channel = Channel(theirs)
        self.member = Member(1, Channel(ours), process, f"pid {process.pid}")
        threading.Thread(target=ranks_module._listen, args=(self.member,), daemon=True).start()
        self.ranks = Ranks([self.member])
        self.told = []
        self.ranks.on_fault(self.told.append)

    def say(self, kind, content):
        self.channel.send(kind, json.dumps(content).encode())

    def fault(self):
        assert wait_until(lambda: self.told)
        self.ranks.end()
        assert self.member.process.poll() is not None
        return self.told[0]


SLEEP = "import time; time.sleep(60)"


def test_a_rank_that_is_killed_is_named():
    program = Program(SLEEP)
    program.member.process.kill()
    program.channel.close()
    fault = program.fault()
    assert str(fault) == f"rank 1 (pid {program.member.process.pid}) was killed by SIGKILL"
    assert "out of memory" in fault.hint


def test_the_last_to_ask_hears_first_of_a_lost_rank():
    """The loop, so that it uses no sum that the link has let go of."""
    program = Program(SLEEP)
    heard = []
    for name in ("link", "loop"):
        program.ranks.on_fault(lambda fault, name=name: heard.append(name))
    program.member.process.kill()
    program.channel.close()
    program.fault()
    assert heard == ["loop", "link"]


def test_a_rank_that_ends_leaves_its_last_words():
    program = Program("import sys; print('step 7'); sys.exit('no more of this')")
    program.member.process.wait()
    program.channel.close()
    assert str(program.fault()).endswith("ended with code 1; its last words: no more of this")


def test_a_rank_of_other_versions_is_refused():
    program = Program(SLEEP)
    said = hello()
    said["versions"]["torch"] = "1.0"
    said["host"] = "elsewhere"
    program.say(Kind.HELLO, said)
    fault = program.fault()
    assert isinstance(fault, UsageError)
    assert "on elsewhere) has torch 1.0, rank 0 has " in str(fault)


def test_what_a_rank_cannot_do_is_told_as_it_was_there():
    program = Program(SLEEP)
    missing = CheckpointError("/models/x: no such file or folder", hint="give a folder")
    program.say(Kind.FAULT, to_message(missing))
    fault = program.fault()
    assert isinstance(fault, CheckpointError)
    assert str(fault) == f"{program.member.name}: /models/x: no such file or folder"
    assert fault.hint == "give a folder"


def test_a_rank_out_of_memory_is_named():
    content = json.dumps(to_message(torch.OutOfMemoryError("CUDA out of memory\nmore"))).encode()
    fault = from_message(content, "rank 3 (pid 1 on here)")
    assert isinstance(fault, DoesNotFitError)
    assert str(fault).startswith("rank 3 (pid 1 on here): OutOfMemoryError: CUDA out of memory")
    assert "--cache-tokens" in fault.hint


def test_a_sum_that_fails_while_all_answer_is_told_too(monkeypatch):
    monkeypatch.setattr(ranks_module, "EXPLAINING_SECONDS", 0.1)
    program = Program(SLEEP)
    fault = program.ranks.explain(BrokenLinkError("timed out"))
    assert str(fault) == "ranks wait for each other: timed out"
    assert program.fault() is fault


def test_a_rank_that_does_not_start_is_named():
    program = Program(SLEEP)
    with pytest.raises(RankError, match=r"rank 1 .* has not started within 0\.1 s"):
        program.ranks.wait_for(Kind.HELLO, 0.1)
    program.fault()


def test_a_rank_leaves_when_rank_0_is_gone():
    member = ranks_module._started(1, 2)
    assert member.channel.receive()[0] == Kind.HELLO
    member.channel.close()
    assert wait_until(lambda: member.process.poll() is not None)


def test_devices_are_as_many_as_ranks():
    with pytest.raises(UsageError, match="2 devices for 4 ranks"):
        choose_devices(4, ["cpu", "cpu"])


def test_steps_arrive_as_they_were_sent():
    chosen = random.Random(0)
    writer, reader = StepWriter(), StepReader()
    pages = {slot: [] for slot in range(4)}
    for _ in range(200):
        step = []
        for slot in chosen.sample(range(4), chosen.randint(0, 4)):
            if chosen.random() < 0.2:  # another sequence's
                pages[slot] = []
            pages[slot] += chosen.sample(range(1, 100), chosen.randint(0, 3))
            numbers = [chosen.randint(0, 9999) for _ in range(3)]
            step.append(Chunk(slot, *numbers, pages[slot]))
        assert reader.read(writer.write(step)) == step
