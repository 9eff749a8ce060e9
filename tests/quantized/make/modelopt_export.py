"""Fixtures by ModelOpt 0.47.0 (`export_hf_checkpoint`), dequantized by its own tensor classes.

Run it once with transformers 5.17.0 and once, with `--projection-first`, with 4.57.6, whose fused experts ModelOpt
unrolls into `experts.gate_proj.{e}`.
"""

import copy
import json
import re
import shutil
import sys

import modelopt.torch.quantization as mtq
import torch
from common import (
    WORK,
    base_path,
    base_weights,
    config,
    is_quantized,
    keep,
    new_fixture,
    save_config,
    save_dequantized,
    split_experts,
    weights_of,
)
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
from modelopt.torch.export.layer_utils import set_expert_quantizer_amax
from modelopt.torch.export.quant_utils import pack_int4_in_uint8
from modelopt.torch.export.registry import PrepareMoEInputsRegistry
from modelopt.torch.quantization.nn import QuantModuleRegistry
from modelopt.torch.quantization.plugins.custom import CUSTOM_MODEL_PLUGINS
from modelopt.torch.quantization.plugins.huggingface import register_fused_experts_on_the_fly
from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP4QTensor, NVFP4QTensor
from safetensors.torch import save_file
from transformers import Qwen3VLMoeForConditionalGeneration
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextExperts

PRESETS = {
    "modelopt-fp8": ("small", "FP8_DEFAULT_CFG"),
    "modelopt-fp8-channel": ("small", "FP8_PER_CHANNEL_PER_TOKEN_CFG"),
    "modelopt-fp8-block": ("wide", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"),
    "modelopt-nvfp4": ("small", "NVFP4_DEFAULT_CFG"),
    "modelopt-nvfp4-experts": ("small", "NVFP4_EXPERTS_ONLY_CFG"),
    "modelopt-mxfp4": ("small", "MXFP4_DEFAULT_CFG"),
    "modelopt-nvfp4-g32": ("tiny", "NVFP4_DEFAULT_CFG"),
    "modelopt-w4a16-nvfp4": ("tiny", "W4A16_NVFP4_CFG"),
}
PROJECTION_FIRST = {
    "modelopt-fp8-block-projfirst": ("ragged", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"),
    "modelopt-nvfp4-projfirst": ("small", "NVFP4_DEFAULT_CFG"),
    "modelopt-fp8-attention": ("small", "FP8_DEFAULT_CFG"),
}
CACHE = {"modelopt-fp8": mtq.FP8_KV_CFG, "modelopt-w4a16-nvfp4": mtq.FP8_AFFINE_KV_CFG}
# Not exported for this model type (INT4) or not without a GPU (NVFP4): put together here by the tool's packers.
SMOOTHED = {"modelopt-nvfp4-awq": ("tiny", 16), "modelopt-int4-awq": ("tiny", 32)}


def prepare_unrolled_experts(name, moe, context):
    """ModelOpt quantizes the unrolled experts, but its exporter of this release has no handler for them."""
    for projection in ("gate_proj", "up_proj", "down_proj"):
        set_expert_quantizer_amax(list(getattr(moe.experts, projection)), quantizer_attrs=["input_quantizer"])


def calibrate(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _ in range(8):
            model(input_ids=torch.randint(3, 70, (4, 32), generator=generator))


def leave_experts_alone():
    """As releases that did not know this model's experts: only the linear layers around them are quantized."""
    QuantModuleRegistry.unregister(Qwen3VLMoeTextExperts)
    CUSTOM_MODEL_PLUGINS.discard(register_fused_experts_on_the_fly)
    PrepareMoEInputsRegistry.register("Qwen3VLMoeTextExperts")(lambda name, moe, context: None)


def quantize(name, base, preset):
    torch.manual_seed(0)
    if name == "modelopt-fp8-attention":
        leave_experts_alone()
    eager = {"experts_implementation": "eager"} if EXPERTS_FIRST else {}  # the others cannot be intercepted
    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(base_path(base), dtype=torch.bfloat16, **eager)
    cfg = copy.deepcopy(getattr(mtq, preset))
    if name == "modelopt-nvfp4-g32":
        for quantizer in cfg["quant_cfg"]:
            if "block_sizes" in quantizer.get("cfg", {}):
                quantizer["cfg"]["block_sizes"][-1] = 32
    if name in CACHE:
        cfg["quant_cfg"] += copy.deepcopy(CACHE[name]["quant_cfg"])
    cfg["quant_cfg"].append({"quantizer_name": "*visual*", "enable": False})
    model = mtq.quantize(model.eval(), cfg, calibrate)
    shutil.rmtree(WORK / name, ignore_errors=True)
    export_hf_checkpoint(model, export_dir=WORK / name)
    folder = keep(WORK / name, name)
    if name == "modelopt-nvfp4-projfirst":  # as exports from before config.json held a copy
        cfg = json.loads((folder / "config.json").read_text())
        del cfg["quantization_config"]
        save_config(folder, cfg)
    return dequantize(folder)


def smooth(name, base, group_size):
    """AWQ: the columns of a matrix are divided by `pre_quant_scale`, with which the layer multiplies its input."""
    generator = torch.Generator().manual_seed(23)
    out, dequantized, shared = {}, {}, {}
    for key, value in split_experts(base_weights(base)).items():
        if not is_quantized(key):
            out[key] = dequantized[key] = value
            continue
        # One for all experts of a layer, as the tool averages them.
        group = re.sub(r"experts\.\d+", "experts", key)
        scale = shared.setdefault(group, torch.exp(0.5 * torch.randn(value.shape[1], generator=generator)).bfloat16())
        weight = value.float() / scale.float()
        tensors, decoded = (pack_nvfp4 if "nvfp4" in name else pack_int4)(weight, group_size)
        out |= {f"{key}{k}": v.contiguous() for k, v in tensors.items()}
        out[key.replace("weight", "pre_quant_scale")] = scale.clone()
        dequantized[key] = decoded * scale.float()
    folder = new_fixture(name)
    save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {
        "quant_algo": "NVFP4_AWQ" if "nvfp4" in name else "W4A16_AWQ",
        "kv_cache_quant_algo": None,
        "group_size": group_size,
        "has_zero_point": False,
        "pre_quant_scale": True,
        "exclude_modules": ["lm_head", "model.language_model.layers.*.mlp.gate", "model.visual*"],
    }
    both = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": quantization}
    (folder / "hf_quant_config.json").write_text(json.dumps(both, indent=4) + "\n")
    save_config(folder, config(base) | {"quantization_config": convert_hf_quant_config_format(both)})
    return dequantized


def pack_nvfp4(weight, group_size):
    quantized, scale, scale_2 = NVFP4QTensor.quantize(weight, group_size)
    tensors = {"": quantized._quantized_data, "_scale": scale, "_scale_2": scale_2}
    return tensors, dequantize_one(*tensors.values())


def pack_int4(weight, group_size):
    """The tool has no decoder: two rows in a byte, the even one in the low half, in two's complement."""
    scale = weight.unflatten(1, (-1, group_size)).abs().amax(-1) / 7
    packed = pack_int4_in_uint8(weight, scale, group_size)
    codes = torch.stack([packed & 15, packed >> 4], 1).flatten(0, 1).to(torch.int8)
    codes = torch.where(codes > 7, codes - 16, codes)
    return {"": packed, "_scale": scale}, codes * scale.repeat_interleave(group_size, 1)


def dequantize(folder):
    tensors, out = weights_of(folder), {}
    for key, value in tensors.items():
        if key.endswith(("_scale", "_scale_2", ".k_bias", ".v_bias")):
            continue
        if (scale := tensors.get(f"{key}_scale")) is not None:
            value = dequantize_one(value, scale, tensors.get(f"{key}_scale_2"))
        for projection in ("gate_proj", "up_proj", "down_proj"):  # .gate_proj.0. -> .0.gate_proj.
            before, found, after = key.partition(f".experts.{projection}.")
            if found:
                key = f"{before}.experts.{after.removesuffix('.weight')}.{projection}.weight"
        out[key] = value.float()
    return split_experts(out)  # where the experts were left fused and in float


def dequantize_one(weight, scale, scale_2):
    if weight.dtype == torch.uint8:
        shape = torch.Size((weight.shape[0], weight.shape[1] * 2))
        if scale_2 is None:
            quantized = MXFP4QTensor(shape, torch.float32, weight)
            return quantized.dequantize(torch.float32, scale=scale, block_sizes={-1: 32})
        quantized, group = NVFP4QTensor(shape, torch.float32, weight), shape[1] // scale.shape[1]
        return quantized.dequantize(torch.float32, scale=scale, double_scale=scale_2, block_sizes={-1: group})
    quantized = FP8QTensor(weight.shape, torch.float32, weight.float())
    if scale.dim() == 4:
        return quantized.dequantize(torch.float32, scale=scale[:, 0, :, 0], block_sizes={0: 128, 1: 128})
    return quantized.dequantize(torch.float32, scale=scale[:, None] if scale.dim() == 1 else scale)


EXPERTS_FIRST = "--projection-first" not in sys.argv
if not EXPERTS_FIRST:
    sys.argv.remove("--projection-first")
    PrepareMoEInputsRegistry.register("_QuantQwen3VLMoeTextExperts")(prepare_unrolled_experts)
todo = PRESETS | SMOOTHED if EXPERTS_FIRST else PROJECTION_FIRST
for name in sys.argv[1:] or todo:
    base, option = todo[name]
    save_dequantized(name, base, (smooth if name in SMOOTHED else quantize)(name, base, option))
    print("made", name)
