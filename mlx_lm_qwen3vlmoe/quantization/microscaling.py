"""Small floats with a scale for each 16 or 32 neighbors along *in*: MXFP4, MXFP6, MXFP8 and NVFP4.

MLX has ``mxfp4`` and ``mxfp8`` (groups of 32, e8m0 scales) and ``nvfp4`` (groups of 16, e4m3 scales, and in the host's
stacked experts one scale for the whole, on a GPU). Source: OCP Microscaling Formats 1.0.
"""

from __future__ import annotations

import mlx.core as mx

from .layer import Decoded, Layer
from .numbers import e2m1, e4m3, e8m0, has_mode, loaded_e4m3, six_bits_as_e4m3


def mxfp4(layer: Layer, codes: mx.array, scales: mx.array) -> Decoded:
    """``w = e2m1 * 2 ** (s - 127)``: bytes ``[out, in / 2]``, low nibble first, and scales ``[out, in / 32]``."""
    outputs, size = layer.shape(codes)
    if codes.dtype != mx.uint8:
        raise layer.error("weight", "two values a byte (uint8)", codes.dtype)
    layer.check("weight_scale", _bytes(layer, scales), (outputs, _groups(layer, size, 16)))
    if has_mode("mxfp4"):
        tensors = {"weight": codes.view(mx.uint32), "scales": scales}
        return Decoded(tensors, {"group_size": 32, "bits": 4, "mode": "mxfp4"})
    return _float(layer, e2m1(codes), e8m0(scales), 32, "this MLX has no mxfp4")


def mxfp6(layer: Layer, codes: mx.array, scales: mx.array, kind: str) -> Decoded:
    """MXFP6, ``e2m3`` or ``e3m2``: four codes in three bytes, little-endian, ``[out, 3 * in / 4]``.

    Every code is an e4m3 code as well, so it becomes mxfp8.
    """
    size = layer.shape(codes)[1]
    if codes.dtype != mx.uint8 or size % 24:
        found = f"{codes.dtype} {list(layer.shape(codes))}"
        raise layer.error("weight", "a multiple of 24 bytes (uint8) for 32 inputs each", found)
    triples = codes.reshape(*codes.shape[:-1], -1, 3)
    first, second, third = (triples[..., i] for i in range(3))
    fours = [first & 63, (first >> 6) | ((second & 15) << 2), (second >> 4) | ((third & 3) << 4), third >> 2]
    return mxfp8(layer, six_bits_as_e4m3(mx.stack(fours, -1).flatten(-2), kind), scales)


def mxfp8(layer: Layer, codes: mx.array, scales: mx.array) -> Decoded:
    """``w = e4m3 * 2 ** (s - 127)``: codes ``[out, in]`` as `mx.load` gives them, scales ``[out, in / 32]`` bytes."""
    outputs, size = layer.shape(codes)
    layer.check("weight_scale", _bytes(layer, scales), (outputs, _groups(layer, size, 32)))
    if codes.dtype == mx.uint8 and has_mode("mxfp8"):  # not the values that an older MLX decoded
        tensors = {"weight": codes.view(mx.uint32), "scales": scales}
        return Decoded(tensors, {"group_size": 32, "bits": 8, "mode": "mxfp8"})
    return _float(layer, e4m3(codes), e8m0(scales), 32, "this MLX has no mxfp8")


def nvfp4(layer: Layer, codes: mx.array, scales: mx.array, scale: mx.array, group_size: int = 16) -> Decoded:
    """``w = e2m1 * e4m3 * scale``: codes ``[out, in / 2]`` bytes, low nibble first, scales ``[out, in / group_size]``.

    ``scale`` is one float32 for the whole. MLX's ``global_scale`` is that times 448 * 6, the largest product of the
    other two.
    """
    outputs, size = layer.shape(codes)
    inputs = 2 * size
    if codes.dtype != mx.uint8:
        raise layer.error("weight", "two values a byte (uint8)", codes.dtype)
    if scales.dtype != loaded_e4m3():
        raise layer.error("weight_scale", "e4m3", scales.dtype)
    if group_size not in (16, 32) or inputs % group_size:
        raise layer.error("weight", f"{inputs} inputs in groups of 16 or 32", f"groups of {group_size}")
    layer.check("weight_scale", scales, (outputs, inputs // group_size))
    if layer.takes_global_scale and scales.dtype == mx.uint8:
        scales = mx.repeat(scales, group_size // 16, -1)
        # Stacked experts have one each; a single layer a scalar.
        tensors = {"weight": codes.view(mx.uint32), "scales": scales, "global_scale": scale.reshape(layer.stack_shape)}
        tensors["global_scale"] = tensors["global_scale"] * (448 * 6)
        return Decoded(tensors, {"group_size": 16, "bits": 4, "mode": "nvfp4", "global_scale": True})
    return _float(layer, e2m1(codes), e4m3(scales) * scale, group_size, "NVFP4's second scale")


def fp4_in_groups(layer: Layer, codes: mx.array, scales: mx.array, why: str) -> Decoded:
    """``w = e2m1 * scale`` with float scales for groups of 16, which MLX has no format for."""
    outputs, size = layer.shape(codes)
    if codes.dtype != mx.uint8 or size % 8:
        raise layer.error("weight", "bytes of groups of 16", f"{codes.dtype} {list(layer.shape(codes))}")
    layer.check("weight_scale", scales, (outputs, size // 8))
    return _float(layer, e2m1(codes), scales, 16, why)


def _groups(layer: Layer, size: int, group: int) -> int:
    if size % group:
        raise layer.unsupported("weight", f"a multiple of {group} bytes for groups of 32 inputs", size)
    return size // group


def _bytes(layer: Layer, scales: mx.array) -> mx.array:
    if scales.dtype != mx.uint8:
        raise layer.error("weight_scale", "powers of two (uint8)", scales.dtype)
    return scales


def _float(layer: Layer, values: mx.array, scales: mx.array, group: int, why: str) -> Decoded:
    """``values [out, in]`` times one scale for each ``group`` inputs, in the layer's dtype, rounded once."""
    grouped = values.reshape(*scales.shape, group) * mx.expand_dims(scales, -1)
    return Decoded({"weight": grouped.flatten(-2).astype(layer.dtype)}, None, why)
