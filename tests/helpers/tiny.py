"""A small Llama, in memory or as a complete folder: config, tokenizer, several shards."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
HIDDEN, FFN, VOCAB, LAYERS = 64, 192, 320, 2
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
}


def small_llama(**changes):
    """A random Llama of SIZES, the same every time; `changes` of its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | changes)).eval()


def make_llama(
    folder, *, dtype=torch.bfloat16, tied=False, shard_size="60KB", layers=LAYERS, **config
):
    """Save a random model as transformers does; returns the folder."""
    from transformers import GenerationConfig

    model = small_llama(num_hidden_layers=layers, tie_word_embeddings=tied, **config).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard_size)
    GenerationConfig(eos_token_id=2, temperature=0.7, do_sample=True).save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


def tensors_of(folder):
    """All tensors of a folder, by name."""
    found = {}
    for shard in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(shard)
    return found


def rewrite(folder, change):
    """Apply `change(tensors)` to the one shard that holds each tensor named in the result."""
    for shard in sorted(Path(folder).glob("*.safetensors")):
        tensors = load_file(shard)
        before = dict(tensors)
        change(tensors)
        if any(before.get(n) is not t for n, t in tensors.items()) or before.keys() - tensors:
            save_file(tensors, shard, metadata={"format": "pt"})


def edit_json(path, **changes):
    """Set keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def hashes(folder):
    """File name -> sha256, of every file of a folder."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file()
    }
