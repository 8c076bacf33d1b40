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
    """What was measured on a GPU: at once by runner, then prompts alone."""
    found = results("serve_gpu")
    rows = found["results"]
    at_once = [row for row in rows if row["workload"] == "at once"]
    first = at_once[0]
    lines = [
        f"Llama-3-8B's shapes on one {found['device']}, {first['prompt_tokens']} tokens in and "
        f"{first['new_tokens']} out, greedy,",
        "all requests of a round at once, prefill included:",
        "",
        "| at once | tokens/s | first token, ms | between, ms | over HTTP, tokens/s | |",
        "|---|---|---|---|---|---|",
        *_at_once_lines(at_once),
        "",
        *_prefill_lines(rows),
        "",
        *_prefix_lines(),
    ]
    return "\n".join(lines)


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


def _prefix_lines() -> Iterator[str]:
    """SmolLM2 on a CPU: how soon a prompt starts whose beginning was read before."""
    found = results("prefixes_cpu")
    first, *later = found["results"]
    yield (
        f"SmolLM2-135M on {found['device']}: a prompt of {first['prompt_tokens']:,} tokens starts "
        f"after {first['first_token_ms']:,.0f} ms;"
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
