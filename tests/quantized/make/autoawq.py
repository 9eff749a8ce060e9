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
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.quantize.quantizer import AwqQuantizer
    from awq.utils.packing_utils import dequantize_gemm

    return AwqQuantizer.pseudo_quantize_tensor, WQLinear_GEMM, dequantize_gemm


def quantize(weight, group_size, scale_dtype):
    """[out, in] -> the tensors of the file, and what they decode to."""
    round_, linear_class, dequantize_gemm = import_autoawq()
    options = SimpleNamespace(group_size=group_size, w_bit=4, zero_point=True)
    rounded, scales, zeros = round_(options, weight.float())
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = rounded
    packed = linear_class.from_linear(
        linear, 4, group_size, scales=scales.t().contiguous(), zeros=zeros.t().contiguous()
    )
    scales = packed.scales.to(scale_dtype)
    decoded = dequantize_gemm(packed.qweight, packed.qzeros, scales.float(), 4, group_size).t()
    return {"qweight": packed.qweight, "qzeros": packed.qzeros, "scales": scales}, decoded


def make(name, base, group_size, dtype=torch.float16):
    out, dequantized = {}, {}
    for key, value in split_experts(base_weights(base)).items():
        if not is_quantized(key):
            out[key] = dequantized[key] = value.to(dtype)
            continue
        tensors, dequantized[key] = quantize(value, group_size, dtype)
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
        "version": "gemm",
        "zero_point": True,
    }
    save_config(folder, cfg)
    save_dequantized(name, base, dequantized)
    print("made", name)


if __name__ == "__main__":
    make("awq-g32-bf16", "small", 32, torch.bfloat16)
    make("awq-g64", "wide", 64)
    make("awq-g128", "wide", 128)
