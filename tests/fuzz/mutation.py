"""Random changes to files: to the values and keys of JSON, and to bytes."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

SCALARS: list[Any] = [
    None, True, False, 0, 1, -1, 2, 255, 2**31, 2**53 + 1, 2**63, 2**64, 10**30, -(2**63), 0.0,
    -0.5, 1e308, float("inf"), float("nan"), "", "a", "re:(", "re:.*", "../../x", "/etc/passwd",
    "\x00", "bfloat16", "float9", "llama", "\ud800", "ü" * 300, "1", [], {}, [[]], [None], [0],
    ["a"], {"a": 1}, [1, "a"], {"": None},
]  # fmt: skip


def mutated_json(raw: bytes, chance: random.Random) -> bytes:
    """A JSON text with one to three of its places changed; now and then no JSON any more."""
    if chance.random() < 0.1:
        return mutated_bytes(raw, chance)
    value = json.loads(raw)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        value = _changed(value, chance)
    text = json.dumps(value)
    if chance.random() < 0.001:
        depth = chance.choice((50, 2000, 100_000))
        opening, closing = chance.choice((("[", "]"), ('{"text_config":', "}")))
        text = opening * depth + text + closing * depth
    return text.encode()


def _changed(value: Any, chance: random.Random) -> Any:
    """A copy with one place changed; deeper places as likely as those above them."""
    if not isinstance(value, dict | list) or not value or chance.random() < 0.1:
        return chance.choice(SCALARS)
    copy = value.copy()
    key = chance.choice(list(copy)) if isinstance(copy, dict) else chance.randrange(len(copy))
    act = chance.random()
    if act < 0.1:
        del copy[key]
    elif act < 0.15 and isinstance(copy, dict):
        copy[chance.choice(["", "a", "\ud800", str(key) + "x", "text_config"])] = copy.pop(key)
    elif act < 0.2:
        other = chance.choice(list(copy)) if isinstance(copy, dict) else chance.randrange(len(copy))
        copy[key] = copy[other]
    elif act < 0.35 and isinstance(copy[key], int) and not isinstance(copy[key], bool):
        copy[key] += chance.choice((-1, 1, -copy[key], 7, copy[key], 10**6))
    else:
        copy[key] = _changed(copy[key], chance)
    return copy


def mutated_bytes(raw: bytes, chance: random.Random) -> bytes:
    """Bytes flipped, cut, doubled, or a length in them changed."""
    data = bytearray(raw)
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.randrange(len(data) + 1)
        act = chance.randrange(5)
        if act == 0 and at < len(data):
            data[at] = chance.randrange(256)
        elif act == 1:
            del data[at : at + chance.choice((1, 2, 8, 100))]
        elif act == 2:
            data[at:at] = data[at : at + chance.choice((1, 8, 64))]
        elif act == 3:
            size = chance.choice((0, 1, 2**16, 2**31, 2**32 - 1, 2**62, 2**64 - 1))
            data[at : at + 8] = struct.pack("<Q", size)
        else:
            data[at:at] = bytes(chance.randrange(256) for _ in range(chance.choice((1, 4))))
    return bytes(data)


def mutated_shard(raw: bytes, chance: random.Random) -> bytes:
    """A safetensors file with its header changed, its length mended or not."""
    (length,) = struct.unpack("<Q", raw[:8])
    if chance.random() < 0.2:
        return mutated_bytes(raw[: 8 + length], chance) + raw[8 + length :]
    header = mutated_json(raw[8 : 8 + length], chance)
    stated = len(header) if chance.random() < 0.95 else chance.choice((0, 2**40, length))
    return struct.pack("<Q", stated) + header + raw[8 + length :]


def mutated_data(raw: bytes, chance: random.Random) -> bytes:
    """A safetensors file with some bytes of its data changed: the header stays true."""
    (length,) = struct.unpack("<Q", raw[:8])
    data = bytearray(raw)
    for _ in range(chance.choice((1, 4, 64, 512))):
        data[chance.randrange(8 + length, len(data))] = chance.choice((0, 0x7F, 0x80, 0xFF, 1))
    return bytes(data)
