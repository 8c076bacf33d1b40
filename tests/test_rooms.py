"""The rooms of the package: who may import whom, as pyproject.toml states it."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter")
ROOT = Path(__file__).parents[1]


def test_imports_point_one_way():
    code = (
        "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_room_says_what_comes_in_and_what_it_may_import():
    for folder in sorted((ROOT / "halfweight").iterdir()):
        if not folder.is_dir() or folder.name in ("cli", "__pycache__"):
            continue
        text = " ".join((folder / "__init__.py").read_text().split())
        for word in ("In: ", "Out: ", "First file: ", "May import: "):
            assert word in text, f"{folder.name}/__init__.py does not say {word!r}"
