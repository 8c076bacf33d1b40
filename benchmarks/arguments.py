"""Options that the benchmarks of whole models share."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from envelope import RESULTS
from models import SHAPES


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, float]:
    """Add the shared options and parse; also the deadline, a time of time.monotonic."""
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--tiny", dest="shape", action="store_const", const="tiny")
    parser.add_argument("--models", type=Path, help="folder that keeps the random models")
    parser.add_argument("--limit-seconds", type=float, default=3600, help="end after this long")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--name", help="name of the result, if not that of the benchmark")
    options = parser.parse_args()
    return options, time.monotonic() + options.limit_seconds


@contextmanager
def workplace(models: Path | None) -> Iterator[Path]:
    """The folder for the models: the one given, else one that goes away."""
    if models is not None:
        models.mkdir(parents=True, exist_ok=True)
        yield models
        return
    with tempfile.TemporaryDirectory(prefix="halfweight-models-") as folder:
        yield Path(folder)
