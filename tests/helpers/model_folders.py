"""Folders that tests of several rooms start from."""

import pytest
from byte_tokenizer import make_tokenizer
from tiny import make_llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import halfweight
from halfweight.quantization.scheme import Recipe, Scheme

TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def int8_folder(tmp_path_factory):
    """An INT8 folder whose tokenizer knows 320 words."""
    root = tmp_path_factory.mktemp("cli")
    source = make_llama(root / "source")
    words = ["user", "assistant", "system", *(f"w{i}" for i in range(317))]
    inner = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0"))
    inner.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(source)
    halfweight.quantize(source, root / "int8", Recipe(Scheme(32)))
    return str(root / "int8")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A model with a real tokenizer (bytes), and its quantized form."""
    folder = make_llama(tmp_path_factory.mktemp("pair") / "source")
    make_tokenizer().save_pretrained(folder)
    out = folder.parent / "int8"
    halfweight.quantize(folder, out)
    text = folder.parent / "text.txt"
    text.write_text("Happy families are all alike; every unhappy family is unhappy. " * 8)
    return folder, out, text
