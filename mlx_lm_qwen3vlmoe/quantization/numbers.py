"""The small floats of quantized checkpoints → their values.

| name | bits: sign, exponent, mantissa | bias | source                                                          |
|------|--------------------------------|------|-----------------------------------------------------------------|
| e4m3 | 1, 4, 3                        | 7    | OCP 8-bit Floating Point 1.0 (E4M3: no infinity, NaN is 0x7f)   |
| e5m3 | 0, 5, 3                        | 15   | auto-round 0.16.1, ``data_type/nvfp.py``                        |
| e2m1 | 1, 2, 1                        | 1    | OCP Microscaling Formats 1.0, section 5.3                       |
| e2m3 | 1, 2, 3                        | 1    | the same                                                        |
| e3m2 | 1, 3, 2                        | 3    | the same                                                        |
| e8m0 | 0, 8, 0                        | 127  | the same                                                        |
"""

from __future__ import annotations

import functools
import io
import math
from typing import Any

import mlx.core as mx


def e4m3(codes: mx.array, dtype: mx.Dtype = mx.float32) -> mx.array:
    """The values of e4m3, exact in every float dtype but e4m3's own, from codes, or from what an older MLX decoded."""
    if codes.dtype != mx.uint8:
        return codes.astype(dtype)
    if hasattr(mx, "from_fp8"):
        return mx.from_fp8(codes, dtype)
    return _table(4, 3, 7)[codes].astype(dtype)


def e5m3(codes: mx.array) -> mx.array:
    """The values of unsigned e5m3 in float32."""
    return _table(5, 3, 15)[codes]


def e2m1(pairs: mx.array) -> mx.array:
    """``[…, n / 2]`` bytes of two e2m1 codes, low nibble first → ``[…, n]`` float32."""
    return _pairs()[pairs].view(mx.float32)


def e8m0(codes: mx.array) -> mx.array:
    """Powers of two in float32; the smallest, 2 ** -127, is no normal number, and 255 is NaN."""
    return _powers()[codes]


def six_bits_as_e4m3(codes: mx.array, kind: str) -> mx.array:
    """e2m3 or e3m2 codes → the e4m3 codes of the same values, which e4m3 has all."""
    return _as_e4m3(kind)[codes]


@functools.cache
def loaded_e4m3() -> Any:
    """The dtype that `mlx.core.load` makes of e4m3 here: uint8, or the values in bfloat16. Until: MLX 0.30.6."""
    header = b'{"x":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}'
    file = io.BytesIO(len(header).to_bytes(8, "little") + header + b"\0")
    arrays: Any = mx.load(file, format="safetensors")
    return arrays["x"].dtype


@functools.cache
def has_mode(mode: str) -> bool:
    """Whether this MLX knows a quantization mode, and multiplies by it: 0.30.1 has mxfp8, but its CPU gives zeros.

    Until: MLX 0.30.6.
    """
    bits, ones = {"mxfp4": (4, 0x22222222), "mxfp8": (8, 0x38383838)}[mode]
    words, scales = mx.full((32, bits), ones, mx.uint32), mx.full((32, 1), 127, mx.uint8)
    try:
        sums = mx.quantized_matmul(mx.ones((1, 32)), words, scales, None, True, 32, bits, mode=mode)
        return bool(mx.all(sums == 32).item())
    except (TypeError, ValueError):
        return False


def _values(exponent_bits: int, mantissa_bits: int, bias: int) -> list[float]:
    """The values of all codes without the sign."""
    values = []
    for code in range(2 ** (exponent_bits + mantissa_bits)):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        fraction = mantissa / 2**mantissa_bits
        values.append((1 + fraction) * 2.0 ** (exponent - bias) if exponent else fraction * 2.0 ** (1 - bias))
    return values


@functools.cache
def _table(exponent_bits: int, mantissa_bits: int, bias: int) -> mx.array:
    values = _values(exponent_bits, mantissa_bits, bias)
    if exponent_bits == 4:
        values[-1] = math.nan
    if exponent_bits == 5:  # unsigned
        return mx.array(values)
    return mx.array(values + [-value for value in values])


@functools.cache
def _pairs() -> mx.array:
    """The two values of each byte, as the bits of one number: half as many are looked up."""
    values = _values(2, 1, 1)
    values += [-value for value in values]
    return mx.array([[values[byte & 15], values[byte >> 4]] for byte in range(256)]).view(mx.uint64).flatten()


@functools.cache
def _powers() -> mx.array:
    return mx.array([2.0 ** (code - 127) for code in range(255)] + [math.nan])


@functools.cache
def _as_e4m3(kind: str) -> mx.array:
    codes = {value: code for code, value in enumerate(_values(4, 3, 7)[:-1])}
    positive = [codes[value] for value in _values(*{"e2m3": (2, 3, 1), "e3m2": (3, 2, 3)}[kind])]
    return mx.array(positive + [code | 0x80 for code in positive], mx.uint8)
