"""Small models in INT8 with tokenizers of the kinds that GGUF has, and llama.cpp to run them."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import llama_like
import tiny
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GenerationConfig
from transformers import PreTrainedTokenizerFast as Fast

import halfweight

LLAMA_PYTHON = os.environ.get("LLAMA_PYTHON")
"""A Python that has llama-cpp-python."""
if LLAMA_PYTHON is None and find_spec("llama_cpp"):
    LLAMA_PYTHON = sys.executable
VOCAB = 323
TEXT = "the cats don't count 1984 things; In 2025 they'll SLEEP, won't they?"
GEMMA3 = Gemma3TextConfig(
    **tiny.SIZES | {"num_hidden_layers": 7, "vocab_size": VOCAB, "head_dim": 32},
    query_pre_attn_scalar=32,
    sliding_window=8,
    max_position_embeddings=256,
)
CONFIGS = llama_like.FAMILY | {"gemma3": GEMMA3}
WORDS = ("the", "cat", "cats", "in", "at", "he", "they", "count", "thing", "sleep", "co", "unt")
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}| ", r"|\p{N}{1,3}| ")


def byte_pairs(*cuts, ignore_merges=False):
    """BPE of bytes over WORDS; `cuts` are pre-tokenizers before ByteLevel, "regex" GPT-2's own."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: i for i, text in enumerate(("<s>", "</s>", "<tool>", *letters))}
    merges = []
    for word in ("\u0120" + word for word in WORDS):
        for end in range(2, len(word) + 1):
            pair = (word[: end - 1], word[end - 1])
            if pair not in merges:
                merges.append(pair)
                vocabulary[word[:end]] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=ignore_merges))
    parts = [cut for cut in cuts if cut != "regex"]
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex="regex" in cuts))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts) if len(parts) > 1 else parts[0]
    tokenizer.decoder = decoders.ByteLevel()
    fast = Fast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.add_tokens(["<tool>"])
    fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return fast


def split(regex):
    """A pre-tokenizer that cuts as Qwen's and Llama 3's do."""
    return pre_tokenizers.Split(Regex(regex), "isolated")


def pieces(*, prefix=True):
    """SentencePiece's kind: BPE of characters, unknown ones in bytes, all splits of each piece."""
    vocabulary = {text: i for i, text in enumerate(("<unk>", "<s>", "</s>"))}
    for text in (*(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581acehilnopstuy1259"):
        vocabulary[text] = len(vocabulary)
    made = ["th", "he", "the", "at", "cat", "cats", "\u2581the", "\u2581c", "\u2581cat", "\u2581t"]
    merges = []
    for piece in made:
        vocabulary[piece] = len(vocabulary)
    for piece in made:
        merges += [
            (piece[:at], piece[at:])
            for at in range(1, len(piece))
            if piece[:at] in vocabulary and piece[at:] in vocabulary
        ]
    model = models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(" ", "\u2581")
    start = [normalizers.Prepend("\u2581")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*start, spaces])
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(parts)
    return Fast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "gpt-2": lambda: byte_pairs("regex"),
    "smollm": lambda: byte_pairs(pre_tokenizers.Digits(individual_digits=True), "regex"),
    "qwen2": lambda: byte_pairs(split(QWEN2)),
    "smaug-bpe": lambda: byte_pairs(split(LLAMA3)),
    "llama-bpe": lambda: byte_pairs(split(LLAMA3), ignore_merges=True),
    "sentencepiece": pieces,
    "sentencepiece, no prefix": lambda: pieces(prefix=False),
}


def make_int8(folder, config=None, *, tokenizer="gpt-2", dtype=torch.bfloat16, recipe=None):
    """A folder of INT8 weights of a random model with a tokenizer; `folder/source` is its source.

    Norms and biases are away from 1 and 0, and weights large enough for logits that differ.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or CONFIGS["llama"])
    for parameter in model.parameters():
        away = 0.3 if parameter.dim() == 1 else 0.08
        parameter.data += away * torch.randn_like(parameter)
    source = folder / "source"
    model.to(dtype).save_pretrained(source)
    GenerationConfig(eos_token_id=[2, 7]).save_pretrained(source)
    (source / "LICENSE").write_text("terms")
    if tokenizer:
        TOKENIZERS[tokenizer]().save_pretrained(source)
    halfweight.quantize(source, folder / "int8", recipe)
    return folder / "int8"


def asked_of_llama(path, texts, new_tokens=1):
    """llama.cpp's {"ids", "new", "text", "logits"} for each text; logits after the text."""
    program = Path(__file__).with_name("llama_greedy.py")
    asked = {"path": str(path), "texts": texts, "new_tokens": new_tokens}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [LLAMA_PYTHON, program],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])
