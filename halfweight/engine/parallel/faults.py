"""What is told of a rank that is lost: one error that names it and its last words."""

from __future__ import annotations

import json
from typing import Any

from halfweight import errors
from halfweight.errors import HalfweightError


class RankError(HalfweightError):
    """A rank has died, hangs, or cannot be reached; no rank can go on."""


def to_message(error: BaseException) -> dict[str, Any]:
    """An error as it goes to rank 0."""
    text = getattr(error, "message", None) or f"{type(error).__name__}: {error}".strip()
    hint = getattr(error, "hint", "")
    return {"kind": type(error).__name__, "text": text.partition("\n")[0], "hint": hint}


def from_message(content: bytes, who: str) -> HalfweightError:
    """The error of a rank, of the class that it had there if that is one of ours."""
    found = json.loads(content)
    kind = getattr(errors, found["kind"], RankError)
    if not (isinstance(kind, type) and issubclass(kind, HalfweightError)):
        kind = RankError
    if "OutOfMemory" in found["kind"] or found["kind"] == "MemoryError":
        kind = errors.DoesNotFitError
        found["hint"] = "give it fewer --cache-tokens, fewer --max-sequences, or more devices"
    made: HalfweightError = kind(f"{who}: {found['text']}", hint=found["hint"])
    return made
