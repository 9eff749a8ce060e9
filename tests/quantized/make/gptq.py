"""GPTQ fixtures packed and unpacked by GPTQModel 7.7.0, keys put together here; a real run is in gptqmodel_run.py.

Rounded to the nearest value: the calibration that makes GPTQ what it is does not change the format.
"""

import re
import sys

import torch
from common import (
    base_weights,
    config,
    is_quantized,
    new_fixture,
    save_config,
    save_dequantized,
    split_experts,
)
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization import FORMAT
from gptqmodel.quantization.config import QuantizeConfig
from gptqmodel.quantization.quantizer import Quantizer
from gptqmodel.utils.model import (
    convert_gptq_v1_to_v2_format_module,
    convert_gptq_v2_to_v1_format_module,
)
from safetensors.torch import save_file

NAMES = ("qweight", "qzeros", "scales", "g_idx")


def linear(qcfg, rows, columns):
    return TorchLinear(
        bits=qcfg.bits,
        group_size=qcfg.group_size,
        sym=qcfg.sym,
        desc_act=qcfg.desc_act,
        in_features=columns,
        out_features=rows,
        bias=False,
        register_buffers=True,
        format=qcfg.format,
    )


def groups(columns, qcfg, generator):
    """The group of each column: runs in the order of the columns, or of their (here random) importance."""
    size = columns if qcfg.group_size == -1 else qcfg.group_size
    order = torch.randperm(columns, generator=generator) if qcfg.desc_act else torch.arange(columns)
    g_idx = torch.empty(columns, dtype=torch.int32)
    g_idx[order] = torch.arange(columns, dtype=torch.int32) // size
    return g_idx


def quantize(weight, qcfg, g_idx):
    """[out, in] -> the tensors of the file."""
    weight = weight.float()
    scales, zeros = [], []
    for group in range(int(g_idx.max()) + 1):
        quantizer = Quantizer(qcfg)
        quantizer.configure(perchannel=True)
        quantizer.find_params(weight[:, g_idx == group], weight=True)
        scales.append(quantizer.scale.flatten())
        zeros.append(quantizer.zero.flatten())
    scales = torch.stack(scales, 1).half().float()  # the file holds float16
    source = torch.nn.Linear(*weight.shape[::-1], bias=False)
    source.weight.data = weight
    module = linear(qcfg, *weight.shape)
    module.pack_original(source, scales, torch.stack(zeros, 1), g_idx)
    if qcfg.format == FORMAT.GPTQ:
        module.qzero_format(format=2)
        convert_gptq_v2_to_v1_format_module(module, qcfg)
    return {name: getattr(module, name).detach().clone().contiguous() for name in NAMES}


def dequantize(tensors, qcfg):
    """The tensors of the file -> [out, in]."""
    rows = tensors["scales"].shape[1]
    columns = tensors["qweight"].shape[0] * 32 // qcfg.bits
    module = linear(qcfg, rows, columns)
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor.clone())
    if qcfg.format == FORMAT.GPTQ:
        module.qzero_format(format=1)
        convert_gptq_v1_to_v2_format_module(module, qcfg.bits, torch.int32)
    module.post_init()
    module.scales = module.scales.float()
    weight = module.dequantize_weight()
    weight = weight if torch.is_tensor(weight) else weight.to_dense()
    assert weight.dtype == torch.float32
    assert weight.shape == (columns, rows)
    return weight.T.contiguous()


def make(name, bits, sym=True, desc_act=False, fmt="gptq", group_size=32, base="small", with_g_idx=True, dynamic=None):
    """`dynamic` is that of the tool: a pattern of modules -> the options that are theirs."""
    options = {"bits": bits, "group_size": group_size, "sym": sym, "desc_act": desc_act, "format": fmt}
    generator = torch.Generator().manual_seed(11)
    out, dequantized = {}, {}
    for key, value in split_experts(base_weights(base)).items():
        if not is_quantized(key):
            out[key] = dequantized[key] = value.half()
            continue
        qcfg = QuantizeConfig(**options)
        for pattern, own in (dynamic or {}).items():
            if re.match(pattern.removeprefix("+:"), key):
                qcfg = QuantizeConfig(**options | own)
        tensors = quantize(value, qcfg, groups(value.shape[1], qcfg, generator))
        dequantized[key] = dequantize(tensors, qcfg)
        if not with_g_idx:
            del tensors["g_idx"]
        out |= {key.removesuffix("weight") + k: v for k, v in tensors.items()}
    folder = new_fixture(name)
    save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
    cfg = config(base)
    cfg["text_config"]["dtype"] = "float16"
    cfg["quantization_config"] = {
        "bits": bits,
        "checkpoint_format": fmt,
        "desc_act": desc_act,
        "group_size": group_size,
        "lm_head": False,
        "meta": {"quantizer": ["gptqmodel:7.7.0"], "static_groups": False, "true_sequential": True},
        "pack_dtype": "int32",
        "quant_method": "gptq",
        "sym": sym,
    }
    if fmt == "gptq_p":  # newer files name it twice
        cfg["quantization_config"] |= {"format": fmt, "method": "gptq"}
    if dynamic:
        cfg["quantization_config"]["dynamic"] = dynamic
    save_config(folder, cfg)
    save_dequantized(name, base, dequantized)
    print("made", name)


MAKE = {
    "gptq-w4-sym": {"bits": 4},
    "gptq-w4-asym": {"bits": 4, "sym": False},
    "gptq-w4-asym-v2": {"bits": 4, "sym": False, "fmt": "gptq_v2"},
    "gptq-w4-actorder": {"bits": 4, "desc_act": True},
    "gptq-w4-channel": {"bits": 4, "group_size": -1},
    "gptq-w8-sym": {"bits": 8, "with_g_idx": False},
    "gptq-w8-asym": {"bits": 8, "sym": False},
    "gptq-w4-g128": {"bits": 4, "group_size": 128, "base": "wide"},
    "gptq-w3-sym": {"bits": 3},
    "gptq-w4-g128-uneven": {"bits": 4, "sym": False, "group_size": 128, "base": "uneven"},
    "gptq-experts-mixed": {
        "bits": 4,
        "base": "tiny",
        "dynamic": {r"+:.*experts\.1\..*": {"bits": 8}, r"+:.*experts\.2\..*": {"group_size": -1}},
    },
    "gptq-p-w3-asym": {"bits": 3, "sym": False, "fmt": "gptq_p", "base": "tiny"},
    "gptq-p-w6-asym": {"bits": 6, "sym": False, "fmt": "gptq_p", "base": "tiny"},
    "gptq-p-w7-asym": {"bits": 7, "sym": False, "fmt": "gptq_p", "base": "tiny"},
}
if __name__ == "__main__":
    for name in sys.argv[1:] or MAKE:
        make(name, **MAKE[name])
