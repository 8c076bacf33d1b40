"""Listens until it is told to end: by Ctrl-C, by SIGTERM, by the end of its process."""

from __future__ import annotations

import asyncio
import errno
import socket
from contextlib import suppress
from typing import Any

import uvicorn
from fastapi import FastAPI

from halfweight.engine.engine import Engine
from halfweight.errors import UsageError

GRACE_SECONDS = 5
"""What runs when the server is told to end has so long to end by itself."""
HARD_SECONDS = 60
"""Then uvicorn cuts what is left, should the engine not have ended it."""

_PORT_HINT = "--port 0 takes a free one"
_HOST_HINT = "--host 127.0.0.1 is for this machine alone, 0.0.0.0 for all that reach it"


class _Server(uvicorn.Server):
    """Ends as uvicorn's does, but what takes too long hears of it: streams get a last event."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine

    async def shutdown(self, sockets: Any = None) -> None:
        """No new connections; those there are end, or the engine does and with it they."""
        closing = asyncio.create_task(self._close_engine())
        try:
            await super().shutdown(sockets)
        finally:
            closing.cancel()

    async def _close_engine(self) -> None:
        await asyncio.sleep(GRACE_SECONDS)
        await asyncio.to_thread(self._engine.close)


def require_address(host: str, port: int) -> None:
    """Raises UsageError where nobody could listen now, so that no model is loaded in vain."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as found:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
    except OSError as error:
        raise UsageError(
            f"{host}:{port}: cannot be listened on ({error.strerror})",
            hint=_PORT_HINT if error.errno in (errno.EADDRINUSE, errno.EACCES) else _HOST_HINT,
        ) from error


def listen(app: FastAPI, engine: Engine, host: str, port: int) -> None:
    """Serve until told to end. Leaves the process with uvicorn's code where it cannot listen."""
    config = uvicorn.Config(app, host=host, port=port, timeout_graceful_shutdown=HARD_SECONDS)
    server = _Server(config, engine)
    with suppress(KeyboardInterrupt):  # uvicorn raises it again once all has ended
        server.run()
