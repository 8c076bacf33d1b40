"""Write the measured figures of README.md from benchmarks/results/: all between its two markers.

python benchmarks/readme_tables.py
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from envelope import RESULTS

PAGE = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
SIXTEEN_BIT, INT8, LLAMA_CPP = "transformers 16-bit", "halfweight", "llama.cpp Q8_0"
ROUNDED = "halfweight int8 activations"
DEFAULT = "128-grid8-least_squares"
ONE_SCALE = "tensor-float32-absmax"

TEXT = """
Llama-3-8B's shapes on one {gpu}:

| | 16 bit | INT8 | |
|---|---|---|---|
| weights resident on the GPU | {before_gb:.2f} GB | {after_gb:.2f} GB | {saved:.2%} |
| load, warm page cache | {before_load:.2f} s | {after_load:.2f} s | {load:.2f}x |
| first token after 2,048 | {before_first:.1f} ms | {after_first:.1f} ms | {first:.2f}x |
| the same with int8 activations (opt-in) | | {rounded_first:.1f} ms | {rounded:.2f}x |
{decode}
| sequences of 4,096 tokens in 24 GB, largest batch | {before_batch} | {after_batch} \
| {after_batch_ratio:.2f}x |

Decoding is each model's best step: 16 bits compiled by torch.compile, INT8 by kernels of its own.
The first token of 16 bits is transformers' forward with a static cache, not compiled.
These were measured before the engine; serving by the engine, on one {serve_gpu}, 512 tokens in and
128 out, prefill included ([more](docs/engine.md)):

| requests at once | {at_once} |
|---|{lines}
| tokens a second | {served} |

Kernels of few tokens are faster since then: decoding alone, {few_batches} at once, makes
{few_rates} tokens a second on one {few_gpu}
([more](docs/kernels.md#the-decode-step-and-the-prefill)).

Llama-3-70B's shapes by {ranks} ranks that may take {limit:.0f} GB each, all on one {ranks_gpu}:
{ranks_batch} prompts of {prompt:,} tokens read and {new} written, at a context of {context:,}. \
The fullest rank took
{peak:.2f} GB, {planned:.2f} were planned; each read {read:.2f} GB of the file. \
How fast four cards are was not measured.
Two of them make {two_70b:.1f} tokens a second of one text ([more](docs/distributed.md)).

Decode on a CPU ({cpu}; [more](docs/cpu.md)), tokens a second:

| | 16 bit, transformers | llama.cpp Q8_0 | INT8 |
|---|---|---|---|
| SmolLM2-135M | {bf16:.0f} | {llama_cpp:.0f} | {cpu_rate:.0f} |
| the same, {many} at once, prefill included | | {llama_many:.0f} | {engine_many:.0f} |
| Llama-3-8B's shapes | | | {large:.2f}, at {large_share:.2f} of a plain read's speed |

Accuracy on SmolLM2-135M: perplexity {change:+.2%} ± {error:.2%} over {tokens:,} tokens; with one
scale a tensor {one_scale:+.1%}. All formats and peers: [accuracy](docs/accuracy.md).
"""


def results(name: str) -> dict[str, Any]:
    """A result file's content."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return content


def between(text: str, name: str, part: str) -> str:
    """A page with `part` between the markers of a name."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    return f"{text.split(begin)[0]}{begin}\n\n{part}\n\n{end}{text.split(end)[1]}"


def decode_lines(rows: list[dict[str, Any]]) -> list[str]:
    """A line a batch size at which both models were timed, each by its fastest step."""
    rates: dict[int, dict[str, float]] = {}
    for row in rows:
        if "step" in row:
            found = rates.setdefault(row["batch_size"], {})
            rate = max(row["tokens_per_second"], found.get(row["rival"], 0.0))
            found[row["rival"]] = rate
    return [
        f"| decode, batch {batch} | {found[SIXTEEN_BIT]:,.0f} tokens/s "
        f"| {found[INT8]:,.0f} tokens/s | {found[INT8] / found[SIXTEEN_BIT]:.2f}x |"
        for batch, found in rates.items()
        if SIXTEEN_BIT in found and INT8 in found
    ]


def figures() -> str:
    """The part of README.md that is measured."""
    load = results("load")
    runs = load["results"]["runs"]
    before, after = ([r for r in runs if r["rival"] == rival] for rival in (SIXTEEN_BIT, INT8))
    timed = results("generate")["results"]["rows"]
    first = {row["rival"]: row["milliseconds"] for row in timed if "milliseconds" in row}
    batch = results("batch")["results"]["largest"]
    before_batch, after_batch = batch["16-bit weights and cache"], batch["INT8 weights"]
    cpu = results("cpu")
    models = cpu["results"]["models"]["found"]["rivals"]
    large = cpu["results"]["large"]["found"]
    rows = {row["variant"]: row["comparison"] for row in results("accuracy")["results"]}
    change = rows[DEFAULT]["comparison"]["perplexity_change"]
    return TEXT.format(
        gpu=load["device"],
        before_gb=before[0]["resident_bytes"] / 1e9,
        after_gb=after[0]["resident_bytes"] / 1e9,
        saved=load["results"]["comparison"]["bytes_change"],
        before_load=median(run["seconds"] for run in before),
        after_load=median(run["seconds"] for run in after),
        load=load["results"]["comparison"]["speedup"],
        before_first=first[SIXTEEN_BIT],
        after_first=first[INT8],
        first=first[SIXTEEN_BIT] / first[INT8],
        rounded_first=first[ROUNDED],
        rounded=first[SIXTEEN_BIT] / first[ROUNDED],
        decode="\n".join(decode_lines(timed)),
        before_batch=before_batch,
        after_batch=after_batch,
        after_batch_ratio=after_batch / before_batch,
        **serving(),
        **decoding_now(),
        **serving_on_a_cpu(),
        **several_ranks(),
        cpu=cpu["device"],
        bf16=models["transformers bfloat16"]["decode_tokens_per_second"],
        llama_cpp=models[LLAMA_CPP]["decode_tokens_per_second"],
        cpu_rate=models[INT8]["decode_tokens_per_second"],
        large=large["decode_tokens_per_second"],
        large_share=large["fraction_of_read"],
        change=change["value"],
        error=change["error"],
        tokens=rows[DEFAULT]["num_tokens"],
        one_scale=rows[ONE_SCALE]["comparison"]["perplexity_change"]["value"],
    )


def decoding_now() -> dict[str, str]:
    """Decoding by the kernels of today."""
    found = results("generate_h200")
    rates = {
        row["batch_size"]: row["tokens_per_second"]
        for row in found["results"]["rows"]
        if "step" in row
    }
    *batches, last_batch = map(str, rates)
    *numbers, last = (f"{rate:,.0f}" for rate in rates.values())
    return {
        "few_gpu": found["device"],
        "few_batches": f"{', '.join(batches)} and {last_batch}",
        "few_rates": f"{', '.join(numbers)} and {last}",
    }


def serving() -> dict[str, str]:
    """The engine's tokens a second by how many requests run at once."""
    found = results("serve_gpu")
    rates = {
        row["concurrency"]: row["tokens_per_second"]
        for row in found["results"]
        if (row["workload"], row["runner"]) == ("at once", "engine")
    }
    return {
        "serve_gpu": found["device"],
        "at_once": " | ".join(map(str, rates)),
        "lines": "---|" * len(rates),
        "served": " | ".join(f"{rate:,.0f}" for rate in rates.values()),
    }


def several_ranks() -> dict[str, Any]:
    """The memory of a model that no single card of its ranks' size holds."""
    found = results("tensor_parallel")
    row = next(row for row in found["results"] if row["limit_bytes"])
    two = next(r for r in found["results"] if (r["model"], r["ranks"]) == (row["model"], 2))
    return {
        "two_70b": two["tokens_per_second"],
        "ranks": row["ranks"],
        "ranks_gpu": found["device"],
        "ranks_batch": row["batch"],
        "limit": row["limit_bytes"] / 1e9,
        "prompt": row["prompt_tokens"],
        "new": row["new_tokens"],
        "context": row["context"],
        "peak": row["peak_bytes"] / 1e9,
        "planned": row["planned_bytes"] / 1e9,
        "read": row["bytes_read_a_rank"] / 1e9,
    }


def serving_on_a_cpu() -> dict[str, float]:
    """The engine beside llama.cpp, at as many requests at once as that was run with."""
    rates = {
        (row["runner"], row["concurrency"]): row["tokens_per_second"]
        for row in results("serve_cpu")["results"]
        if row["workload"] == "at once"
    }
    many = max(number for runner, number in rates if runner == "llama.cpp")
    return {
        "many": many,
        "llama_many": rates["llama.cpp", many],
        "engine_many": rates["engine", many],
    }


def page() -> str:
    """README.md with the figures of the results."""
    head, _, rest = PAGE.read_text().partition(BEGIN)
    tail = rest.partition(END)[2]
    return f"{head}{BEGIN}\n{figures()}\n{END}{tail}"


if __name__ == "__main__":
    PAGE.write_text(page())
