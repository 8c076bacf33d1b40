"""Write the tables of docs/engine.md from benchmarks/results/: all between its two markers.

python benchmarks/serve_table.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from readme_tables import results

PAGE = Path(__file__).parent.parent / "docs" / "engine.md"
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"


def page() -> str:
    """The page with its figures."""
    text = PAGE.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n\n{figures()}\n\n{END}{after}"


def figures() -> str:
    """What was measured on a GPU and on a CPU: at once by runner, then prompts alone."""
    lines = [
        *_section("Llama-3-8B's shapes", "serve_gpu"),
        "",
        *_section("SmolLM2-135M", "serve_cpu"),
        "",
        *_steps_lines(),
        "",
        *_guessing_lines(),
        "",
        *_prefix_lines(),
    ]
    return "\n".join(lines)


def _section(model: str, name: str) -> Iterator[str]:
    found = results(name)
    rows = found["results"]
    at_once = [row for row in rows if row["workload"] == "at once"]
    yield (
        f"{model} on one {found['device']}, {at_once[0]['prompt_tokens']} tokens in and "
        f"{at_once[0]['new_tokens']} out, greedy,"
    )
    yield "all requests of a round at once, prefill included:"
    yield ""
    yield "| at once | tokens/s | first token, ms | between, ms | over HTTP, tokens/s | |"
    yield "|---|---|---|---|---|---|"
    yield from _at_once_lines(at_once)
    yield ""
    yield from _prefill_lines(rows)
    yield from _again_lines(rows)


def _steps_lines() -> Iterator[str]:
    """On a CPU: one sequence against its steps in a plain loop, and llama.cpp in the same run."""
    rates = {
        (row["runner"], row["concurrency"]): row["tokens_per_second"]
        for row in results("serve_cpu")["results"]
        if row["workload"] == "at once"
    }
    steps = rates["steps", 1]
    yield (
        f"There one sequence's steps in a plain loop make {steps:.0f} tokens/s: the engine "
        f"{rates['engine', 1] / steps:.2f} of it, its server {rates['http', 1] / steps:.2f}."
    )
    for number in sorted(number for runner, number in rates if runner == "llama.cpp"):
        rate = rates["llama.cpp", number]
        yield (
            f"llama.cpp's batch API, Q8_0, in the same run, {number} at once: {rate:.0f} tokens/s; "
            f"the engine {rates['engine', number] / rate:.2f} times that."
        )


def _guessing_lines() -> Iterator[str]:
    """What guessing gives where a text comes again, and where it does not."""
    rows = {row["workload"]: row for row in results("serve_cpu")["results"]}
    for workload, text in (
        ("editing", "A text to write again with a change"),
        ("prose", "A text to go on with, sampled"),
    ):
        plain, guessing = rows[f"{workload}, plain"], rows[f"{workload}, guessing"]
        times = guessing["tokens_per_second"] / plain["tokens_per_second"]
        yield (
            f"{text}: guessing makes {times:.2f} times the tokens/s, "
            f"{guessing['accepted']} of {guessing['drafted']} guesses right."
        )


def _at_once_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    by_runner = {(row["runner"], row["concurrency"]): row for row in rows}
    for (runner, concurrency), row in by_runner.items():
        if runner != "engine":
            continue
        http = by_runner.get(("http", concurrency))
        rate = row["tokens_per_second"]
        over = "| |"
        if http is not None:
            over = (
                f"{http['tokens_per_second']:,.0f} | {http['tokens_per_second'] / rate - 1:+.1%} |"
            )
        yield (
            f"| {concurrency} | {rate:,.0f} | {row['first_token_ms_p50']:,.1f} | "
            f"{row['between_tokens_ms_p50']:.2f} | {over}"
        )


def _prefill_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        if row["workload"] == "prefill" and row["runner"] == "engine":
            yield (
                f"{row['concurrency']} prompts of {row['prompt_tokens']:,} tokens are read at "
                f"{row['prefill_tokens_per_second']:,.0f} tokens/s."
            )


def _again_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """How soon a prompt starts whose first 2,000 tokens an earlier one had."""
    times = {(row["workload"], row["runner"]): row["first_token_ms_p50"] for row in rows}
    for runner, name in (("engine", "a prompt"), ("http", "over HTTP one")):
        if ("prefix", runner) in times:
            first, again = times["prefix", runner], times["prefix again", runner]
            yield (
                f"After one with the same first 2,000 tokens, {name} of 2,048 starts in "
                f"{again:.1f} ms instead of {first:.1f} ({again / first:.1%})."
            )


def _prefix_lines() -> Iterator[str]:
    """SmolLM2 on a CPU: how soon a prompt starts whose beginning was read before."""
    found = results("prefixes_cpu")
    first, *later = found["results"]
    yield (
        f"A prompt of {first['prompt_tokens']:,} tokens starts after "
        f"{first['first_token_ms']:,.0f} ms;"
    )
    for row in later:
        yield (
            f"a {row['prompt']} that begins with {row['shared_tokens']:,} of them after "
            f"{row['first_token_ms']:,.0f} ms ({row['part_of_the_first']:.1%})."
        )


def main() -> None:
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
