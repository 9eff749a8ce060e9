"""Integers with a scale and a zero point a group → MLX's affine mode, or a float weight.

MLX has ``w = scales * q + biases``, one scale and bias for 32, 64 or 128 neighbors along *in*, and 2, 3, 4, 5, 6 or 8
bits. A zero point ``z`` becomes ``biases = -z * scales``, in float32 (as are then the scales) unless it is the middle
of the range: 16 bits would round it, which costs more than 1 % of the logits.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx

from .layer import Decoded, Layer, Parameters, Tensors
from .packing import codes, pack, unpack

BITS = (2, 3, 4, 5, 6, 8)
_GROUPS = (128, 64, 32)


def affine(
    layer: Layer,
    words: mx.array,
    scales: mx.array,
    zeros: mx.array | None,
    bits: int,
    group_size: int | None = None,
) -> Decoded:
    """``w = scales * (q - zeros)``.

    Args:
        layer: for errors, and for the dtype.
        words: ``[…, out, in * bits / 32]``, packed as MLX packs.
        scales: ``[…, out, groups]`` floats. A group that MLX lacks is repeated as groups of 128, 64 or 32, or decoded.
        zeros: ``[…, out, groups]``; None means ``2 ** (bits - 1)``.
        group_size: as described; a last group may be cut short. None or -1 means one group.
    """
    inputs, groups = words.shape[-1] * 32 // bits, scales.shape[-1]
    size = group_size_of(layer, inputs, groups, group_size)
    if scales.dtype not in (mx.float16, mx.bfloat16):
        scales = scales.astype(mx.float32)
    wide = scales.astype(mx.float32)
    group = _mlx_group(inputs, size)
    if group is None or bits not in (*BITS, 7):
        why = f"{bits} bits" if group else f"groups of {size}"
        return ungrouped(layer, words, wide, zeros, bits, mx.arange(inputs) // size, why)
    # The middle of the range only shifts the exponent; the product with any other zero point needs more digits.
    if zeros is None:
        biases = (-(2 ** (bits - 1)) * wide).astype(scales.dtype)
    else:
        scales, biases = wide, -zeros.astype(mx.float32) * wide
    return with_biases(layer, words, scales, biases, bits, size)


def with_biases(layer: Layer, words: mx.array, scales: mx.array, biases: mx.array, bits: int, size: int) -> Decoded:
    """``w = scales * q + biases`` of one dtype, for groups of a ``size`` that MLX's groups make up."""
    inputs = words.shape[-1] * 32 // bits
    group = _mlx_group(inputs, size)
    if group is None:
        raise layer.unsupported("weight", f"{inputs} inputs in groups of a multiple of 32", f"groups of {size}")
    if bits == 7:  # which MLX lacks, but a code of 7 bits is one of 8
        words, bits = pack(codes(words, 7), 8), 8
    if scales.dtype != biases.dtype:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    if group != size:
        scales, biases = (regroup(array, inputs, size, group) for array in (scales, biases))
    return Decoded({"weight": words, "scales": scales, "biases": biases}, {"group_size": group, "bits": bits})


def signed(
    layer: Layer,
    codes: mx.array,
    scales: mx.array,
    zeros: mx.array | None = None,
    bits: int = 8,
    group_size: int | None = None,
) -> Decoded:
    """``w = scales * (q - zeros)``, where ``q`` is in two's complement: ``[…, out, in]`` int8, of so many bits."""
    inputs, middle = codes.shape[-1], 2 ** (bits - 1)
    if inputs % 32:
        raise layer.unsupported("weight", "a multiple of 32 inputs", inputs)
    unsigned = (codes.view(mx.uint8) + middle) & (2**bits - 1)
    words = unsigned.view(mx.uint32) if bits == 8 else pack(unsigned, bits)
    if zeros is None and scales.dtype == mx.float32:  # which is not to be rounded
        zeros = mx.zeros(scales.shape)
    return affine(layer, words, scales, None if zeros is None else zeros.astype(mx.float32) + middle, bits, group_size)


def signed_pairs(layer: Layer, suffix: str, pairs: mx.array, scales: mx.array, group_size: int | None) -> Decoded:
    """``w = scales * q`` of 4 bits in two's complement, two in a byte, low nibble first: ``[…, out, in / 2]`` int8.

    So MLX packs, and 8 is added by turning the sign.
    """
    size = layer.shape(pairs)[1]
    if pairs.dtype != mx.int8 or size % 4:
        raise layer.error(suffix, "two values in each of a multiple of 4 bytes (int8)", f"{pairs.dtype}, {size} bytes")
    return affine(layer, pairs.view(mx.uint32) ^ 0x88888888, scales, None, 4, group_size)


def _mlx_group(inputs: int, size: int) -> int | None:
    """The largest of MLX's groups at whose multiples every group of ``size`` begins, and the inputs end."""
    step = math.gcd(size, inputs)
    return next((group for group in _GROUPS if step % group == 0), None)


def ungrouped(
    layer: Layer, words: mx.array, scales: mx.array, zeros: mx.array | None, bits: int, order: mx.array, why: str
) -> Decoded:
    """A float weight, where the inputs of a group are not neighbors: ``order [in]`` or ``[…, in]`` has their groups."""
    order = mx.broadcast_to(mx.expand_dims(order, -2), (*scales.shape[:-2], 1, order.shape[-1]))
    zero = 2 ** (bits - 1) if zeros is None else mx.take_along_axis(zeros.astype(mx.float32), order, -1)
    weight = (unpack(words, bits) - zero) * mx.take_along_axis(scales.astype(mx.float32), order, -1)
    return Decoded({"weight": weight.astype(layer.dtype)}, None, why)


def group_size_of(layer: Layer, inputs: int, groups: int, described: int | None) -> int:
    """The size of a group, whose last may be cut short; raises `CheckpointError` where the description is not met."""
    if not isinstance(described, int):
        described = None
    if groups == 1 and (described is None or described <= 0 or described >= inputs):
        return inputs
    if described is None or described <= 0:
        what = (
            "group_size in quantization_config"
            if described is None
            else f"one group, according to group_size {described}"
        )
        raise layer.error("weight", what, f"{groups} groups for {inputs} inputs")
    # No tool has groups of other sizes than powers of two, where a wrong one could pass for a last group cut short.
    cut_short = inputs % described and not described & (described - 1)
    if groups != math.ceil(inputs / described) or (inputs % described and not cut_short):
        raise layer.error("weight", f"{inputs} inputs in groups of {described}", f"{groups} groups")
    return described


def regroup(array: mx.array, inputs: int, size: int, group: int) -> mx.array:
    """``[…, groups]`` of ``size`` inputs each → the same numbers for groups of ``group`` inputs, contiguous."""
    if inputs % size == 0:
        return mx.contiguous(mx.repeat(array, size // group, -1))
    return mx.take(array, mx.arange(0, inputs, group) // size, -1)


def dequantize(tensors: Tensors, parameters: Parameters, dtype: mx.Dtype) -> mx.array:
    """The float weight of MLX's packed tensors."""
    if "global_scale" in tensors and tensors["global_scale"].ndim:  # of which MLX takes one at a time
        experts = [{name: array[n] for name, array in tensors.items()} for n in range(len(tensors["weight"]))]
        return mx.stack([dequantize(each, parameters, dtype) for each in experts])
    options: dict[str, Any] = {name: value for name, value in parameters.items() if name != "global_scale"}
    if "global_scale" in tensors:
        options |= {"global_scale": tensors["global_scale"], "dtype": mx.float32}
    if "biases" in tensors:
        scales, biases = (tensors[name].astype(mx.float32) for name in ("scales", "biases"))
    else:  # bfloat16 holds a small float times a power of two
        scales, biases = tensors["scales"], None
    return mx.dequantize(tensors["weight"], scales, biases, **options).astype(dtype)


def common(layers: list[Decoded]) -> list[Decoded] | None:
    """Layers of one shape in different formats → in one, with the same values; None where only floats can do that.

    A code of 4 bits is a code of 8 bits with the same scale and bias, and a group splits into smaller ones.
    """
    parameters = [layer.parameters for layer in layers]
    if any(p is None or p.get("mode", "affine") != "affine" for p in parameters):
        return layers if all(p == parameters[0] for p in parameters) else None
    bits = max(p["bits"] for p in parameters if p)
    group = min(p["group_size"] for p in parameters if p)
    scales = {layer.tensors[name].dtype for layer in layers for name in ("scales", "biases")}
    kind = scales.pop() if len(scales) == 1 else mx.float32
    return [_widened(layer, bits, group, kind) for layer in layers]


def _widened(layer: Decoded, bits: int, group: int, dtype: mx.Dtype) -> Decoded:
    own: Any = layer.parameters
    tensors = dict(layer.tensors)
    if own["bits"] != bits:
        tensors["weight"] = pack(codes(tensors["weight"], own["bits"]), bits)
    for name in ("scales", "biases"):
        tensors[name] = mx.repeat(tensors[name].astype(dtype), own["group_size"] // group, -1)
    return Decoded(tensors, {**own, "bits": bits, "group_size": group})
