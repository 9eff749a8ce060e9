"""Integers of a few bits in words, and from one order to another.

MLX packs ``[…, out, in]`` along *in*: a dense little-endian bit stream in ``uint32``.
"""

from __future__ import annotations

import functools
import math

import mlx.core as mx

AWQ = (0, 2, 4, 6, 1, 3, 5, 7)  # the number of the output in each nibble of an AWQ word, lowest nibble first
PLAIN = (0, 1, 2, 3, 4, 5, 6, 7)


def unpack(words: mx.array, bits: int) -> mx.array:
    """``[…, n * bits / 32]`` dense little-endian bit streams → ``[…, n]`` unsigned integers, as int32."""
    return codes(words, bits).astype(mx.int32)


def codes(words: mx.array, bits: int) -> mx.array:
    """The same of integers of any size, in uint8, which takes a quarter of the memory."""
    mask = constant(2**bits - 1)
    if 8 % bits == 0:
        pieces = words.view(mx.uint8)
        return pieces if bits == 8 else _interleaved([(pieces >> n) & (2**bits - 1) for n in range(0, 8, bits)])
    numbers, size = _block(bits)
    blocks = words.view(mx.uint32).reshape(*words.shape[:-1], -1, size)
    found = []
    for n in range(numbers):
        word, shift = divmod(n * bits, 32)
        code = blocks[..., word] >> constant(shift)
        if shift + bits > 32:
            code = code | (blocks[..., word + 1] << constant(32 - shift))
        found.append((code & mask).astype(mx.uint8))
    return _interleaved(found)


def pack(values: mx.array, bits: int) -> mx.array:
    """``[…, n]`` unsigned integers → MLX's ``[…, n * bits / 32]`` uint32; n is a multiple of 32, or fills words."""
    if 8 % bits == 0:
        values = values.astype(mx.uint8)
        pieces = values[..., :: 8 // bits]
        for n in range(1, 8 // bits):
            pieces = pieces | (values[..., n :: 8 // bits] << (n * bits))
        return mx.contiguous(pieces).view(mx.uint32)
    numbers, size = _block(bits)
    blocks = values.reshape(*values.shape[:-1], -1, numbers)
    words = [mx.zeros(blocks.shape[:-1], mx.uint32)] * size
    for n in range(numbers):
        word, shift = divmod(n * bits, 32)
        code = blocks[..., n].astype(mx.uint32)
        words[word] = words[word] | (code << constant(shift))
        if shift + bits > 32:
            words[word + 1] = words[word + 1] | (code >> constant(32 - shift))
    return _interleaved(words)


def _block(bits: int) -> tuple[int, int]:
    """How many numbers fill how many words."""
    common = math.gcd(bits, 32)
    return 32 // common, bits // common


def _interleaved(arrays: list[mx.array]) -> mx.array:
    """``[…, n]`` each → one ``[…, n * len(arrays)]``."""
    return mx.stack(arrays, -1).flatten(-2)


def unpack_planes(words: mx.array, bits: int) -> mx.array:
    """``[…, n * bits / 32]``, 32 numbers in ``bits`` words, first of their lower bits → ``[…, n]`` uint8.

    The bits are cut in planes of 4, 2 and 1 bits, each of which is packed densely.
    """
    blocks = words.reshape(*words.shape[:-1], -1, bits)
    planes, start = [], 0
    for width in (4, 2, 1):
        if bits & width:
            planes.append(codes(blocks[..., start : start + width], width) << start)
            start += width
    return sum(planes[1:], planes[0]).flatten(-2)


def unpack_outputs(words: mx.array, bits: int = 4, order: tuple[int, ...] = AWQ) -> mx.array:
    """``[…, n, out * bits / 32]``, eight outputs at a time, `AWQ` or `PLAIN` → ``[…, n, out]`` integers, as int32."""
    return _outputs(words, bits, order).astype(mx.int32)


def _outputs(words: mx.array, bits: int, order: tuple[int, ...]) -> mx.array:
    values = codes(words, bits)
    if order == PLAIN:
        return values
    return values.reshape(*values.shape[:-1], -1, 2, 4).swapaxes(-1, -2).flatten(-3)  # the even ones come first in AWQ


def transpose_nibbles(words: mx.array, order: tuple[int, ...] = AWQ) -> mx.array:
    """``[…, in, out / 8]`` words of eight outputs each → MLX's ``[…, out, in / 8]`` words of eight inputs each.

    Eight words of eight nibbles are transposed as a square, without taking a nibble out: three times, the halves (then
    quarters, then eighths) of words that lie off the diagonal change places.
    """
    *stack_shape, inputs, outputs = words.shape
    squares = words.view(mx.uint32).reshape(*stack_shape, inputs // 8, 8, outputs)
    rows = [mx.contiguous(mx.moveaxis(squares, -2, 0))]
    for shift, mask in ((16, 0x0000FFFF), (8, 0x00FF00FF), (4, 0x0F0F0F0F)):
        halves = [mx.split(each, 2) for each in rows]
        rows = []
        for low, high in halves:
            swapped = ((low >> constant(shift)) ^ high) & constant(mask)
            rows += [low ^ (swapped << constant(shift)), high ^ swapped]
    # rows[j] now has nibble j of every word, that is its output order[j], for eight inputs.
    columns = [rows[order.index(output)].squeeze(0).swapaxes(-1, -2) for output in range(8)]
    return mx.stack(columns, -2).flatten(-3, -2)


def transpose_stream(words: mx.array, bits: int) -> mx.array:
    """The same for other numbers of bits, ``[…, in, out * bits / 32]`` → ``[…, out, in * bits / 32]``, if slower."""
    return pack(_outputs(words, bits, AWQ).swapaxes(-1, -2), bits)


@functools.cache
def constant(*values: int) -> mx.array:
    """A vector that thousands of layers share: making one costs as much as two operations."""
    return mx.array(values, mx.uint32)
