"""Integers of a few bits in words, and from one order to another.

MLX packs ``[…, out, in]`` along *in*: a dense little-endian bit stream in ``uint32``.
"""

from __future__ import annotations

import functools

import mlx.core as mx

AWQ = (0, 2, 4, 6, 1, 3, 5, 7)  # the number of the output in each nibble of an AWQ word, lowest nibble first
PLAIN = (0, 1, 2, 3, 4, 5, 6, 7)


def unpack(words: mx.array, bits: int) -> mx.array:
    """``[…, n * bits / 32]`` dense little-endian bit streams → ``[…, n]`` unsigned integers, as int32."""
    words = words.view(mx.uint32)
    if 32 % bits == 0:
        values = (mx.expand_dims(words, -1) >> constant(*range(0, 32, bits))) & constant(2**bits - 1)
        return values.flatten(-2).astype(mx.int32)
    stream = ((mx.expand_dims(words, -1) >> constant(*range(32))) & constant(1)).flatten(-2)
    values = stream.reshape(*words.shape[:-1], -1, bits) << constant(*range(bits))
    return values.sum(-1).astype(mx.int32)


def pack(values: mx.array, bits: int) -> mx.array:
    """``[…, n]`` unsigned integers → MLX's ``[…, n * bits / 32]`` uint32; n is a multiple of 32, or fills words."""
    values = values.astype(mx.uint32)
    if 32 % bits == 0:
        values = values.reshape(*values.shape[:-1], -1, 32 // bits)
        return (values << constant(*range(0, 32, bits))).sum(-1)
    stream = ((mx.expand_dims(values, -1) >> constant(*range(bits))) & constant(1)).flatten(-2)
    return (stream.reshape(*values.shape[:-1], -1, 32) << constant(*range(32))).sum(-1)


def nibbles(words: mx.array) -> mx.array:
    """Integers of any size ``[…, n]`` → the 4-bit codes in them, lowest first, as uint8 along the last axis."""
    pairs = words.view(mx.uint8)
    return mx.stack([pairs & 15, pairs >> 4], -1).flatten(-2)


def pack_nibbles(codes: mx.array) -> mx.array:
    """``[…, n]`` 4-bit codes in uint8 → MLX's ``[…, n / 8]`` uint32."""
    return mx.contiguous(codes[..., ::2] | (codes[..., 1::2] << 4)).view(mx.uint32)


def unpack_outputs(words: mx.array, bits: int = 4, order: tuple[int, ...] = AWQ) -> mx.array:
    """``[…, n, out * bits / 32]``, eight outputs at a time in an order → ``[…, n, out]`` integers, as int32."""
    values = unpack(words, bits)
    eights = values.reshape(*values.shape[:-1], -1, 8)
    return eights[..., mx.array([order.index(output) for output in range(8)])].flatten(-2)


def transpose_nibbles(words: mx.array, order: tuple[int, ...] = AWQ) -> mx.array:
    """``[…, in, out / 8]`` words of eight outputs each → MLX's ``[…, out, in / 8]`` words of eight inputs each.

    Eight words of eight nibbles are transposed as a square, without taking a nibble out: three times, the halves (then
    quarters, then eighths) of words that lie off the diagonal change places.
    """
    *lead, inputs, outputs = words.shape
    squares = words.view(mx.uint32).reshape(*lead, inputs // 8, 8, outputs)
    rows = list(mx.contiguous(mx.moveaxis(squares, -2, 0)))
    for distance, shift, mask in ((4, 16, 0x0000FFFF), (2, 8, 0x00FF00FF), (1, 4, 0x0F0F0F0F)):
        for i in range(8):
            if i & distance:
                continue
            low, high = rows[i], rows[i + distance]
            swapped = ((low >> constant(shift)) ^ high) & constant(mask)
            rows[i], rows[i + distance] = low ^ (swapped << constant(shift)), high ^ swapped
    # rows[j] now has nibble j of every word, that is its output order[j], for eight inputs.
    columns = [rows[order.index(output)].swapaxes(-1, -2) for output in range(8)]
    return mx.stack(columns, -2).flatten(-3, -2)


def transpose_stream(words: mx.array, bits: int) -> mx.array:
    """The same for other numbers of bits, ``[…, in, out * bits / 32]`` → ``[…, out, in * bits / 32]``, if slower."""
    return pack(unpack_outputs(words, bits).swapaxes(-1, -2), bits)


@functools.cache
def constant(*values: int) -> mx.array:
    """A vector that thousands of layers share: making one costs as much as two operations."""
    return mx.array(values, mx.uint32)
