"""Small .gguf files."""

import numpy as np
import pytest
from tiny import FFN, HIDDEN, VOCAB

gguf = pytest.importorskip("gguf")  # a GPU machine's own python may lack it

HEADS, KV_HEADS = 4, 2
TYPES = gguf.GGMLQuantizationType


def make_gguf(path, kind=TYPES.Q8_0, *, architecture="llama", tied=True, extra=None, parts=1):
    """A one-layer Llama in GGUF with random weights, norms in F32; or the first of `parts`."""
    random = np.random.default_rng(0)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {"attn_q": (HIDDEN, HIDDEN), "attn_k": (kv, HIDDEN), "attn_v": (kv, HIDDEN)}
    shapes |= {"attn_output": (HIDDEN, HIDDEN), "ffn_gate": (FFN, HIDDEN), "ffn_up": (FFN, HIDDEN)}
    shapes = {f"blk.0.{name}": shape for name, shape in shapes.items()}
    shapes |= {"blk.0.ffn_down": (HIDDEN, FFN), "token_embd": (VOCAB, HIDDEN)}
    shapes |= {} if tied else {"output": (VOCAB, HIDDEN)}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    if parts > 1:
        writer.add_uint16("split.count", parts)
    for name, shape in shapes.items():
        weight = random.normal(size=shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quantize(weight, kind), raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", random.normal(size=HIDDEN).astype(np.float32))
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
