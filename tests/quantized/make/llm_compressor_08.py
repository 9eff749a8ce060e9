"""Fixtures of llm-compressor 0.8.1 (compressed-tensors 0.12.2, transformers 4.57.6), dequantized by it too.

What later releases no longer write: column groups by importance (`weight_g_idx`), 3-bit values in one byte each
(`naive-quantized`), and a router in float32 with a random `bias` that no model reads.
"""

import json
import shutil

import torch
from common import (
    WORK,
    base_path,
    base_weights,
    is_quantized,
    keep,
    save_config,
    save_dequantized,
    split_experts,
    weights_of,
)
from compressed_tensors.compressors.quantized_compressors.naive_quantized import NaiveQuantizationCompressor
from compressed_tensors.compressors.quantized_compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modeling import replace_modules_for_calibration
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import save_file
from transformers import Qwen3VLMoeForConditionalGeneration

NAIVE = NaiveQuantizationCompressor.__new__(NaiveQuantizationCompressor)
COMPRESSOR = PackedQuantizationCompressor.__new__(PackedQuantizationCompressor)


def arguments(**options):
    return QuantizationArgs(type="int", strategy="group", group_size=32, symmetric=True, **options)


def run(name, **options):
    """A whole data-free run."""
    torch.manual_seed(0)
    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(base_path("small"), dtype=torch.bfloat16)
    for module in model.modules():  # the router class that the tool was written for had these
        if hasattr(module, "gate"):
            module.gate.hidden_size, module.gate.top_k = 96, 2
    model = replace_modules_for_calibration(model)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments(**options))
    ignore = ["re:.*visual.*", "re:.*lm_head", "re:.*mlp.gate$"]
    oneshot(model=model, recipe=QuantizationModifier(config_groups={"group_0": scheme}, ignore=ignore))
    shutil.rmtree(WORK / name, ignore_errors=True)
    model.save_pretrained(WORK / name, save_compressed=True)


def finish(name):
    save_dequantized(name, "small", dequantize(keep(WORK / name, name)))
    print("made", name)


def add_actorder(name):
    """The tool's calibration does not run for this model type: groups in a random order, packed by its compressor."""
    options = arguments(num_bits=4, actorder="group")
    generator = torch.Generator().manual_seed(17)
    out = weights_of(WORK / name)
    for key, value in split_experts(base_weights("small")).items():
        if not is_quantized(key):
            continue
        columns = value.shape[1]
        order = torch.randperm(columns, generator=generator)
        g_idx = torch.empty(columns, dtype=torch.int32)
        g_idx[order] = torch.arange(columns, dtype=torch.int32) // 32
        scale = value[:, order].unflatten(1, (-1, 32)).abs().amax(-1) / 7.5
        zeros = torch.zeros_like(scale, dtype=torch.int8)
        packed = COMPRESSOR.compress_weight(value, scale, options, zeros, g_idx)
        tensors = {"weight_scale": scale, "weight_g_idx": g_idx} | packed
        out |= {key.removesuffix("weight") + k: v.contiguous() for k, v in tensors.items()}
    save_file(out, WORK / name / "model.safetensors", metadata={"format": "pt"})
    cfg = json.loads((WORK / name / "config.json").read_text())
    cfg["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    save_config(WORK / name, cfg)


def dequantize(folder):
    cfg = json.loads((folder / "config.json").read_text())["quantization_config"]
    options = QuantizationArgs.model_validate(cfg["config_groups"]["group_0"]["weights"])
    modules, out = {}, {}
    for key, value in weights_of(folder).items():
        module, _, name = key.rpartition(".")
        modules.setdefault(module, {})[name] = value
    for module, tensors in modules.items():
        if "weight_scale" in tensors:
            tensors["weight_scale"] = tensors["weight_scale"].float()
            compressor = COMPRESSOR if "weight_packed" in tensors else NAIVE
            out[f"{module}.weight"] = compressor.decompress_weight(tensors, options)
        else:
            read = {k: v for k, v in tensors.items() if (module[-8:], k) != ("mlp.gate", "bias")}
            out |= {f"{module}.{k}": v for k, v in read.items()}
    return out


run("ct08-w3a16", num_bits=3)
finish("ct08-w3a16")
run("ct08-w4a16-actorder", num_bits=4)
add_actorder("ct08-w4a16-actorder")
finish("ct08-w4a16-actorder")
