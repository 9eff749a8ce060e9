"""One small matrix per AWQ and GPTQ packing -> vectors.safetensors.

`<case>.<tensor>` are the tensors as the tool packs them, `<case>.weight` is what its own code decodes them to
(float32, [out, in]); `cases` in the metadata is a JSON object of the options of each case. Run with GPTQModel
installed and AUTOAWQ set (see autoawq.py).
"""

import json

import torch
from autoawq import quantize as awq_quantize
from common import FIXTURES
from gptq import dequantize, groups, quantize
from gptqmodel.quantization.config import QuantizeConfig
from safetensors.torch import save_file

ROWS, COLUMNS = 64, 96
GPTQ = {
    "gptq-w2-sym": {"bits": 2},
    "gptq-w3-sym": {"bits": 3},
    "gptq-w3-asym": {"bits": 3, "sym": False},
    "gptq-w4-sym": {"bits": 4},
    "gptq-w4-asym": {"bits": 4, "sym": False},
    "gptq-w8-sym": {"bits": 8},
    "gptq-w8-asym": {"bits": 8, "sym": False},
    "gptq-w4-actorder": {"bits": 4, "desc_act": True},
    "gptq-v2-w4-asym": {"bits": 4, "sym": False, "format": "gptq_v2"},
    # Some zero points are 0: the format's `z - 1`, taken from the whole 32-bit word, borrows from the next field.
    "gptq-w4-asym-borrow": {"bits": 4, "sym": False},
    # Split planes instead of one bit stream; zero points as in gptq_v2.
    "gptq-p-w3-sym": {"bits": 3, "format": "gptq_p"},
    "gptq-p-w5-sym": {"bits": 5, "format": "gptq_p"},
    "gptq-p-w6-sym": {"bits": 6, "format": "gptq_p"},
    # One plane each: as in gptq_v2.
    "gptq-p-w2-asym": {"bits": 2, "sym": False, "format": "gptq_p"},
    "gptq-p-w4-asym": {"bits": 4, "sym": False, "format": "gptq_p"},
    "gptq-p-w8-asym": {"bits": 8, "sym": False, "format": "gptq_p"},
}

generator = torch.Generator().manual_seed(21)
weight = torch.randn(ROWS, COLUMNS, generator=generator) * torch.rand(ROWS, 1, generator=generator)
out, meta = {}, {}


def add(case, tensors, decoded, options):
    out.update({f"{case}.{k}": v.contiguous() for k, v in tensors.items()})
    out[f"{case}.weight"] = decoded.float().contiguous()
    meta[case] = options


tensors, decoded = awq_quantize(weight, 32, torch.float16)
add("awq-w4-gemm", tensors, decoded, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"})
for case, options in GPTQ.items():
    options = {"sym": True, "desc_act": False, "group_size": 32, "format": "gptq"} | options
    qcfg = QuantizeConfig(**options)
    source = weight.clone()
    if case.endswith("borrow"):
        source[::3, :32] = source[::3, :32].abs() + 1e-3
    tensors = quantize(source, qcfg, groups(COLUMNS, qcfg, generator))
    options["checkpoint_format"] = options.pop("format")
    add(case, tensors, dequantize(tensors, qcfg), {"quant_method": "gptq"} | options)
    error = (out[f"{case}.weight"] - source).norm() / source.norm()
    print(f"{case:24s} error {error:.4f}")
save_file(out, FIXTURES.parent / "vectors.safetensors", metadata={"cases": json.dumps(meta)})
