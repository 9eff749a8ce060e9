"""Fixtures of transformers' fine-grained FP8 (transformers 5.23.0), quantized and dequantized by its own code.

`fp8-fused-v5` and `fp8-tensor-v5-static` are real saves. The others are put together here from the same quantizer,
because transformers itself writes neither per-expert keys nor the official orientation nor partial blocks (it leaves a
matrix whose axes are not multiples of 128 in float). A partial block is quantized and dequantized padded with zeros.
"""

import shutil
import sys
from types import SimpleNamespace

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
from safetensors.torch import save_file
from torch.nn.functional import pad
from transformers import FineGrainedFP8Config, Qwen3VLMoeForConditionalGeneration
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

BLOCK = 128
FUSED = ("experts.gate_up_proj", "experts.down_proj")


def whole_blocks(weight, size=BLOCK):
    if size is None:  # one scale a matrix
        return weight
    rows, columns = weight.shape[-2:]
    return pad(weight, (0, -columns % size, 0, -rows % size))


def quantizer(scale_fmt="float", block=BLOCK):
    blocks = block and (block, block)
    return SimpleNamespace(quantization_config=FineGrainedFP8Config(weight_block_size=blocks, scale_fmt=scale_fmt))


def quantize(weight, scale_fmt, block=BLOCK):
    rows, columns = weight.shape[-2:]
    quantized = Fp8Quantize(quantizer(scale_fmt, block))._quantize_one("w", whole_blocks(weight.float(), block))
    return quantized["w"][..., :rows, :columns].contiguous(), quantized["w_scale_inv"]


def dequantize(weight, scale, block=BLOCK):
    rows, columns = weight.shape[-2:]
    weight = whole_blocks(weight.float(), block).to(weight.dtype)
    whole = Fp8Dequantize(quantizer(block=block))._dequantize_one(weight, scale, output_dtype=torch.float32)
    return whole[..., :rows, :columns]


def not_converted(base):
    """The official list: the head, the vision tower, the router and the norms, one by one."""
    layers = range(config(base)["text_config"]["num_hidden_layers"])
    return [
        "lm_head",
        *(f"model.visual.merger.linear_fc{i}" for i in (1, 2)),
        *(f"model.visual.blocks.0.{m}" for m in ("attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2")),
        "model.language_model.layers.0.mlp.gate",
        *(
            f"model.language_model.layers.{layer}.{norm}"
            for layer in layers
            for norm in ("input_layernorm", "post_attention_layernorm")
        ),
    ]


def assemble(name, arrange, official=True, scales=torch.float32, base="ragged", scale_fmt="float", block=BLOCK):
    """`arrange` puts the official float weights into the layout of the file, which is then quantized.

    Without blocks the file is a static one: it has the scales of activations too, as transformers' modules name them.
    """
    out, dequantized = {}, {}
    for key, value in arrange(base_weights(base)).items():
        if not (is_quantized(key) or key.endswith(FUSED)):
            out[key] = dequantized[key] = value
            continue
        weight, scale = quantize(value, scale_fmt, block)
        scale = scale.to(scales)
        dequantized[key] = dequantize(weight, scale, block)
        if block is None and value.dim() == 2:
            scale = scale.squeeze()
        out[key], out[f"{key}_scale_inv"] = weight, scale
        if block is None:
            fused = key.endswith(FUSED)
            out[f"{key}_activation_scale" if fused else key.replace("weight", "activation_scale")] = (
                torch.rand(len(value) if fused else ()) + 0.5
            )
    folder = new_fixture(name)
    save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {
        "activation_scheme": "dynamic" if block else "static",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": block and [block, block],
        "modules_to_not_convert": not_converted(base),
    }
    if scale_fmt != "float":
        quantization["scale_fmt"] = scale_fmt
    save_config(folder, config(base) | {"quantization_config": quantization})
    save_dequantized(name, base, split_experts(dequantized, official))


def swap_axes(weights):
    return {k: v.transpose(1, 2).contiguous() if k.endswith(FUSED) else v for k, v in weights.items()}


def real_save(name, base="wide", block=BLOCK, scheme="dynamic"):
    # The check asks for a GPU, which only computing needs; quantizing and saving do not.
    FineGrainedFP8HfQuantizer.validate_environment = lambda self, *args, **kwargs: None
    quantization = FineGrainedFP8Config(
        weight_block_size=block and (block, block),
        activation_scheme=scheme,
        modules_to_not_convert=["lm_head", "model.visual", "mlp.gate"],
    )
    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(
        base_path(base), quantization_config=quantization, dtype=torch.bfloat16
    )
    shutil.rmtree(WORK / name, ignore_errors=True)
    model.save_pretrained(WORK / name)
    weights, dequantized = weights_of(keep(WORK / name, name)), {}
    for key, value in weights.items():
        if not key.endswith(("_scale_inv", "activation_scale")):
            scale = weights.get(f"{key}_scale_inv")
            dequantized[key] = value if scale is None else dequantize(value, scale, block)
    save_dequantized(name, base, split_experts(dequantized, official=False))


MAKE = {
    "fp8-perexpert": lambda name: assemble(name, split_experts),
    "fp8-perexpert-ue8m0": lambda name: assemble(
        name, split_experts, scales=torch.float8_e8m0fnu, base="small", scale_fmt="ue8m0"
    ),
    "fp8-fused-official": lambda name: assemble(name, lambda w: w),
    "fp8-fused-v5": real_save,
    "fp8-fused-v5-bf16": lambda name: assemble(name, swap_axes, official=False, scales=torch.bfloat16),
    "fp8-tensor-v5-static": lambda name: real_save(name, "tiny", None, "static"),
    "fp8-tensor-official": lambda name: assemble(name, lambda w: w, base="tiny", block=None),
    "fp8-tensor-perexpert": lambda name: assemble(name, split_experts, base="tiny", block=None),
}
for name in sys.argv[1:] or MAKE:
    MAKE[name](name)
    print("made", name)
