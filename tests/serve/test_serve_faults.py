"""Clients that leave and servers that fail, seen from both ends of the socket."""

import json
import math
import re
import socket
import threading
import time
import urllib.request

import pytest
from byte_tokenizer import EOS, make_tokenizer
from tiny import small_llama

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
from live_server import Server

from halfweight.engine import streams
from halfweight.serve import app as serve_app
from halfweight.serve.logprobs import TokenNames

TEXT = {"model": "tiny", "prompt": "hello", "temperature": 0, "ignore_eos": True}


@pytest.fixture
def server():
    special = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": EOS}
    model = small_llama(max_position_embeddings=256, **special)
    with Server(model, make_tokenizer(), cache_tokens=2048, max_sequences=1) as server:
        yield server


def send(server, body):
    """A request on a socket of its own, whose answer nobody has read."""
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
    client = socket.create_connection(("127.0.0.1", server.port))
    client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + data)
    return client


def wait_until(holds):
    limit = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.002)


def wait_for_requests(server, count):
    wait_until(lambda: server.engine.num_requests == count)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_who_leaves_while_waiting_is_noticed_before_the_first_token(server, monkeypatch, stream, n):
    gate, entered = threading.Event(), threading.Event()
    run = server.engine._loop._runner.run

    def run_slowly(step):
        entered.set()
        gate.wait(60)
        return run(step)

    monkeypatch.setattr(server.engine._loop._runner, "run", run_slowly)
    first = send(server, TEXT | {"max_tokens": 200, "stream": True})
    assert entered.wait(60)  # what comes now stays in the loop's inbox
    second = send(server, TEXT | {"max_tokens": 200, "stream": stream, "n": n})
    wait_for_requests(server, 1 + n)
    second.close()
    wait_until(lambda: sum(isinstance(item, int) for item in server.engine._loop._inbox) == n)
    gate.set()  # they were given up while no step ran
    wait_for_requests(server, 1)
    assert first.recv(100)
    first.close()
    wait_for_requests(server, 0)
    assert server.engine._loop.num_used_pages == 0


def test_clients_that_leave_are_counted(server):
    client = send(server, TEXT | {"max_tokens": 200, "stream": True})
    assert client.recv(100)
    client.close()
    wait_for_requests(server, 0)
    assert counted(server, "cancelled") == 1
    server.post("completions", TEXT | {"max_tokens": 2})
    assert (counted(server, "cancelled"), counted(server, "length")) == (1, 1)


def counted(server, reason):
    found = []

    def read():
        with urllib.request.urlopen(f"{server.url}/metrics") as answer:
            page = answer.read().decode()
        found[:] = re.findall(rf'requests_total{{finish_reason="{reason}"}} (\d+)', page)
        return found

    wait_until(read)
    return int(found[0])


def test_what_nobody_foresaw_is_told_in_the_same_form(server, monkeypatch, caplog):
    monkeypatch.setattr(streams.TextStream, "add", lambda self, token: 1 / 0)
    status, answer = server.post("completions", TEXT | {"max_tokens": 200})
    assert (status, answer["error"]["type"]) == (500, "server_error")
    assert answer["error"]["message"] == "the server failed; see its log"
    status, answer = server.post("completions", TEXT | {"max_tokens": 200, "stream": True})
    assert (status, answer["error"]["type"]) == (500, "server_error")
    wait_for_requests(server, 0)


def test_a_failure_within_a_stream_is_its_last_event(server, monkeypatch, caplog):
    add = streams.TextStream.add

    def fail_later(self, token):
        if len(self._tokens) == 5:
            raise ZeroDivisionError
        return add(self, token)

    monkeypatch.setattr(streams.TextStream, "add", fail_later)
    client = send(server, TEXT | {"max_tokens": 200, "stream": True})
    found = b""
    while b"see its log" not in found:
        part = client.recv(65536)
        assert part, found
        found += part
    assert b"[DONE]" not in found
    assert "a stream failed" in caplog.text
    wait_for_requests(server, 0)


def test_logprobs_are_numbers_that_json_has():
    names = TokenNames(make_tokenizer())
    entry = streams.TokenLogprob(65, -math.inf, ((65, -math.inf), (66, -1.5)))
    shown = json.dumps([names.chat([entry]), names.text_completion([entry], [65])], allow_nan=False)
    assert "-9999.0" in shown
    assert "-1.5" in shown


def test_a_burst_is_answered_or_told_to_come_back():
    special = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": EOS}
    model = small_llama(max_position_embeddings=256, **special)
    limits = {"cache_tokens": 512, "max_sequences": 2, "max_requests": 3}
    found = []

    def ask():
        found.append(server.post("completions", TEXT | {"max_tokens": 60})[0])

    with Server(model, make_tokenizer(), **limits) as server:
        threads = [threading.Thread(target=ask) for _ in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_for_requests(server, 0)
    assert sorted(set(found)) == [200, 429]
    assert len(found) == 24
    assert serve_app.MOST_REQUESTS == 1024
