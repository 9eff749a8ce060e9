"""Checkpoints of Qwen3-VL-30B-A3B's true shapes in the layouts that people download, of random bytes from a small pool.

What stands in a tensor does not change what it costs to load or to convert it, so that 30 GB are written as fast as the
disk takes them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from checkpoints import TINY, Sizes, linears

VOCABULARY = 151936
SHARD = 5 * 10**9  # as the hub has them
Entry = tuple[str, tuple[int, ...], str]  # dtype, shape, and which pool the bytes are of
Tensors = dict[str, Entry]


def _pools() -> dict[str, bytes]:
    """Some megabytes of each kind of bytes; a prime number of values, so that no two layers begin alike."""
    random, n = np.random.default_rng(0), 4_000_037

    def bfloat16(values: np.ndarray) -> bytes:
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()

    scales = random.uniform(1e-3, 2e-3, n)
    return {
        "BF16": bfloat16(random.normal(0, 0.02, n)),
        "ones": bfloat16(np.ones(n)),
        "BF16 scale": bfloat16(scales),
        "F16 scale": scales.astype(np.float16).tobytes(),
        "F32 scale": scales.astype(np.float32).tobytes(),
        "F8_E4M3": (random.integers(0, 120, n) | random.integers(0, 2, n) << 7).astype(np.uint8).tobytes(),
        "E8M0": random.integers(110, 118, n).astype(np.uint8).tobytes(),
        "bytes": random.bytes(n),
        "groups of 128": (np.arange(1 << 16, dtype=np.int32) // 128).tobytes(),
    }


def _fp8(name: str, out: int, inputs: int) -> Tensors:
    return {
        f"{name}.weight": ("F8_E4M3", (out, inputs), "F8_E4M3"),
        f"{name}.weight_scale_inv": ("BF16", (-(-out // 128), -(-inputs // 128)), "BF16 scale"),
    }


def _awq(name: str, out: int, inputs: int) -> Tensors:
    return {
        f"{name}.qweight": ("I32", (inputs, out // 8), "bytes"),
        f"{name}.qzeros": ("I32", (inputs // 128, out // 8), "bytes"),
        f"{name}.scales": ("F16", (inputs // 128, out), "F16 scale"),
    }


def _awq_gemv_fast(name: str, out: int, inputs: int) -> Tensors:
    wide = -(-inputs // 128 // 8) * 8
    return {
        f"{name}.qweight": ("I16", (out // 4, inputs), "bytes"),
        f"{name}.qzeros": ("F16", (wide, out), "F16 scale"),
        f"{name}.scales": ("F16", (wide, out), "F16 scale"),
    }


def _awq_marlin(name: str, out: int, inputs: int) -> Tensors:
    return {
        f"{name}.qweight": ("I32", (inputs // 16, 2 * out), "bytes"),
        f"{name}.scales": ("F16", (inputs // 128, out), "F16 scale"),
    }


def _gptq(name: str, out: int, inputs: int) -> Tensors:
    return {
        f"{name}.qweight": ("I32", (inputs // 8, out), "bytes"),
        f"{name}.qzeros": ("I32", (inputs // 128, out // 8), "bytes"),
        f"{name}.scales": ("F16", (inputs // 128, out), "F16 scale"),
        f"{name}.g_idx": ("I32", (inputs,), "groups of 128"),
    }


def _compressed_tensors(name: str, out: int, inputs: int) -> Tensors:
    return {
        f"{name}.weight_packed": ("I32", (out, inputs // 8), "bytes"),
        f"{name}.weight_scale": ("BF16", (out, inputs // 128), "BF16 scale"),
    }


def _mxfp4(name: str, out: int, inputs: int) -> Tensors:
    return {
        f"{name}.weight_packed": ("U8", (out, inputs // 2), "bytes"),
        f"{name}.weight_scale": ("U8", (out, inputs // 32), "E8M0"),
    }


def _nvfp4(name: str, out: int, inputs: int) -> Tensors:
    return {
        f"{name}.weight_packed": ("U8", (out, inputs // 2), "bytes"),
        f"{name}.weight_scale": ("F8_E4M3", (out, inputs // 16), "E8M0"),
        f"{name}.weight_global_scale": ("F32", (1,), "F32 scale"),
    }


def _floats(name: str, out: int, inputs: int) -> Tensors:
    return {f"{name}.weight": ("BF16", (out, inputs), "BF16")}


def _ct(form: str, **weights: object) -> dict:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


# Layout → a linear layer's tensors, and the description. "official" and "fp8 fused" have fused experts.
LAYOUTS: dict[str, tuple[Callable[[str, int, int], Tensors], dict | None]] = {
    "official": (_floats, None),
    "per-expert": (_floats, None),
    "fp8": (_fp8, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}),
    "fp8 fused": (_fp8, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}),
    "awq": (_awq, {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}),
    "awq gemv_fast": (
        _awq_gemv_fast,
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv_fast", "zero_point": True},
    ),
    "awq marlin": (
        _awq_marlin,
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "marlin", "zero_point": False},
    ),
    "gptq": (
        _gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "gptq", "desc_act": False},
    ),
    "compressed-tensors": (
        _compressed_tensors,
        _ct("pack-quantized", num_bits=4, type="int", strategy="group", group_size=128),
    ),
    "mxfp4": (_mxfp4, _ct("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32)),
    "nvfp4": (_nvfp4, _ct("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16)),
}


def tensors(sizes: Sizes, layout: str) -> Iterator[Tensors]:
    """The tensors of every layer, after those that stand outside of layers."""
    form, _ = LAYOUTS[layout]
    h, i, e = sizes.hidden, sizes.width, sizes.experts
    outside = {"lm_head.weight": (sizes.vocab, h), "model.language_model.embed_tokens.weight": (sizes.vocab, h)}
    norm = {"model.language_model.norm.weight": ("BF16", (h,), "ones")}
    yield {**{name: ("BF16", shape, "BF16") for name, shape in outside.items()}, **norm}
    fused = layout in ("official", "fp8 fused")
    for n in range(sizes.layers):
        prefix = f"model.language_model.layers.{n}"
        norms = {f"{p}_layernorm": h for p in ("input", "post_attention")}
        norms |= {f"self_attn.{p}_norm": sizes.head_dim for p in "qk"}
        found: Tensors = {f"{prefix}.{name}.weight": ("BF16", (size,), "ones") for name, size in norms.items()}
        found[f"{prefix}.mlp.gate.weight"] = "BF16", (e, h), "BF16"
        for name, shape in linears(sizes, n, experts=not fused).items():
            found |= form(name, *shape)
        for name, (rows, columns) in {"gate_up_proj": (h, 2 * i), "down_proj": (i, h)}.items() if fused else ():
            for suffix, (dtype, shape, pool) in form("", rows, columns).items():
                suffix = suffix.removeprefix(".weight")
                found[f"{prefix}.mlp.experts.{name}{suffix}"] = dtype, (e, *shape), pool
        yield found


WIDTHS = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1, "I16": 2, "I32": 4}


def size_of(entry: Entry) -> int:
    return int(np.prod(entry[1])) * WIDTHS[entry[0]]


def config(sizes: Sizes, layout: str) -> dict:
    described = json.loads((TINY / "config.json").read_text())
    described["text_config"] |= sizes.text_config() | {"dtype": "bfloat16"}
    described |= {"tie_word_embeddings": False}
    if (quantization := LAYOUTS[layout][1]) is not None:
        described["quantization_config"] = quantization
    return described


def write(folder: Path, sizes: Sizes, layout: str = "official") -> int:
    """Write a checkpoint in shards of 5 GB, and return its size in bytes."""
    folder.mkdir(parents=True)
    for file in TINY.iterdir():
        if file.suffix != ".safetensors" and "index" not in file.name:
            shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(config(sizes, layout), indent=1))
    shards: list[Tensors] = [{}]
    filled = 0
    for layer in tensors(sizes, layout):
        for name, entry in layer.items():
            if filled + size_of(entry) > SHARD:
                shards.append({})
                filled = 0
            shards[-1][name] = entry
            filled += size_of(entry)
    pools = _pools()
    for number, shard in enumerate(shards):
        _write_file(folder / f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors", shard, pools)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _write_file(path: Path, shard: Tensors, pools: dict[str, bytes]) -> None:
    header, end = {}, 0
    for name, entry in shard.items():
        header[name] = {"dtype": entry[0], "shape": entry[1], "data_offsets": [end, end + size_of(entry)]}
        end += size_of(entry)
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in shard.values():
            left, pool = size_of(entry), memoryview(pools[entry[2]])
            while left:
                left -= file.write(pool[: min(left, len(pool))])
