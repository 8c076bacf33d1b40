"""Small .gguf files."""

import numpy as np
import pytest
from tiny import FFN, HIDDEN, VOCAB

gguf = pytest.importorskip("gguf")  # a GPU machine's own python may lack it

HEADS, KV_HEADS = 4, 2
BIASES = {"attn_q": HIDDEN, "attn_k": HIDDEN // 2, "attn_v": HIDDEN // 2}
TYPES = gguf.GGMLQuantizationType


def make_gguf(path, kind=TYPES.Q8_0, *, architecture="llama", tied=True, extra=None, biases=False):
    """A one-layer Llama in GGUF with random weights, norms in F32; Qwen2's `biases` where it is."""
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
    for name, shape in shapes.items():
        weight = random.normal(size=shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quantize(weight, kind), raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", random.normal(size=HIDDEN).astype(np.float32))
    if biases and architecture == "qwen2":
        extra = {f"blk.0.{n}.bias": np.ones(m, np.float32) for n, m in BIASES.items()}
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make_split(path, folder, parts):
    """The files of a model cut into `parts` as llama.cpp does: fields in the first; returns it."""
    folder.mkdir()
    reader = gguf.GGUFReader(path)
    tensors = list(reader.tensors)
    files = [folder / f"m-{i + 1:05}-of-{parts:05}.gguf" for i in range(parts)]
    for number, file in enumerate(files):
        architecture = reader.get_field("general.architecture").contents()
        writer = gguf.GGUFWriter(file, architecture)
        if number == 0:
            copy_fields(reader, writer)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", parts)
        writer.add_int32("split.tensors.count", len(tensors))
        for tensor in tensors[number::parts]:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return files[0]


def copy_fields(reader, writer):
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), field.types[0])
