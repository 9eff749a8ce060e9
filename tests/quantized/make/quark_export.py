"""Fixtures by AMD Quark 0.13 (`export_safetensors`, transformers 5.13.1), dequantized by its own `QParamsLinear`.

Quark unrolls the fused experts itself. Activation scales come from a calibration over random ids.
"""

import json
import shutil
import sys

import torch
from common import WORK, base_path, base_weights, keep, save_dequantized, split_experts, weights_of
from quark.torch import LLMTemplate, ModelQuantizer, export_safetensors
from quark.torch.export.main_export.quant_config_parser import get_layer_quant_config
from quark.torch.export.nn.modules.qparamslinear import QParamsLinear
from quark.torch.export.nn.modules.realquantizer import SequentialRealQuantizer
from quark.torch.quantization.config.config import Int8PerChannelSpec, QConfig, QLayerConfig, Uint8PerTensorSpec
from quark.torch.utils.llm import preprocess_for_quantization
from transformers import Qwen3VLMoeForConditionalGeneration

TEMPLATE = LLMTemplate.get("qwen3_vl_moe")


def scheme(name, **options):
    return TEMPLATE.get_config(scheme=name, **options)


def layer(spec):
    return QLayerConfig(weight=spec.to_quantization_spec())


def int8():
    """Three kinds of 8 bits, of which the template's scheme is one."""
    config = scheme("int8")
    config.layer_quant_config = {
        "*layers.1.*": layer(Uint8PerTensorSpec()),
        "*layers.2.*": layer(Int8PerChannelSpec(ch_axis=0, symmetric=False)),
    }
    return config


# name: base, quantization config, pack method
MAKE = {
    "quark-mxfp4": ("small", scheme("mxfp4"), "reorder"),
    "quark-fp8": ("small", scheme("fp8", kv_cache_scheme="fp8"), "reorder"),
    "quark-ptpc-fp8": ("small", scheme("ptpc_fp8"), "reorder"),
    "quark-nvfp4": ("small", scheme("nvfp4"), "reorder"),
    "quark-int8": ("small", int8(), "reorder"),
    "quark-int4-g32": ("small", scheme("int4_wo_32"), "reorder"),
    "quark-uint4-g32-order": ("small", scheme("uint4_wo_32"), "order"),
    "quark-int4-channel-order": (
        "small",
        scheme("int4_wo_per_channel", layer_config={"*layers.1.*": "uint4_wo_per_channel"}),
        "order",
    ),
    "quark-int4-fp8": ("small", scheme("int4_fp8"), "reorder"),
    "quark-mxfp6": (
        "small",
        scheme("mxfp6_e2m3", layer_config={"*layers.1.*": "mxfp6_e3m2", "*layers.2.*": "mxfp6_e3m2"}),
        "reorder",
    ),
    "quark-mixed": (
        "small",
        scheme("mxfp4", layer_config={"*self_attn*": "ptpc_fp8", "*layers.1.mlp*": "uint4_wo_32"}),
        "reorder",
    ),
    "quark-amdfp4-g32": ("small", scheme("amdfp4_g32"), "reorder"),
}


def quantize(name, base, config, pack_method):
    torch.manual_seed(0)
    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(base_path(base), dtype=torch.bfloat16).eval()
    preprocess_for_quantization(model)
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 70, (4, 32), generator=generator) for _ in range(2)]
    quantizer = ModelQuantizer(config)
    model = quantizer.freeze(quantizer.quantize_model(model, ids))
    shutil.rmtree(WORK / name, ignore_errors=True)
    with torch.no_grad():
        export_safetensors(model, WORK / name, pack_method=pack_method)
    return keep(WORK / name, name)


def dequantize(folder, base):
    cfg = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = QConfig.from_dict(cfg)
    shapes = {k: v.shape for k, v in split_experts(base_weights(base)).items()}
    modules, out = {}, {}
    for key, value in weights_of(folder).items():
        module, _, name = key.rpartition(".")
        modules.setdefault(module, {})[name] = value
    for module, tensors in modules.items():
        if "weight_scale" not in tensors:
            out |= {f"{module}.{k}": v for k, v in tensors.items()}
            continue
        rows, columns = shapes[f"{module}.weight"]
        linear = torch.nn.Linear(columns, rows, bias=False)
        described = get_layer_quant_config(config, torch.nn.Linear, module)
        linear = QParamsLinear(linear, "quark", cfg["export"]["pack_method"], described)
        out[f"{module}.weight"] = dequantize_one(linear, tensors)
    return out


def dequantize_one(linear, tensors):
    """Fill Quark's own linear layer as its loader does, and ask it for the weight it computes with."""
    stages = linear.weight_quantizer if isinstance(linear.weight_quantizer, SequentialRealQuantizer) else None
    for name, value in tensors.items():
        if not name.startswith("weight_"):
            continue
        second = name.endswith("_2")
        quantizer = linear.weight_quantizer if stages is None else stages[second]
        value = value.float() if value.dtype == torch.bfloat16 else value  # its own buffers are float32
        setattr(quantizer, name.removeprefix("weight_").removesuffix("_2"), value)
    return linear._get_qweight(torch.nn.Parameter(tensors["weight"], requires_grad=False))


for name in sys.argv[1:] or MAKE:
    base, config, pack_method = MAKE[name]
    save_dequantized(name, base, dequantize(quantize(name, base, config, pack_method), base))
    print("made", name)
