"""`halfweight bench serve`: a model under load, by itself and through a server."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from itertools import count, product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfweight.cli.bench import bench
from halfweight.cli.output import print_json, stderr, stdout
from halfweight.cli.ranks import Devices, TensorParallel, rank_options
from halfweight.cli.run import Activations, BackendName, Cache, Device, Dtype, Model, open_engine
from halfweight.errors import UsageError

if TYPE_CHECKING:
    from halfweight.engine.engine import Engine
    from halfweight.evaluation.speed.clients import Ask, Load
    from halfweight.evaluation.speed.serving import ProcessTarget, Row, Target

CONCURRENCIES = (1, 16)
REQUESTS_PER_CLIENT = 3
SECONDS_AT_RATE = 30
WARM_UP_REQUESTS, WARM_UP_TOKENS = 64, 32
Prompts = Callable[[int], "list[Ask]"]
"""So many requests, other ones each time: a prompt that was seen before is not read again."""


@bench.command()
def serve(
    model: Model,
    concurrencies: Annotated[
        list[int] | None,
        typer.Option(
            "--concurrency", min=1, help="Clients at once; may repeat (default: 1 and 16)."
        ),
    ] = None,
    rates: Annotated[
        list[float] | None,
        typer.Option("--rate", min=0.001, help="Requests a second, at random; may repeat."),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(min=1, help="Of each load (default: 3 a client, or 30 s of a rate)."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 512,
    new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    text: Annotated[
        Path | None, typer.Option(help="A file to cut prompts from, instead of random tokens.")
    ] = None,
    http: Annotated[bool, typer.Option("--http", help="Through the server too.")] = False,
    url: Annotated[
        str | None, typer.Option(help="A server of MODEL that runs already, instead of loading it.")
    ] = None,
    max_sequences: Annotated[
        int | None, typer.Option(min=1, help="Run at once (default: by the device).")
    ] = None,
    speculate: Annotated[
        bool, typer.Option(help="Guess tokens of text that repeats, as `serve` does.")
    ] = True,
    kv_cache: Cache = "16bit",
    device: Device = None,
    dtype: Dtype = None,
    backend: BackendName = None,
    activations: Activations = "exact",
    tensor_parallel: TensorParallel = None,
    devices: Devices = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time greedy answers to many requests at once: tokens a second, and how long clients wait."""
    loads = _loads(concurrencies, rates, requests)
    prompts = _prompts(model, text, prompt_tokens, new_tokens)
    with ExitStack() as stack:
        if url is None:
            engine = open_engine(
                *(model, device, dtype, backend, activations),
                kv_cache=kv_cache,
                max_sequences=max_sequences,
                speculates=speculate,
                reads_text=http,
                **rank_options(tensor_parallel, devices, device),
            )
            targets = stack.enter_context(_targets(engine, http))
        else:
            targets = [stack.enter_context(_running_server(url))]
        rows = _measure(targets, loads, prompts)
    if json_output:
        print_json([asdict(row) for row in rows])
        return
    _print(rows)


def _loads(
    concurrencies: Sequence[int] | None, rates: Sequence[float] | None, requests: int | None
) -> list[tuple[Load, int]]:
    """Each load with its number of requests."""
    from halfweight.evaluation.speed.clients import Load

    if not concurrencies and not rates:
        concurrencies = CONCURRENCIES
    found = [(Load(n), requests or REQUESTS_PER_CLIENT * n) for n in concurrencies or ()]
    for rate in rates or ():
        found.append((Load(rate=rate), requests or math.ceil(SECONDS_AT_RATE * rate)))
    return found


def _prompts(model: str, text: Path | None, prompt_tokens: int, new_tokens: int) -> Prompts:
    from transformers import AutoConfig, AutoTokenizer

    from halfweight.checkpoint.headers import resolve
    from halfweight.evaluation.speed.serving import random_asks, text_asks

    folder, seeds = resolve(model), count()
    if text is None:
        vocab_size = AutoConfig.from_pretrained(folder).get_text_config(decoder=True).vocab_size
        return lambda n: random_asks(vocab_size, n, prompt_tokens, new_tokens, seed=next(seeds))
    try:
        words = text.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{text}: {error}", hint="give a file of plain text") from error
    ids = AutoTokenizer.from_pretrained(folder)(words, add_special_tokens=False)["input_ids"]
    return lambda n: text_asks(ids, n, prompt_tokens, new_tokens, seed=next(seeds))


@contextmanager
def _targets(engine: Engine, http: bool) -> Iterator[list[Target]]:
    """The engine and, if wanted, the same engine behind a server of this process."""
    from halfweight.evaluation.speed.serving import EngineTarget

    with engine, ExitStack() as stack:
        targets: list[Target] = [EngineTarget(engine)]
        if http:
            targets.append(stack.enter_context(_server(engine)))
        yield targets


@contextmanager
def _server(engine: Engine) -> Iterator[Target]:
    try:
        from halfweight.serve.app import build_app
        from halfweight.serve.local import served
    except ImportError as error:
        raise UsageError(
            f"serving needs {error.name}, which is not installed",
            hint="pip install 'halfweight[serve]'",
        ) from error
    with served(build_app(engine, engine.tokenizer, "model")) as url, _running_server(url) as found:
        yield found


def _running_server(url: str) -> closing[ProcessTarget]:
    from halfweight.evaluation.speed.serving import server

    return closing(server(url))


def _measure(
    targets: Sequence[Target], loads: Sequence[tuple[Load, int]], prompts: Prompts
) -> list[Row]:
    from halfweight.evaluation.speed.serving import measure, warm_up

    most = max(load.concurrency or min(number, WARM_UP_REQUESTS) for load, number in loads)
    for target in targets:
        warm_up(target, prompts(most), WARM_UP_TOKENS)
    rows = []
    for (load, number), target in product(loads, targets):
        rows.append(measure(target, load, [prompts(number)]))
        stderr.print(f"{rows[-1].runner}: {rows[-1].tokens_per_second:.1f} tokens/s", style="dim")
    return rows


def _print(rows: Sequence[Row]) -> None:
    from rich.table import Table

    first = rows[0]
    stdout.print(
        f"prompts of {first.prompt_tokens} tokens, {first.new_tokens} new; times in ms at the "
        "50th, 95th, 99th percentile",
        highlight=False,
    )
    table = Table("", "at once", "tokens/s", "prefill/s", "first token", "between tokens")
    for row in rows:
        table.add_row(
            row.runner,
            str(row.concurrency) if row.rate is None else f"{row.rate:g}/s",
            f"{row.tokens_per_second:.1f}",
            "" if row.prefill_tokens_per_second is None else f"{row.prefill_tokens_per_second:.0f}",
            _three(row.first_token_ms_p50, row.first_token_ms_p95, row.first_token_ms_p99),
            _three(row.between_tokens_ms_p50, row.between_tokens_ms_p95, row.between_tokens_ms_p99),
        )
    stdout.print(table)


def _three(*milliseconds: float | None) -> str:
    return ", ".join("" if ms is None else f"{ms:.1f}" for ms in milliseconds)
