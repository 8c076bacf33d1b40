"""Clients of a server or an engine: who asks what and when, and when the answers came.

No torch here, nor what needs it: the clients of a server run in a process of their own.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Ask:
    """One request: so many new tokens after a prompt of token ids, whatever they are."""

    prompt: Sequence[int]
    new_tokens: int
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Load:
    """When requests are made: exactly one of `concurrency` and `rate` is given."""

    concurrency: int | None = None
    """Clients, each of which asks again as soon as it has its answer."""
    rate: float | None = None
    """Requests a second, at random times that depend on nothing (a Poisson process)."""
    seed: int = 0
    """Of those times."""


@dataclass(frozen=True)
class Answer:
    """One request as its client saw it; times are seconds of one clock."""

    prompt_tokens: int
    new_tokens: int
    asked: float
    pieces: Sequence[float]
    """When new tokens came."""


async def drive(send: Callable[[Ask], Awaitable[T]], load: Load, asks: Sequence[Ask]) -> list[T]:
    """Make all requests as `load` says; what `send` returned, in no particular order.

    The first error of one ends all.
    """
    if load.rate is not None:
        return await _at_random(send, asks, load.rate, random.Random(load.seed))
    left = iter(asks)
    found: list[T] = []

    async def client() -> None:
        for ask in left:
            found.append(await send(ask))

    await asyncio.gather(*(client() for _ in range(load.concurrency or 1)))
    return found


async def _at_random(
    send: Callable[[Ask], Awaitable[T]], asks: Sequence[Ask], rate: float, source: random.Random
) -> list[T]:
    clock = asyncio.get_running_loop().time
    at = clock()
    tasks = []
    for ask in asks:
        tasks.append(asyncio.ensure_future(send(ask)))
        at += source.expovariate(rate)
        await asyncio.sleep(at - clock())
    return await asyncio.gather(*tasks)
