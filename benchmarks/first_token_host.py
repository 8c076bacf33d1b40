"""What the host adds to the first token of a second question on the same beginning.

    python benchmarks/first_token_host.py [--repeats 100] [--limit-seconds 120]

2,048 tokens, the first 2,000 of which were asked before. Nothing is computed: the engine, the GPU
runner's work on the host (pages, packing) and the sampler's run as they do beside a GPU, then a
step takes the time of one on an H200 with Llama-3-8B. What is missing is the driver: copies and
launches. Every repeat asks for something new, as `serve.py` does. Rows, `engine` and `http`:

    before   from the request to the step's launch
    after    from the step's end to the first token: on the engine's thread, or with the client
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from statistics import median
from typing import Any

import numpy as np
import torch
from arguments import parse
from engine_host import VOCAB, Device, Sampled
from envelope import envelope, write_result
from models import SHAPES, random_model
from serve import OWN_TOKENS, SHARED_TOKENS, http_target, wordy_tokenizer

from halfweight.engine.engine import Engine
from halfweight.engine.runners import gpu
from halfweight.engine.sampler import Gained, Sampler
from halfweight.engine.step import Chunk, Step
from halfweight.evaluation.speed.clients import Ask, Load
from halfweight.evaluation.speed.serving import EngineTarget, Target, random_asks
from halfweight.memory.engine_memory import READ_TOKENS

STEP_SECONDS = 0.0045
NEW_TOKENS = 2


class HostDevice(Device):
    """A device whose runner and sampler do all that theirs do on the host."""

    max_context = 4096

    def __init__(self, step_seconds: float) -> None:
        super().__init__(step_seconds)
        SHAPES["host"] = replace(SHAPES["tiny"], vocabulary=VOCAB)
        self._runner = runner_without_launches(self.max_sequences, self.max_context)
        self.table = self._runner.table
        self._sampler = Sampler(self.table, VOCAB)
        self.set, self.check = self._sampler.set, self._sampler.check
        self.begun: list[float] = []
        self.ended: list[float] = []

    def run(self, step: Step) -> torch.Tensor:
        """Packs what a recorded step takes; what is longer only takes its time."""
        if sum(chunk.num_tokens for chunk in step) <= READ_TOKENS:
            self._runner.run(step)
        self.begun.append(time.perf_counter())
        return super().run(step)

    def sample(self, logits: torch.Tensor, chunks: Sequence[Chunk], drafts: Any) -> Timed:
        """By the real sampler; ready at the end of the step."""
        sampled = self._sampler.sample(logits, chunks, drafts)
        return Timed(sampled, Sampled(self._free_at, []), self.ended)


class Timed:
    """Tokens that are there at the end of their step; notes when that was seen."""

    def __init__(self, sampled: Any, end: Sampled, ended: list[float]) -> None:
        self._sampled, self._end, self._ended = sampled, end, ended

    def wait(self) -> list[Gained]:
        """See sampler.Sampled."""
        self._end.wait()
        self._ended.append(time.perf_counter())
        found: list[Gained] = self._sampled.wait()
        return found


def runner_without_launches(max_sequences: int, max_context: int) -> Any:
    """A GPU runner of a tiny model on the CPU that packs its inputs and launches nothing."""

    def nothing(*_: object, **__: object) -> None:
        """In place of a kernel, or of a recorded step."""

    gpu.launch = nothing
    runner: Any = gpu.GpuRunner(
        random_model("host"),
        max_sequences=max_sequences,
        max_context=max_context,
        cache_tokens=max_context,
    )
    runner._recordings = nothing
    return runner


def rows(repeats: int, deadline: float) -> list[dict[str, Any]]:
    """Engine and server in turn, medians over the repeats."""
    device: Any = HostDevice(STEP_SECONDS)
    tokenizer, seeds = wordy_tokenizer(VOCAB), count()
    with Engine.over(device, device, tokenizer) as engine, http_target(engine) as http:
        targets: list[Target] = [EngineTarget(engine), *http]
        found: dict[str, list[tuple[float, float]]] = {target.runner: [] for target in targets}
        for i in range(-3, repeats):
            for target in targets:
                times = second_question(device, target, seeds)
                if i >= 0 and time.monotonic() < deadline:  # the first warm up
                    found[target.runner].append(times)
    return [row(runner, np.array(times)) for runner, times in found.items()]


def second_question(device: HostDevice, target: Target, seeds: Any) -> tuple[float, float]:
    """Seconds before and after the step that gives the first token."""
    shared, first, second = (
        random_asks(VOCAB, 1, tokens, NEW_TOKENS, seed=next(seeds))[0].prompt
        for tokens in (SHARED_TOKENS, OWN_TOKENS, OWN_TOKENS)
    )
    target.run(Load(concurrency=1), [Ask([*shared, *first], NEW_TOKENS)])
    device.begun.clear()
    device.ended.clear()
    (answer,) = target.run(Load(concurrency=1), [Ask([*shared, *second], NEW_TOKENS)]).answers
    return device.begun[0] - answer.asked, answer.pieces[0] - device.ended[0]


def row(runner: str, times: Any) -> dict[str, Any]:
    """Medians in microseconds."""
    before, after = (1e6 * median(column) for column in times.T)
    return {
        "runner": runner,
        "num_requests": len(times),
        "before_microseconds": before,
        "after_microseconds": after,
        "both_microseconds": 1e6 * median(times.sum(axis=1)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=100)
    options, deadline = parse(parser)
    facts = envelope(torch.device("cpu"), {"step_microseconds": 1e6 * STEP_SECONDS})
    found = rows(options.repeats, deadline)
    write_result(options.name or "first_token_host", facts, found, out=options.out)
    for each in found:
        print(
            f"{each['runner']}: {each['before_microseconds']:.0f} us before the step, "
            f"{each['after_microseconds']:.0f} after"
        )


if __name__ == "__main__":
    main()
