"""Folders in the forms of others, written by their own libraries or from their specifications.

Nothing here is imported from halfweight: what it reads is compared with what these wrote.
"""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file


def rewritten(source, out, change, **quantization_config):
    """A copy of a folder of one shard whose tensors are `change(tensors)`, and its new config."""
    shutil.copytree(source, out)
    shard = out / "model.safetensors"
    tensors = {name: t.contiguous() for name, t in change(load_file(shard)).items()}
    save_file(tensors, shard, metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = quantization_config
    (out / "config.json").write_text(json.dumps(config))
    return out


def linears(tensors):
    """Names of the linears' weights: matrices but embedding and head."""
    matrices = (name for name, tensor in tensors.items() if tensor.dim() == 2)
    return [name for name in matrices if "embed" not in name and "lm_head" not in name]


def with_linears(tensors, pack):
    """The tensors with each linear's weight replaced by `pack(name without .weight, weight)`."""
    chosen = linears(tensors)
    found = {name: tensor for name, tensor in tensors.items() if name not in chosen}
    for name in chosen:
        found |= pack(name.removesuffix(".weight"), tensors[name])
    return found


def write_compressed_tensors(source, out, group_size, scale_dtype=torch.bfloat16):
    """W8A16 by compressed-tensors' own compressor; group_size None is a scale a row."""
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    strategy = "channel" if group_size is None else "group"
    weights = {"num_bits": 8, "type": "int", "symmetric": True}
    weights |= {"strategy": strategy, "group_size": group_size}
    fields = {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}
    scheme = QuantizationScheme.model_validate(fields)

    def pack(name, weight):
        groups = weight.float().reshape(weight.shape[0], -1, group_size or weight.shape[1])
        scale = (groups.abs().amax(-1) / 127.5).to(scale_dtype)
        parts = {"weight": weight, "weight_scale": scale}
        packed = PackedQuantizationCompressor.compress(parts, scheme)
        return {f"{name}.{part}": tensor for part, tensor in packed.items()}

    return rewritten(
        source,
        out,
        lambda tensors: with_linears(tensors, pack),
        quant_method="compressed-tensors",
        format="pack-quantized",
        quantization_status="compressed",
        config_groups={"group_0": fields},
        ignore=["lm_head"],
    )


def rounded(weight, group_size, dtype=torch.float16, most=127):
    """Symmetric INT8 q [N, K] as int64, scales [N, K/G], by absmax; the last group may be short."""
    size = group_size or weight.shape[1]
    parts = [weight[:, k : k + size].float() for k in range(0, weight.shape[1], size)]
    scales = [(part.abs().amax(1) / most).to(dtype) for part in parts]
    q = [
        torch.round(part / scale.float()[:, None]).clamp(-128, 127).long()
        for part, scale in zip(parts, scales, strict=True)
    ]
    return torch.cat(q, 1), torch.stack(scales, 1)


def gptq_parts(q, scales, group_size, *, zero_point=128, order=None, version="gptq"):
    """GPTQ's tensors of one linear, by its specification: weight k is byte k % 4 of a word."""
    rows, columns = q.shape
    words = torch.zeros(columns // 4, rows, dtype=torch.int64)
    for k in range(columns):
        words[k // 4] |= (q[:, k] + 128) << (8 * (k % 4))
    stored = zero_point - (version == "gptq")
    word = sum(stored << (8 * i) for i in range(4))
    zeros = torch.full((scales.shape[1], -(-rows // 4)), word, dtype=torch.int64)
    g_idx = torch.arange(columns) // (group_size or columns) if order is None else order
    return {
        "qweight": words.to(torch.int32),
        "qzeros": zeros.to(torch.int32),
        "scales": scales.t(),
        "g_idx": g_idx.to(torch.int32),
    }


def write_gptq(source, out, group_size, *, dtype=torch.float16, config=None, **options):
    """GPTQ in 8 bits, rounded to nearest; `options` are those of `gptq_parts`."""

    def pack(name, weight):
        q, scales = rounded(weight, group_size, dtype)
        parts = gptq_parts(q, scales, group_size, **options)
        return {f"{name}.{part}": tensor for part, tensor in parts.items()}

    fields = {"quant_method": "gptq", "bits": 8, "group_size": group_size or -1, "sym": True}
    fields |= {"desc_act": False, "checkpoint_format": options.get("version", "gptq")}
    return rewritten(source, out, lambda t: with_linears(t, pack), **fields | (config or {}))
