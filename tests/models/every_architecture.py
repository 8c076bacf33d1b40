"""Every architecture of the installed transformers, quantized and compared: `make test-models`.

Writes benchmarks/results/models.json and docs/models.md. Two processes share the work; each row is
written to a journal as it is found, so that a run cut short goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, Queue
from threading import Lock
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
JOURNAL = ROOT / "build" / "models.jsonl"
SECONDS = 120
"""The longest that one model may take."""
OUTCOMES = ("right", "refused", "wrong", "crash", "not run")
NOTE_CHARACTERS = 160
INTRODUCTION = """# Models

Every language model class of transformers {version} ({number}), as a tiny random model: saved in
16 bits, quantized, verified, loaded, saved again. Made by `make test-models`; all notes are in
`benchmarks/results/models.json`.

- **right**: every weight and the logits equal those of transformers' own model with the weights
  that the file stores, to float32 rounding, and what is saved again has the file's names. The note
  says what is kept in 16 bits and why.
- **refused**: before anything is converted, in one line that names the tensor and the remedy.
- **wrong**, **crash**: what must not be.
- **not run**: transformers itself does not build the tiny model here, or does not run it on plain
  token ids; then the note says that all weights are right."""


def work() -> None:
    """The loop of a worker process: an architecture a line in, an outcome a line out."""
    sys.path.insert(0, str(HERE))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch
    from compare import outcome_of

    torch.set_num_threads(1)
    for line in sys.stdin:
        model_type, class_name = line.split()
        with tempfile.TemporaryDirectory(prefix="models-") as folder:
            found = outcome_of(model_type, class_name, Path(folder))
        answers.write(json.dumps([found.outcome, found.note]) + "\n")
        answers.flush()


class Worker:
    """A worker process, started anew after a crash or when it hangs."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def outcome(self, model_type: str, class_name: str) -> tuple[str, str]:
        if self._process is None:
            environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen(
                [sys.executable, __file__, "--work"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{model_type} {class_name}\n")
        process.stdin.flush()
        with ThreadPoolExecutor(1) as pool:
            line = pool.submit(process.stdout.readline)
            try:
                answer = line.result(SECONDS)
            except TimeoutError:
                process.kill()
                answer = ""
        if not answer:
            self.close()
            return "crash", f"the process died or took more than {SECONDS} s"
        outcome, note = json.loads(answer)
        return outcome, note

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def run(pattern: str, jobs: int, again: bool) -> list[dict[str, Any]]:
    """A row for each architecture whose name holds `pattern`, from the journal or made now."""
    sys.path.insert(0, str(HERE))
    from tiny_models import architectures

    wanted = {key: kind for key, kind in architectures().items() if pattern in key}
    JOURNAL.parent.mkdir(exist_ok=True)
    if again:
        JOURNAL.unlink(missing_ok=True)
    lines = JOURNAL.read_text().splitlines() if JOURNAL.exists() else []
    rows = {row["architecture"] + ":" + row["class"]: row for row in map(json.loads, lines)}
    todo: Queue[str] = Queue()
    for key in wanted:
        if key not in rows:
            todo.put(key)
    lock = Lock()

    def take() -> None:
        worker = Worker()
        while True:
            try:
                key = todo.get_nowait()
            except Empty:
                worker.close()
                return
            started = time.monotonic()
            model_type, class_name = key.split(":")
            outcome, note = worker.outcome(model_type, class_name)
            row = {
                "architecture": model_type,
                "class": class_name,
                "kind": wanted[key],
                "outcome": outcome,
                "note": note,
            }
            with lock, JOURNAL.open("a") as file:
                rows[key] = row
                file.write(json.dumps(row) + "\n")
            print(f"{outcome:8} {key} {time.monotonic() - started:.1f}s {note}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        for done in [pool.submit(take) for _ in range(jobs)]:
            done.result()
    return [rows[key] for key in wanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pattern", default="", help="only architectures whose name holds this")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="forget the journal")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work()
        return
    rows = run(options.pattern, options.jobs, options.again)
    print(dict(Counter(row["outcome"] for row in rows)))
    if not options.pattern:
        write(rows)


def write(rows: list[dict[str, Any]]) -> None:
    """The results and the page made of them."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import torch
    import transformers
    from envelope import envelope, write_result

    write_result("models", envelope(torch.device("cpu"), {}), rows)
    (ROOT / "docs/models.md").write_text(page(rows, transformers.__version__))


def page(rows: list[dict[str, Any]], version: str) -> str:
    """docs/models.md: counts, then a table a kind of model."""
    counts = Counter(row["outcome"] for row in rows)
    parts = [INTRODUCTION.format(version=version, number=len(rows))]
    parts.append("| outcome | models |\n|---|---|")
    parts[-1] += "".join(f"\n| {name} | {counts[name]} |" for name in OUTCOMES if counts[name])
    kept = sum(row["note"].startswith("with --keep") for row in rows)
    parts.append(f"{kept} of these are right with `--keep '*experts*'` and refused without it.")
    for kind in dict.fromkeys(row["kind"] for row in rows):
        parts.append(
            f"## {kind.capitalize()}\n\n| type | class | outcome | note |\n|---|---|---|---|"
        )
        parts[-1] += "".join(_row(row) for row in rows if row["kind"] == kind)
    return "\n\n".join(parts) + "\n"


def _row(row: dict[str, Any]) -> str:
    note = row["note"].replace("|", "/")
    if len(note) > NOTE_CHARACTERS:
        note = note[:NOTE_CHARACTERS].rpartition(" ")[0] + " ..."
    return f"\n| {row['architecture']} | {row['class']} | {row['outcome']} | {note} |"


if __name__ == "__main__":
    main()
