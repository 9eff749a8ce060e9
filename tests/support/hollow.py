"""Checkpoints of which only the headers are written: of any size, in the layouts and formats that are released."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from . import TINY

BIG = {  # Qwen3-VL-235B-A22B
    "hidden_size": 4096,
    "moe_intermediate_size": 1536,
    "intermediate_size": 12288,
    "num_hidden_layers": 94,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "dtype": "bfloat16",
}
MIDDLING = BIG | {  # Qwen3-VL-30B-A3B
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
}
FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
AWQ = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}}
MLX = {"quantization": {"group_size": 64, "bits": 4, "mode": "affine"}}


def tensors(sizes: dict, per_expert: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint: the official layout, or one tensor an expert."""
    h, i, e, d = (sizes[name] for name in ("hidden_size", "moe_intermediate_size", "num_experts", "head_dim"))
    heads, kv = sizes["num_attention_heads"] * d, sizes["num_key_value_heads"] * d
    shapes = {"lm_head.weight": (sizes["vocab_size"], h), "model.visual.patch_embed.proj.weight": (1152, 3, 2, 16, 16)}
    shapes |= {"model.language_model.embed_tokens.weight": shapes["lm_head.weight"]}
    shapes |= {"model.language_model.norm.weight": (h,)}
    for n in range(sizes["num_hidden_layers"]):
        layer = f"model.language_model.layers.{n}"
        shapes |= {f"{layer}.{name}_layernorm.weight": (h,) for name in ("input", "post_attention")}
        shapes |= {f"{layer}.self_attn.{name}_norm.weight": (d,) for name in "qk"}
        for name, shape in {"q": (heads, h), "k": (kv, h), "v": (kv, h), "o": (h, heads)}.items():
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = shape
        shapes[f"{layer}.mlp.gate.weight"] = e, h
        if per_expert:
            for expert in range(e):
                experts = f"{layer}.mlp.experts.{expert}"
                shapes |= {f"{experts}.{name}_proj.weight": (i, h) for name in ("gate", "up")}
                shapes[f"{experts}.down_proj.weight"] = h, i
        else:
            shapes[f"{layer}.mlp.experts.gate_up_proj"] = e, h, 2 * i
            shapes[f"{layer}.mlp.experts.down_proj"] = e, i, h
    return shapes


def write_config(folder: Path, sizes: dict, **others) -> None:
    config = json.loads((TINY / "config.json").read_text()) | others
    config["text_config"] |= sizes
    (folder / "config.json").write_text(json.dumps(config))


def bf16(shapes: dict) -> dict:
    """A checkpoint as it is released; entries have a dtype, its size, and a shape."""
    return {name: ("BF16", 2, shape) for name, shape in shapes.items()}


def swapped(shapes: dict) -> dict:
    """With the axes of the experts swapped, as transformers 5 saves them."""
    return bf16({name: (s[0], s[2], s[1]) if ".experts." in name else s for name, s in shapes.items()})


def fp8(shapes: dict) -> dict:
    """Every linear layer in blocks of e4m3."""
    entries = bf16(shapes)
    for name, shape in shapes.items():
        if "_proj" in name and ".layers." in name:
            blocks = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
            entries |= {name: ("F8_E4M3", 1, shape), f"{name}_scale_inv": ("F32", 4, blocks)}
    return entries


def awq(shapes: dict) -> dict:
    """Every linear layer as AutoAWQ packs it."""
    entries = bf16(shapes)
    for name, shape in shapes.items():
        if "_proj" in name and ".layers." in name:
            (out, inputs), layer = shape, name.removesuffix("weight")
            del entries[name]
            entries[f"{layer}qweight"] = "I32", 4, (inputs, out // 8)
            entries[f"{layer}qzeros"] = "I32", 4, (inputs // 128, out // 8)
            entries[f"{layer}scales"] = "F16", 2, (inputs // 128, out)
    return entries


def write(folder: Path, entries: dict, data: bool = False, holes: bool = False) -> int:
    """Write a file of a header, with random data, with zeros that take no space or with none; return their size."""
    header, offset = {}, 0
    for name, (dtype, size, shape) in entries.items():
        end = offset + size * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(random.randbytes(offset) if data else b"")
        file.truncate(file.tell() + offset * holes)
    return offset


def vision(out: int) -> dict[str, tuple[int, ...]]:
    """The vision tower of the official releases, for a language model of the hidden size ``out``."""
    h, wide, merged = 1152, 4304, 4 * 1152
    shapes = {
        "patch_embed.proj.weight": (h, 3, 2, 16, 16),
        "patch_embed.proj.bias": (h,),
        "pos_embed.weight": (2304, h),
    }
    for n in range(27):
        for name, (rows, columns) in {
            "attn.qkv": (3 * h, h),
            "attn.proj": (h, h),
            "mlp.linear_fc1": (wide, h),
            "mlp.linear_fc2": (h, wide),
        }.items():
            shapes |= {f"blocks.{n}.{name}.weight": (rows, columns), f"blocks.{n}.{name}.bias": (rows,)}
        shapes |= {f"blocks.{n}.norm{m}.{part}": (h,) for m in (1, 2) for part in ("weight", "bias")}
    for merger, width in {"merger": h, **{f"deepstack_merger_list.{n}": merged for n in range(3)}}.items():
        shapes |= {f"{merger}.norm.{part}": (width,) for part in ("weight", "bias")}
        shapes |= {f"{merger}.linear_fc1.weight": (merged, merged), f"{merger}.linear_fc1.bias": (merged,)}
        shapes |= {f"{merger}.linear_fc2.weight": (out, merged), f"{merger}.linear_fc2.bias": (out,)}
    return {f"model.visual.{name}": shape for name, shape in shapes.items()}


def mlx(shapes: dict) -> dict:
    """In 4 bits, groups of 64, as mlx-vlm writes it: all but norms and the vision tower."""
    entries = {}
    for name, shape in shapes.items():
        name = name.replace("model.language_model.", "language_model.model.").replace(
            "lm_head", "language_model.lm_head"
        )
        name = name.replace("model.visual.", "vision_tower.")
        if "norm" in name or "vision_tower" in name:
            entries[name] = "BF16", 2, shape
            continue
        if ".experts." in name:
            layer, projection = name.split(".experts.")
            e, i, h = shape if projection == "down_proj" else (shape[0], shape[2] // 2, shape[1])
            names = ["down_proj"] if projection == "down_proj" else ["gate_proj", "up_proj"]
            linears = {f"{layer}.switch_mlp.{each}": (e, h, i) if each == "down_proj" else (e, i, h) for each in names}
        else:
            linears = {name.removesuffix(".weight"): shape}
        for linear, (*experts, out, inputs) in linears.items():
            entries[f"{linear}.weight"] = "U32", 4, (*experts, out, inputs // 8)
            entries |= {f"{linear}.{part}": ("BF16", 2, (*experts, out, inputs // 64)) for part in ("scales", "biases")}
    return entries
