"""torchao, as transformers saves it: a tensor subclass in parts, ``_weight_qdata``, ``_weight_scale`` and others.

| class                      | ``_weight_qdata``        | ``_weight_scale``        | weight                   |
|----------------------------|--------------------------|--------------------------|--------------------------|
| `Int8Tensor`               | int8 ``[out, in]``       | ``[out, 1]``, ``[1, 1]`` | ``(q - zero_point) * s`` |
| `IntxUnpackedToInt8Tensor` | the same, of 1 to 8 bits | ``[out, in / g]``        | the same                 |
| `Float8Tensor`             | e4m3 ``[out, in]``       | as `fp8` has it          | ``e4m3 * s``             |
| `MXTensor`                 | e4m3 ``[out, in]``       | e8m0 ``[out, in / 32]``  | MXFP8                    |
| `MXTensor`                 | uint8 ``[out, in / 2]``  | e8m0 ``[out, in / 32]``  | MXFP4, low nibble first  |
| `NVFP4Tensor`              | uint8 ``[out, in / 2]``  | e4m3 ``[out, in / 16]``  | NVFP4                    |

NVFP4's second scale is ``_weight_per_tensor_scale``. ``_weight_zero_point``, in int8 or floats, has the shape of the
scale; `Int8Tensor` may lack it. Fused experts have the same parts, ``[E, out, in]``. The class is in the file's
metadata, which the host's reader does not hand on: the shapes tell e4m3 from packed bytes, and the bits are those of
``weight_dtype`` in ``quant_type``, or 8, which holds them all. Scales in the order that a GPU wants
(``is_swizzled_scales``) have another shape, and are refused. Source: ``quantization/quantize_/workflows`` and
``prototype/mx_formats`` of torchao 0.18.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import mlx.core as mx

from . import fp8
from .affine import BITS, signed
from .family import Description, Family
from .fields import Part, objects
from .layer import Decoded, Layer, Tensors
from .microscaling import mxfp4, mxfp8, nvfp4
from .numbers import loaded_e4m3
from .patterns import pattern

_OF_ACTIVATIONS = ("_weight_act_quant_scale", "_weight_act_quant_zero_point", "_weight_act_per_tensor_scale")
_FIELDS = (  # of a config's ``_data``
    *("granularity", "group_size", "block_size", "weight_dtype", "mapping_type", "scale_dtype", "intx_packing_format"),
    *("intx_choose_qparams_algorithm", "set_inductor_config", "fqn_to_config", "module_fqn_to_config", "version"),
    *("activation_dtype", "activation_value_lb", "activation_value_ub", "kernel_preference", "mm_config", "layout"),
    *("act_mapping_type", "use_triton_kernel", "use_dynamic_per_tensor_scale", "scaling_mode", "preserve_zero"),
)
_MICRO = {8: "NVFP4", 16: "MXFP4", 32: "MXFP8"}  # bytes of codes for a byte of scales


class TorchAo(Family):
    methods = ("torchao",)
    detail = ""  # its description is nested
    marks = ("_weight_qdata", "_weight_scale", "_weight_zero_point", "_weight_per_tensor_scale")
    fields = (*("quant_type", "quant_type_kwargs", "include_input_output_embeddings", "untie_embedding_weights"),)
    formats = (
        "torchao int8 and intx, 1 to 8 bits | `_weight_qdata` in int8 | affine | packed",
        "torchao float8 | `_weight_qdata` in e4m3 | float | 16 bits",
        "torchao MXFP4, MXFP8 and NVFP4 | `_weight_qdata`, with `_weight_scale` in bytes | as there | as there",
    )

    def parts(self, description: Description) -> Iterable[Part]:
        config = _within(description.get("quant_type"), "default")
        named = _within(config, "_data", "fqn_to_config")
        configs = {"default": config, **(named if isinstance(named, dict) else {})}
        within = {name: _within(each, "_data") for name, each in configs.items()}
        return [("", description, self.fields), *objects("quant_type", within, _FIELDS)]

    def check(self, description: Description) -> None:
        named = _within(description.get("quant_type"), "default", "_data", "fqn_to_config")
        for key in named if isinstance(named, dict) else ():
            if key.startswith("re:"):
                _matches(key[3:], ())

    def settings(self, description: Description, name: str) -> Description:
        """``quant_type.default``, or what its ``fqn_to_config`` has for a name, a pattern (``re:``), or all others."""
        config = _within(description.get("quant_type"), "default")
        named = _within(config, "_data", "fqn_to_config") or _within(config, "_data", "module_fqn_to_config")
        if isinstance(named, dict):
            names = (name, f"{name}.weight")
            matching = (key for key in named if key.startswith("re:") and _matches(key[3:], names))
            key = next((each for each in names if each in named), None) or next(matching, "_default")
            config = named.get(key)
        return {**description, "config": config}

    def fused(self, layer: Layer, experts: int) -> tuple[Tensors, tuple[int, ...] | None]:
        codes, scales = (layer.tensors.get(suffix) for suffix in ("_weight_qdata", "_weight_scale"))
        if codes is None or not codes.ndim:
            return super().fused(layer, experts)
        pairs = scales is not None and _kind(codes, scales) in ("NVFP4", "MXFP4")
        return layer.tensors, (*codes.shape[:-1], codes.shape[-1] * (1 + pairs))

    def halves(self, tensors: Tensors, axis: int, settings: Description) -> tuple[Tensors, Tensors] | None:
        """Along the outputs, if every tensor has these."""
        rows = tensors["_weight_qdata"].shape[1] if "_weight_qdata" in tensors else 0
        if axis != -2 or rows % 2 or not all(array.ndim == 3 and array.shape[1] == rows for array in tensors.values()):
            return None
        pairs = {suffix: mx.split(array, 2, axis) for suffix, array in tensors.items()}
        return {suffix: pair[0] for suffix, pair in pairs.items()}, {suffix: pair[1] for suffix, pair in pairs.items()}

    def decode(self, layer: Layer) -> Decoded:
        for suffix in _OF_ACTIVATIONS:
            layer.tensors.pop(suffix, None)
        codes = layer.take("_weight_qdata", 2)
        config = layer.settings.get("config", _within(layer.settings.get("quant_type"), "default"))
        if layer.has("_weight_scale", mx.uint8) or layer.has("_weight_per_tensor_scale"):
            return _microscaled(layer, codes, _within(config, "_data", "block_size"))
        if codes.dtype not in (mx.int8, loaded_e4m3()):
            raise layer.error("_weight_qdata", "int8 or e4m3", codes.dtype)
        kind = re.search("(Int8|Intx|Float8)Weight", str(_within(config, "_type")))
        if kind and (kind[1] == "Float8") != (codes.dtype != mx.int8):
            raise layer.error("_weight_qdata", f"{kind[1]}, according to quant_type", codes.dtype)
        config = _within(config, "_data")
        if layer.has("_weight_scale"):
            _check_granularity(layer, codes, _within(config, "granularity"))
        if codes.dtype == mx.int8:
            return _integers(layer, codes, _bits(_within(config, "weight_dtype", "_data")))
        return fp8.scaled(layer, codes, "_weight_scale", None)


def _matches(text: str, names: tuple[str, ...]) -> bool:
    found = pattern("quant_type", text)
    return any(map(found.fullmatch, names))


def _within(description: Any, *fields: str) -> Any:
    """A nested field; None where there is none."""
    for field in fields:
        description = description.get(field) if isinstance(description, dict) else None
    return description


def _kind(codes: mx.array, scales: mx.array) -> str | None:
    """The format of codes with such scales, by the sizes of their rows; None for no microscaling format."""
    if codes.dtype == mx.int8 or not scales.ndim or not scales.shape[-1]:
        return None
    # An MLX that reads e4m3 as values has no bytes for them.
    micro = scales.dtype == mx.uint8 or (codes.dtype == mx.uint8 != loaded_e4m3())
    return _MICRO.get(codes.shape[-1] // scales.shape[-1]) if micro else None


def _microscaled(layer: Layer, codes: mx.array, block: Any) -> Decoded:
    """Bytes with a scale in bytes for each 16 or 32 values."""
    scales = layer.take("_weight_scale", 2)
    (outputs, size), found = layer.shape(codes), layer.shape(scales)
    kind = _kind(codes, scales) if found[0] == outputs and size % found[1] == 0 else None
    for bytes_of_codes in _MICRO:
        if found == (math.ceil(outputs / 128) * 32, math.ceil(size / bytes_of_codes / 4) * 16) and kind is None:
            raise layer.unsupported("_weight_scale", "scales in the order of the inputs", "is_swizzled_scales")
    if kind is None or (block not in (None, 32) and kind != "NVFP4"):
        expected = f"a scale for 32 values of {outputs} outputs, or for 16 of NVFP4"
        raise layer.error("_weight_scale", expected, f"the shape {list(found)} beside {list(layer.shape(codes))}")
    if kind == "MXFP8":
        return mxfp8(layer, codes, scales)
    if kind == "MXFP4":
        return mxfp4(layer, codes, scales)
    one = mx.ones((*layer.stack_shape, 1, 1))
    return nvfp4(
        layer,
        codes,
        scales,
        layer.number("_weight_per_tensor_scale") if layer.has("_weight_per_tensor_scale") else one,
    )


def _check_granularity(layer: Layer, codes: mx.array, granularity: Any) -> None:
    """There are as many scales as the description says."""
    if isinstance(granularity, list) and granularity:  # that of activations, then that of the weight
        granularity = granularity[-1]
    outputs, inputs = layer.shape(codes)
    kind, size = _within(granularity, "_type"), _within(granularity, "_data", "group_size")
    if kind == "PerGroup" and type(size) is int and size > 0:
        layer.check("_weight_scale", layer.tensors["_weight_scale"], (outputs, inputs // size))
    elif kind in ("PerRow", "PerAxis"):
        layer.check("_weight_scale", layer.tensors["_weight_scale"], (outputs, 1))


def _integers(layer: Layer, codes: mx.array, bits: int) -> Decoded:
    scales = layer.floats("_weight_scale", 2)
    zeros = layer.take_optional("_weight_zero_point", 2)
    outputs, inputs = layer.shape(codes)
    rows, groups = layer.shape(scales)
    if (rows, groups) != (1, 1) and (rows != outputs or inputs % groups):
        raise layer.error("_weight_scale", f"the shape [{outputs}, groups] or [1, 1]", [rows, groups])
    if zeros is not None:
        layer.check("_weight_zero_point", zeros, (rows, groups))
        if zeros.dtype != mx.int8 and not mx.issubdtype(zeros.dtype, mx.floating):
            raise layer.error("_weight_zero_point", "int8 or floats", zeros.dtype)
        zeros = mx.broadcast_to(zeros, (*layer.stack_shape, outputs, groups))
    return signed(
        layer, codes, mx.broadcast_to(scales, (*layer.stack_shape, outputs, groups)), zeros, bits, inputs // groups
    )


def _bits(dtype: Any) -> int:
    """Of ``int1`` to ``int8``, as many as MLX has; where nothing is said, 8."""
    match = re.fullmatch("int([1-8])", str(dtype))
    bits = max(int(match[1]), 2) if match else 8
    return bits if bits in BITS else 8
