"""What the host does for a token: the engine's Python a step, and the server's a token.

    python benchmarks/engine_host.py [--at-once 1 64] [--limit-seconds 120]

Nothing is computed: a step is over when it would be on one H200 with Llama-3-8B, so what is
measured is this package, the interpreter and the server's libraries. Rows:

    loop    time on the processor of the engine's thread from one launch to the next, where a step
            takes no time: how short a step of the device may be before the host holds it up
    engine  tokens a second with steps of the device's length, requests of token ids
    http    the same through the server, with its time on the processor for each token

The ceiling is what a device that never waits would make of each number of sequences.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import count, pairwise
from statistics import median
from typing import Any

import torch
from arguments import parse
from envelope import envelope, write_result
from serve import http_target, wordy_tokenizer

from halfweight.engine.engine import Engine
from halfweight.engine.sampler import Gained
from halfweight.engine.step import Chunk, Step
from halfweight.evaluation.speed.clients import Load
from halfweight.evaluation.speed.serving import EngineTarget, Run, Target, random_asks, summarize

VOCAB = 128256
LENGTHS = (512, 128)
STEP_SECONDS = {1: 0.0026, 16: 0.0040, 64: 0.0120, 256: 0.0350}
"""Of a step at so many sequences, the prompts of others beside them."""
ROUNDS = 3
SERVER_THREAD = "halfweight-server"


class Device:
    """A runner and its sampler; steps take a given time, one after the other."""

    page_tokens, max_sequences, max_context, max_step_tokens = 64, 256, 2048, 8192
    num_pages = 1 + max_sequences * 12
    vocab_size, shares_prefixes = VOCAB, True
    device = torch.device("meta")
    """Anything but the CPU, whose steps are over when `run` returns."""

    def __init__(self, step_seconds: float) -> None:
        self.table = torch.zeros(self.max_sequences + 1, self.max_context + 1, dtype=torch.int32)
        self.launches: list[tuple[int, float]] = []
        """Of each step: its sequences, and how long its thread had been on the processor."""
        self._seconds, self._free_at = step_seconds, 0.0
        self._logits = torch.zeros(1, 1).expand(self.max_step_tokens, 1)

    def run(self, step: Step) -> torch.Tensor:
        """The step begins when the one before has ended."""
        self.launches.append((len(step), time.thread_time()))
        self._free_at = max(self._free_at, time.perf_counter()) + self._seconds
        return self._logits[: sum(chunk.num_logits for chunk in step)]

    def sample(self, logits: torch.Tensor, chunks: Sequence[Chunk], drafts: object) -> Sampled:
        """A token for each, with the end of the step."""
        return Sampled(self._free_at, [300 + chunk.start for chunk in chunks])

    def check(self, sampling: object) -> None:
        """Anything goes."""

    def set(self, slot: int, *_: object, **__: object) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to free."""


class Sampled:
    """Tokens that are there when their step has ended."""

    def __init__(self, ready_at: float, tokens: list[int]) -> None:
        self._ready_at, self._tokens = ready_at, tokens

    def wait(self) -> list[Gained]:
        """See sampler.Sampled."""
        time.sleep(max(0.0, self._ready_at - time.perf_counter()))
        return [Gained([token]) for token in self._tokens]


def loop_row(number: int) -> dict[str, Any]:
    """Steps of decoding alone, `number` sequences in each."""
    device: Any = Device(0.0)
    with Engine.over(device, device, None) as engine:
        EngineTarget(engine).run(Load(number), random_asks(VOCAB, number, *LENGTHS, seed=0))
    full = [at for size, at in device.launches if size == number]
    seconds = [after - before for before, after in pairwise(full)]
    return {"runner": "loop", "concurrency": number, "step_microseconds": 1e6 * median(seconds)}


def served_rows(number: int) -> list[dict[str, Any]]:
    """The engine and its server, a round of each in turn."""
    device: Any = Device(STEP_SECONDS[number])
    tokenizer, seeds = wordy_tokenizer(VOCAB), count()
    with Engine.over(device, device, tokenizer) as engine, http_target(engine) as http:
        targets: list[Target] = [EngineTarget(engine), *http]
        runs: dict[str, list[Run]] = {target.runner: [] for target in targets}
        busy: list[float] = []
        for i in range(-1, ROUNDS):
            for target in targets:
                begin = server_seconds()
                asks = random_asks(VOCAB, number, *LENGTHS, seed=next(seeds))
                run = target.run(Load(number), asks)
                if i >= 0:  # the first warms up
                    runs[target.runner].append(run)
                    busy.append(server_seconds() - begin)
    rows = [asdict(summarize(runner, Load(number), found)) for runner, found in runs.items()]
    if http:
        seconds = median(busy[1::2])
        rows[1]["server_microseconds_per_token"] = 1e6 * seconds / (number * LENGTHS[1])
        rows[1]["over_engine"] = rows[1]["tokens_per_second"] / rows[0]["tokens_per_second"]
    return rows


def server_seconds() -> float:
    """How long the server's thread has been on the processor."""
    for thread in threading.enumerate():
        if thread.name == SERVER_THREAD and thread.ident is not None:
            return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = list(STEP_SECONDS)
    parser.add_argument("--at-once", nargs="+", type=int, choices=numbers, default=numbers)
    options, deadline = parse(parser)
    ceiling = {f"tokens_per_second_at_{n}": n / STEP_SECONDS[n] for n in options.at_once}
    facts = envelope(torch.device("cpu"), ceiling)
    rows: list[dict[str, Any]] = []
    for number in options.at_once:
        for make in (lambda n: [loop_row(n)], served_rows):
            if time.monotonic() < deadline:
                rows += make(number)
        write_result(options.name or "engine_host", facts, rows, out=options.out)
        print("\n".join(line(row) for row in rows if row["concurrency"] == number), flush=True)


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    if row["runner"] == "loop":
        return f"loop, {row['concurrency']} at once: {row['step_microseconds']:.0f} us a step"
    text = (
        f"{row['runner']}, {row['concurrency']} at once: {row['tokens_per_second']:.0f} tokens/s, "
        f"first {row['first_token_ms_p50']:.0f} ms"
    )
    if row["runner"] == "http":
        text += (
            f", {row['over_engine']:.3f} of the engine, "
            f"{row['server_microseconds_per_token']:.0f} us of the server a token, "
            f"clients {row['client_busy']:.0%} of a core"
        )
    return text


if __name__ == "__main__":
    main()
