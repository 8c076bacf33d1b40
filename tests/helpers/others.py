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


def write_bitsandbytes(source, out):
    """LLM.int8() as bitsandbytes saves it: w = CB * SCB / 127, a scale a row."""

    def pack(name, weight):
        absmax = weight.float().abs().amax(1)
        q = torch.round(weight.float() * (127 / absmax)[:, None]).to(torch.int8)
        format_row = torch.tensor(0, dtype=torch.uint8)
        return {f"{name}.weight": q, f"{name}.SCB": absmax, f"{name}.weight_format": format_row}

    config = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
    return rewritten(source, out, lambda t: with_linears(t, pack), **config)


def write_torchao(source, out, group_size, *, dtype=torch.float32, zero_point=0):
    """Int8WeightOnlyConfig as torchao's flatten_tensor_state_dict names it."""

    def pack(name, weight):
        q, scales = rounded(weight, group_size, dtype)
        return {
            f"{name}._weight_qdata": q.to(torch.int8),
            f"{name}._weight_scale": scales,
            f"{name}._weight_zero_point": torch.full_like(scales, zero_point, dtype=torch.int8),
        }

    config = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8Tensor"}}}
    return rewritten(source, out, lambda t: with_linears(t, pack), **config)


def write_compressed(source, out, stored_format, weights, scale_of, **more):
    """compressed-tensors' own compressor of `stored_format`; scales by `scale_of(weight)`."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    fields = {"targets": ["Linear"], "weights": weights, "format": stored_format}
    scheme = QuantizationScheme.model_validate(fields)
    compressor = BaseCompressor.get_value_from_registry(stored_format)

    def pack(name, weight):
        parts = {"weight": weight, "weight_scale": scale_of(weight)}
        packed = compressor.compress(parts, scheme)
        return {f"{name}.{part}": t for part, t in packed.items()} | {
            f"{name}.{part}": t.clone() for part, t in more.items()
        }

    return rewritten(
        source,
        out,
        lambda tensors: with_linears(tensors, pack),
        quant_method="compressed-tensors",
        format=stored_format,
        config_groups={"group_0": fields},
    )


def write_float8(source, out, block, *, scale_dtype=torch.float32, powers=False, ends="_scale_inv"):
    """FP8 in blocks as DeepSeek's and Qwen's files have it; `powers`: scales are powers of two."""

    def pack(name, weight):
        rows, columns = weight.shape
        grid = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
        data = torch.empty(rows, columns)
        for i in range(grid.shape[0]):
            for j in range(grid.shape[1]):
                where = (slice(i * block[0], (i + 1) * block[0]),
                         slice(j * block[1], (j + 1) * block[1]))  # fmt: skip
                scale = (weight[where].float().abs().max() / 448).to(scale_dtype).float()
                grid[i, j] = 2.0 ** torch.log2(scale).ceil() if powers else scale
                data[where] = weight[where].float() / grid[i, j]
        found = data.to(torch.float8_e4m3fn)
        return {f"{name}.weight": found, f"{name}.weight{ends}": grid.to(scale_dtype)}

    config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}
    return rewritten(source, out, lambda t: with_linears(t, pack), **config)


def write_mxfp4(source, out, experts):
    """gpt-oss's experts [E, H, M] by the OCP specification, each value the nearest of E2M1."""
    grid = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])

    def change(tensors):
        for name in experts:
            blocks = tensors.pop(name).float().transpose(1, 2).unflatten(-1, (-1, 32))
            powers = torch.log2(blocks.abs().amax(-1) / 6).ceil().clamp(-127, 127)
            scaled = blocks / 2.0 ** powers[..., None]
            codes = (scaled.abs()[..., None] - grid).abs().argmin(-1) + 8 * (scaled < 0)
            pairs = codes.unflatten(-1, (16, 2))
            tensors[f"{name}_blocks"] = (pairs[..., 0] + 16 * pairs[..., 1]).to(torch.uint8)
            tensors[f"{name}_scales"] = (powers + 127).to(torch.uint8)
        return tensors

    return rewritten(source, out, change, quant_method="mxfp4", modules_to_not_convert=[])
