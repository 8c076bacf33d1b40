"""Several ranks run one model: speed, the memory of the worst rank beside its plan, bytes read.

    python benchmarks/tensor_parallel.py                          # small, ranks on the CPU
    python benchmarks/tensor_parallel.py --preset llama-3-70b --ranks 4 --limit 24GB \\
        --devices cuda:0,cuda:0,cuda:1,cuda:1 --batch 4 --prompt 2048 --new 128 --context 8192
    python benchmarks/tensor_parallel.py --preset llama-3-70b --ranks 4 --limit 24GB --batch 1 4 16
    python benchmarks/tensor_parallel.py --preset llama-3-8b --ranks 4 --compare

Random INT8 weights of a preset's shapes are written to a folder and loaded from there by each rank,
which reads its part alone; the ranks are started once, with room for the largest batch. All
requests of a batch come at once; the prompts are random and no two alike. `prefill_seconds` is the
time until each has its first token, `tokens_per_second` all later tokens over their time. With
--limit a rank cannot allocate more of its GPU. On GPUs `peak_bytes` is what the worst rank's
allocator reserved at most until then, `planned_bytes` what the planner expects for the largest
batch; on a CPU the first is the process's largest size, and there is no plan. A step reads a rank's
weights once and its part of the cache: `fraction_of_read_bandwidth` is of what one of the devices
reads. With --compare the same folder is run by one rank too: `logits_difference` is the largest
between their logits of one prompt, `largest_logit` the largest of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from arguments import workplace
from envelope import RESULTS, envelope, write_result
from random_folder import write_random
from torch import Tensor

from halfweight.checkpoint.headers import read_headers
from halfweight.engine.engine import Engine
from halfweight.engine.parallel.job import peak_bytes
from halfweight.engine.parallel.start import Running, start
from halfweight.engine.sampler import Sampler
from halfweight.engine.step import Chunk
from halfweight.evaluation.speed.generate import step_bytes
from halfweight.kernels.timing import read_bandwidth
from halfweight.memory.cards import parse_bytes
from halfweight.memory.plan import Footprint, footprint
from halfweight.memory.presets import preset
from halfweight.memory.workload import Workload
from halfweight.model.share import described, own_part

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
COMPARED_TOKENS = 48
WARM_UP_TOKENS = 32
SECONDS_TO_BEAT = 1.5
"""In which each rank has told its largest size."""


def ids(batch: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    found: list[list[int]] = torch.randint(
        vocab_size, (batch, length), generator=generator
    ).tolist()
    return found


def seconds(
    engine: Engine, prompts: list[list[int]], new_tokens: Iterable[int]
) -> tuple[float, float]:
    """Until each prompt has its first token, and from then to the end of all."""
    options: dict[str, Any] = {"temperature": 0, "stop_tokens": ()}
    begin = time.perf_counter()
    streams = [
        iter(engine.open(engine.request(prompt, max_new_tokens=most, **options)))
        for prompt, most in zip(prompts, new_tokens, strict=True)
    ]
    for stream in streams:
        next(stream)
    first = time.perf_counter()
    for stream in streams:
        for _ in stream:
            pass
    return first - begin, time.perf_counter() - first


def measure(engine: Engine, batch: int, prompt: int, new: int) -> dict[str, float]:
    """One row's times, after one batch that is not counted and whose sequences end one after
    another: the graphs of all batch sizes are recorded by then.
    """
    vocab_size = 1000
    ends = [8 + i * WARM_UP_TOKENS // batch for i in range(batch)]
    seconds(engine, ids(batch, prompt, vocab_size, 0), ends)
    prefill, rest = seconds(engine, ids(batch, prompt, vocab_size, 1), [new] * batch)
    return {"tokens_per_second": batch * (new - 1) / rest, "prefill_seconds": prefill}


@torch.inference_mode()
def logits(running: Running) -> Tensor:
    """Of every token of one prompt, float32 [T, V] on the host."""
    runner = running.runner
    (prompt,) = ids(1, COMPARED_TOKENS, 1000, 2)
    runner.table[0, : len(prompt)] = torch.tensor(prompt, dtype=torch.int32)
    pages = list(range(1, 1 - len(prompt) // -runner.page_tokens))
    found = runner.run([Chunk(0, 0, len(prompt), len(prompt), pages)])
    return found.float().cpu()


def compared(options: argparse.Namespace, folder: Path, shared: Tensor) -> dict[str, float]:
    """The logits of all ranks beside those of one."""
    alone_on = {"ranks": 1, "devices": options.devices and options.devices[:1]}
    running = opened(argparse.Namespace(**{**vars(options), **alone_on}), folder)
    alone = logits(running)
    running.runner.close()
    difference = float((alone - shared).abs().max())
    return {"logits_difference": difference, "largest_logit": float(alone.abs().max())}


def opened(options: argparse.Namespace, folder: Path) -> Running:
    most = max(options.batch)
    limits = {"max_context": options.context, "max_sequences": most}
    limits["cache_tokens"] = most * options.context
    limits["kv_cache"] = options.kv_cache
    device = None if options.devices else ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype)
    loading = {"device": device, "dtype": dtype, "backend": None, "activations": "exact"}
    limit = parse_bytes(options.limit) if options.limit else None
    return start(folder, options.ranks, options.devices, loading, limits, limit)


def rows(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """One for each batch; `peak_bytes` is up to its end."""
    peak_rate = fastest_read(options)
    begin = time.perf_counter()
    running = opened(options, folder)
    loaded = time.perf_counter() - begin
    fixed = facts(options, folder, running) | {"load_seconds": loaded}
    device = running.runner.device
    if options.compare:
        fixed |= compared(options, folder, logits(running))
    sampler = Sampler(running.runner.table, running.runner.vocab_size)
    with Engine.over(running.runner, sampler, None) as engine:
        for batch in options.batch:
            times = measure(engine, batch, options.prompt, options.new)
            time.sleep(SECONDS_TO_BEAT)
            peaks = [peak_bytes(device), *(member.peak_bytes for member in engine.ranks)]
            num_bytes = step_bytes(running.model, batch, options.prompt + options.new // 2)
            rate = num_bytes * times["tokens_per_second"] / batch
            read = {"fraction_of_read_bandwidth": rate / peak_rate, "peak_bytes": max(peaks)}
            yield {**fixed, "batch": batch, **times, **read}


def fastest_read(options: argparse.Namespace) -> float:
    """Bytes a second of the first device, measured before there is a model: it takes memory."""
    first = options.devices[0] if options.devices else "cuda:0"
    device = torch.device(first if torch.cuda.is_available() else "cpu")
    found = read_bandwidth(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return found


def facts(options: argparse.Namespace, folder: Path, running: Running) -> dict[str, Any]:
    """What is the same for all batches."""
    on_gpu = running.runner.device.type == "cuda"
    both = planned(options, folder)
    part = own_part(read_headers(folder), described(folder), 0, options.ranks)
    return {
        "model": options.preset or "small",
        "ranks": options.ranks,
        "limit_bytes": parse_bytes(options.limit) if options.limit else None,
        "max_batch": max(options.batch),
        "planned_bytes": both["int8"].allocated + both["int8"].slack if on_gpu else None,
        "bytes_read_a_rank": part.num_bytes,
        "prompt_tokens": options.prompt,
        "new_tokens": options.new,
        "context": options.context,
        "kv_cache": options.kv_cache,
        "dtype": options.dtype,
        "devices": ",".join(options.devices or [running.runner.device.type]),
        "planned_16bit_bytes": both["16bit"].total.likely if on_gpu else None,
    }


def planned(options: argparse.Namespace, folder: Path) -> dict[str, Footprint]:
    work = Workload(options.context, max(options.batch), options.kv_cache, options.ranks)
    model = described(folder)
    return {weights: footprint(model, work, weights) for weights in ("16bit", "int8")}


def _places(devices: str) -> list[str]:
    return devices.split(",")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", help="sizes of the model [default: small ones]")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--devices", type=_places, help="one a rank, separated by commas")
    parser.add_argument("--limit", help="memory that a rank may have, as 24GB")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--kv-cache", choices=("16bit", "int8"), default="16bit")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--compare", action="store_true", help="logits, with one rank's")
    parser.add_argument("--models", type=Path, help="folder that keeps the random models")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="tensor_parallel")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    found: list[dict[str, Any]] = []
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    with workplace(options.models) as under:
        folder = under / f"{options.preset or 'small'}-random-int8"
        write_random(preset(options.preset) if options.preset else SMALL, folder)
        for row in rows(options, folder):
            found.append(row)
            print(row, flush=True)
            write_result(options.name, envelope(device, {}), found, out=options.out)


if __name__ == "__main__":
    main()
