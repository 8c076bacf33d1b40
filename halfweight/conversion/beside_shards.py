"""What is written beside the shards: config, index, tokenizer, model card, and the manifest."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from halfweight import __version__
from halfweight.checkpoint.headers import INDEX_NAME
from halfweight.checkpoint.layout import Layout, index, quantization_config
from halfweight.checkpoint.manifest import FORMAT_VERSION, MANIFEST_NAME, file_sha256
from halfweight.checkpoint.readers import READERS, unread_of
from halfweight.checkpoint.sources.source import Source
from halfweight.checkpoint.sources.turned import turned_names
from halfweight.conversion.workspace import Workspace
from halfweight.quantization.scheme import GroupSize, Recipe


def describe_job(source: Source, layout: Layout) -> dict[str, Any]:
    """All that the output is a function of; `kept` and `turned` are the model's, where any are."""
    asked = {d.tensor.name for d in layout.recipe.decide_all(source.tensors) if d.scheme}
    quantized = {d.tensor.name for d in layout.decisions if d.scheme}
    of_model = {"kept": sorted(asked - quantized), "turned": sorted(turned_names(source))}
    return {
        "format_version": FORMAT_VERSION,
        "halfweight": __version__,
        "source": {"name": base_model(source.name), **source.fingerprint()},
        "recipe": _recipe(layout.recipe, source),
        **{key: names for key, names in of_model.items() if names},
    }


def _recipe(recipe: Recipe, source: Source) -> dict[str, Any]:
    """The recipe as JSON has it; `requantize` and ranks only where they make a difference."""
    fields: dict[str, Any] = json.loads(json.dumps(asdict(recipe)))
    if not (recipe.requantize and any(tensor.int8 for tensor in source.tensors)):
        del fields["requantize"]
    if recipe.tensor_parallel == 1:
        del fields["tensor_parallel"]
    return fields


def write_beside_shards(workspace: Workspace, source: Source, layout: Layout) -> None:
    """Write every file of the output but the shards, durably; the manifest last."""
    folder = workspace.checkpoint
    source.write_companions(folder)
    config = {**source.config, "quantization_config": quantization_config(layout.decisions)}
    write_json(folder / "config.json", config)
    if len(layout.shards) > 1:
        write_json(folder / INDEX_NAME, index(layout.shards))
    (folder / "README.md").write_text(_card(source, layout))
    write_manifest(workspace, [shard.name for shard in layout.shards])


def write_manifest(workspace: Workspace, shards: Iterable[str]) -> None:
    """Write the manifest of all files that are there, `shards` as journalled; fsync all others."""
    folder = workspace.checkpoint
    entries = {name: workspace.finished[name] for name in shards}
    others = sorted(p for p in folder.iterdir() if p.name not in (MANIFEST_NAME, *entries))
    manifest = {
        "job": workspace.job,
        "shards": entries,
        "files": {p.name: {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in others},
    }
    write_json(folder / MANIFEST_NAME, manifest)
    for path in (*others, folder / MANIFEST_NAME):
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def base_model(name: str) -> str:
    """A Hub id as it is; of a path the last part, so that no machine's path is published."""
    path = Path(name)
    if not path.exists():
        return name
    return path.resolve().name


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file as people read it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _groups_in_words(sizes: Iterable[GroupSize]) -> str:
    words = [str(size) for size in sizes if isinstance(size, int)]
    return f"group of {' or '.join(words)} weights" if words else "row"


def _kept(layout: Layout) -> str:
    """What the card says of weights that were INT8 in the source."""
    count = sum(decision.keeps_int8 for decision in layout.decisions)
    if not count:
        return ""
    return f" {count} weights were INT8 in the source: their integers and scales are its own."


def _readers_in_words(source: Source, layout: Layout) -> str:
    """A line for each program that reads the file or does not, for the card."""
    lines = ["- halfweight"]
    for reader in READERS.values():
        unread = unread_of(reader, source.config, layout.decisions)
        versions = f"{reader.name} ({reader.versions})"
        lines.append(f"- not {versions}: {'; '.join(unread)}" if unread else f"- {versions}")
    return "\n".join(lines)


def _card(source: Source, layout: Layout) -> str:
    name = base_model(source.name)
    before = source.stored_bytes
    disk = sum(decision.disk_bytes for decision in layout.decisions)
    resident = sum(decision.resident_bytes for decision in layout.decisions)
    kept = sum(decision.scheme is None for decision in layout.decisions)
    scheme = layout.recipe.scheme
    sizes = {d.scheme.group_size: None for d in layout.decisions if d.scheme is not None}
    return f"""---
base_model: {name}
base_model_relation: quantized
library_name: transformers
tags:
- halfweight
- compressed-tensors
- int8
- w8a16
---

# {name}, INT8 weights

{name} with its weights in INT8, made by halfweight \
{__version__}: one byte a weight, one scale for each {_groups_in_words(sizes)} along the input \
({scheme.scale_choice.replace("_", " ")} choice, `{scheme.scale_format}` scales).{_kept(layout)}

| | bytes | of the source |
|---|---|---|
| source tensors | {before:,} | |
| on disk | {disk:,} | {disk / before:.2%} |
| in memory under halfweight | {resident:,} | {resident / before:.2%} |

{len(layout.decisions) - kept} tensors are quantized, {kept} kept as they were. The files are
compressed-tensors `pack-quantized`; `halfweight.json` holds a sha256 of each and every tensor's
error. Read in INT8 as it is by

{_readers_in_words(source, layout)}

```python
import halfweight

model = halfweight.load("path/to/this/folder")
```
"""
