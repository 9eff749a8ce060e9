"""Intel AutoRound 0.16.1, whose ``packing_format`` tells what the tensors mean.

| ``packing_format``                       | layout                                  | zero point, or source   |
|------------------------------------------|-----------------------------------------|-------------------------|
| ``auto_round:auto_gptq``                 | GPTQ's                                  | stored less one         |
| ``auto_round``, ``auto_round:gptqmodel`` | GPTQ's                                  | stored as it is         |
| ``auto_round:auto_awq``                  | AWQ's, with 4 to 7 bits                 | stored as it is         |
| ``auto_round`` with ``mx_int``           | MXFP4's names and shapes                | ``mxint4_utils.py``     |
| ``auto_round:llm_compressor``            | compressed-tensors' NVFP4, MXFP4, MXFP8 | ``qmodules``            |
| ``…_nvfp4_e5m3``                         | FP4 in groups of 16, e5m3 scales        | ``data_type/nvfp.py``   |
| ``auto_round:fp8_static``, …:fp8, none   | FP8                                     | ``export_to_fp8.py``    |

Its other exports are those tools' own formats. Source: ``auto_round/export`` and ``auto_round/inference``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import mlx.core as mx

from ..errors import check_kinds, shown
from . import awq, compressed_tensors, fp8, gptq
from .affine import affine, dequantize
from .family import Description, Family
from .fields import Part, objects
from .layer import Decoded, Layer
from .microscaling import fp4_in_groups
from .numbers import e5m3, e8m0
from .patterns import pattern


class AutoRound(Family):
    methods = ("auto-round", "intel/auto-round")
    detail = "packing_format"
    marks = (
        *("qweight", "qzeros", "g_idx"),
        *("weight_packed", "weight_scale", "weight_scale_inv", "weight_global_scale"),
    )
    fields = (
        *("bits", "group_size", "sym", "desc_act", "data_type", "packing_format", "fmt", "weight_block_size"),
        *("scale_fmt", "rotation_config", "super_bits", "super_group_size", "scale_dtype", "supported_types"),
    )
    formats = (
        "AutoRound, 2 to 8 bits | `qweight`, by `packing_format` | affine; 7 bits as 8 | packed",
        "AutoRound MXINT4 | MXFP4's tensors, with `data_type` `mx_int` | affine, 4 bits | packed",
        "AutoRound NVFP4, MXFP4, MXFP8, FP8 | as the same of other tools | as there | as there",
        "AutoRound NVFP4 with E5M3 scales | `packing_format` `…_nvfp4_e5m3` | float | 16 bits",
    )
    turned = gptq.Gptq.turned

    def check(self, description: Description) -> None:
        check_kinds("", description, extra_config=dict)
        for key in _patterns(*(description.get("extra_config") or {})):
            pattern("extra_config", key)

    def parts(self, description: Description) -> Iterable[Part]:
        known = (*self.fields, "extra_config")
        return [("", description, known), *objects("extra_config", description.get("extra_config"), known)]

    def settings(self, description: Description, name: str) -> Description:
        """``extra_config`` has fields for layers by name, or by a regular expression."""
        extra = description.get("extra_config") or {}
        fields = extra.get(name)
        if fields is None:
            fields = next(
                (extra[key] for key in _patterns(*extra) if pattern("extra_config", key).fullmatch(name)), None
            )
        return {**description, **fields} if isinstance(fields, dict) else description

    def decode(self, layer: Layer) -> Decoded:
        """With ``rotation_config``, each block of inputs x has gone through a Hadamard matrix H: ``W = W_q · Hᵀ``."""
        block = _rotated(layer)
        if not block:
            return self._decode(layer)
        dtype, layer.dtype, layer.takes_global_scale = layer.dtype, mx.float32, False  # one rounding, at the end
        tensors, parameters, _ = self._decode(layer)
        weight = dequantize(tensors, parameters, mx.float32) if parameters else tensors["weight"]
        if weight.shape[-1] % block:
            raise layer.error(
                "weight_packed", f"blocks of {block} inputs, according to rotation_config", weight.shape[-1]
            )
        weight = mx.hadamard_transform(weight.reshape(*weight.shape[:-1], -1, block)).reshape(weight.shape)
        return Decoded({"weight": weight.astype(dtype)}, None, "a rotation of the inputs")

    def _decode(self, layer: Layer) -> Decoded:
        packing = str(layer.settings.get("packing_format") or "").removeprefix("auto_round").removeprefix(":")
        kind = str(layer.settings.get("data_type"))
        if layer.has("qweight") or layer.has("qzeros"):
            if packing in ("awq", "auto_awq"):
                return awq.words_along_outputs(layer)
            extra = (layer.settings.get("extra_config") or {}).values()
            described = {own["bits"] for own in extra if isinstance(own, dict) and isinstance(own.get("bits"), int)}
            own = layer.settings.get("bits")
            described.add(own if isinstance(own, int) else None)
            if packing not in ("gptq", "auto_gptq", "", "gptqmodel") or layer.settings.get("packing_format") is None:
                raise _unknown(layer, "qweight", "auto_round, auto_round:auto_gptq, …:gptqmodel or …:auto_awq")
            return gptq.words_along_inputs(layer, stored_less_one=packing.endswith("gptq"), described=described)
        if layer.has("weight_packed"):
            if kind == "mx_int":
                return _mxint4(layer)
            if packing == "llm_compressor_nvfp4_e5m3":
                codes, scales = layer.take("weight_packed", 2), layer.take("weight_scale", 2)
                if scales.dtype != mx.uint8:
                    raise layer.error("weight_scale", "e5m3 (uint8)", scales.dtype)
                return fp4_in_groups(layer, codes, e5m3(scales), "NVFP4 with E5M3 scales")
            if packing != "llm_compressor" or kind[:5] not in ("mx_fp", "nv_fp"):
                raise _unknown(layer, "weight_packed", "auto_round:llm_compressor")
            if kind.startswith("nv_fp") and not layer.has("weight_global_scale"):  # or it would be taken for MXFP4
                layer.take("weight_global_scale")
            return compressed_tensors.CompressedTensors().decode(layer)
        if layer.has("weight_scale", mx.uint8):
            return compressed_tensors.CompressedTensors().decode(layer)
        if layer.has("weight_scale_inv"):
            return fp8.Fp8().decode(layer)
        size = layer.settings.get("group_size")
        shared = {0: fp8.TENSOR, -1: fp8.CHANNEL}.get(size) if isinstance(size, int) else None
        return fp8.scaled(layer, layer.take("weight", 2), "weight_scale", shared)


@functools.lru_cache
def _patterns(*keys: str) -> tuple[str, ...]:
    return tuple(key for key in keys if "*" in key)


def _rotated(layer: Layer) -> int:
    """The size of the blocks of inputs that are rotated by ``rotation_config``; 0 for none."""
    rotation = layer.settings.get("rotation_config")
    if not rotation:
        return 0
    known = {"algorithm": "hadamard", "hadamard_type": "hadamard", "backend": "auto", "allow_online_rotation": True}
    own = {field: value for field, value in rotation.items() if value} if isinstance(rotation, dict) else {}
    block = own.pop("block_size", None)
    if own.items() <= known.items() and type(block) is int and 1 < block <= 2**13 and not block & (block - 1):
        return block
    expected = "algorithm and hadamard_type hadamard in rotation_config, with a power of two for block_size"
    raise layer.unsupported("weight", expected, shown(rotation))


def _unknown(layer: Layer, suffix: str, expected: str) -> Exception:
    packing, kind = (shown(layer.settings.get(field)) for field in ("packing_format", "data_type"))
    expected = f"packing_format {expected} in quantization_config"
    return layer.unsupported(
        suffix, expected, f"{packing} with data_type {kind}" if layer.settings.get("data_type") else packing
    )


def _mxint4(layer: Layer) -> Decoded:
    """``w = ±n / 4 * 2 ** (s - 127)``: a sign and three bits, low nibble first, 32 in a group."""
    codes, scales = layer.take("weight_packed", 2), layer.take("weight_scale", 2)
    outputs, size = layer.shape(codes)
    if codes.dtype != mx.uint8 or scales.dtype != mx.uint8 or size % 16:
        raise layer.error(
            "weight_packed", "bytes of groups of 32, and of their scales", f"{codes.dtype} {list(codes.shape)}"
        )
    layer.check("weight_scale", scales, (outputs, size // 16))
    words = _offset_nibbles()[codes].view(mx.uint32)
    return affine(layer, words, (e8m0(scales) / 4).astype(mx.bfloat16), None, 4, 32)


@functools.cache
def _offset_nibbles() -> mx.array:
    """Bytes of two signs and magnitudes → of two numbers with 8 added."""
    offset = [8 - (nibble & 7) if nibble & 8 else 8 + nibble for nibble in range(16)]
    return mx.array([offset[byte & 15] | offset[byte >> 4] << 4 for byte in range(256)], mx.uint8)
