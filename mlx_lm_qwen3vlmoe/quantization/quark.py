"""AMD Quark 0.13, whose description gives every layer's type: the tensors of several types look alike.

| ``dtype`` of ``weight``    | ``weight``                  | ``weight_scale``                 | w =                   |
|----------------------------|-----------------------------|----------------------------------|-----------------------|
| fp4, ``scale_format`` e8m0 | uint8 ``[out, in / 2]``     | e8m0 ``[out, in / 32]``          | MXFP4                 |
| fp6_e2m3, fp6_e3m2         | uint8 ``[out, 3 * in / 4]`` | e8m0 ``[out, in / 32]``          | MXFP6                 |
| fp8_e4m3                   | e4m3 ``[out, in]``          | float ``[]`` or ``[out]``        | ``e4m3 * s``          |
| [fp4, fp8_e4m3]            | uint8 ``[out, in / 2]``     | e4m3, ``weight_scale_2 []``      | NVFP4                 |
| int8, uint8                | ``[out, in]``               | float ``[]`` or ``[out]``        | ``(q - z) * s``       |
| int4, uint4 per group      | int32 ``[in, out / 8]``     | ``[groups, out]``                | ``(q - z) * s``       |
| int4, uint4 per channel    | int32 ``[out, in / 8]``     | ``[out]``                        | ``(q - z) * s``       |
| [fp8_e4m3, int4]           | int32 ``[out, in / 8]``     | ``[]``, ``weight_scale_2 [out]`` | ``(q - z) * s_2 * s`` |

Zero points are as the weights, packed ones ``[groups, out / 8]`` or ``[out / 8]``; int4 and its zero points are in
two's complement. ``pack_method`` ``reorder`` is AWQ's order of nibbles, ``order`` the plain one. amdfp4, which looks
like MXFP4, is refused. Source: ``quark/torch`` (``export``, ``utils/pack.py``, ``kernel/hw_emulation``).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

import mlx.core as mx

from ..errors import check_kinds, description_error, shown
from . import fp8
from .affine import affine
from .family import Description, Family
from .fields import Part, objects
from .layer import Decoded, Layer
from .microscaling import mxfp4, mxfp6, nvfp4
from .packing import AWQ, PLAIN, pack, transpose_nibbles, unpack_outputs

_STAGE = (
    *(
        "dtype",
        "qscheme",
        "ch_axis",
        "group_size",
        "block_size",
        "symmetric",
        "scale_format",
        "scale_type",
        "round_method",
    ),
    *("scale_calculation_mode", "zero_point_type", "is_scale_quant", "is_dynamic", "observer_cls", "qat_spec"),
    *("enable_buffer_reuse", "max_input_numel", "mx_element_dtype"),
)


class Quark(Family):
    methods = ("quark",)
    detail = "version"
    marks = ("weight_scale", "weight_scale_2", "weight_zero_point", "weight_zero_point_2")
    fields = (
        *("global_quant_config", "layer_quant_config", "layer_type_quant_config", "export", "algo_config"),
        *("quant_mode", "kv_cache_quant_config", "kv_cache_post_rope", "softmax_quant_spec"),
    )
    formats = (
        "Quark MXFP4 | `weight` in uint8, by `quantization_config` | `mxfp4` | packed",
        "Quark MXFP6, E2M3 and E3M2 | the same | `mxfp8` | packed",
        "Quark INT8 and UINT8 | `weight` in 8-bit integers | affine, 8 bits | packed",
        "Quark INT4 and UINT4, by group or channel, over FP8 too | `weight` in int32 | affine, 4 bits | packed",
        "Quark FP8 and NVFP4 | as the same of other tools | as there | as there",
    )

    def check(self, description: Description) -> None:
        fields = ("global_quant_config", "layer_quant_config", "layer_type_quant_config", "export")
        check_kinds("", description, **dict.fromkeys(fields, dict))
        for home in ("layer_quant_config", "layer_type_quant_config"):
            for name, layer in (description.get(home) or {}).items():
                check_kinds(f"{home}.", {name: layer}, **{name: dict})

    def parts(self, description: Description) -> Iterable[Part]:
        layers = {"global_quant_config": description.get("global_quant_config")}
        for home in ("layer_quant_config", "layer_type_quant_config"):
            layers |= {f"{home}.{name}": layer for name, layer in (description.get(home) or {}).items()}
        found: list[Part] = [("", description, self.fields)]
        for name, layer in layers.items():
            weight = (layer or {}).get("weight")
            found += objects(f"{name}.weight", weight if isinstance(weight, list) else [weight], _STAGE)
        return found

    def settings(self, description: Description, name: str) -> Description:
        """``stages``: the descriptions of a layer's weight, of which there are two where scales are quantized, too."""
        layers = description.get("layer_quant_config") or {}
        types = description.get("layer_type_quant_config") or {}
        linear = types.get("Linear") or description.get("global_quant_config") or {}
        own = next((layers[pattern] for pattern in layers if fnmatch.fnmatchcase(name, pattern)), None)
        weight = (own or linear).get("weight")
        stages = weight if isinstance(weight, list) else [weight]
        if not all(isinstance(stage, dict) for stage in stages):
            stages = []
        return {**description, "stages": stages}

    def decode(self, layer: Layer) -> Decoded:
        kinds = tuple(str(stage.get("dtype") or "nothing") for stage in layer.settings.get("stages", ()))
        scale_format = layer.settings["stages"][0].get("scale_format") if kinds else None
        if kinds == ("fp4",) and scale_format == "e8m0":
            return mxfp4(layer, layer.take("weight", 2), layer.take("weight_scale", 2))
        if kinds in (("fp6_e2m3",), ("fp6_e3m2",)) and scale_format == "e8m0":
            return mxfp6(layer, layer.take("weight", 2), layer.take("weight_scale", 2), kinds[0].removeprefix("fp6_"))
        if kinds == ("fp8_e4m3",):
            return fp8.scaled(layer, layer.take("weight", 2), "weight_scale", _shared(layer))
        if kinds == ("fp4", "fp8_e4m3"):
            return nvfp4(layer, layer.take("weight", 2), layer.take("weight_scale", 2), layer.number("weight_scale_2"))
        if kinds in (("int8",), ("uint8",)):
            return _eight_bits(layer, signed=kinds == ("int8",))
        if kinds in (("int4",), ("uint4",)):
            return _four_bits(layer, signed=kinds == ("int4",))
        if kinds == ("fp8_e4m3", "int4"):
            scales = layer.floats("weight_scale_2", 1).astype(mx.float32)
            scales = mx.expand_dims(scales, -1) * layer.number("weight_scale")
            return _four_bits_by_channel(layer, scales, "weight_zero_point_2", signed=True)
        known = "fp4 with scale_format e8m0, fp6_e2m3, fp6_e3m2, fp8_e4m3, int8, uint8, int4 or uint4"
        found = " over ".join(kinds) + (f" with scale_format {scale_format}" if scale_format else "")
        if scale_format == "e5m3":
            found = f"amdfp4 ({found})"
        raise layer.unsupported("weight", f"{known} in quantization_config (dtype)", found or "nothing")


def _shared(layer: Layer) -> tuple[int, int] | None:
    """What shares a scale, by the description."""
    schemes = {"per_tensor": fp8.TENSOR, "per_channel": fp8.CHANNEL}
    return schemes.get(str(layer.settings["stages"][0].get("qscheme")))


def _eight_bits(layer: Layer, signed: bool) -> Decoded:
    weight, scales = layer.take("weight", 2), layer.floats("weight_scale", 0, 1)
    zeros = layer.take_optional("weight_zero_point", 0, 1)
    outputs, inputs = layer.shape(weight)
    kind = mx.int8 if signed else mx.uint8
    for suffix, array in (("weight", weight), ("weight_zero_point", zeros)):
        if array is not None and array.dtype != kind:
            raise layer.error(suffix, str(kind), array.dtype)
    if inputs % 32:
        raise layer.unsupported("weight", "a multiple of 32 inputs", inputs)
    offset = 128 if signed else 0
    words = (weight.astype(mx.int32) + offset).astype(mx.uint8).view(mx.uint32)
    scales = _column(layer, "weight_scale", scales, outputs)
    if zeros is None:
        if layer.settings["stages"][0].get("symmetric") is not True:
            layer.take("weight_zero_point")
        zeros = mx.zeros(scales.shape, mx.int32)
    else:
        zeros = _column(layer, "weight_zero_point", zeros.astype(mx.int32), outputs)
    return affine(layer, words, scales, zeros + offset, 8)


def _column(layer: Layer, suffix: str, array: mx.array, outputs: int) -> mx.array:
    """``[out]`` per channel, ``[]`` or ``[1]`` per tensor → ``[out, 1]``."""
    channels = layer.settings["stages"][0].get("qscheme") == "per_channel"
    layer.check(suffix, array, *([(outputs,)] if channels else [(), (1,)]))
    return mx.broadcast_to(array.reshape(*layer.stack_shape, -1, 1), (*layer.stack_shape, outputs, 1))


def _four_bits(layer: Layer, signed: bool) -> Decoded:
    (stage,) = layer.settings["stages"]
    if stage.get("qscheme") == "per_channel":
        scales = layer.floats("weight_scale", 1)
        return _four_bits_by_channel(layer, mx.expand_dims(scales, -1), "weight_zero_point", signed)
    if stage.get("qscheme") != "per_group":
        expected = "per_group or per_channel in quantization_config (qscheme)"
        raise layer.unsupported("weight", expected, shown(stage.get("qscheme")))
    order, words, scales = _order(layer), layer.words("weight", 2), layer.floats("weight_scale", 2)
    (inputs, size), (groups, outputs) = layer.shape(words), layer.shape(scales)
    layer.check("weight", words, (inputs, outputs // 8))
    if inputs % 8 or outputs % 8:
        raise layer.unsupported("weight", "a multiple of 8 inputs and outputs", f"{inputs} and {outputs}")
    zeros = layer.words("weight_zero_point", 2) if layer.has("weight_zero_point") else None
    if zeros is not None:
        layer.check("weight_zero_point", zeros, (groups, size))
        zeros = unpack_outputs(_unsigned(zeros, signed), 4, order).swapaxes(-1, -2)
    elif not signed:
        layer.take("weight_zero_point")
    scales = mx.contiguous(scales.swapaxes(-1, -2))
    return affine(layer, transpose_nibbles(_unsigned(words, signed), order), scales, zeros, 4, stage.get("group_size"))


def _four_bits_by_channel(layer: Layer, scales: mx.array, suffix: str, signed: bool) -> Decoded:
    order, words = _order(layer), layer.words("weight", 2)
    outputs = layer.shape(words)[0]
    layer.check("weight_scale", scales, (outputs, 1))
    words = _unsigned(words, signed)
    if order != PLAIN:
        words = pack(unpack_outputs(words, 4, order), 4)
    zeros = layer.words(suffix, 1) if layer.has(suffix) else None
    if zeros is not None:
        layer.check(suffix, zeros, (outputs // 8,))
        zeros = mx.expand_dims(unpack_outputs(_unsigned(zeros, signed), 4, order), -1)
    elif not signed:
        layer.take(suffix)
    return affine(layer, words, scales, zeros, 4)


def _order(layer: Layer) -> tuple[int, ...]:
    method = (layer.settings.get("export") or {}).get("pack_method")
    if method not in ("reorder", "order"):
        raise description_error("export.pack_method", '"reorder" or "order"', method)
    return AWQ if method == "reorder" else PLAIN


def _unsigned(words: mx.array, signed: bool) -> mx.array:
    """Nibbles in two's complement → the same numbers with 8 added."""
    return words ^ 0x88888888 if signed else words
