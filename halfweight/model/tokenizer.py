"""A tokenizer and chat template of a model; what is wrong with them is one line with the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from halfweight.checkpoint.gguf_header import gguf_files
from halfweight.checkpoint.json_files import read_json
from halfweight.errors import CheckpointError, UsageError

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
LEGACY_TEMPLATE = "chat_template.json"
"""Where processors of images and text keep the template; tokenizers do not look there."""


def has_tokenizer(path: Path) -> bool:
    """Whether there is anything of a tokenizer at a model's path; a .gguf file holds its own."""
    if path.is_file():
        return path.suffix == ".gguf"
    names = [file.name for file in path.iterdir()]
    return any(
        n.startswith(("tokenizer", "vocab", "spiece")) or n.endswith(".model") for n in names
    )


def open_tokenizer(path: Path) -> Any:
    """The tokenizer of a folder or a .gguf file.

    Raises CheckpointError where it is missing or broken.
    """
    from transformers import AutoTokenizer

    if path.is_file():
        path = gguf_files(path)[0]
    where = {"gguf_file": path.name} if path.is_file() else {}
    folder = path.parent if path.is_file() else path
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **where)
    except Exception as error:
        if path.is_dir():
            _check_files(path)
        raise CheckpointError(
            f"{path}: its tokenizer cannot be read ({type(error).__name__}: {_first_line(error)})",
            hint="copy the tokenizer's files from the original model again",
        ) from error
    legacy = folder / LEGACY_TEMPLATE
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if not where and not has_template and legacy.is_file():
        tokenizer.chat_template = _legacy_template(legacy)
    return tokenizer


def chat_text(tokenizer: Any, messages: Sequence[Mapping[str, Any]], /, **template: Any) -> str:
    """The text of a conversation that is the model's turn to go on with.

    `template` goes to the chat template: `tools`, `enable_thinking`, ...

    Raises UsageError where there is no template, for what is no message, or where the template
    refuses them; CheckpointError where it is no valid template.
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    name = tokenizer.name_or_path or "the tokenizer"
    if tokenizer.chat_template is None:
        raise UsageError(
            f"{name} has no chat template", hint="use `halfweight generate`, or a model for chat"
        )
    for i, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or "role" not in message:
            raise UsageError(
                f"message {i} is {message!r}, expected a role and a content",
                hint='{"role": "user", "content": "..."}',
            )
    try:
        options = {"add_generation_prompt": True, **template, "tokenize": False}
        text: str = tokenizer.apply_chat_template(list(messages), **options)
    except TemplateSyntaxError as error:
        raise CheckpointError(
            f"{name}: its chat template has a syntax error in line {error.lineno} "
            f"({_first_line(error)})",
            hint="copy chat_template.jinja or tokenizer_config.json from the original model again",
        ) from error
    except TemplateError as error:
        raise UsageError(
            f"{name}: its chat template refuses these messages ({_first_line(error)})",
            hint="some models take no system message, and want user and assistant in turns",
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(
            f"{name}: its chat template cannot be used ({_first_line(error)})",
            hint=_hint(tokenizer),
        ) from error
    return text


def _hint(tokenizer: Any) -> str:
    if isinstance(tokenizer.chat_template, dict):
        names = ", ".join(tokenizer.chat_template)
        return f"it has several ({names}) and none is called default: keep one in the model's files"
    return "use `halfweight generate`, or a model for chat"


def _legacy_template(path: Path) -> str:
    template = read_json(path).get("chat_template")
    if not isinstance(template, str):
        raise CheckpointError(
            f"{path}: chat_template is {type(template).__name__}, expected text",
            hint="copy the file from the original model again",
        )
    return template


def _check_files(folder: Path) -> None:
    """Raise CheckpointError for the first of the tokenizer's JSON files that is none."""
    for name in FILES:
        if (folder / name).is_file():
            read_json(folder / name)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
