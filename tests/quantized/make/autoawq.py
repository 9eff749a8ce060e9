"""AWQ fixtures: AutoAWQ 0.2.9's own rounding, packing and unpacking, keys put together here.

AutoAWQ has no release for this model type and its kernels want a GPU, so only its pure Python files are used:
AUTOAWQ is the folder `awq` of its source archive, imported without the package's own `__init__`.
"""

import os
import sys
from types import ModuleType, SimpleNamespace

import torch
import transformers  # noqa: F401  (before the stand-in packages: it looks for an installed one)
from common import (
    base_weights,
    config,
    is_quantized,
    new_fixture,
    save_config,
    save_dequantized,
    split_experts,
)
from safetensors.torch import save_file


def import_autoawq():
    sys.modules["awq"] = ModuleType("awq")
    sys.modules["awq"].__path__ = [os.environ["AUTOAWQ"]]
    # What the quantizer imports for real models only.
    for name, attributes in {
        "awq.utils.calib_data": ["get_calib_dataset"],
        "awq.quantize.scale": ["apply_scale", "apply_clip"],
    }.items():
        sys.modules[name] = ModuleType(name)
        for attribute in attributes:
            setattr(sys.modules[name], attribute, None)
    from awq.modules.linear import gemm, gemv, gemv_fast, marlin
    from awq.quantize.quantizer import AwqQuantizer
    from awq.utils.packing_utils import AWQ_REVERSE_ORDER, dequantize_gemm, unpack_awq

    return SimpleNamespace(
        round=AwqQuantizer.pseudo_quantize_tensor,
        gemm=gemm.WQLinear_GEMM,
        gemv=gemv.WQLinear_GEMV,
        gemv_fast=gemv_fast.WQLinear_GEMVFast,
        marlin=marlin,
        reverse_order=AWQ_REVERSE_ORDER,
        dequantize_gemm=dequantize_gemm,
        unpack=unpack_awq,
    )


def codes_of(awq, packed):
    """gemm's integers, [out, in]."""
    codes, _ = awq.unpack(packed.qweight, packed.qzeros, 4)
    return (codes.unflatten(1, (-1, 8))[..., awq.reverse_order].flatten(1) & 15).t()


def quantize(weight, group_size, scale_dtype, version="gemm"):
    """[out, in] -> the tensors of the file, and what they decode to.

    gemv and gemv_fast have decoders in CUDA only. They round as gemm does: their integers are those of gemm, which the
    tool decodes, and that the packed ones are the same is checked here.
    """
    awq = import_autoawq()
    options = SimpleNamespace(group_size=group_size, w_bit=4, zero_point=version != "marlin")
    rounded, scales, zeros = awq.round(options, weight.float())
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = rounded
    if version == "marlin":
        return quantize_marlin(awq, linear, group_size, scales)
    packed = awq.gemm.from_linear(linear, 4, group_size, scales=scales.t().contiguous(), zeros=zeros.t().contiguous())
    codes, groups = codes_of(awq, packed), scales.shape[1]
    if version == "gemm":
        scales = packed.scales.to(scale_dtype)
        decoded = awq.dequantize_gemm(packed.qweight, packed.qzeros, scales.float(), 4, group_size).t()
        return {"qweight": packed.qweight, "qzeros": packed.qzeros, "scales": scales}, decoded
    decoded = awq.dequantize_gemm(packed.qweight, packed.qzeros, packed.scales.float(), 4, group_size).t()
    packed = getattr(awq, version).from_linear(linear, 4, group_size, scales=scales, zeros=zeros)
    tensors = {name: getattr(packed, name) for name in ("qweight", "qzeros", "scales")}
    if version == "gemv":
        nibbles = (tensors["qweight"][..., None] >> torch.arange(0, 32, 4)) & 15
        assert nibbles.flatten(1).equal(codes.int())
        assert tensors["scales"].shape[1] > groups  # padded with zeros
        return tensors, decoded
    # Four rows in one word, and each 32 columns in an order of their own.
    nibbles = (tensors["qweight"].unflatten(1, (-1, 4, 16))[..., None] >> torch.arange(0, 16, 4)) & 15
    rows = nibbles.permute(0, 2, 1, 3, 4).reshape(weight.shape)  # a word holds columns of one row, 64 a run
    columns = rows.unflatten(1, (-1, 4, 2, 4)).transpose(-1, -2).reshape(-1, weight.shape[1] // 32, 4, 4, 2)
    assert columns.transpose(2, 3).reshape(weight.shape).equal(codes.int())
    scales, biases = (
        tensors[name][:groups].t().float().repeat_interleave(group_size, 1) for name in ("scales", "qzeros")
    )
    exact = codes * scales + biases  # the zero point is stored as -z * s, rounded to float16
    assert (exact - decoded).abs().max() < 1e-3 * exact.abs().max()
    return tensors, exact


def quantize_marlin(awq, linear, group_size, scales):
    """As quantize. There is no decoder but the kernel: the permutations of the packing are undone here."""
    scales = scales.half()
    packed = awq.marlin.WQLinear_Marlin.from_linear(linear, 4, group_size, scales=scales.float())
    rows, columns = linear.weight.shape
    codes = torch.stack([(packed.qweight >> shift) & 15 for shift in range(0, 32, 4)], -1).flatten(1)
    whole = torch.empty_like(codes).view(-1, len(awq.marlin._perm))
    whole[:, awq.marlin._perm] = codes.view(whole.shape)
    codes = whole.view(columns // 16, rows // 16, 16, 16).transpose(1, 2).reshape(columns, rows).t()
    order = awq.marlin._scale_perm if group_size < columns else awq.marlin._scale_perm_single
    stored = packed.scales.view(-1, len(order))
    back = torch.empty_like(stored)
    back[:, order] = stored
    back = back.view(-1, rows).t()
    assert back.equal(scales)
    decoded = (codes - 8) * back.float().repeat_interleave(group_size, 1)
    assert (decoded - linear.weight).abs().max() < 1e-3 * decoded.abs().max()
    return {"qweight": packed.qweight, "scales": packed.scales}, decoded


def make(name, base, group_size, dtype=torch.float16, version="gemm"):
    packing = version.lower().replace("exllama", "gemm")  # exllama is a kernel: the file is gemm's
    out, dequantized = {}, {}
    for key, value in split_experts(base_weights(base)).items():
        if not is_quantized(key):
            out[key] = dequantized[key] = value.to(dtype)
            continue
        tensors, dequantized[key] = quantize(value, group_size, dtype, packing)
        prefix = key.removesuffix("weight")
        out |= {prefix + k: v.contiguous() for k, v in tensors.items()}
    folder = new_fixture(name)
    save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
    cfg = config(base)
    cfg["torch_dtype"] = cfg["text_config"]["dtype"] = str(dtype).removeprefix("torch.")
    cfg["quantization_config"] = {
        "bits": 4,
        "group_size": group_size,
        "modules_to_not_convert": ["visual", "mlp.gate", "lm_head"],
        "quant_method": "awq",
        "version": version,
        "zero_point": packing != "marlin",
    }
    save_config(folder, cfg)
    save_dequantized(name, base, dequantized)
    print("made", name)


MAKE = {
    "awq-g32-bf16": ("small", 32, torch.bfloat16),
    "awq-g64": ("wide", 64),
    "awq-g128": ("wide", 128),
    "awq-exllama": ("tiny", 32, torch.float16, "exllama"),
    "awq-gemv": ("tiny", 32, torch.float16, "GEMV"),
    "awq-gemv-fast": ("wide", 128, torch.float16, "gemv_fast"),
    "awq-marlin": ("wide", 128, torch.float16, "marlin"),
}
if __name__ == "__main__":
    for name in sys.argv[1:] or MAKE:
        make(name, *MAKE[name])
