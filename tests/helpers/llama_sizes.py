"""The tensors of Llama-3-8B and 70B, by name and shape."""

from halfweight.quantization.scheme import TensorInfo


def llama_tensors(hidden, ffn, layers, kv_dim, vocab):
    shapes = {"q_proj": (hidden, hidden), "k_proj": (kv_dim, hidden), "v_proj": (kv_dim, hidden)}
    shapes |= {"o_proj": (hidden, hidden), "gate_proj": (ffn, hidden), "up_proj": (ffn, hidden)}
    shapes |= {"down_proj": (hidden, ffn)}
    for i in range(layers):
        for name, shape in shapes.items():
            yield TensorInfo(f"model.layers.{i}.{name}.weight", "BF16", shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield TensorInfo(f"model.layers.{i}.{name}.weight", "BF16", (hidden,))
    yield TensorInfo("model.norm.weight", "BF16", (hidden,))
    for name in ("model.embed_tokens", "lm_head"):
        yield TensorInfo(f"{name}.weight", "BF16", (vocab, hidden))


LLAMA_8B = (4096, 14336, 32, 1024, 128256)
LLAMA_70B = (8192, 28672, 80, 1024, 128256)
