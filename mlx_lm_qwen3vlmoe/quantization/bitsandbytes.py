"""bitsandbytes: int8 with a scale an output; four bits with a table of 16 values and a scale a block of a flat weight.

| format          | tensors                                                                                    |
|-----------------|--------------------------------------------------------------------------------------------|
| int8            | ``weight [out, in]`` int8, ``SCB [out]``: ``w = q * SCB / 127``; ``weight_format`` 0 (rows) |
| nf4, fp4        | ``weight [out * in / 2, 1]`` bytes, high nibble first, ``weight.quant_map [16]``,          |
|                 | ``weight.absmax [⌈out * in / blocksize⌉]``: ``w = quant_map[q] * absmax``                  |
| double quantized| ``weight.absmax`` in bytes, ``weight.nested_quant_map [256]``, ``weight.nested_absmax``:   |
|                 | ``absmax = nested_quant_map[a] * nested_absmax + nested_offset``                           |

``weight.quant_state.bitsandbytes__{nf4,fp4}`` is JSON in bytes: ``blocksize``, ``shape``, ``nested_blocksize``,
``nested_offset``. Where the bytes are stored as another type (``bnb_4bit_quant_storage``), they are the same bytes.
Source: ``functional.py``, `QuantState` and `int8_vectorwise_dequant`, of bitsandbytes 0.50.
"""

from __future__ import annotations

import json
import math
from typing import Any

import mlx.core as mx

from ..errors import shown
from .affine import regroup, signed
from .family import Family
from .layer import Decoded, Layer

_STATES = tuple(f"weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
_STORAGE = ("uint8", "int8", "float16", "bfloat16", "float32")
_LONGEST = 4096  # bytes of a description


class BitsAndBytes(Family):
    methods = ("bitsandbytes",)
    detail = ""  # its description names a type of four bits for int8, too
    marks = ("SCB", "weight_format", "weight.absmax", "weight.quant_map", *_NESTED, *_STATES)
    formats = (
        "bitsandbytes int8 | `SCB` | affine, 8 bits | packed",
        "bitsandbytes nf4 and fp4, double quantized too | `weight.quant_state.…` | float | 16 bits",
    )

    def decode(self, layer: Layer) -> Decoded:
        if layer.has("SCB") or (layer.has("weight", mx.int8) and not any(layer.has(state) for state in _STATES)):
            return _rows(layer)
        return _four_bits(layer)


def _rows(layer: Layer) -> Decoded:
    codes, scales = layer.take("weight", 2), layer.floats("SCB", 1)
    if codes.dtype != mx.int8:
        raise layer.error("weight", "8-bit integers", codes.dtype)
    layer.check("SCB", scales, layer.shape(codes)[:1])
    order = layer.take_optional("weight_format")
    if order is not None and not layer.planning and mx.any(order != 0).item():
        raise layer.unsupported("weight_format", "0, for rows", "another order")
    return signed(layer, codes, mx.expand_dims(scales.astype(mx.float32) / 127, -1))


def _four_bits(layer: Layer) -> Decoded:
    outputs, inputs = layer.linear_shape("weight")
    state = next((suffix for suffix in _STATES if layer.has(suffix)), _STATES[0])
    described = _described(layer, state, [outputs, inputs])
    size = outputs * inputs
    codes, values = layer.take("weight", 2), layer.floats("weight.quant_map", 1)
    storage = layer.setting("bnb_4bit_quant_storage", "a storage type", *_STORAGE, default="uint8")
    if codes.dtype != getattr(mx, storage):
        raise layer.error("weight", f"{storage}, by bnb_4bit_quant_storage", codes.dtype)
    layer.check("weight", codes, (size // 2 // codes.itemsize, 1))
    layer.check("weight.quant_map", values, (16,))
    if size % 2 or size // 2 % codes.itemsize:
        raise layer.unsupported("weight", "an even number of values", size)
    scales = _scales(layer, described)
    block = described.get("blocksize") or math.ceil(size / scales.size)
    layer.check("weight.absmax", scales, (math.ceil(size / block),))
    piece = math.gcd(block, size)  # the last block may be cut short
    codes = codes.view(mx.uint8).flatten()
    nibbles = mx.stack([codes >> 4, codes & 15], -1).reshape(-1, piece)
    weight = values.astype(mx.float32)[nibbles] * mx.expand_dims(regroup(scales, size, block, piece), -1)
    return Decoded({"weight": weight.reshape(outputs, inputs).astype(layer.dtype)}, None, "a table of 16 values")


def _scales(layer: Layer, described: dict[str, Any]) -> mx.array:
    """``[blocks]`` in float32, of which there may be scales, too."""
    scales = layer.take("weight.absmax", 1)
    if not any(layer.has(suffix) for suffix in _NESTED) and scales.dtype != mx.uint8:
        if not mx.issubdtype(scales.dtype, mx.floating):
            raise layer.error("weight.absmax", "floats, or bytes and weight.nested_absmax", scales.dtype)
        return scales.astype(mx.float32)
    factors, values = (layer.floats(suffix, 1) for suffix in _NESTED)
    layer.check(_NESTED[1], values, (256,))
    if scales.dtype != mx.uint8:
        raise layer.error("weight.absmax", "bytes beside weight.nested_absmax", scales.dtype)
    block = described.get("nested_blocksize") or math.ceil(scales.size / factors.size)
    layer.check(_NESTED[0], factors, (math.ceil(scales.size / block),))
    factors = regroup(factors.astype(mx.float32), scales.size, block, 1)
    return values.astype(mx.float32)[scales] * factors + described.get("nested_offset", 0.0)


def _described(layer: Layer, state: str, shape: list[int]) -> dict[str, Any]:
    """What the JSON says, checked; nothing where the tensors have no values yet."""
    array = layer.take(state, 1)
    if array.dtype != mx.uint8 or array.size > _LONGEST:
        raise layer.error(state, f"at most {_LONGEST} bytes of JSON", f"{array.dtype} {list(array.shape)}")
    if layer.planning:
        return {}
    try:
        found = json.loads(bytes(array.tolist()))  # type: ignore[arg-type]
    except (ValueError, RecursionError):
        raise layer.error(state, "JSON", "other bytes") from None
    if not isinstance(found, dict) or found.get("shape") != shape:
        raise layer.error(state, f"the shape {shape}", shown(found.get("shape") if isinstance(found, dict) else found))
    nested = layer.has(_NESTED[0])
    for field in ("blocksize", "nested_blocksize")[: 1 + nested]:
        if type(found.get(field)) is not int or found[field] < 1:
            raise layer.error(state, f"a positive integer for {field}", shown(found.get(field)))
    offset = found.get("nested_offset", 0.0)
    if nested and (type(offset) is not float or "nested_offset" not in found or not math.isfinite(offset)):
        raise layer.error(state, "a number for nested_offset", shown(found.get("nested_offset")))
    return found
