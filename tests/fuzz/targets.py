"""What is fuzzed: a file of a small checkpoint, how it is changed, and who then reads it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mutation import mutated_bytes, mutated_json, mutated_shard

from halfweight.checkpoint.gguf_header import file_dtype, gguf_files, read_gguf_header
from halfweight.checkpoint.headers import own_dtype, quantized_modules, read_headers
from halfweight.checkpoint.inspection import inspect
from halfweight.checkpoint.sources import open_source
from halfweight.conversion.verification import check_structure
from halfweight.conversion.workspace import Workspace, workspace_folder
from halfweight.memory.architecture import architecture
from halfweight.memory.cards import parse_gpus
from halfweight.memory.costs import loading
from halfweight.memory.named_model import planned_model
from halfweight.memory.plan import plan
from halfweight.memory.plan_document import document
from halfweight.memory.workload import Workload

CARD = parse_gpus("24GB")
JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class Target:
    """`read(folder)` meets `file` after `change`; `weight` is its share of all inputs."""

    name: str
    file: str
    change: Callable[[bytes, random.Random], bytes]
    read: Callable[[Path], object]
    weight: int


def _plan(name: str) -> None:
    made = plan(planned_model(name), Workload(64), CARD.num_bytes)
    json.dumps(document(made, CARD, loading(made.model, None)))


def _folder_plan(folder: Path) -> None:
    _plan(str(folder))


def _config_plan(folder: Path) -> None:
    _plan(str(folder / "config.json"))


def _headers(folder: Path) -> None:
    checkpoint = read_headers(folder)
    own_dtype(checkpoint)
    quantized_modules(checkpoint)


def _journal(folder: Path) -> None:
    lines = (folder / JOURNAL).read_bytes()
    out = folder / "out"
    work = workspace_folder(out)
    work.mkdir(exist_ok=True)
    (work / JOURNAL).write_bytes(lines)
    with Workspace(out, {"job": 1}, [1]) as workspace:
        for name in list(workspace.finished):
            workspace.forget(name)


def _gguf(folder: Path) -> None:
    path = folder / "tiny.gguf"
    gguf_files(path)
    file_dtype(path)
    if (header := read_gguf_header(path)) is not None:
        architecture(header.config, path.stem)


def _mutated_journal(raw: bytes, chance: random.Random) -> bytes:
    first, second = raw.splitlines()
    if chance.random() < 0.1:
        return mutated_bytes(raw, chance)
    return first + b"\n" + mutated_json(second, chance) + b"\n"


TARGETS = (
    Target("plan of a config", "config.json", mutated_json, _config_plan, 30),
    Target("plan of a folder", "config.json", mutated_json, _folder_plan, 10),
    Target("plan and manifest", "halfweight.json", mutated_json, _folder_plan, 8),
    Target("inspect and manifest", "halfweight.json", mutated_json, inspect, 8),
    Target("structure", "config.json", mutated_json, check_structure, 8),
    Target("headers and config", "config.json", mutated_json, _headers, 8),
    Target("headers", "model.safetensors", mutated_shard, _headers, 12),
    Target("index", "model.safetensors.index.json", mutated_json, _headers, 8),
    Target("source", "config.json", mutated_json, open_source, 3),
    Target("journal", JOURNAL, _mutated_journal, _journal, 5),
    Target("GGUF header", "tiny.gguf", mutated_bytes, _gguf, 10),
)
