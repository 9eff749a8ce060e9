"""Integers that SGLang reads by methods of its own, and AngelSlim's `w4a8_awq`; no zero points.

| method           | tensors                                                                                  |
|------------------|------------------------------------------------------------------------------------------|
| `w8a8_int8`      | ``weight`` int8 ``[out, in]``, ``weight_scale`` float ``[out, 1]``                       |
| `blockwise_int8` | ``weight`` int8 ``[out, in]``, ``weight_scale_inv`` float ``[⌈out / b⌉, ⌈in / b⌉]``      |
| `w4afp8`         | experts: ``weight`` int8 ``[out, in / 2]``, ``weight_scale_inv`` float ``[out, in / g]`` |
| `w4a8_awq`       | experts: ``qweight`` int8 ``[out, in / 2]``, ``weight_scale.int4`` ``[out, in / g]``     |

``w = q * s``; two integers of 4 bits in a byte are in two's complement, the first in the low nibble, g is 128. Other
layers of the latter two are FP8 in blocks, where AngelSlim leaves out an axis of one block; its ``weight_scale []`` is
of activations. Sources: ``w8a8_int8.py``, ``blockwise_int8.py`` and ``w4afp8.py`` in ``layers/quantization`` of SGLang
0.5, and AngelSlim 0.5.
"""

from __future__ import annotations

import math

import mlx.core as mx

from ..errors import check_block, check_kinds
from . import fp8
from .affine import signed, signed_pairs
from .family import Description, Family
from .layer import Decoded, Layer


class EightBits(Family):
    methods = ("w8a8_int8", "blockwise_int8")
    detail = ""
    marks = ("weight_scale", "weight_scale_inv")
    fields = ("weight_block_size", "is_checkpoint_fp8_serialized")
    formats = ("SGLang `w8a8_int8`, `blockwise_int8` | `weight` in int8 | affine, 8 bits | packed",)

    def check(self, description: Description) -> None:
        check_block("", description, "weight_block_size")

    def decode(self, layer: Layer) -> Decoded:
        weight, block = layer.take("weight", 2), fp8.described_block(layer.settings)
        if weight.dtype != mx.int8:
            raise layer.error("weight", "8-bit integers", weight.dtype)
        outputs, inputs = layer.shape(weight)
        if not block or not block[0]:
            scales = layer.floats("weight_scale", 1, 2)
            layer.check("weight_scale", scales, (outputs, 1), (outputs,))
            return signed(layer, weight, scales.reshape(*layer.stack_shape, outputs, 1))
        high, wide = block
        scales = layer.floats("weight_scale_inv", 2)
        layer.check("weight_scale_inv", scales, (math.ceil(outputs / high), math.ceil(inputs / wide)))
        return signed(layer, weight, fp8.spread(scales, -2, outputs, high, 1), None, 8, wide)


class FourBits(Family):
    methods = ("w4afp8", "w4a8_awq")
    detail = ""
    marks = ("weight_scale_inv", "qweight", "weight_scale", "weight_scale.int4")
    fields = ("weight_block_size", "weight_group_size", "is_checkpoint_w4afp8_serialized")
    formats = (
        "SGLang `w4afp8`, AngelSlim `w4a8_awq`: experts | `weight` or `qweight` in int8 | affine, 4 bits | packed",
        "the same: other layers | `weight` in e4m3 | float | 16 bits",
    )

    def check(self, description: Description) -> None:
        check_kinds("", description, ignored_quantization_config=dict, weight_group_size=int)
        check_block("", description, "weight_block_size")
        check_block("ignored_quantization_config.", _of_others(description), "weight_block_size")

    def decode(self, layer: Layer) -> Decoded:
        if layer.has("qweight"):
            if layer.has("weight_scale"):
                layer.number("weight_scale")
            return _experts(layer, "qweight", "weight_scale.int4")
        if layer.has("weight", mx.int8):
            return _experts(layer, "weight", "weight_scale_inv")
        weight = layer.take("weight", 2)
        block = fp8.described_block({**layer.settings, **_of_others(layer.settings)})
        if block and block[0] and layer.has("weight_scale_inv"):
            blocks = tuple(math.ceil(size / each) for size, each in zip(layer.shape(weight), block, strict=True))
            scales = layer.tensors["weight_scale_inv"]
            if 1 in blocks and layer.shape(scales) == (max(blocks),):
                layer.tensors["weight_scale_inv"] = scales.reshape(*layer.stack_shape, *blocks)
        return fp8.scaled(layer, weight, "weight_scale_inv", block)


def _of_others(description: Description) -> Description:
    """What AngelSlim says of the layers that are not experts."""
    return description.get("ignored_quantization_config") or {}


def _experts(layer: Layer, suffix: str, scale: str) -> Decoded:
    pairs, scales, size = layer.take(suffix, 2), layer.floats(scale, 2), layer.settings.get("weight_group_size") or 128
    (outputs, width), size = layer.shape(pairs), 2 * layer.shape(pairs)[1] if size == -1 else size
    layer.check(scale, scales, (outputs, math.ceil(2 * width / size)))
    return signed_pairs(layer, suffix, pairs, scales, size)
