"""vLLM with the plug-in against vLLM alone: the same file, the same run, only the kernels differ.

    python benchmarks/vllm_plugin.py [--model llama-3-8b] [--tensor-parallel 1]
    python benchmarks/vllm_plugin.py --model llama-3-70b --tensor-parallel 2 --concurrency 1 16
    python benchmarks/vllm_plugin.py --tiny                 a rehearsal, of seconds, on any machine

A folder with nothing but the config.json of a file for vLLM (embedding in 16 bits, the rest INT8 in
groups of 128) is served from weights that vLLM makes up. For each kernel one process starts vLLM
(CUDA graphs and torch.compile on, `start_seconds`), warms up, and answers `concurrency` prompts of
512 random ids with 128 new tokens each, greedy, all sent at once; the median of the repeats counts,
prefill included. With --rounds the kernels take turns, each in a fresh process: the second round's
`start_seconds` are those of a machine that has compiled before. The ceiling is the read bandwidth:
a step reads each weight once. vLLM does not fill the bytes of made-up weights, which are the same,
mostly zeros, for both kernels; its made-up scales become 2^-7 for ours, as a file's lie on a grid.

A CPU has no kernel of vLLM's for this file; there only ours is run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
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


class Server:
    """`serve` in a process of its own, with our plug-in on or off."""

    def __init__(self, kernel: str, folder: str) -> None:
        self.kernel = kernel
        self._process = subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--serve", folder],
            env=os.environ | {"HALFWEIGHT_VLLM": "1" if kernel == "halfweight" else "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
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


def measure(server: Server, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one kernel, the median of the repeats of each number of prompts at once."""
    new_tokens = WORKLOAD[options.tiny][1]
    rows = []
    for concurrency in options.concurrency:
        server.seconds(concurrency)
        seconds = [server.seconds(concurrency) for _ in range(options.repeats)]
        rows.append(
            {
                "model": options.model,
                "tensor_parallel": options.tensor_parallel,
                "kernel": server.kernel,
                "concurrency": concurrency,
                "tokens_per_second": concurrency * new_tokens / median(seconds),
                "start_seconds": server.start_seconds,
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=(*PRESETS, "tiny"), default="llama-3-8b")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--kernels", nargs="+", choices=KERNELS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1, help="starts of each kernel, in turns")
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
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), options.model)
        for _ in range(options.rounds):
            for kernel in kernels:
                server = Server(kernel, folder)
                rows += measure(server, options)
                server.close()
                write_result("vllm_plugin", facts, rows, out=options.out)


if __name__ == "__main__":
    main()
