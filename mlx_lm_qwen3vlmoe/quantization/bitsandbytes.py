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

from ..errors import series, shown
from .affine import regroup, signed
from .family import Family
from .layer import Decoded, Layer, Tensors

_STATES = (*(f"weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")), "weight.quant_state")
_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
_STORAGE = ("uint8", "int8", "float16", "bfloat16", "float32")
_LONGEST = 4096  # bytes of a description


class BitsAndBytes(Family):
    methods = ("bitsandbytes",)
    detail = ""  # its description names a type of four bits for int8, too
    marks = ("SCB", "weight_format", "weight.absmax", "weight.quant_map", *_NESTED, *_STATES)
    fields = (
        *("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit", "bnb_4bit_quant_storage"),
        *("bnb_4bit_quant_type", "bnb_4bit_compute_dtype", "bnb_4bit_use_double_quant", "llm_int8_threshold"),
        *("llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight"),
        *("bits", "block_size", "group_size", "compress_statistics", "format", "checkpoint_format", "desc_act", "sym"),
    )
    formats = (
        "bitsandbytes int8 | `SCB` | affine, 8 bits | packed",
        "bitsandbytes nf4 and fp4, double quantized too | `weight.quant_state.…` | float | 16 bits",
    )

    def fused(self, layer: Layer, experts: int) -> tuple[Tensors, tuple[int, ...] | None]:
        """One flat weight for all → ``weight [E, rows, columns / 2]``, ``weight.absmax [E, blocks]``."""
        if not any(map(layer.has, _STATES)) or layer.host_shape is None:
            return super().fused(layer, experts)
        out, inputs = layer.host_shape
        shapes: list[tuple[int, ...]] = [(experts, out, inputs), (experts, inputs, out)]
        shape, codes, values, scales = _blocks(layer, shapes, out * inputs)
        tensors = {
            "weight": codes.reshape(*shape[:-1], -1),
            "weight.quant_map": mx.broadcast_to(values, (experts, 16)),
            "weight.absmax": scales.reshape(experts, -1),
        }
        return {**layer.tensors, **tensors}, shape

    def stacks(self, tensors: Tensors) -> bool:
        """The bytes that describe a layer may be of another length in the next."""
        return not any(state in tensors for state in _STATES)

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
        raise layer.unsupported("weight_format", "0 (rows)", "another number")
    return signed(layer, codes, mx.expand_dims(scales.astype(mx.float32) / 127, -1))


def _four_bits(layer: Layer) -> Decoded:
    if layer.stack_shape and not any(map(layer.has, _STATES)):  # as `BitsAndBytes.fused` has made it
        weight = layer.take("weight", 2), layer.take("weight.quant_map", 1), layer.take("weight.absmax", 1)
        rows, columns = layer.shape(weight[0])
        shape = (*layer.stack_shape, rows, 2 * columns)
        values = _values(*weight)
    else:
        shape = layer.linear_shape("weight")
        values = _values(*_blocks(layer, [shape], math.prod(shape))[1:])
    return Decoded({"weight": values.reshape(shape).astype(layer.dtype)}, None, "a table of 16 values")


def _values(codes: mx.array, table: mx.array, scales: mx.array) -> mx.array:
    """Two codes a byte, ``[…, n / 2]``, times ``scales […, blocks]``, which cut what is as flat in equal pieces."""
    nibbles = mx.stack([codes >> 4, codes & 15], -1).reshape(*scales.shape, -1)
    return table.reshape(-1, 16)[0][nibbles] * mx.expand_dims(scales, -1)


def _blocks(
    layer: Layer, shapes: list[tuple[int, ...]], whole: int
) -> tuple[tuple[int, ...], mx.array, mx.array, mx.array]:
    """The shape that the JSON says, one of those, and flat: bytes, the table, and scales of equal blocks.

    The first of the shapes where the tensors have no values yet. A block that goes on beyond a multiple of ``whole``,
    or is the last and cut short, is cut in smaller ones.
    """
    state = next((suffix for suffix in _STATES if layer.has(suffix)), _STATES[0])
    described = _described(layer, state, shapes)
    shape: tuple[int, ...] = tuple(described.get("shape", shapes[0]))
    size = math.prod(shape)
    codes, values = layer.take("weight", 2), layer.floats("weight.quant_map", 1)
    storage = layer.setting("bnb_4bit_quant_storage", "a storage type", *_STORAGE, default="uint8")
    if codes.dtype != getattr(mx, storage):
        raise layer.error("weight", f"{storage}, according to bnb_4bit_quant_storage", codes.dtype)
    layer.check("weight", codes, (size // 2 // codes.itemsize, 1))
    layer.check("weight.quant_map", values, (16,))
    if shape[-1] % 2 or size // 2 % codes.itemsize:
        raise layer.unsupported("weight", "an even number of values", f"the shape {list(shape)}")
    scales = _scales(layer, described)
    block = described.get("blocksize") or math.ceil(size / scales.size)
    layer.check("weight.absmax", scales, (math.ceil(size / block),))
    scales = regroup(scales, size, block, math.gcd(block, whole))
    return shape, codes.view(mx.uint8).flatten(), values.astype(mx.float32), scales


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


def _described(layer: Layer, state: str, shapes: list[tuple[int, ...]]) -> dict[str, Any]:
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
    known = [list(shape) for shape in shapes]
    if not isinstance(found, dict) or found.get("shape") not in known:
        raise layer.error(
            state, f"the shape {series(known)}", shown(found.get("shape") if isinstance(found, dict) else found)
        )
    nested = layer.has(_NESTED[0])
    for field in ("blocksize", "nested_blocksize")[: 1 + nested]:
        if type(found.get(field)) is not int or found[field] < 1:
            raise layer.error(state, f"a positive integer for {field}", shown(found.get(field)))
    offset = found.get("nested_offset", 0.0)
    if nested and (type(offset) is not float or "nested_offset" not in found or not math.isfinite(offset)):
        raise layer.error(state, "a number for nested_offset", shown(found.get("nested_offset")))
    return found
