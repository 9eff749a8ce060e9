"""compressed-tensors (llm-compressor): integers, FP8, NVFP4 and MX formats.

| format                   | weight                                     | ``weight_scale``                             |
|--------------------------|--------------------------------------------|----------------------------------------------|
| ``pack-quantized``       | ``weight_packed`` int32 ``[out, in*b/32]`` | float ``[out, groups]``, blocks or ``[1]``   |
| ``int-quantized``, naive | ``weight`` int8 ``[out, in]``              | the same                                     |
| the same by AngelSlim    | ``weight_packed`` int8 ``[out, in/2]``     | float ``[out, 1]``                           |
| ``float-quantized``      | ``weight`` e4m3 ``[out, in]``              | the same                                     |
| ``mxfp4-pack-quantized`` | ``weight_packed`` uint8 ``[out, in/2]``    | e8m0 ``[out, in/32]``                        |
| ``mxfp6-pack-quantized`` | ``weight_packed`` uint8 ``[out, 3*in/4]``  | the same                                     |
| ``mxfp8-quantized``      | ``weight`` e4m3 ``[out, in]``              | e8m0 ``[out, in/32]``                        |
| ``nvfp4-pack-quantized`` | ``weight_packed`` uint8 ``[out, in/2]``    | e4m3 ``[out, in/16]``, and a global one      |

``w = (q - z) * s``, of integers with a sign; `schemes` has what the description says. Packed integers have ``2 **
(bits - 1)`` added and are packed as MLX packs, as are their zero points along *out*, ``weight_zero_point [out * bits /
32, groups]``; those of blocks and of ``weight`` in int8 are int8 in the shape of the scales, with nothing added.
``weight_g_idx [in]`` has the groups of inputs in act-order. NVFP4's second scale divides. MXFP6 is e2m3. Source:
``compressors`` of compressed-tensors 0.20.
"""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx

from . import fp8
from .affine import BITS, affine, signed_pairs
from .family import Description, Family
from .fields import Part
from .gptq import in_order
from .layer import Decoded, Layer
from .microscaling import mxfp4, mxfp6, mxfp8, nvfp4
from .numbers import loaded_e4m3
from .packing import pack, unpack
from .schemes import (
    Scheme,
    block_of,
    check,
    grid_of,
    groups,
    is_named,
    of_each_output,
    scheme_of_words,
    schemes_for,
    shared_by,
    width_of,
)


class CompressedTensors(Family):
    methods = ("compressed-tensors",)
    detail = "format"
    marks = ("weight_packed", "weight_scale", "weight_zero_point", "weight_global_scale", "weight_g_idx")
    fields = ("config_groups", "format", "global_compression_ratio", "moe_sparsity_config")
    formats = (
        "compressed-tensors `pack-quantized` | `weight_packed` in int32 | affine; in act-order float | packed; 16 bits",
        "compressed-tensors `int-quantized` | `weight` in int8 | affine, 8 bits | packed",
        "AngelSlim `int-quantized`, 4 bits | `weight_packed` in int8 | affine, 4 bits | packed",
        "MXFP4 of compressed-tensors and ModelOpt | uint8 `weight_scale` for 32 weights of 4 bits | `mxfp4` | packed",
        "MXFP8 | `weight` in e4m3, `weight_scale` in uint8 for 32 weights | `mxfp8` | packed",
    )
    undescribed = ("weight_global_scale",)

    def check(self, description: Description) -> None:
        check(description)

    def parts(self, description: Description) -> Iterable[Part]:
        return [("", description, self.fields), *groups(description)]

    def settings(self, description: Description, name: str) -> Description:
        """``schemes``: the weight schemes that may apply to a layer, those that name it, else those for its class."""
        described = (description.get("config_groups") or {}).values()
        groups = [group for group in described if group and group.get("weights")]
        named = [group["weights"] for group in groups if any(is_named(t, name) for t in group.get("targets") or [])]
        kind = "Embedding" if name.endswith("embed_tokens") else "Linear"
        schemes = named or [group["weights"] for group in groups if kind in (group.get("targets") or [kind])]
        return {**description, "schemes": schemes}

    def decode(self, layer: Layer) -> Decoded:
        if layer.has("weight_packed", mx.int32, mx.uint32):
            return _packed_integers(layer)
        if layer.has("weight_packed", mx.int8):
            return _pairs(layer)
        if layer.has("weight_packed"):
            return _packed_floats(layer)
        if layer.has("weight", mx.int8):
            return _integers(layer)
        return _floats(layer)


def _packed_integers(layer: Layer) -> Decoded:
    words, scales = layer.words("weight_packed", 2), layer.floats("weight_scale", 0, 1, 2)
    outputs, size = layer.shape(words)
    zeros, indices = layer.take_optional("weight_zero_point", 0, 1, 2), layer.take_optional("weight_g_idx", 1)
    packed = None if zeros is None or zeros.dtype == mx.int8 else layer.check_words("weight_zero_point", zeros)
    scheme = scheme_of_words(layer, scales, (outputs, size * 32), packed)
    bits = scheme["num_bits"]
    inputs = size * 32 // bits
    scales = of_each_output(layer, scales, scheme, (outputs, inputs))
    groups = scales.shape[-1]
    _check_symmetry(layer, scheme, zeros)
    if packed is not None:
        if (block_of(scheme) or (1,))[0] != 1:
            raise layer.error("weight_zero_point", "8-bit integers for blocks", packed.dtype)
        layer.check("weight_zero_point", packed, (outputs * bits // 32, groups))
        zeros = unpack(mx.contiguous(packed.swapaxes(-1, -2)), bits).swapaxes(-1, -2)
    elif zeros is not None:
        zeros = _signed_zeros(layer, zeros, scheme, (outputs, inputs), bits)
    return in_order(layer, words, scales, zeros, bits, width_of(scheme), "weight_g_idx", indices)


def _integers(layer: Layer) -> Decoded:
    """8 bits, or fewer that are stored as 8, which MLX packs. Its integers are unsigned: half of the range is added."""
    weight, scales = layer.take("weight", 2), layer.floats("weight_scale", 0, 1, 2)
    zeros = layer.take_optional("weight_zero_point", 0, 1, 2)
    outputs, inputs = layer.shape(weight)
    shape = outputs, inputs
    schemes = schemes_for(layer, "int") or [{}]
    scheme = next((scheme for scheme in schemes if grid_of(layer, scales, scheme, shape)), schemes[0])
    bits = bits if (bits := scheme.get("num_bits")) in BITS else 8
    scales = of_each_output(layer, scales, scheme, shape)
    _check_symmetry(layer, scheme, zeros)
    if zeros is not None:
        zeros = _signed_zeros(layer, zeros, scheme, shape, bits)
    if inputs % 32:
        raise layer.unsupported("weight", "a multiple of 32 inputs", inputs)
    unsigned = (weight.view(mx.uint8) + 2 ** (bits - 1)) & (2**bits - 1)
    return affine(layer, pack(unsigned, bits), scales, zeros, bits, width_of(scheme))


def _pairs(layer: Layer) -> Decoded:
    """AngelSlim's ``int-quantized`` with 4 bits: two in a byte, in two's complement, and a scale an output."""
    pairs, scales = layer.take("weight_packed", 2), layer.floats("weight_scale", 2)
    outputs, size = layer.shape(pairs)
    scheme = next(iter(schemes_for(layer, "int", 4)), {})
    if scheme.get("symmetric") is False:
        raise layer.unsupported("weight_packed", "a symmetric scheme of 4 bits in int8", "symmetric false")
    scales = of_each_output(layer, scales, scheme, (outputs, 2 * size))
    return signed_pairs(layer, "weight_packed", pairs, scales, width_of(scheme))


def _check_symmetry(layer: Layer, scheme: Scheme, zeros: mx.array | None) -> None:
    """There are zero points, or the description says that there are none."""
    if zeros is None and scheme.get("symmetric") is False:
        layer.take("weight_zero_point")


def _signed_zeros(layer: Layer, zeros: mx.array, scheme: Scheme, shape: tuple[int, int], bits: int) -> mx.array:
    """Zero points as they are → of unsigned integers, ``[out, groups]``."""
    if zeros.dtype != mx.int8:
        raise layer.error("weight_zero_point", "8-bit integers", zeros.dtype)
    return of_each_output(layer, zeros, scheme, shape, "weight_zero_point").astype(mx.int32) + 2 ** (bits - 1)


def _packed_floats(layer: Layer) -> Decoded:
    codes = layer.take("weight_packed", 2)
    if codes.dtype != mx.uint8:
        raise layer.error("weight_packed", "32-bit integers or bytes", codes.dtype)
    schemes = schemes_for(layer, "float", 4, 6)
    if layer.has("weight_global_scale") or (schemes and all(width_of(scheme) == 16 for scheme in schemes)):
        _check_group(layer, schemes_for(layer, "float", 4), 16)
        return nvfp4(layer, codes, layer.take("weight_scale"), 1 / layer.number("weight_global_scale"))  # it divides
    scales = layer.take("weight_scale", 2)
    _check_group(layer, schemes, 32)
    size, groups = layer.shape(codes)[1], layer.shape(scales)[1]
    described = {scheme["num_bits"] for scheme in schemes} or {4}
    if described == {6} or (6 in described and size == 24 * groups):
        return mxfp6(layer, codes, scales, "e2m3")
    return mxfp4(layer, codes, scales)


def _check_group(layer: Layer, schemes: list[Scheme], size: int) -> None:
    if schemes and all(width_of(scheme) != size for scheme in schemes):
        found = f"groups of {width_of(schemes[0])}" if width_of(schemes[0]) else "none"
        raise layer.error("weight_scale", f"groups of {size} in config_groups", found)


def _floats(layer: Layer) -> Decoded:
    weight = layer.take("weight", 2)
    if weight.dtype != loaded_e4m3():
        raise layer.unsupported("weight", "8-bit integers or e4m3", weight.dtype)
    schemes = schemes_for(layer, "float", 8)
    if layer.has("weight_scale", mx.uint8):
        _check_group(layer, schemes, 32)
        return mxfp8(layer, weight, layer.take("weight_scale", 2))
    if schemes and schemes[0].get("scale_dtype") == "torch.uint8":
        raise layer.error(
            "weight_scale", "powers of two (uint8), according to scale_dtype", layer.take("weight_scale").dtype
        )
    suffix = "weight_scale_inv" if layer.has("weight_scale_inv") else "weight_scale"
    return fp8.scaled(layer, weight, suffix, shared_by(schemes[0]) if schemes else None)
