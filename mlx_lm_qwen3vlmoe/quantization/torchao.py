"""torchao, as transformers saves it: a tensor subclass in parts, ``_weight_qdata``, ``_weight_scale`` and others.

| class                      | ``_weight_qdata [out, in]``     | ``_weight_scale``      | weight                     |
|----------------------------|---------------------------------|------------------------|----------------------------|
| `Int8Tensor`               | int8                            | ``[out, 1]``, ``[1, 1]`` | ``(q - zero_point) * s`` |
| `IntxUnpackedToInt8Tensor` | int8 that holds 1 to 8 bits     | ``[out, in / g]``      | the same                   |
| `Float8Tensor`             | e4m3                            | as `fp8` has it        | ``e4m3 * s``               |

``_weight_zero_point``, in int8 or floats, has the shape of the scale; `Int8Tensor` may lack it. The class is in the
file's metadata, which the host's reader does not hand on: the bits are those of ``weight_dtype`` in ``quant_type``, or
8, which holds them all. Its other classes are of GPUs. Source: ``quantization/quantize_/workflows`` of torchao 0.18.
"""

from __future__ import annotations

import re
from typing import Any

import mlx.core as mx

from . import fp8
from .affine import BITS, signed
from .family import Family
from .layer import Decoded, Layer
from .numbers import loaded_e4m3

_OF_ACTIVATIONS = ("_weight_act_quant_scale", "_weight_act_quant_zero_point")


class TorchAo(Family):
    methods = ("torchao",)
    detail = ""  # its description is nested
    marks = ("_weight_qdata", "_weight_scale", "_weight_zero_point")
    formats = (
        "torchao int8 and intx, 1 to 8 bits | `_weight_qdata` in int8 | affine | packed",
        "torchao float8 | `_weight_qdata` in e4m3 | float | 16 bits",
    )

    def decode(self, layer: Layer) -> Decoded:
        for suffix in _OF_ACTIVATIONS:
            layer.tensors.pop(suffix, None)
        codes = layer.take("_weight_qdata", 2)
        if codes.dtype not in (mx.int8, loaded_e4m3()):
            raise layer.error("_weight_qdata", "int8 or e4m3", codes.dtype)
        config = _within(layer.settings.get("quant_type"), "default")
        kind = re.search("(Int8|Intx|Float8)Weight", str(_within(config, "_type")))
        if kind and (kind[1] == "Float8") != (codes.dtype != mx.int8):
            raise layer.error("_weight_qdata", f"{kind[1]}, by quant_type", codes.dtype)
        config = _within(config, "_data")
        if layer.has("_weight_scale"):
            _check_granularity(layer, codes, _within(config, "granularity"))
        if codes.dtype == mx.int8:
            return _integers(layer, codes, _bits(_within(config, "weight_dtype", "_data")))
        if layer.has("_weight_scale", mx.uint8):
            raise layer.error("_weight_scale", "floats", mx.uint8)
        return fp8.scaled(layer, codes, "_weight_scale", None)


def _within(description: Any, *fields: str) -> Any:
    """A nested field; None where there is none: a description may also be one for each name, and says nothing here."""
    for field in fields:
        description = description.get(field) if isinstance(description, dict) else None
    return description


def _check_granularity(layer: Layer, codes: mx.array, granularity: Any) -> None:
    """There are as many scales as the description says."""
    if isinstance(granularity, list) and granularity:  # that of activations, then that of the weight
        granularity = granularity[-1]
    outputs, inputs = layer.shape(codes)
    kind, size = _within(granularity, "_type"), _within(granularity, "_data", "group_size")
    if kind == "PerGroup" and type(size) is int and size > 0:
        layer.check("_weight_scale", layer.tensors["_weight_scale"], (outputs, inputs // size))
    elif kind in ("PerRow", "PerAxis"):
        layer.check("_weight_scale", layer.tensors["_weight_scale"], (outputs, 1))


def _integers(layer: Layer, codes: mx.array, bits: int) -> Decoded:
    scales = layer.floats("_weight_scale", 2)
    zeros = layer.take_optional("_weight_zero_point", 2)
    outputs, inputs = layer.shape(codes)
    rows, groups = layer.shape(scales)
    if (rows, groups) != (1, 1) and (rows != outputs or inputs % groups):
        raise layer.error("_weight_scale", f"the shape [{outputs}, groups] or [1, 1]", [rows, groups])
    if zeros is not None:
        layer.check("_weight_zero_point", zeros, (rows, groups))
        if zeros.dtype != mx.int8 and not mx.issubdtype(zeros.dtype, mx.floating):
            raise layer.error("_weight_zero_point", "int8 or floats", zeros.dtype)
        zeros = mx.broadcast_to(zeros, (*layer.stack_shape, outputs, groups))
    return signed(
        layer, codes, mx.broadcast_to(scales, (*layer.stack_shape, outputs, groups)), zeros, bits, inputs // groups
    )


def _bits(dtype: Any) -> int:
    """Of ``int1`` to ``int8``, as many as MLX has; where nothing is said, 8."""
    match = re.fullmatch("int([1-8])", str(dtype))
    bits = max(int(match[1]), 2) if match else 8
    return bits if bits in BITS else 8
