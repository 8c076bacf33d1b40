"""Pieces of several streams as one, and work that ends when its client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import Request
from starlette.exceptions import HTTPException

from halfweight.engine.streams import Piece


def merged(
    streams: Sequence[AsyncGenerator[tuple[int, Piece]]],
) -> AsyncGenerator[tuple[int, Piece]]:
    """Pieces of all streams as they come; closing it closes them, the first error ends all."""
    return streams[0] if len(streams) == 1 else _interleaved(streams)


async def _interleaved(
    streams: Sequence[AsyncGenerator[tuple[int, Piece]]],
) -> AsyncGenerator[tuple[int, Piece]]:
    queue: asyncio.Queue[tuple[int, Piece] | Exception | None] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[tuple[int, Piece]]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    queue.put_nowait(item)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        num_left = len(tasks)
        while num_left:
            found = await queue.get()
            if isinstance(found, Exception):
                raise found
            if found is None:
                num_left -= 1
            else:
                yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def unless_disconnected(task: asyncio.Task[dict[str, Any]], http: Request) -> dict[str, Any]:
    """The task's result; it is cancelled as soon as the client goes away."""
    leaving = asyncio.ensure_future(http.receive())
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(499, "the client went away")
        return task.result()
    finally:
        task.cancel()
        leaving.cancel()
