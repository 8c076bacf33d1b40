"""vLLM with the plug-in against vLLM alone: the same file, the same run, only the kernels differ.

    python benchmarks/vllm_plugin.py [--model llama-3-8b] [--together]
    python benchmarks/vllm_plugin.py --together --model llama-3-70b --tensor-parallel 2 \\
        --concurrency 1 16
    python benchmarks/vllm_plugin.py --tiny                 a rehearsal, of seconds, on any machine

A folder with nothing but the config.json of a file for vLLM (embedding in 16 bits, the rest INT8 in
groups of 128) is served from weights that vLLM makes up. For each kernel one process starts vLLM
(CUDA graphs and torch.compile on, `start_seconds`), warms up, and answers `concurrency` prompts of
512 random ids with 128 new tokens each, greedy, all sent at once; the median of the repeats counts,
prefill included. With --together all start at once, on GPUs of their own where there are enough,
and are measured in turns; else one kernel is done before the other starts. With --own-cache vLLM
chooses its cache's size, as it does for users, and for that records its graphs once more. With
--rounds all is done again: the second round's `start_seconds` are those of a machine that has
compiled before. Runs at the same time on one machine start together and measure alone. The ceiling
is the read bandwidth: a step reads each weight once. vLLM does not fill the bytes of made-up
weights, which are the same, mostly zeros, for both kernels; its made-up scales become 2^-7 for
ours, as a file's lie on a grid.

A CPU has no kernel of vLLM's for this file; there only ours is run.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from envelope import RESULTS, envelope, write_result

from halfweight.checkpoint.layout import lay_out, quantization_config
from halfweight.checkpoint.readers import VLLM_HEADS
from halfweight.kernels.timing import read_bandwidth
from halfweight.memory.architecture import architecture
from halfweight.memory.plan import Model
from halfweight.memory.presets import PRESETS, preset
from halfweight.memory.vllm_run import model_for_vllm

TINY = {
    **{"model_type": "llama", "dtype": "bfloat16", "tie_word_embeddings": False},
    **{"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 1024},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048},
    **{"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu"},
}
KERNELS = ("vllm", "halfweight")
PROMPT_TOKENS, NEW_TOKENS = 512, 128
LEAST_FREE = 0.3
"""Part of a GPU that must be free for vLLM to start where others have the rest."""
MOST_TAKEN = 0.65
"""Part of a GPU that vLLM may take where it chooses: room for another kernel's server is left."""
LARGEST_BLOCK = 128
"""Tokens of a block of vLLM's cache, on a CPU."""
WORKLOAD = {False: (PROMPT_TOKENS, NEW_TOKENS), True: (32, 8)}
"""Prompt and new tokens, of a run and of a rehearsal."""


def write_config(folder: Path, name: str) -> None:
    """The config.json of `quantize --for vllm` for a model of this name."""
    config = TINY if name == "tiny" else preset(name)
    model = model_for_vllm(Model.from_recipe(architecture(config, name)))
    assert model.recipe is not None
    decisions = lay_out(model.architecture.tensors, model.recipe).decisions
    names = {"architectures": [VLLM_HEADS[config["model_type"]]]}
    made = {**config, **names, "quantization_config": quantization_config(decisions)}
    (folder / "config.json").write_text(json.dumps(made))


def serve(options: argparse.Namespace, folder: str) -> None:
    """One process: vLLM with one kernel. Answers a line of concurrencies with a line of seconds."""
    from vllm import LLM, SamplingParams

    prompt_tokens, new_tokens = WORKLOAD[options.tiny]
    begin = time.perf_counter()
    llm = LLM(
        folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        seed=0,
        tensor_parallel_size=options.tensor_parallel,
        max_model_len=prompt_tokens + new_tokens,
        max_num_seqs=max(options.concurrency),
        **memory(options),
        disable_custom_all_reduce=options.no_custom_all_reduce,
        enable_prefix_caching=False,
    )
    print("STARTED", time.perf_counter() - begin, flush=True)
    sampling = SamplingParams(
        temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
    )
    generator = torch.Generator().manual_seed(0)
    for line in sys.stdin:
        shape = (int(line), prompt_tokens)
        ids = torch.randint(0, llm.model_config.get_vocab_size(), shape, generator=generator)
        prompts = [{"prompt_token_ids": row} for row in ids.tolist()]
        begin = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        print("SECONDS", time.perf_counter() - begin, flush=True)


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """vLLM's options for its cache: with a given size it records its graphs once, not twice."""
    kernel = "vllm" if os.environ["HALFWEIGHT_VLLM"] == "0" else "halfweight"
    if kernel in options.own_cache:
        return {"gpu_memory_utilization": MOST_TAKEN}
    return {"gpu_memory_utilization": LEAST_FREE, "kv_cache_memory_bytes": cache_bytes(options)}


def cache_bytes(options: argparse.Namespace) -> int:
    """Of a GPU: what the prompts need; another kernel's server has as much."""
    name, tokens = options.model, sum(WORKLOAD[options.tiny])
    cache = architecture(TINY if name == "tiny" else preset(name), name).kv_bytes(
        -(-tokens // LARGEST_BLOCK) * LARGEST_BLOCK
    )
    return cache * (1 + max(options.concurrency)) // options.tensor_parallel


class Server:
    """`serve` in a process of its own, with our plug-in on or off."""

    def __init__(self, kernel: str, folder: str, gpus: str | None) -> None:
        """`gpus` as in CUDA_VISIBLE_DEVICES; None leaves it as it is."""
        self.kernel, self.start_seconds = kernel, 0.0
        settings = {"HALFWEIGHT_VLLM": "1" if kernel == "halfweight" else "0"}
        settings["VLLM_LOGGING_PREFIX"] = f"{kernel}: "
        settings |= {} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}
        self._process = subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--serve", folder],
            env=os.environ | settings,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait(self) -> None:
        """Until it has started."""
        self.start_seconds = self._answer("STARTED")

    def seconds(self, concurrency: int) -> float:
        """What it takes to answer so many prompts at once."""
        assert self._process.stdin is not None
        print(concurrency, file=self._process.stdin, flush=True)
        return self._answer("SECONDS")

    def _answer(self, word: str) -> float:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(word):
                return float(line.split()[1])
        raise SystemExit(f"vLLM with {self.kernel}'s kernels died; its log is above")

    def close(self) -> None:
        """End it: its memory is the next one's."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=120)


def started(kernels: Sequence[str], folder: str, tensor_parallel: int) -> list[Server]:
    """Servers of these kernels, on GPUs of their own where there are enough."""
    places = list(range(torch.cuda.device_count()))
    servers = []
    for i, kernel in enumerate(kernels):
        own = places[i * tensor_parallel : (i + 1) * tensor_parallel]
        enough = len(kernels) * tensor_parallel <= len(places)
        servers.append(Server(kernel, folder, ",".join(map(str, own)) if enough else None))
    for server in servers:
        server.wait()
    return servers


def measure(servers: Sequence[Server], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows, the median of the repeats of each number of prompts at once; servers take turns."""
    new_tokens = WORKLOAD[options.tiny][1]
    for concurrency in options.concurrency:
        turns = [
            [server.seconds(concurrency) for server in servers] for _ in range(1 + options.repeats)
        ]
        for i, server in enumerate(servers):
            row = {
                "model": options.model,
                "tensor_parallel": options.tensor_parallel,
                "kernel": server.kernel,
                "concurrency": concurrency,
                "tokens_per_second": concurrency * new_tokens / median(t[i] for t in turns[1:]),
                "start_seconds": server.start_seconds,
            }
            print(json.dumps(row), file=sys.stderr)
            yield row


@contextmanager
def machine(how: int) -> Iterator[None]:
    """The machine shared with other runs that start (LOCK_SH), or alone (LOCK_EX)."""
    with (Path(tempfile.gettempdir()) / "halfweight-vllm-plugin.lock").open("w") as lock:
        fcntl.flock(lock, how)
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=(*PRESETS, "tiny"), default="llama-3-8b")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--kernels", nargs="+", choices=KERNELS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--together", action="store_true", help="start all kernels at once")
    parser.add_argument("--own-cache", nargs="+", choices=KERNELS, default=[])
    parser.add_argument("--rounds", type=int, default=1, help="starts of each kernel")
    parser.add_argument("--no-custom-all-reduce", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        options.model = "tiny"
        options.concurrency = [min(4, n) for n in options.concurrency[:2]]
    if options.serve is not None:
        serve(options, options.serve)
        return
    run(options)


def run(options: argparse.Namespace) -> None:
    on_gpu = torch.cuda.is_available()
    kernels = options.kernels or (KERNELS if on_gpu else ("halfweight",))
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    ceiling = {"read_bytes_per_second": read_bandwidth(device)} if on_gpu else {}
    torch.cuda.empty_cache()
    facts = envelope(device, ceiling) | {"prompt_and_new_tokens": WORKLOAD[options.tiny]}
    rows: list[dict[str, Any]] = []
    groups = [kernels] if options.together else [[kernel] for kernel in kernels]
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), options.model)
        for group in groups * options.rounds:
            with machine(fcntl.LOCK_SH):
                servers = started(group, folder, options.tensor_parallel)
            with machine(fcntl.LOCK_EX):
                for row in measure(servers, options):
                    rows.append(row)
                    write_result("vllm_plugin", facts, rows, out=options.out)
            for server in servers:
                server.close()


if __name__ == "__main__":
    main()
