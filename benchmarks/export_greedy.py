"""Does another program write from the exported GGUF what halfweight writes from its INT8 folder?

    python benchmarks/export_greedy.py INT8 [--llama-python PYTHON] [--tokens 48]

INT8 is a folder with a tokenizer, exported to GGUF here. Twenty prompts are continued greedily by
transformers' own GGUF reader in float32, which dequantizes, and by llama.cpp (PYTHON has
llama-cpp-python). halfweight in float32 reads every text so made: where a token is not the one that
it would have written, the text has parted from ours, and the logits of both tokens are compared.
llama.cpp multiplies int8 weights with activations that it rounds to eight bits, so its logits move;
`logit_error` is by how much, the root of the mean square over the logits after each prompt.
A parting is a near tie where both logits are closer than that.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from envelope import RESULTS, envelope, write_result
from greedy import PROMPTS
from transformers import AutoModelForCausalLM, AutoTokenizer

import halfweight

LLAMA = Path(__file__).parent.parent / "tests" / "helpers" / "llama_greedy.py"
TRANSFORMERS, LLAMA_CPP = "transformers, float32", "llama.cpp"


@dataclass(frozen=True)
class Answer:
    """A prompt's ids, what a reader goes on with, and its logits after the prompt."""

    ids: Sequence[int]
    new: Sequence[int]
    logits: torch.Tensor


@dataclass(frozen=True)
class Parting:
    """The first token that is not ours, and how far its logit lies behind, in our model."""

    prompt: str
    position: int
    gap: float
    near_tie: bool


def by_transformers(path: Path, prompts: Sequence[str], num_tokens: int) -> Iterator[Answer]:
    """Continued by transformers from the .gguf file alone."""
    where: dict[str, Any] = {"gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
    model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **where)
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        options = {"do_sample": False, "min_new_tokens": num_tokens, "max_new_tokens": num_tokens}
        made = model.generate(
            ids, **options, return_dict_in_generate=True, output_logits=True, eos_token_id=-1
        )
        new = made.sequences[0, ids.shape[1] :].tolist()
        yield Answer(ids[0].tolist(), new, made.logits[0][0])


def by_llama_cpp(
    python: str, path: Path, prompts: Sequence[str], num_tokens: int
) -> Iterator[Answer]:
    """Continued by llama.cpp, which cuts the prompts itself."""
    asked = {"path": str(path), "texts": prompts, "new_tokens": num_tokens}
    done = subprocess.run(
        [python, LLAMA], input=json.dumps(asked), stdout=subprocess.PIPE, text=True, check=True
    )
    for answer in json.loads(done.stdout.splitlines()[-1]):
        yield Answer(answer["ids"], answer["new"], torch.tensor(answer["logits"]))


def compare(model: Any, reader: str, answers: Sequence[Answer]) -> dict[str, Any]:
    """How many texts are ours token by token, and where the others part."""
    logits = [_read(model, answer) for answer in answers]
    moved = [
        ours[0] - answer.logits[: ours.shape[1]]
        for ours, answer in zip(logits, answers, strict=True)
    ]
    error = float(torch.stack(moved).square().mean().sqrt())
    partings = [
        found
        for prompt, ours, answer in zip(PROMPTS, logits, answers, strict=False)
        if (found := _parting(prompt, ours, answer, error))
    ]
    return {
        "reader": reader,
        "prompts": len(answers),
        "equal": len(answers) - len(partings),
        "near_ties": sum(parting.near_tie for parting in partings),
        "different": sum(not parting.near_tie for parting in partings),
        "logit_error": error,
        "partings": [asdict(parting) for parting in partings],
    }


def _read(model: Any, answer: Answer) -> torch.Tensor:
    """Our logits [tokens, V] before each token of the answer."""
    text = torch.tensor([[*answer.ids, *answer.new]])
    with torch.inference_mode():
        return model(text).logits[0, len(answer.ids) - 1 : -1]


def _parting(prompt: str, ours: torch.Tensor, answer: Answer, near: float) -> Parting | None:
    best = ours.max(-1).values
    gaps = best - ours[range(len(ours)), list(answer.new)]
    behind = gaps.nonzero()
    if not len(behind):
        return None
    position = int(behind[0])
    gap = float(gaps[position])
    return Parting(prompt, position, gap, gap < near)


def markdown(results: dict[str, Any]) -> str:
    """The table of docs/export.md."""
    lines = [
        f"| {results['tokens']} tokens by | texts as ours | part at a near tie | part elsewhere "
        "| widest gap at a parting | error of logits |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        gaps = [parting["gap"] for parting in row["partings"]]
        widest = f"{max(gaps):.2f}" if gaps else "none"
        lines.append(
            f"| {row['reader']} | {row['equal']} of {row['prompts']} | {row['near_ties']} "
            f"| {row['different']} | {widest} | {row['logit_error']:.1g} |"
        )
    return "\n".join(lines)


def _version(python: str) -> str:
    program = "from importlib.metadata import version; print(version('llama-cpp-python'))"
    done = subprocess.run([python, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


def main() -> None:
    """Compare and write results/export_greedy.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="only the first so many")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    prompts = PROMPTS[: options.prompts]
    facts = envelope(torch.device("cpu"), {})
    facts["versions"]["llama-cpp-python"] = _version(options.llama_python)
    model = halfweight.load(options.model, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        halfweight.export(options.model, Path(folder) / "gguf", "gguf-q8_0")
        (path,) = (Path(folder) / "gguf").glob("*.gguf")
        answers = {
            TRANSFORMERS: by_transformers(path, prompts, options.tokens),
            LLAMA_CPP: by_llama_cpp(options.llama_python, path, prompts, options.tokens),
        }
        found = [compare(model, reader, list(made)) for reader, made in answers.items()]
    results = {"tokens": options.tokens, "rows": found}
    write_result("export_greedy", facts, results, out=options.out)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
