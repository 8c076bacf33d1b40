"""Mutates files of small checkpoints and has them read, for a time; counts what is not an error of
ours.

    python tests/fuzz/run.py --seconds 60                     as CI does
    python tests/fuzz/run.py --seconds 3600 --processes 2 --out benchmarks/results

Clean is an input that was read, or refused by a HalfweightError. All else is printed with the seed
that makes it again: --seed S --inputs 1.
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [
    str(Path(__file__).parent),
    str(ROOT / "tests" / "helpers"),
    str(ROOT / "benchmarks"),
]

import torch  # noqa: E402
from envelope import envelope, write_result  # noqa: E402
from seeds import make_seeds  # noqa: E402
from targets import TARGETS, Target  # noqa: E402

from halfweight.errors import HalfweightError  # noqa: E402

SLOW_SECONDS = 5.0
"""Of the processor, not of the clock: CI shares its machines."""


def fuzz(seed: int, seconds: float, inputs: int | None) -> dict[str, Any]:
    """Inputs seed, seed + 1, ... until the time is over or there were `inputs` of them."""
    logging.getLogger("halfweight").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(dir=_memory_folder()) as name:
        folders = make_seeds(Path(name))
        end, done = time.monotonic() + seconds, 0
        counts: Counter[str] = Counter()
        others: dict[str, list[str]] = {}
        while time.monotonic() < end and (inputs is None or done < inputs):
            target, fault = one_input(seed + done, folders)
            counts[target.name] += 1
            done += 1
            if fault is not None:
                others.setdefault(fault, []).append(f"seed {seed + done - 1}, {target.name}")
        return {"inputs": done, "by_target": counts, "others": others}


def one_input(seed: int, folders: dict[str, Path]) -> tuple[Target, str | None]:
    """The target that a seed chooses, and what it raised that is no error of ours."""
    chance = random.Random(seed)
    (target,) = chance.choices(TARGETS, [target.weight for target in TARGETS])
    folder = folders[chance.choice(target.folders)]
    path = folder / target.file
    original = path.read_bytes()
    path.write_bytes(target.change(original, chance))
    begin = time.process_time()
    try:
        target.read(folder)
    except HalfweightError as error:
        fault = None if "\n" not in error.message else f"two lines: {error.message[:200]!r}"
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        fault = f"{type(error).__name__} in {where}: {str(error)[:200]}"
    else:
        fault = None
    finally:
        path.write_bytes(original)
        shutil.rmtree(folder / ".out.halfweight", ignore_errors=True)
    took = time.process_time() - begin
    return target, f"{took:.0f} seconds" if fault is None and took > SLOW_SECONDS else fault


def _memory_folder() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--inputs", type=int)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    first = random.SystemRandom().randrange(2**40) if given.seed is None else given.seed
    seeds = [first + i * 10**9 for i in range(given.processes)]
    with ProcessPoolExecutor(given.processes) as pool:
        found = list(
            pool.map(fuzz, seeds, *([each] * len(seeds) for each in (given.seconds, given.inputs)))
        )
    inputs = sum(part["inputs"] for part in found)
    others = {fault: where for part in found for fault, where in part["others"].items()}
    other = sum(len(where) for part in found for where in part["others"].values())
    for fault, where in sorted(others.items()):
        print(f"{len(where)} x {fault}\n    first: {where[0]}")
    print(f"{inputs} inputs from seed {first}: {inputs - other} clean, {other} other")
    if given.out is not None:
        counts = sum((part["by_target"] for part in found), Counter())
        result = {"inputs": inputs, "clean": inputs - other, "other": other, "by_target": counts}
        write_result("fuzz", envelope(torch.device("cpu"), {}), result, out=given.out)
    sys.exit(1 if other else 0)


if __name__ == "__main__":
    main()
