"""What auto-round 0.16.1's own layers make of its tensors, in float32 (its scales are widened first)."""

import json

import torch
from auto_round.experimental.qmodules.fp8_static import WeightFP8ActFP8StaticQuantLinear
from auto_round.experimental.qmodules.mx import MXFP4QuantLinear, MXFP8QuantLinear, MXINT4QuantLinear
from auto_round.experimental.qmodules.nvfp4 import NVFP4QuantLinear
from auto_round.experimental.qmodules.nvfp4_e5m3 import NVFP4E5M3QuantLinear
from auto_round.export.export_to_awq.utils import dequantize_gemm
from auto_round.schemes import QuantizationScheme
from auto_round_extension.mlx.qlinear_mlx import QuantLinearMLX
from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp
from common import weights_of
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig

BLOCK = 128
PARTS = {"qweight", "qzeros", "scales", "biases", "g_idx", "input_scale", "input_global_scale"}
FLOAT = {
    ("mx_fp", 4): MXFP4QuantLinear,
    ("mx_fp", 8): MXFP8QuantLinear,
    ("mx_int", 4): MXINT4QuantLinear,
    ("nv_fp", 4): NVFP4QuantLinear,
    ("nvfp4_v2", 4): NVFP4E5M3QuantLinear,
}


def dequantize(folder):
    """A checkpoint's folder -> its weights in float32, by the names of the file."""
    cfg = json.loads((folder / "config.json").read_text())
    modules, out = {}, {}
    for key, value in weights_of(folder).items():
        module, _, name = key.rpartition(".")
        modules.setdefault(module, {})[name] = value
    for module, tensors in modules.items():
        if "visual" in module:
            continue
        if not PARTS & tensors.keys() and not any(name.startswith("weight_") for name in tensors):
            out |= {f"{module}.{name}": value for name, value in tensors.items()}
            continue
        weight = dequantize_one(module, tensors, cfg)
        assert weight.dtype == torch.float32, (module, weight.dtype)
        out[f"{module}.weight"] = weight
    return out


def dequantize_one(module, tensors, cfg):
    """The tensors of one linear layer -> [out, in]."""
    quantization = cfg["quantization_config"]
    method, packing = quantization.get("quant_method"), quantization.get("packing_format") or ""
    if "biases" in tensors:
        return mlx(tensors, cfg["quantization"][module])
    if method == "compressed-tensors":
        return compressed_tensors(tensors, quantization)
    if "qweight" not in tensors:
        return floating(tensors, quantization)
    group_size = quantization["group_size"]
    if method == "awq" or "awq" in packing:
        bits = tensors["qweight"].shape[1] * 32 // tensors["scales"].shape[1]
        return dequantize_gemm(
            tensors["qweight"], tensors["qzeros"], tensors["scales"].float(), bits, group_size
        ).T.contiguous()
    stores_zero = packing in ("auto_round", "auto_round:gptqmodel")
    return gptq((qlinear_torch if stores_zero else qlinear_torch_zp).QuantLinear, tensors, group_size)


def gptq(linear_class, tensors, group_size):
    rows = tensors["scales"].shape[1]
    bits = tensors["qzeros"].shape[1] * 32 // rows
    columns = tensors["qweight"].shape[0] * 32 // bits
    ragged = group_size > 0 and columns % group_size
    if not ragged and "g_idx" not in tensors:
        return gptq_layer(linear_class, tensors, bits, group_size)
    # With g_idx the layer takes as many rows as it has columns, so give it 32 at a time. Without it, it cannot run a
    # partial last group; the groups are the same: g_idx is the column's number divided by the group size.
    parts = []
    for row in range(0, rows, 32):
        part = {name: tensors[name][:, row : row + 32] for name in ("qweight", "scales")}
        part["qzeros"] = tensors["qzeros"][:, row * bits // 32 : (row + 32) * bits // 32]
        part["g_idx"] = tensors.get("g_idx", torch.arange(columns, dtype=torch.int32) // group_size)
        parts.append(gptq_layer(linear_class, part, bits, group_size))
    return torch.cat(parts)


def gptq_layer(linear_class, tensors, bits, group_size):
    (words, rows), with_g_idx = tensors["qweight"].shape, "g_idx" in tensors
    columns = words * 32 // bits
    linear = linear_class(bits, group_size, columns, rows, False, g_idx=with_g_idx)
    for name, tensor in tensors.items():
        assert getattr(linear, name).shape == tensor.shape, (name, tensor.shape)
        setattr(linear, name, tensor.float() if name == "scales" else tensor.contiguous())
    return linear(torch.eye(columns)).T.contiguous()


def mlx(tensors, options):
    bits, group_size = options["bits"], options["group_size"]
    rows, words = tensors["weight"].shape
    columns = words * 32 // bits
    linear = QuantLinearMLX(bits, group_size, columns, rows, False)
    for name, tensor in tensors.items():
        setattr(linear, name, tensor)
    return linear._forward_torch(torch.eye(columns)).T.contiguous()


def floating(tensors, quantization):
    if (scale := tensors.get("weight_scale_inv")) is not None:
        # `_dequant_fp8_linear_weight` multiplies in bfloat16; the same blocks in float32.
        scale = scale.float().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        rows, columns = tensors["weight"].shape
        return tensors["weight"].float() * scale[:rows, :columns]
    if quantization["data_type"] == "fp":
        rows, columns = tensors["weight"].shape
        linear = WeightFP8ActFP8StaticQuantLinear(
            columns, rows, tensors["weight"], tensors["weight_scale"], dtype=torch.float32
        )
        return linear.dequant_weight_online()
    linear_class = FLOAT[quantization["data_type"], quantization["bits"]]
    weight = tensors.get("weight_packed", tensors.get("weight"))
    rows, columns = weight.shape[0], weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)
    linear = linear_class(
        columns,
        rows,
        QuantizationScheme.from_dict(quantization),
        weight=weight,
        weight_scale=tensors["weight_scale"],
        dtype=torch.float32,
    )
    if "weight_global_scale" in tensors:
        linear.weight_global_scale = tensors["weight_global_scale"]
    return linear.dequant_weight_online()


def compressed_tensors(tensors, quantization):
    skipped = ("sparsity_config", "transform_config", "version", "provider")
    config = QuantizationConfig.model_validate({k: v for k, v in quantization.items() if k not in skipped})
    (scheme,) = config.config_groups.values()
    if tensors["weight_scale"].dtype in (torch.bfloat16, torch.float16):
        tensors["weight_scale"] = tensors["weight_scale"].float()
    fmt = scheme.format or config.format
    compressor = BaseCompressor.get_value_from_registry(getattr(fmt, "value", fmt))
    return compressor.decompress(tensors, scheme)["weight"].float()
