"""`halfweight generate` and `chat`: text from a model."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from halfweight.cli import app
from halfweight.cli.output import bytes_bar, print_json, stderr
from halfweight.cli.refusal import Force, longest_prompt, require_room
from halfweight.errors import UsageError

Model = Annotated[str, typer.Argument(help="A halfweight folder or Hub id.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")]
TopK = Annotated[int, typer.Option(min=0, help="Sample from so many tokens; 0 from all.")]
TopP = Annotated[float, typer.Option(min=0, max=1, help="Sample from this much probability.")]
Penalty = Annotated[float, typer.Option(min=0.01, help="Over 1 makes repetition less likely.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N [default: a GPU if any].")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="Of activations [default: the model's]."),
]
BackendName = Annotated[str | None, typer.Option(help="See `halfweight backends`.")]
Activations = Annotated[
    Literal["exact", "int8"], typer.Option(help="int8 rounds activations too: faster prefill.")
]
Cache = Annotated[Literal["16bit", "int8"], typer.Option(help="Numbers of the KV cache.")]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the step: starts slower, runs faster.")
]


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="Text to continue.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file with one prompt a line, instead of PROMPT.")
    ] = None,
    batch_size: Annotated[
        str, typer.Option(help="Prompts at once: a number, or 'auto' for what fits.")
    ] = "auto",
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    backend: BackendName = None,
    activations: Activations = "exact",
    kv_cache: Cache = "16bit",
    compiled: Compile = False,
    force: Force = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Continue a prompt, or every line of a file."""
    from halfweight.engine.decoder import Sampling

    if (prompt is None) == (prompts is None):
        raise UsageError("no prompt, or two kinds of them", hint="give PROMPT or --prompts FILE")
    texts = [prompt] if prompt is not None else _lines(prompts)
    if not force:
        batch = min(int(batch_size), len(texts)) if batch_size.isdigit() else 1
        require_room(
            model,
            device,
            lambda: longest_prompt(model, texts) + max_new_tokens,
            max(1, batch),
            kv_cache,
        )
    loaded, tokenizer = open_model(model, device, dtype, backend, activations)
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    options = {
        "max_new_tokens": max_new_tokens,
        "sampling": sampling,
        "kv_cache": kv_cache,
        "step": "compiled" if compiled else "kernel",
    }
    if prompt is not None and not json_output:
        _print_stream(loaded, tokenizer, tokenizer(prompt)["input_ids"], options)
        return
    _print_batches(loaded, tokenizer, texts, batch_size, options, json_output)


@app.command()
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    backend: BackendName = None,
    activations: Activations = "exact",
    kv_cache: Cache = "16bit",
) -> None:
    """Talk with a model. /reset forgets what was said, /quit ends."""
    from halfweight.engine.decoder import Sampling
    from halfweight.model.tokenizer import chat_prompt

    loaded, tokenizer = open_model(model, device, dtype, backend, activations)
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    options = {"max_new_tokens": max_new_tokens, "sampling": sampling, "kv_cache": kv_cache}
    first = [{"role": "system", "content": system}] if system else []
    chat_prompt(tokenizer, [*first, {"role": "user", "content": "hello"}])
    said = list(first)
    for line in _typed():
        if line == "/quit":
            return
        if line == "/reset":
            said = list(first)
            continue
        said.append({"role": "user", "content": line})
        ids = chat_prompt(tokenizer, said)
        answer = _print_stream(loaded, tokenizer, ids, options)
        said.append({"role": "assistant", "content": answer})


def open_model(
    model: str, device: str | None, dtype: str | None, backend: str | None, activations: Any
) -> tuple[Any, Any]:
    """The loaded model and its tokenizer."""
    import torch

    from halfweight.checkpoint.headers import read_headers, resolve
    from halfweight.model.loading import load
    from halfweight.model.tokenizer import open_tokenizer

    folder = resolve(model)
    _refuse_what_does_not_write(folder.name, read_headers(folder).config)
    tokenizer = open_tokenizer(folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    begin = time.perf_counter()
    with bytes_bar() as bar:
        task = bar.add_task(f"loading on {device}", total=None)
        loaded = load(
            folder,
            device=device,
            dtype=getattr(torch, dtype) if dtype else None,
            backend=backend,
            activations=activations,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if sys.stderr.isatty():
        stderr.print(f"loaded on {device} in {time.perf_counter() - begin:.1f} s")
    return loaded, tokenizer


def _refuse_what_does_not_write(name: str, config: dict[str, Any]) -> None:
    """Raise UsageError for an encoder, or an encoder and a decoder."""
    from halfweight.memory.architecture import is_causal

    if not is_causal(config) or config.get("is_encoder_decoder"):
        kinds = ", ".join(map(str, config.get("architectures") or [config.get("model_type")]))
        raise UsageError(
            f"{name}: {kinds} does not continue a text",
            hint="give a causal language model; `halfweight.load` loads this one for Python",
        )


def _typed() -> Iterator[str]:
    """Lines that are typed, until the end of input."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line:
            yield line


def _lines(path: Path | None) -> list[str]:
    assert path is not None
    try:
        texts = [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}", hint="give a file of plain text") from error
    if not texts:
        raise UsageError(f"{path}: no prompts", hint="write one prompt a line")
    return texts


def _print_stream(loaded: Any, tokenizer: Any, ids: list[int], options: dict[str, Any]) -> str:
    """Print the continuation of one prompt as it comes; returns it."""
    from halfweight.engine.decoder import stream

    tokens: list[int] = []
    shown = ""
    begin = time.perf_counter()
    for (entry,) in stream(loaded, [ids], **options):
        if entry == "nan":
            stderr.print(f"stopped: the logits of token {len(tokens) + 1} are not numbers")
        if not isinstance(entry, int):
            break
        tokens.append(entry)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()
    if sys.stderr.isatty() and len(tokens) > 1:
        rate = len(tokens) / (time.perf_counter() - begin)
        stderr.print(f"{len(tokens)} tokens, {rate:.1f} a second", style="dim")
    return shown


def _print_batches(
    loaded: Any,
    tokenizer: Any,
    texts: Sequence[str],
    batch_size: str,
    options: dict[str, Any],
    json_output: bool,
) -> None:
    """Print every prompt's continuation in order, a batch of similar lengths at a time.

    Batches share their decoder, and so what a GPU has recorded for their size.
    """
    from halfweight.engine.decoder import Decoder
    from halfweight.engine.decoder import generate as generate_tokens

    ids = [tokenizer(text)["input_ids"] for text in texts]
    size = _batch_size(batch_size, loaded, ids, options)
    length = max(map(len, ids)) + options["max_new_tokens"]
    own = {name: options[name] for name in ("kv_cache", "step")}
    decoder_of = cache(lambda sequences: Decoder(loaded, sequences, length, **own))
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    results: dict[int, Any] = {}
    for begin in range(0, len(order), size):
        batch = order[begin : begin + size]
        prompts = [ids[i] for i in batch]
        found = generate_tokens(loaded, prompts, **options, decoder=decoder_of(len(batch)))
        results |= dict(zip(batch, found, strict=True))
    for i, text in enumerate(texts):
        answer = tokenizer.decode(results[i].tokens, skip_special_tokens=True)
        if json_output:
            print_json({"prompt": text, "text": answer, **asdict(results[i])}, indent=None)
        else:
            print(f"{text}{answer}")


def _batch_size(wanted: str, loaded: Any, ids: list[list[int]], options: dict[str, Any]) -> int:
    from halfweight.engine.decoder import largest_batch

    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    if wanted != "auto":
        raise UsageError(f"batch size is {wanted!r}", hint="give a number or 'auto'")
    length = max(map(len, ids)) + options["max_new_tokens"]
    return min(len(ids), largest_batch(loaded, length, options["kv_cache"]))
