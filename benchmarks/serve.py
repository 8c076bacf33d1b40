"""Serving: requests at once through the engine alone and through its HTTP server.

    python benchmarks/serve.py [--limit-seconds 240]
    python benchmarks/serve.py --work FOLDER --llama-python /path/with/llama_cpp   on a CPU

On a GPU random INT8 weights of Llama-3-8B's shapes, 512 tokens in and 128 out, 1 to 256 requests at
once; on a CPU SmolLM2-135M, 128 in and 128 out, 1 to 32, beside llama.cpp's Q8_0 where it is
installed. All requests of a round begin at once; rounds of all runners are interleaved. Answers are
greedy and go on past the end of text, prompts are random and never the same.

    steps      the runner's steps in a plain loop, a token each: what the engine can reach for one
    engine     requests of token ids to the engine in this process
    http       its server in this process, clients in another
    llama.cpp  its batch API, as many threads as there are cores

Guessing is off but in the rows that are about it: text of random weights repeats itself. Rows:

    at once    tokens a second by concurrency
    prefill    one new token: how fast prompts are read
    prefix     2,000 tokens that an earlier request began with, against the first time
    editing    a text to write again with a change, SmolLM2, without and with guessing
    prose      a text to continue, sampled, the same
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from arguments import parse, workplace
from cpu import prepare
from envelope import envelope, write_result
from models import DEVICE, random_model
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import halfweight
from halfweight.engine.engine import Engine
from halfweight.engine.runners import make_runner
from halfweight.engine.sampler import Sampler
from halfweight.engine.step import Chunk, Runner, Step
from halfweight.errors import HalfweightError
from halfweight.evaluation.speed.clients import Answer, Ask, Load
from halfweight.evaluation.speed.serving import (
    EngineTarget,
    ProcessTarget,
    Run,
    Target,
    random_asks,
    server,
    summarize,
    warm_up,
)
from halfweight.kernels.timing import read_bandwidth

PARTS = ("at once", "prefill", "prefix", "editing")
ON_GPU = DEVICE.type == "cuda"
AT_ONCE = (1, 2, 4, 8, 16, 32, 64, 128, 256) if ON_GPU else (1, 2, 4, 8, 16, 32)
AT_ONCE_OF = {"steps": (1,), "llama.cpp": (1, 8)}
LENGTHS = (512, 128) if ON_GPU else (128, 128)
PREFILL = ((64, 512), (8, 8192)) if ON_GPU else ((8, 512),)
"""Prompts and their tokens."""
SHARED_TOKENS, OWN_TOKENS, PREFIX_NEW_TOKENS = 2000, 48, 8
MOST_CONTEXT = 8448 if ON_GPU else 2304
TEXT_PLACES, TEXT_TOKENS, BEGUN_TOKENS, GUESSED_NEW_TOKENS = (1500, 3000, 4500, 6000), 192, 32, 96
WARM_UP_TOKENS = 32
TEXT = Path(halfweight.__file__).parent / "cli" / "pride-and-prejudice.txt"
CHANGES = {"Bennet": "Smith", "Bingley": "Jones"}
EDIT = "Text:\n\n{text}\n\nThe same text, with the names changed to Smith and Jones:\n\n{begun}"


@dataclass
class Subject:
    """A model in memory, what runs it, and the seeds of its prompts."""

    model: Any
    runner: Runner
    tokenizer: Any

    def __post_init__(self) -> None:
        self._seeds = count()

    def asks(self, number: int, prompt_tokens: int, new_tokens: int) -> list[Ask]:
        """Requests that no other call gives."""
        sizes = (self.runner.vocab_size, number, prompt_tokens, new_tokens)
        return random_asks(*sizes, seed=next(self._seeds))

    def engine(self, *, speculates: bool = False) -> Engine:
        """It closes the runner."""
        sampler = Sampler(self.runner.table, self.runner.vocab_size)
        return Engine.over(self.runner, sampler, self.tokenizer, speculates=speculates)


def random_subject(shape: str, most: int) -> Subject:
    """Random weights; on a GPU every step that can be recorded is."""
    model = random_model(shape)
    tokens = 2 * most * sum(LENGTHS) + 16 * MOST_CONTEXT
    runner: Any = make_runner(
        model, max_sequences=most, max_context=MOST_CONTEXT, cache_tokens=tokens
    )
    if ON_GPU:
        runner.record(list(range(1, most + 1)))
    return Subject(model, runner, wordy_tokenizer(runner.vocab_size))


def smollm2(folder: Path, most: int) -> Subject:
    """SmolLM2-135M-Instruct, quantized as the demo does."""
    model = halfweight.load(folder, dtype=torch.bfloat16)
    runner = make_runner(model, max_sequences=most, max_context=MOST_CONTEXT)
    return Subject(model, runner, AutoTokenizer.from_pretrained(folder))


def wordy_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer, every token of which is text; it can only decode."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"\u0120w{i}" for i in range(len(letters), vocab_size))]
    vocabulary = {word: i for i, word in enumerate(words[:vocab_size])}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class StepsTarget:
    """One sequence by the runner's steps alone, each with the likeliest token of the last."""

    runner = "steps"

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def run(self, load: Load, asks: Sequence[Ask]) -> Run:
        """See Target."""
        return Run([self._answer(ask) for ask in asks])

    @torch.inference_mode()
    def _answer(self, ask: Ask) -> Answer:
        runner, length = self._runner, len(ask.prompt)
        pages = list(range(1, 1 - (length + ask.new_tokens) // -runner.page_tokens))
        asked = time.perf_counter()
        runner.table[0, :length] = torch.tensor(ask.prompt, dtype=torch.int32)
        starts = range(0, length, runner.max_step_tokens)
        chunks = [
            Chunk(0, start, min(length - start, runner.max_step_tokens), 1, pages)
            for start in starts
        ]
        chunks += [Chunk(0, length + i, 1, 1, pages) for i in range(ask.new_tokens - 1)]
        pieces = []
        for chunk in chunks:
            logits = runner.run([chunk])
            end = chunk.start + chunk.num_tokens
            runner.table[0, end] = logits[-1].argmax()
            if end >= length:
                pieces.append(time.perf_counter())
        if ON_GPU:
            torch.cuda.synchronize()
            pieces[-1] = time.perf_counter()
        return Answer(length, ask.new_tokens, asked, pieces)


class Results:
    """The rows so far, written with each new one."""

    def __init__(self, options: argparse.Namespace, deadline: float) -> None:
        self._out, self._name = options.out, options.name or f"serve_{DEVICE.type}"
        self._name = self._name.replace("cuda", "gpu")
        self._facts = envelope(DEVICE, {"read_bytes_per_second": read_bandwidth(DEVICE)})
        self._deadline = deadline
        self._rows: list[dict[str, Any]] = []

    def compare(
        self, workload: str, targets: Sequence[Target], rounds: Sequence[Callable[[], list[Ask]]]
    ) -> None:
        """A row for each target; every round asks all of them, each for something new."""
        if time.monotonic() > self._deadline:
            raise SystemExit("out of time")
        runs: dict[str, list[Run]] = {target.runner: [] for target in targets}
        load = Load()
        for make in rounds:
            for target in targets:
                asks = make()
                load = Load(concurrency=len(asks))
                runs[target.runner].append(target.run(load, asks))
        for runner, found in runs.items():
            self.add(workload, asdict(summarize(runner, load, found)))

    def add(self, workload: str, row: dict[str, Any]) -> None:
        """Keep a row."""
        row = {"workload": workload, **row}
        self._rows.append(row)
        write_result(self._name, self._facts, self._rows, out=self._out)
        print(line(row), flush=True)


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    between = row["between_tokens_ms_p50"]
    parts = [
        f"{row['workload']}, {row['runner']}, {row['concurrency']} at once: "
        f"{row['tokens_per_second']:.1f} tokens/s",
        f"prefill {row['prefill_tokens_per_second']:.0f}",
        f"first {row['first_token_ms_p50']:.1f} ms ({row['first_token_ms_p95']:.1f})",
        f"between {between:.2f} ms" if between is not None else "",
        f"clients {row['client_busy']:.0%} of a core" if row["client_busy"] is not None else "",
        f"{row['accepted']} of {row['drafted']} guesses right" if row.get("drafted") else "",
    ]
    return ", ".join(filter(None, parts))


def at_once(results: Results, subject: Subject, targets: Sequence[Target], most: int) -> None:
    """Tokens a second by concurrency."""
    for number in (n for n in AT_ONCE if n <= most):
        chosen = [target for target in targets if number in AT_ONCE_OF.get(target.runner, AT_ONCE)]
        results.compare(
            "at once",
            chosen,
            [lambda n=number: subject.asks(n, *LENGTHS)] * rounds_of(number),
        )


def rounds_of(number: int) -> int:
    """Rounds of a concurrency: each takes longer the more requests it has."""
    return 2 if number >= 64 else 3


def prefill(results: Results, subject: Subject, targets: Sequence[Target], most: int) -> None:
    """How fast prompts are read."""
    for number, length in PREFILL:
        if number <= most and length < subject.runner.max_context:
            make = [lambda n=number, k=length: subject.asks(n, k, 1)] * 2
            results.compare("prefill", targets[:1], make)


def prefix(results: Results, subject: Subject, targets: Sequence[Target]) -> None:
    """A prompt with 2,000 tokens in common with one before, after that one."""
    for target in targets:
        runs: dict[str, list[Run]] = {"prefix": [], "prefix again": []}
        for _ in range(3):
            shared, *own = (
                subject.asks(1, tokens, PREFIX_NEW_TOKENS)[0].prompt
                for tokens in (SHARED_TOKENS, OWN_TOKENS, OWN_TOKENS)
            )
            for name, end in zip(runs, own, strict=True):
                ask = Ask([*shared, *end], PREFIX_NEW_TOKENS)
                runs[name].append(target.run(Load(concurrency=1), [ask]))
        for name, found in runs.items():
            results.add(name, asdict(summarize(target.runner, Load(concurrency=1), found)))


class Drafts:
    """Counts what a runner is asked to check."""

    def __init__(self, runner: Any) -> None:
        self.count, self._run = 0, runner.run
        runner.run = self._counted

    def _counted(self, step: Step) -> torch.Tensor:
        self.count += sum(max(0, chunk.num_logits - 1) for chunk in step)
        return self._run(step)


def editing(results: Results, model: Any, tokenizer: Any) -> None:
    """One text after the other to write again or to continue, with and without guesses."""
    runners = [make_runner(model, max_sequences=1, max_context=MOST_CONTEXT) for _ in range(2)]
    subjects = [Subject(model, runner, tokenizer) for runner in runners]
    drafts = Drafts(runners[1])
    with subjects[0].engine() as plain, subjects[1].engine(speculates=True) as guessing:
        targets = {"plain": EngineTarget(plain), "guessing": EngineTarget(guessing)}
        for workload, asks in (("editing", edits(tokenizer)), ("prose", prose(tokenizer))):
            drafts.count = 0
            runs: dict[str, list[Run]] = {name: [] for name in targets}
            for ask in asks:
                for name, target in targets.items():
                    runs[name].append(target.run(Load(concurrency=1), [ask]))
            for name, found in runs.items():
                row = asdict(summarize("engine", Load(concurrency=1), found))
                total = row["num_requests"] * row["new_tokens"]
                counted = {
                    "drafted": drafts.count,
                    "accepted": round(total * (1 - 1 / row["tokens_per_piece"])),
                }
                results.add(f"{workload}, {name}", row | (counted if name == "guessing" else {}))


def passages(tokenizer: Any) -> list[list[int]]:
    """Pieces of a novel, as tokens."""
    ids = tokenizer(TEXT.read_text())["input_ids"]
    return [ids[place : place + TEXT_TOKENS] for place in TEXT_PLACES]


def edits(tokenizer: Any) -> list[Ask]:
    """Greedy. The answer is begun: so small a model does not do as it is told."""
    asks = []
    for ids in passages(tokenizer):
        text = changed = tokenizer.decode(ids)
        for old, new in CHANGES.items():
            changed = changed.replace(old, new)
        begun = tokenizer.decode(tokenizer(changed)["input_ids"][:BEGUN_TOKENS])
        prompt = tokenizer(EDIT.format(text=text, begun=begun))["input_ids"]
        asks.append(Ask(prompt, GUESSED_NEW_TOKENS))
    return asks


def prose(tokenizer: Any) -> list[Ask]:
    """Sampled: a small model's greedy prose goes round in circles, which is easy to guess."""
    return [
        Ask(ids, GUESSED_NEW_TOKENS, temperature=0.8, seed=seed)
        for seed, ids in enumerate(passages(tokenizer))
    ]


@contextmanager
def http_target(engine: Engine) -> Iterator[list[Target]]:
    """The engine's server, where what it needs is installed."""
    try:
        from halfweight.serve.app import build_app
        from halfweight.serve.local import served
    except ImportError as error:
        print(f"no http rows: {error.name} is not installed", flush=True)
        yield []
        return
    with served(build_app(engine, engine.tokenizer, "model")) as url, closing(server(url)) as found:
        yield [found]


def llama_target(python: str, model: Path) -> list[ProcessTarget]:
    """llama.cpp, where it is installed."""
    script = Path(__file__).with_name("llama_batch.py")
    sizes = (str(max(AT_ONCE_OF["llama.cpp"])), str(sum(LENGTHS)))
    try:
        return [ProcessTarget("llama.cpp", [python, str(script), str(model), *sizes])]
    except (HalfweightError, OSError) as error:
        print(f"no rows of llama.cpp: {error}", flush=True)
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--most", type=int, default=max(AT_ONCE), help="requests at once")
    parser.add_argument("--llama-python", default=sys.executable, help="has llama_cpp installed")
    options, deadline = parse(parser)
    results = Results(options, deadline)
    with workplace(options.models) as place, ExitStack() as stack:
        llama: list[ProcessTarget] = []
        if ON_GPU or options.shape == "tiny":
            subject = random_subject(options.shape, options.most)
        else:
            prepare(place, options.llama_python)
            subject = smollm2(place / "int8", options.most)
            llama = llama_target(options.llama_python, place / "q8_0.gguf")
        for target in llama:
            stack.enter_context(closing(target))
        engine = stack.enter_context(subject.engine())
        targets = [EngineTarget(engine), *stack.enter_context(http_target(engine))]
        for target in targets:
            warm_up(target, subject.asks(options.most, *LENGTHS), WARM_UP_TOKENS)
        if "at once" in options.parts:
            at_once(results, subject, [StepsTarget(subject.runner), *targets, *llama], options.most)
        if "prefill" in options.parts:
            prefill(results, subject, targets, options.most)
        if "prefix" in options.parts:
            prefix(results, subject, targets)
    if "editing" in options.parts and engine.tokenizer.chat_template is not None:
        editing(results, subject.model, subject.tokenizer)


if __name__ == "__main__":
    main()
