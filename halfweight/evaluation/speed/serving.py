"""How fast an engine serves: tokens a second, first tokens, and the time between tokens.

A target answers the requests of a load: the engine itself (`EngineTarget`), or any process that
takes loads line by line (`ProcessTarget`), such as the clients of a server (`server`). `summarize`
makes one row of what the clients saw.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from halfweight.engine.request import Output, Request, Sampling
from halfweight.errors import HalfweightError, UsageError
from halfweight.evaluation.speed.clients import Answer, Ask, Load, drive

if TYPE_CHECKING:
    from halfweight.engine.engine import Engine


class LoadError(HalfweightError):
    """A request of a load was not answered in full."""


@dataclass(frozen=True)
class Run:
    """One load as the clients saw it."""

    answers: list[Answer]
    client_busy: float | None = None
    """The part of a core that the clients took, where they have a process of their own."""


class Target(Protocol):
    """What is measured."""

    runner: str
    """Its name in the results."""

    def run(self, load: Load, asks: Sequence[Ask]) -> Run:
        """Have all requests answered; LoadError if one is not."""
        ...


@dataclass(frozen=True)
class Row:
    """One load of one target; times in milliseconds, percentiles over all requests.

    Tokens a second are new ones, from the first request to the last token: prompts are read within
    that time. `prefill_tokens_per_second` is of the prompts that all clients begin with, until each
    has its first token; None where requests come at a rate. From one piece of an answer to the next
    is the time between tokens, as long as a piece is a token: one that speculation guessed right
    comes along with the one before.
    """

    runner: str
    concurrency: int | None
    rate: float | None
    num_requests: int
    prompt_tokens: int
    """On average, as `new_tokens`."""
    new_tokens: int
    tokens_per_second: float
    prefill_tokens_per_second: float | None
    first_token_ms_p50: float
    first_token_ms_p95: float
    first_token_ms_p99: float
    between_tokens_ms_p50: float | None
    between_tokens_ms_p95: float | None
    between_tokens_ms_p99: float | None
    tokens_per_piece: float
    client_busy: float | None = None


def summarize(runner: str, load: Load, runs: Sequence[Run]) -> Row:
    """The row of a load that was run once or more: medians over the runs, percentiles over all."""
    answers = [answer for run in runs for answer in run.answers]
    first = percentiles([answer.pieces[0] - answer.asked for answer in answers])
    gaps = [gap for answer in answers for gap in np.diff(answer.pieces)]
    between = percentiles(gaps) if gaps else (None, None, None)
    prefill = None
    if load.concurrency is not None:
        prefill = median(_prefill_rate(run.answers, load.concurrency) for run in runs)
    busy = [run.client_busy for run in runs if run.client_busy is not None]
    new_tokens = sum(answer.new_tokens for answer in answers)
    return Row(
        runner=runner,
        concurrency=load.concurrency,
        rate=load.rate,
        num_requests=len(answers),
        prompt_tokens=round(sum(answer.prompt_tokens for answer in answers) / len(answers)),
        new_tokens=round(new_tokens / len(answers)),
        tokens_per_second=median(_rate(run.answers) for run in runs),
        prefill_tokens_per_second=prefill,
        first_token_ms_p50=first[0],
        first_token_ms_p95=first[1],
        first_token_ms_p99=first[2],
        between_tokens_ms_p50=between[0],
        between_tokens_ms_p95=between[1],
        between_tokens_ms_p99=between[2],
        tokens_per_piece=new_tokens / sum(len(answer.pieces) for answer in answers),
        client_busy=median(busy) if busy else None,
    )


def percentiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """The 50th, 95th and 99th, in milliseconds."""
    p50, p95, p99 = (1e3 * np.percentile(seconds, (50, 95, 99))).tolist()
    return p50, p95, p99


def _rate(answers: Sequence[Answer]) -> float:
    begin = min(answer.asked for answer in answers)
    end = max(answer.pieces[-1] for answer in answers)
    return sum(answer.new_tokens for answer in answers) / (end - begin)


def _prefill_rate(answers: Sequence[Answer], concurrency: int) -> float:
    first = sorted(answers, key=lambda answer: answer.asked)[:concurrency]
    seconds = max(answer.pieces[0] for answer in first) - first[0].asked
    return sum(answer.prompt_tokens for answer in first) / seconds


def random_asks(
    vocab_size: int, count: int, prompt_tokens: int, new_tokens: int, *, seed: int
) -> list[Ask]:
    """Requests with prompts of random token ids, no two of which begin alike."""
    source = random.Random(seed)
    ids = range(vocab_size)
    return [Ask(source.choices(ids, k=prompt_tokens), new_tokens) for _ in range(count)]


def text_asks(
    ids: Sequence[int], count: int, prompt_tokens: int, new_tokens: int, *, seed: int
) -> list[Ask]:
    """Requests with prompts cut from a text's tokens, at random places."""
    places = range(len(ids) - prompt_tokens + 1)
    if len(places) < count:
        raise UsageError(
            f"the text has {len(ids)} tokens, too few for {count} prompts of {prompt_tokens}",
            hint="give a longer text or ask for shorter prompts",
        )
    starts = random.Random(seed).sample(places, count)
    return [Ask(ids[start : start + prompt_tokens], new_tokens) for start in starts]


def warm_up(target: Target, asks: Sequence[Ask], new_tokens: int) -> None:
    """All at once, ended one after another: every batch size is met that the load can have."""
    count = len(asks)
    staggered = [Ask(ask.prompt, 2 + i * new_tokens // count) for i, ask in enumerate(asks)]
    target.run(Load(concurrency=count), staggered)


class EngineTarget:
    """The engine without a server: requests of token ids, told of their tokens on its thread."""

    runner = "engine"

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def run(self, load: Load, asks: Sequence[Ask]) -> Run:
        """See Target."""
        return Run(asyncio.run(drive(self._send, load, asks)))

    async def _send(self, ask: Ask) -> Answer:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[Output] = loop.create_future()
        pieces: list[float] = []
        new_tokens = 0

        def take(output: Output) -> None:
            nonlocal new_tokens
            if output.tokens:
                pieces.append(time.perf_counter())
                new_tokens += len(output.tokens)
            if output.finish_reason is not None or output.error is not None:
                loop.call_soon_threadsafe(_resolve, ended, output)

        request = Request(
            tuple(ask.prompt),
            ask.new_tokens,
            Sampling(temperature=ask.temperature, seed=ask.seed),
            stop_tokens=frozenset(),
        )
        asked = time.perf_counter()
        number = self._engine.submit(request, take)
        try:
            last = await ended
        finally:
            self._engine.cancel(number)
        if last.error is not None or last.finish_reason != "length":
            raise LoadError(f"a request ended early: {last.error or last.finish_reason}")
        return Answer(len(ask.prompt), new_tokens, asked, pieces)


def _resolve(ended: asyncio.Future[Output], output: Output) -> None:
    if not ended.done():
        ended.set_result(output)


class ProcessTarget:
    """A process that reads a load a line and writes a line with its answers, both as JSON."""

    def __init__(self, runner: str, command: Sequence[str]) -> None:
        """Returns when the process has written its first line. LoadError if it ends before."""
        self.runner = runner
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self._read()

    def run(self, load: Load, asks: Sequence[Ask]) -> Run:
        """See Target."""
        job = {"load": asdict(load), "asks": [asdict(ask) for ask in asks]}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        found = self._read()
        return Run([Answer(**answer) for answer in found["answers"]], found.get("busy"))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        found: dict[str, Any] = json.loads(line) if line else {"error": "its process ended"}
        if "error" in found:
            raise LoadError(f"{self.runner}: {found['error']}", hint="see what it wrote before")
        return found


def server(url: str, runner: str = "http") -> ProcessTarget:
    """An OpenAI-compatible server, its clients in a process of their own."""
    module = "halfweight.evaluation.speed.http_client"
    return ProcessTarget(runner, [sys.executable, "-m", module, url])


def measure(target: Target, load: Load, rounds: Iterable[Sequence[Ask]]) -> Row:
    """The row of a load whose requests come in one round or several, each to its end."""
    return summarize(target.runner, load, [target.run(load, asks) for asks in rounds])
