"""NVIDIA ModelOpt 0.47: FP8, NVFP4, MXFP4, MXFP8 and integers of 4 and 8 bits.

| ``quant_algo``   | ``weight``              | ``weight_scale``                                     | second      |
|------------------|-------------------------|------------------------------------------------------|-------------|
| FP8, FP8_PB_WO   | e4m3 ``[out, in]``      | float ``[]``, ``[out]``, ``[out/128, 1, in/128, 1]`` |             |
| …NVFP4…          | uint8 ``[out, in / 2]`` | e4m3 ``[out, in / 16]`` or ``[out, in / 32]``        | float ``[]``|
| …MXFP4…          | uint8 ``[out, in / 2]`` | e8m0 ``[out, in / 32]``                              |             |
| MXFP8            | e4m3 ``[out, in]``      | e8m0 ``[out, in / 32]``                              |             |
| W4A16_AWQ        | uint8 ``[out / 2, in]`` | float32 ``[out, in / g]``                            |             |
| W8A16, W8A8_SQ_… | int8 ``[out, in]``      | float32 ``[out]``                                    |             |

The second scale is ``weight_scale_2``. A byte of NVFP4 and MXFP4 has two neighbors along *in*, one of W4A16_AWQ two
along *out*, in two's complement. With ``pre_quant_scale [in]`` the layer multiplies its input by that: each column of
the weight is multiplied here, which no packed format holds. The second scale of W4A8_AWQ is not known here.

Source: ``modelopt/torch/export/quant_utils.py`` and ``modelopt/torch/quantization/qtensor``.
"""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx

from ..errors import check_kinds, series, shown
from . import fp8, schemes
from .affine import affine, dequantize
from .family import Description, Family
from .fields import Part, objects
from .layer import Decoded, Layer
from .microscaling import mxfp4, mxfp8, nvfp4
from .packing import pack


class ModelOpt(Family):
    methods = ("modelopt",)
    detail = "quant_algo"
    marks = ("weight_scale", "weight_scale_2", "pre_quant_scale")
    fields = (
        *("quant_algo", "group_size", "quantized_layers", "config_groups", "quantization", "has_zero_point"),
        *("pre_quant_scale", "awq_block_size"),
    )
    formats = (
        (
            "NVFP4 of compressed-tensors and ModelOpt | `weight_global_scale`, or `weight_scale_2` | "
            "experts: `nvfp4` on a GPU with mlx-lm 0.32.1 or newer; else float | packed; 16 bits"
        ),
        "ModelOpt W8A16 and W4A16_AWQ | `weight` in int8 or uint8, float32 `weight_scale` | affine | packed",
        "ModelOpt's AWQ forms | `pre_quant_scale` | float | 16 bits",
    )
    undescribed = ("weight_scale_2",)

    def check(self, description: Description) -> None:
        check_kinds("", description, group_size=int, quantized_layers=dict)
        for name, fields in (description.get("quantized_layers") or {}).items():
            if isinstance(fields, dict):
                check_kinds(f"quantized_layers.{name}.", fields, group_size=int)
        schemes.check(description)

    def parts(self, description: Description) -> Iterable[Part]:
        layers = objects("quantized_layers", description.get("quantized_layers"), self.fields)
        return [("", description, self.fields), *layers, *schemes.groups(description)]

    def settings(self, description: Description, name: str) -> Description:
        """``quantized_layers`` has the algorithm of single layers, where it is MIXED_PRECISION."""
        fields = (description.get("quantized_layers") or {}).get(name)
        return {**description, **fields} if isinstance(fields, dict) else description

    def decode(self, layer: Layer) -> Decoded:
        smooth = layer.take_optional("pre_quant_scale", 1)
        if smooth is None:
            return _decode(layer)
        dtype, layer.dtype, layer.takes_global_scale = layer.dtype, mx.float32, False  # one rounding, at the end
        tensors, parameters, _ = _decode(layer)
        weight = dequantize(tensors, parameters, mx.float32) if parameters else tensors["weight"]
        layer.check("pre_quant_scale", smooth, (weight.shape[-1],))
        weight = weight * mx.expand_dims(smooth.astype(mx.float32), -2)
        return Decoded({"weight": weight.astype(dtype)}, None, "AWQ's scales of inputs")


def _decode(layer: Layer) -> Decoded:
    algorithm = str(layer.settings.get("quant_algo")).upper()
    if algorithm == "W4A8_AWQ":
        raise layer.unsupported("weight", "another quant_algo in quantization_config", algorithm)
    if layer.has("weight_scale_2") or "NVFP4" in algorithm:
        return _nvfp4(layer, algorithm)
    if layer.has("weight", mx.int8):
        return _int8(layer, algorithm)
    if layer.has("weight_scale", mx.uint8) and layer.has("weight"):
        return microscaled(layer, layer.take("weight", 2), layer.take("weight_scale", 2), algorithm)
    if "W4A16_AWQ" in algorithm:
        return _int4(layer)
    shared = {"FP8": fp8.TENSOR, "FP8_PER_CHANNEL_PER_TOKEN": fp8.CHANNEL, "FP8_PB_WO": (128, 128)}
    return fp8.scaled(layer, layer.take("weight", 2), "weight_scale", shared.get(algorithm))


def _check_algorithm(layer: Layer, suffix: str, algorithm: str, *known: str) -> None:
    """One of these is part of its name, or it is not described, or of each layer (in hf_quant_config.json)."""
    if not any(name in algorithm for name in (*known, "NONE", "MIXED_PRECISION")):
        raise _another(layer, suffix, *known)


def _another(layer: Layer, suffix: str, *known: str) -> Exception:
    expected = f"quant_algo {series(known)} in quantization_config"
    return layer.error(suffix, expected, shown(layer.settings.get("quant_algo")))


def _nvfp4(layer: Layer, algorithm: str) -> Decoded:
    _check_algorithm(layer, "weight_scale_2", algorithm, "NVFP4")
    codes, scales = layer.take("weight", 2), layer.take("weight_scale", 2)
    size = _group(layer, 2 * layer.shape(codes)[1], layer.shape(scales)[1])
    return nvfp4(layer, codes, scales, layer.number("weight_scale_2"), size)


def _int4(layer: Layer) -> Decoded:
    pairs, scales = layer.take("weight", 2), layer.floats("weight_scale", 2)
    rows, inputs = layer.shape(pairs)
    if pairs.dtype != mx.uint8 or inputs % 8:
        raise layer.error("weight", "bytes for a multiple of 8 inputs", f"{pairs.dtype}, {inputs} inputs")
    layer.check("weight_scale", scales, (2 * rows, layer.shape(scales)[1]))
    size = _group(layer, inputs, layer.shape(scales)[1])
    if size < 32:  # which the tool does not write, and config.json need not say
        raise layer.error("weight_scale", "groups of at least 32 inputs", f"groups of {size}")
    # Two's complement with 8 added is the same nibble with the highest bit turned.
    codes = mx.stack([(pairs & 15) ^ 8, (pairs >> 4) ^ 8], -2).flatten(-3, -2)
    return affine(layer, pack(codes, 4), scales, None, 4, size)


def _int8(layer: Layer, algorithm: str) -> Decoded:
    _check_algorithm(layer, "weight", algorithm, "W8A16", "W8A8_SQ")
    weight, scales = layer.take("weight", 2), layer.floats("weight_scale", 1)
    outputs, inputs = layer.shape(weight)
    layer.check("weight_scale", scales, (outputs,))
    if inputs % 4:
        raise layer.unsupported("weight", "a multiple of 4 inputs", inputs)
    words = pack(weight.view(mx.uint8) ^ 128, 8)
    return affine(layer, words, mx.expand_dims(scales, -1), None, 8)


def _group(layer: Layer, inputs: int, groups: int) -> int:
    """The size of groups, as the shapes tell it: the description need not, but may not say otherwise."""
    weights = [(group or {}).get("weights") or {} for group in (layer.settings.get("config_groups") or {}).values()]
    described = {size for fields in (layer.settings, *weights) if (size := fields.get("group_size"))}
    size, rest = divmod(inputs, groups)
    if rest or size & (size - 1) or (described and size not in described):
        what = f"{inputs} inputs in groups of {series(sorted(described) or ['a power of two'])}"
        raise layer.error("weight_scale", what, f"{groups} groups")
    return size


def microscaled(layer: Layer, codes: mx.array, scales: mx.array, algorithm: str) -> Decoded:
    """MXFP4 or MXFP8: two codes a byte, or one."""
    if "MXFP4" in algorithm:
        return mxfp4(layer, codes, scales)
    if "MXFP8" in algorithm:
        return mxfp8(layer, codes, scales)
    raise _another(layer, "weight", "MXFP4", "MXFP8")
