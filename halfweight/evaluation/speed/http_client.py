"""Clients of an OpenAI-compatible server, in a process of their own.

    python -m halfweight.evaluation.speed.http_client URL

reads a line of JSON for each load from stdin and writes one with its answers to stdout. What comes
from the server is noted with its time and looked at when all is over, so that 64 streams take a
small part of one core: the clients must not be what is measured.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

from halfweight.evaluation.speed.clients import Answer, Ask, Load, drive


class Exchange(asyncio.Protocol):
    """One request on a connection of its own: what was sent, and what came back when."""

    def __init__(self, request: bytes, prompt_tokens: int) -> None:
        self._request, self._prompt_tokens = request, prompt_tokens
        self._received: list[tuple[float, bytes]] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._asked = time.perf_counter()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Note a part of the response."""
        self._received.append((time.perf_counter(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        """The server closes when it has said all."""
        if not self.ended.done():
            self.ended.set_result(None)

    def answer(self) -> Answer:
        """What it was, once it has ended. RuntimeError for what is no complete stream."""
        pieces, new_tokens = [], None
        for at, event in events(self._received):
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            if any(choice["text"] for choice in event["choices"]):
                pieces.append(at)
            if event.get("usage"):
                new_tokens = event["usage"]["completion_tokens"]
        if new_tokens is None:
            raise RuntimeError("the stream ended without its usage")
        return Answer(self._prompt_tokens, new_tokens, self._asked, pieces)


def events(received: list[tuple[float, bytes]]) -> Iterator[tuple[float, dict[str, Any]]]:
    """The events of a response and when each was complete."""
    text = b""
    for at, part in chunks(received):
        *complete, text = (text + part).split(b"\n\n")
        for event in complete:
            data = event.removeprefix(b"data: ")
            if data != b"[DONE]":
                yield at, json.loads(data)


def chunks(received: list[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The chunks of a response and when each was complete. RuntimeError for any but a 200."""
    whole = b"".join(data for _, data in received)
    head, _, body = whole.partition(b"\r\n\r\n")
    status = head.split(b"\r\n")[0].decode()
    if " 200 " not in status or b"transfer-encoding: chunked" not in head.lower():
        raise RuntimeError(f"{status or 'no response'}: {body[:300].decode(errors='replace')}")
    parts = iter(received)
    num_received, at, begin = 0, 0.0, len(head) + 4
    while True:
        size_end = whole.find(b"\r\n", begin)
        size = int(whole[begin:size_end], 16) if size_end >= 0 else 0
        end = size_end + 2 + size
        if size == 0 or end > len(whole):
            return
        while num_received < end:
            at, data = next(parts)
            num_received += len(data)
        yield at, whole[size_end + 2 : end]
        begin = end + 2


class Client:
    """Sends requests to one server."""

    def __init__(self, url: str) -> None:
        """Asks the server what its model is called."""
        place = urlsplit(url)
        self._host, self._port = place.hostname or "127.0.0.1", place.port or 80
        with urllib.request.urlopen(f"{url.rstrip('/')}/v1/models") as response:
            self._model = json.load(response)["data"][0]["id"]
        self._path = place.path.rstrip("/") + "/v1/completions"

    async def send(self, ask: Ask) -> Exchange:
        """One request, to its end."""
        request = self._request(ask)
        exchange = Exchange(request, len(ask.prompt))
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: exchange, self._host, self._port)
        await exchange.ended
        return exchange

    def _request(self, ask: Ask) -> bytes:
        fields = {
            "model": self._model,
            "prompt": ask.prompt,
            "max_tokens": ask.new_tokens,
            "temperature": ask.temperature,
            "seed": ask.seed,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        body = json.dumps(fields).encode()
        head = (
            f"POST {self._path} HTTP/1.1\r\nhost: {self._host}:{self._port}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        )
        return head.encode() + body


def measure(client: Client, line: str) -> dict[str, Any]:
    """The answers of a load, and the part of a core that the clients took."""
    job = json.loads(line)
    load, asks = Load(**job["load"]), [Ask(**ask) for ask in job["asks"]]
    begin, begin_busy = time.perf_counter(), time.process_time()
    exchanges = asyncio.run(drive(client.send, load, asks))
    busy = (time.process_time() - begin_busy) / (time.perf_counter() - begin)
    return {"answers": [asdict(exchange.answer()) for exchange in exchanges], "busy": busy}


def main() -> None:
    """Measure a load for each line of stdin."""
    try:
        client = Client(sys.argv[1])
        _write({})
        for line in sys.stdin:
            _write(measure(client, line))
    except (OSError, RuntimeError) as error:
        _write({"error": str(error)})


def _write(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
