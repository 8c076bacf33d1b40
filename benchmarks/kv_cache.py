"""What the int8 KV cache costs: perplexity and divergence beside the 16-bit cache, and its bytes.

    python benchmarks/kv_cache.py MODEL TEXT [--tokens 8192] [--context 1024]

MODEL is a folder (16-bit or made by `halfweight quantize`). The same weights read each window of
the text twice by the engine's runner, through pages in 16 bits and in INT8; every attention of
every layer reads keys and values back from them. The 16-bit cache is the reference, so the figures
are the cache's alone.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from envelope import RESULTS, envelope, write_result
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfweight.checkpoint.headers import quantized_modules, read_headers
from halfweight.engine.runners import make_runner
from halfweight.engine.step import Chunk, Runner
from halfweight.evaluation import scoring
from halfweight.model.loading import load

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def open_model(folder: Path, dtype: torch.dtype) -> Any:
    """The model, quantized or not."""
    if quantized_modules(read_headers(folder)):
        return load(folder, device=DEVICE, dtype=dtype).eval()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(DEVICE).eval()


def logits_of(runner: Runner, ids: Tensor) -> Tensor:
    """Logits [T, V] of a window of token ids [T]."""
    runner.table[0, : len(ids)] = ids.to(runner.table.device, torch.int32)
    pages = list(range(1, runner.num_pages))
    found = []
    for begin in range(0, len(ids), runner.max_step_tokens):
        count = min(runner.max_step_tokens, len(ids) - begin)
        found.append(runner.run([Chunk(0, begin, count, count, pages)]).clone())
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--limit-seconds", type=float, default=3600)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    deadline = time.monotonic() + options.limit_seconds
    model = open_model(options.model, getattr(torch, options.dtype))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = options.text.read_text()[: 8 * options.tokens]
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0, : options.tokens]
    each = torch.nn.Identity()
    sizes = {"max_sequences": 1, "max_context": options.context, "cache_tokens": options.context}
    runners = [make_runner(model, **sizes, kv_cache=kind) for kind in ("16bit", "int8")]
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    facts = envelope(DEVICE, {"bytes_ratio": (head_dim + 2) / (2 * head_dim)})
    scores = []
    for window in scoring.cut(len(ids), options.context, options.context):
        if time.monotonic() > deadline:
            break
        part = ids[window.begin : window.end]
        plain, rounded = (logits_of(runner, part)[:-1] for runner in runners)
        scores.append(scoring.score(rounded, each, part[1:], (plain, each)))
        found = scoring.summarize(np.concatenate(scores))
        results = {
            "model": options.model.name,
            "text": options.text.name,
            "context": options.context,
            "dtype": options.dtype,
            "bytes_16bit": runners[0].cache_bytes,
            "bytes_int8": runners[1].cache_bytes,
            "evaluation": asdict(found),
        }
        write_result("kv_cache", facts, results, out=options.out)
        change, kl = found.comparison.perplexity_change, found.comparison.kl_mean
        print(
            f"{found.num_tokens} tokens: perplexity {found.perplexity.value:.4f} "
            f"({change.value:+.4%} ± {change.error:.4%}), KL {kl.value:.2e}, "
            f"cache bytes {runners[1].cache_bytes / runners[0].cache_bytes:.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
