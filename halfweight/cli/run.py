"""`halfweight generate` and `chat`: text from a model."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from halfweight.cli import app
from halfweight.cli.output import bytes_bar, print_json, stderr
from halfweight.cli.ranks import Devices, TensorParallel, follow_if_told, rank_options
from halfweight.cli.refusal import Force, longest_prompt, require_room, require_tokenizer
from halfweight.cli.stages import say_stages
from halfweight.errors import UsageError

if TYPE_CHECKING:
    from halfweight.engine.engine import Engine

log = logging.getLogger("halfweight")

Model = Annotated[str, typer.Argument(help="A halfweight folder or Hub id.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")]
Temperature = Annotated[
    float | None, typer.Option(min=0, help="0 takes the likeliest token (default: the model's).")
]
TopK = Annotated[
    int | None,
    typer.Option(min=0, help="Sample from so many tokens; 0 from all (default: the model's)."),
]
TopP = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Sample from so much probability (default: the model's)."),
]
MinP = Annotated[
    float | None, typer.Option(min=0, max=1, help="Sample from this share of the likeliest's.")
]
Penalty = Annotated[
    float | None,
    typer.Option(min=0.01, help="Over 1 makes repetition less likely (default: the model's)."),
]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
Greedy = Annotated[
    bool, typer.Option("--greedy", help="Take the likeliest token, whatever the model's files say.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N (default: a GPU if any).")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="Of activations (default: the model's)."),
]
BackendName = Annotated[str | None, typer.Option(help="See `halfweight backends`.")]
Activations = Annotated[
    Literal["exact", "int8"], typer.Option(help="int8 rounds activations too: faster prefill.")
]
Cache = Annotated[Literal["16bit", "int8"], typer.Option(help="Numbers of the KV cache.")]


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="Text to continue.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file with one prompt a line, instead of PROMPT.")
    ] = None,
    max_sequences: Annotated[
        int | None, typer.Option(min=1, help="Prompts at once (default: by the device).")
    ] = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    greedy: Greedy = False,
    device: Device = None,
    dtype: Dtype = None,
    backend: BackendName = None,
    activations: Activations = "exact",
    kv_cache: Cache = "16bit",
    tensor_parallel: TensorParallel = None,
    devices: Devices = None,
    force: Force = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Continue a prompt, or every line of a file."""
    if (prompt is None) == (prompts is None):
        found = "no prompt" if prompt is None else "PROMPT and --prompts"
        raise UsageError(found, hint="give one of PROMPT and --prompts FILE")
    texts = [prompt] if prompt is not None else _lines(prompts)
    given = _sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed, greedy)
    ranks = rank_options(tensor_parallel, devices, device)
    if not force:
        require_room(
            *(model, device, lambda: longest_prompt(model, texts) + max_new_tokens, 1, kv_cache),
            ranks=ranks,
        )
    engine = open_engine(
        model,
        device,
        dtype,
        backend,
        activations,
        max_sequences=max_sequences or (1 if prompt is not None else None),
        kv_cache=kv_cache,
        **ranks,
    )
    with engine:
        _log_sampling(engine, given)
        options = {"max_new_tokens": max_new_tokens, **given}
        if prompt is not None and not json_output:
            _print_stream(engine, prompt, options)
        else:
            _print_all(engine, texts, options, json_output)


@app.command()
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    greedy: Greedy = False,
    device: Device = None,
    dtype: Dtype = None,
    backend: BackendName = None,
    activations: Activations = "exact",
    kv_cache: Cache = "16bit",
    tensor_parallel: TensorParallel = None,
    devices: Devices = None,
) -> None:
    """Talk with a model. /reset forgets what was said, /quit ends."""
    given = _sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed, greedy)
    first = [{"role": "system", "content": system}] if system else []
    engine = open_engine(
        *(model, device, dtype, backend, activations),
        max_sequences=1,
        kv_cache=kv_cache,
        **rank_options(tensor_parallel, devices, device),
    )
    with engine:
        _log_sampling(engine, given)
        engine.chat_prompt([*first, {"role": "user", "content": "hi"}])  # a template that refuses
        said = list(first)
        for line in _typed():
            if line == "/quit":
                return
            if line == "/reset":
                said = list(first)
                continue
            said.append({"role": "user", "content": line})
            prompt = engine.chat_prompt(said)
            answer = _print_stream(engine, prompt, {"max_new_tokens": max_new_tokens, **given})
            said.append({"role": "assistant", "content": answer})


def open_engine(
    model: str,
    device: str | None,
    dtype: str | None,
    backend: str | None,
    activations: Any,
    *,
    reads_text: bool = True,
    **limits: Any,
) -> Engine:
    """The engine of a model, with a bar while it loads; `limits` are Engine's.

    Raises UsageError for a model without a tokenizer, unless it `reads_text` of nobody. Does not
    return in a rank other than 0.
    """
    import torch

    from halfweight.checkpoint.headers import read_headers, resolve
    from halfweight.engine.engine import Engine

    follow_if_told()
    folder = resolve(model)
    _refuse_what_does_not_write(folder.name, read_headers(folder).config)
    if reads_text:
        require_tokenizer(folder)
    if limits.get("devices") and limits.get("tensor_parallel", 1) == 1:
        say_stages(str(folder), limits["devices"], limits)
    begin = time.perf_counter()
    with bytes_bar() as bar:
        task = bar.add_task("loading", total=None)
        engine = Engine(
            folder,
            device=device,
            dtype=getattr(torch, dtype) if dtype else None,
            backend=backend,
            activations=activations,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            **limits,
        )
    if sys.stderr.isatty():
        stderr.print(f"loaded in {time.perf_counter() - begin:.1f} s")
    return engine


def _refuse_what_does_not_write(name: str, config: dict[str, Any]) -> None:
    """Raise UsageError for an encoder, or an encoder and a decoder."""
    from halfweight.memory.architecture import is_causal

    if not is_causal(config) or config.get("is_encoder_decoder"):
        kinds = ", ".join(map(str, config.get("architectures") or [config.get("model_type")]))
        raise UsageError(
            f"{name}: {kinds} does not continue a text",
            hint="give a causal language model; `halfweight.load` loads this one for Python",
        )


def _sampling(
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
    seed: int | None,
    greedy: bool,
) -> dict[str, Any]:
    """The options that were given; what was not is as the model's files say."""
    if greedy and temperature:
        raise UsageError("--greedy and --temperature", hint="give one of them")
    values = {
        "temperature": 0.0 if greedy else temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    return {name: value for name, value in values.items() if value is not None}


def _log_sampling(engine: Engine, given: dict[str, Any]) -> None:
    log.info("sampling: %s", replace(engine.sampling, **given))


def _typed() -> Iterator[str]:
    """Lines that are typed, until the end of input."""
    while sys.stdin is not None:  # it is, where the shell has closed it
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line:
            yield line


def _lines(path: Path | None) -> list[str]:
    assert path is not None
    try:
        texts = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}", hint="give a file of plain text") from error
    if not texts:
        raise UsageError(f"{path}: no prompts", hint="write one prompt a line")
    return texts


def _print_stream(engine: Engine, prompt: str | list[int], options: dict[str, Any]) -> str:
    """Print the continuation of one prompt as it comes; returns it. Raises what ends it."""
    shown, num_tokens = "", 0
    begin = time.perf_counter()
    stream = engine.open(engine.request(prompt, **options))
    try:
        for piece in stream:
            print(piece.text, end="", flush=True)
            shown += piece.text
            num_tokens += len(piece.tokens)
            if piece.error is not None:
                raise piece.error
    finally:
        print()
    if sys.stderr.isatty() and num_tokens > 1:
        rate = num_tokens / (time.perf_counter() - begin)
        stderr.print(f"{num_tokens} tokens, {rate:.1f} a second", style="dim")
    return shown


def _print_all(
    engine: Engine, texts: Sequence[str], options: dict[str, Any], json_output: bool
) -> None:
    """Print every prompt's continuation in order. Raises the first error, after all are printed."""
    found = engine.generate(texts, **options)
    for text, answer in zip(texts, found, strict=True):
        if json_output:
            print_json(
                {
                    "prompt": text,
                    "text": answer.text,
                    "tokens": list(answer.tokens),
                    "finish_reason": answer.finish_reason,
                },
                indent=None,
            )
        else:
            print(f"{text}{answer.text}")
    for answer in found:
        if answer.error is not None:
            raise answer.error
