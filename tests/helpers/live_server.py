"""The server's application over a socket, on an engine of a model in memory."""

import json
import threading
import time
import urllib.error
import urllib.request

import openai
import uvicorn

from halfweight.engine.engine import Engine
from halfweight.serve.app import build_app


class Server:
    """Listens inside its `with` block, on a port of its own."""

    def __init__(self, model, tokenizer, **options):
        served = {
            name: options.pop(name) for name in ("api_key", "max_requests") if name in options
        }
        options = {"tokenizer": tokenizer, "speculates": False} | options
        self.engine = Engine(model, **options)
        app = build_app(self.engine, tokenizer, "tiny", **served)
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        self._thread = threading.Thread(target=self._server.run)

    def __enter__(self):
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_):
        self._server.should_exit = True
        self._thread.join()

    def post(self, kind, body, timeout=60):
        """Status and body of an answer, good or bad."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        where = f"{self.url}/v1/{kind}"
        request = urllib.request.Request(where, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def client(self, **options):
        options = {"api_key": "none", "max_retries": 0} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def wait_until_idle(self):
        limit = time.monotonic() + 60
        while self.engine.num_requests:
            assert time.monotonic() < limit
            time.sleep(0.01)
