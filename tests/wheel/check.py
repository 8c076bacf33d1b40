"""Builds the wheel, installs it into an empty venv with nothing else, and uses it as a user would.

    python tests/wheel/check.py            with the lowest versions allowed, then the newest
    python tests/wheel/check.py lowest     one of them

What an extra brings must not be needed: quantize, verify, inspect, generate, plan, `serve --help`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "wheel"
LOWEST_CPU_TORCH = "2.13.0"
"""The lowest torch whose build for CPUs the package index serves; others bring 3 GB of CUDA."""
MODEL = ROOT / "tests" / "wheel" / "tiny_model.py"


def pins(which: str) -> list[str]:
    """Requirements that hold back, or do not hold back, what the wheel depends on."""
    if which == "newest":
        return [f"torch=={LOWEST_CPU_TORCH}"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lowest = {r.split(">=")[0]: r.split(">=")[1] for r in project["dependencies"]}
    return [f"torch=={LOWEST_CPU_TORCH}", f"transformers=={lowest['transformers']}.*"]


def run(*command: str | Path) -> str:
    """A command's output; its failure ends the check with all it printed."""
    print("+", *command, flush=True)
    done = subprocess.run(command, capture_output=True, text=True, cwd=BUILD)
    if done.returncode:
        sys.exit(f"exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def check(wheel: Path, which: str) -> None:
    """Use the wheel in a new venv."""
    folder = BUILD / which
    venv.create(folder, with_pip=True, clear=True)
    python, halfweight = folder / "bin" / "python", folder / "bin" / "halfweight"
    run(python, "-m", "pip", "install", "-q", wheel, *pins(which))
    source, out = BUILD / f"{which}-source", BUILD / f"{which}-int8"
    run(python, MODEL, source)
    run(halfweight, "quantize", source, out, "--overwrite")
    assert "all as written" in run(halfweight, "verify", out)
    assert "parameters" in run(halfweight, "inspect", out)
    assert "INT8 fits" in run(halfweight, "plan", out, "--gpus", "24GB")
    answer = json.loads(
        run(halfweight, "generate", out, "hello", "--max-new-tokens", "4", "--json")
    )
    assert len(answer["tokens"]) == 4
    assert "Usage" in run(halfweight, "serve", "--help")
    versions = "import torch, transformers; print(torch.__version__, transformers.__version__)"
    print(
        f"{which}: the wheel alone does it all on torch, transformers", run(python, "-c", versions)
    )


def main() -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", BUILD, ROOT)
    (wheel,) = BUILD.glob("halfweight-*.whl")
    for which in sys.argv[1:] or ("lowest", "newest"):
        check(wheel, which)


if __name__ == "__main__":
    main()
