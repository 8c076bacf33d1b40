"""A tokenizer as a GGUF file holds it, by llama.cpp's own conventions.

Truth is the tokenizer that transformers makes of the folder, the one that halfweight runs, not its
files. Two kinds of llama.cpp are written: "gpt2" (BPE of bytes) and "llama" (SentencePiece: BPE of
characters, unknown ones in bytes). llama.cpp has the regular expressions that a text is first cut
by under names; those are looked up here by the expressions themselves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from halfweight.errors import CheckpointError

GPT2, LLAMA = "gpt2", "llama"
SPACE = "\u2581"
"""What stands for a space in SentencePiece."""
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]")
"""Added tokens that llama.cpp takes for control tokens whatever the file says."""
ADDED_SCORE = -1000.0
SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_QWEN2 = _CONTRACTIONS + _WORDS + r"\p{N}" + _REST
_LLAMA3 = _CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2_SPLIT, _BYTES, _SPACES = "ByteLevel regex", "ByteLevel", "spaces"
SPACES_ONLY = {"Prepend", "Replace"}
"""Normalizers that make spaces what SentencePiece has for them."""
PRE_TOKENIZERS = {
    ((_GPT2_SPLIT,), False): "gpt-2",
    (("Digits", _GPT2_SPLIT), False): "smollm",
    ((_QWEN2, _BYTES), False): "qwen2",
    ((_LLAMA3, _BYTES), True): "llama-bpe",
    ((_LLAMA3, _BYTES), False): "smaug-bpe",
    ((_TEKKEN, _BYTES), True): "tekken",
}
"""What a text is cut by, and whether whole words in the vocabulary skip merges -> the name."""


class TokenType(IntEnum):
    """llama.cpp's kinds of tokens."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """`kind` is GPT2 or LLAMA; `scores` of LLAMA only, `merges` of GPT2 only.

    `special` are ids by llama.cpp's names (bos, eos, eot, ...).
    """

    kind: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    special: dict[str, int]
    adds_bos: bool
    adds_eos: bool
    adds_space: bool
    chat_template: Any


def read_vocabulary(folder: Path, vocab_size: int) -> Vocabulary:
    """The tokenizer of a model's folder, filled up to `vocab_size` tokens.

    Raises CheckpointError where it is missing, broken, or of a kind that llama.cpp has not.
    """
    from halfweight.model.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused(folder, f"{type(tokenizer).__name__} is not of the tokenizers package")
    content = json.loads(backend.to_str())
    kind, pre = _kind(folder, content)
    tokens, types = _tokens(folder, content, vocab_size)
    merges = [" ".join(map(_one_word, pair)) for pair in content["model"]["merges"]]
    beginning = tokenizer("a")["input_ids"]
    return Vocabulary(
        kind=kind,
        pre=pre,
        tokens=tokens,
        types=types,
        scores=_scores(content, tokens, types) if kind == LLAMA else [],
        merges=merges if kind == GPT2 else [],
        special=_special(folder, tokenizer),
        adds_bos=beginning[:1] == [tokenizer.bos_token_id],
        adds_eos=beginning[-1:] == [tokenizer.eos_token_id],
        adds_space=_adds_space(content),
        chat_template=_chat_template(tokenizer),
    )


def add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Give a GGUFWriter the tokenizer."""
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.kind == LLAMA:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.adds_space)
    else:
        writer.add_token_merges(vocabulary.merges)
    for name, token in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _kind(folder: Path, content: Mapping[str, Any]) -> tuple[str, str]:
    """llama.cpp's kind of tokenizer and name of its pre-tokenizer."""
    model = content["model"]
    if model["type"] != "BPE":
        raise _refused(folder, f"a tokenizer of kind {model['type']}")
    changes = {part["type"] for part in _parts(content["normalizer"])}
    cuts = _cuts(content["pre_tokenizer"])
    if model.get("byte_fallback") and changes <= SPACES_ONLY and set(cuts) <= {_SPACES}:
        return LLAMA, "default"
    if changes - {"NFC"}:
        raise _refused(folder, f"a tokenizer that changes text by {' and '.join(sorted(changes))}")
    name = PRE_TOKENIZERS.get((tuple(cuts), bool(model.get("ignore_merges"))))
    if name is None:
        raise _refused(folder, f"a tokenizer that cuts text by {' then '.join(cuts) or 'nothing'}")
    return GPT2, name


def _cuts(pre: Mapping[str, Any] | None) -> list[str]:
    """What a pre-tokenizer cuts by, in order: regular expressions, or names of other ways."""
    return [_cut(part) for part in _parts(pre)]


def _cut(pre: Mapping[str, Any]) -> str:
    if pre["type"] == "Split" and "Regex" in pre["pattern"] and pre["behavior"] == "Isolated":
        return str(pre["pattern"]["Regex"])
    if pre["type"] == "ByteLevel" and not pre["add_prefix_space"]:
        return _GPT2_SPLIT if pre["use_regex"] else _BYTES
    if pre["type"] == "Digits" and pre["individual_digits"]:
        return "Digits"
    if pre["type"] == "Metaspace" or pre.get("pattern") == {"String": " "}:
        return _SPACES
    return f"{pre['type']} {json.dumps(pre, ensure_ascii=False)}"


def _parts(node: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, whether it is a sequence, one or none."""
    if node is None:
        return []
    if node["type"] != "Sequence":
        return [node]
    steps = node.get("normalizers") or node.get("pretokenizers") or []
    return [part for step in steps for part in _parts(step)]


def _tokens(
    folder: Path, content: Mapping[str, Any], vocab_size: int
) -> tuple[list[str], list[int]]:
    """Texts and types of all ids; those that the tokenizer has no token for are unused."""
    model = content["model"]
    texts = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [int(TokenType.UNUSED)] * vocab_size
    added = {token["id"]: token for token in content["added_tokens"]}
    ids = {**{i: text for text, i in model["vocab"].items()}}
    ids |= {i: token["content"] for i, token in added.items()}
    for i, text in ids.items():
        if i >= vocab_size:
            raise _refused(folder, f"token {i} of a tokenizer, beyond {vocab_size} embeddings")
        texts[i] = text
        types[i] = _type(text, added.get(i), model)
        if types[i] == TokenType.USER_DEFINED:
            texts[i] = text.replace(SPACE, " ")
    return texts, types


def _type(text: str, added: Mapping[str, Any] | None, model: Mapping[str, Any]) -> TokenType:
    if model.get("byte_fallback") and BYTE.fullmatch(text):
        return TokenType.BYTE
    if model.get("byte_fallback") and text == model.get("unk_token"):
        return TokenType.UNKNOWN
    if added is None:
        return TokenType.NORMAL
    special = added["special"] or LOOKS_SPECIAL.fullmatch(text)
    return TokenType.CONTROL if special else TokenType.USER_DEFINED


def _scores(content: Mapping[str, Any], tokens: list[str], types: list[int]) -> list[float]:
    """SentencePiece's order of merging: the earlier a merge makes a token, the higher its score."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(content["model"]["merges"]):
        ranks.setdefault("".join(pair), rank)
    last = len(ranks)
    of_normal = {TokenType.NORMAL, TokenType.BYTE}
    return [
        -float(ranks.get(token, last)) if kind in of_normal else ADDED_SCORE
        for token, kind in zip(tokens, types, strict=True)
    ]


def _one_word(text: str) -> str:
    """A side of a merge; a space in it, as GPT-2's bytes have it."""
    return text.replace(" ", chr(ord(" ") + 256))


def _special(folder: Path, tokenizer: Any) -> dict[str, int]:
    """Ids of special tokens; `eot` is another token by which the generation config ends a text."""
    names = {name: getattr(tokenizer, f"{name}_token_id", None) for name in SPECIAL}
    found = {name: token for name, token in names.items() if token is not None}
    others = [token for token in _ends(folder) if token != found.get("eos")]
    return found | ({"eot": others[0]} if others else {})


def _ends(folder: Path) -> list[int]:
    from halfweight.checkpoint.json_files import read_json

    path = folder / "generation_config.json"
    ends = read_json(path).get("eos_token_id") if path.is_file() else None
    ends = ends if isinstance(ends, list) else [ends]
    return [token for token in ends if isinstance(token, int)]


def _adds_space(content: Mapping[str, Any]) -> bool:
    """Whether a text is read as if it began with a space."""
    parts = [*_parts(content["normalizer"]), *_parts(content["pre_tokenizer"])]
    return any(
        part["type"] == "Prepend" or part.get("prepend_scheme") in ("first", "always")
        for part in parts
    )


def _chat_template(tokenizer: Any) -> Any:
    """One template, or several by name as GGUFWriter takes them."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return [{"name": name, "template": text} for name, text in template.items()]
    return template


def _refused(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: {what}, not exported to GGUF",
        hint="halfweight export --to dequantized writes a checkpoint for llama.cpp's "
        "convert_hf_to_gguf.py",
    )
