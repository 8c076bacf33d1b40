"""Ctrl-C, as a terminal sends it: `generate`, `chat` and `serve` end at once, with their code."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from byte_tokenizer import make_tokenizer
from tiny import edit_json, make_llama

import halfweight

pytest.importorskip("uvicorn")
ROOT = Path(__file__).parents[2]
SECONDS = 120


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A model whose texts do not end for a long time."""
    root = tmp_path_factory.mktemp("endless")
    folder = make_llama(root / "source", max_position_embeddings=100_000, eos_token_id=None)
    edit_json(folder / "generation_config.json", eos_token_id=None, do_sample=False)
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    halfweight.quantize(folder, root / "int8")
    return str(root / "int8")


@pytest.fixture
def start():
    started = []

    def start(*arguments):
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "halfweight", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def end(process, number=signal.SIGINT):
    """Exit code, stderr and the seconds that the process took to end."""
    begin = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=SECONDS)
    return process.returncode, err.decode(), time.monotonic() - begin


def test_generate(endless, start):
    process = start("generate", endless, "hello", "--max-new-tokens", "90000", "--device", "cpu")
    assert process.stdout.read(20)
    code, err, seconds = end(process)
    assert code == 130
    assert "Traceback" not in err
    assert seconds < 20


def test_chat(endless, start):
    process = start("chat", endless, "--max-new-tokens", "90000", "--device", "cpu")
    process.stdin.write(b"hello\n")
    process.stdin.flush()
    assert process.stdout.read(20)
    code, err, seconds = end(process)
    assert code == 130
    assert "Traceback" not in err
    assert seconds < 20


def serving(process):
    """The address that a server listens on."""
    lines = []
    for line in process.stderr:
        lines.append(line.decode())
        found = re.search(r"running on (http://\S+)", lines[-1])
        if found:
            return found[1]
    raise AssertionError("".join(lines))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, -signal.SIGTERM)]
)
def test_serve_while_it_answers(endless, start, number, code):
    process = start("serve", endless, "--port", "0", "--device", "cpu")
    body = {"prompt": "hello", "max_tokens": 90000, "stream": True}
    headers = {"Content-Type": "application/json"}
    address = serving(process) + "/v1/completions"
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        assert answer.read(100)
        found, err, seconds = end(process, number)
        assert "the engine was closed" in answer.read().decode().splitlines()[-2]
    assert found == code, err
    assert seconds < 30
    assert "Traceback" not in err
