"""What the int8 KV cache costs: perplexity and divergence beside the 16-bit cache, and its bytes.

    python benchmarks/kv_cache.py MODEL TEXT [--tokens 8192] [--context 1024]

MODEL is a folder (16-bit or made by `halfweight quantize`). The same weights read each window of
the text twice, through either cache; every attention of every layer reads keys and values back from
it. The 16-bit cache is the reference, so the figures are the cache's alone.
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
from transformers import AutoModelForCausalLM, StaticCache

from halfweight.checkpoint.headers import quantized_modules, read_headers
from halfweight.engine.decoder import cache_argument
from halfweight.engine.kv_cache import Int8Cache
from halfweight.evaluation import scoring
from halfweight.evaluation.comparison import tokenize
from halfweight.model.loading import load

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def open_model(folder: Path, dtype: torch.dtype) -> Any:
    """The model, quantized or not."""
    if quantized_modules(read_headers(folder)):
        return load(folder, device=DEVICE, dtype=dtype).eval()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(DEVICE).eval()


@torch.inference_mode()
def states(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """The body's states [T, H] of a window of token ids [T], through `cache`."""
    window = ids.to(DEVICE).unsqueeze(0)
    body = model.base_model
    held = {cache_argument(body): cache}
    states: Tensor = body(window, use_cache=True, **held).last_hidden_state[0]
    return states


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors of a cache's layers."""
    tensors = [value for layer in cache.layers for value in vars(layer).values()]
    return sum(t.nbytes for t in tensors if isinstance(t, Tensor) and t.ndim == 4)


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
    text = tokenize(options.model, options.text)
    run = scoring.sample(text, context=options.context, tokens=options.tokens)
    head = model.get_output_embeddings()
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    facts = envelope(DEVICE, {"bytes_ratio": (head_dim + 2) / (2 * head_dim)})
    scores, sizes = [], (0, 0)
    for (window,) in run.batches():
        if time.monotonic() > deadline:
            break
        (part,) = run.inputs((window,))
        caches = [kind(model.config, options.context) for kind in (StaticCache, Int8Cache)]
        plain, rounded = (states(model, part, cache)[:-1] for cache in caches)
        with torch.inference_mode():
            at = len(run.start)
            scores.append(scoring.score(rounded[at:], head, part[at + 1 :], (plain[at:], head)))
        sizes = (cache_bytes(caches[0]), cache_bytes(caches[1]))
        found = scoring.summarize(np.concatenate(scores))
        results = {
            "model": options.model.name,
            "text": options.text.name,
            "context": options.context,
            "dtype": options.dtype,
            "bytes_16bit": sizes[0],
            "bytes_int8": sizes[1],
            "evaluation": asdict(found),
        }
        write_result("kv_cache", facts, results, out=options.out)
        change, kl = found.comparison.perplexity_change, found.comparison.kl_mean
        print(
            f"{found.num_tokens} tokens: perplexity {found.perplexity.value:.4f} "
            f"({change.value:+.4%} ± {change.error:.4%}), KL {kl.value:.2e}, "
            f"cache bytes {sizes[1] / sizes[0]:.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
