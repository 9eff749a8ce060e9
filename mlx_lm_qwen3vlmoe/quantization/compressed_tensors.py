"""compressed-tensors (llm-compressor): integers, FP8, NVFP4 and MX formats.

| format                   | weight                                     | ``weight_scale``                             |
|--------------------------|--------------------------------------------|----------------------------------------------|
| ``pack-quantized``       | ``weight_packed`` int32 ``[out, in*b/32]`` | float ``[out, groups]``, blocks or ``[1]``   |
| ``int-quantized``, naive | ``weight`` int8 ``[out, in]``              | the same                                     |
| ``float-quantized``      | ``weight`` e4m3 ``[out, in]``              | the same                                     |
| ``mxfp4-pack-quantized`` | ``weight_packed`` uint8 ``[out, in/2]``    | e8m0 ``[out, in/32]``                        |
| ``mxfp8-quantized``      | ``weight`` e4m3 ``[out, in]``              | e8m0 ``[out, in/32]``                        |
| ``nvfp4-pack-quantized`` | ``weight_packed`` uint8 ``[out, in/2]``    | e4m3 ``[out, in/16]``, and a global one      |

``w = (q - z) * s``. Packed integers have ``2 ** (bits - 1)`` added and are packed as MLX packs; their zero points,
``weight_zero_point [out * bits / 32, groups]``, are packed along *out*. ``weight_g_idx [in]`` has the groups of inputs
in act-order. NVFP4's second scale divides. Source: ``compressors`` of compressed-tensors 0.19.
"""

from __future__ import annotations

import math
import re
from typing import Any

import mlx.core as mx

from ..errors import CheckpointError
from ..fields import check_block, check_kinds
from . import fp8
from .affine import BITS, affine, group_size_of, ungrouped
from .gptq import group_order
from .layer import Decoded, Format, Layer
from .microscaling import mxfp4, mxfp8, nvfp4
from .numbers import loaded_e4m3
from .packing import pack, unpack

METHODS = ("compressed-tensors",)
DETAIL = "format"
TENSORS = {"weight_packed", "weight_scale", "weight_zero_point", "weight_global_scale", "weight_g_idx"}
FORMATS = (
    Format(
        "compressed-tensors `pack-quantized`",
        "`weight_packed` in int32",
        "affine; in act-order float",
        "packed; 16 bits",
    ),
    Format("compressed-tensors `int-quantized`", "`weight` in int8", "affine, 8 bits", "packed"),
    Format(
        "MXFP4 of compressed-tensors and ModelOpt",
        "`weight_packed` or `weight`, `weight_scale` in uint8 for 32 weights of 4 bits",
        "`mxfp4`",
        "packed",
    ),
    Format("MXFP8", "`weight` in e4m3, `weight_scale` in uint8 for 32 weights", "`mxfp8`", "packed"),
)


def check(config: dict[str, Any]) -> None:
    check_kinds("", config, config_groups=dict)
    for key, group in (config.get("config_groups") or {}).items():
        check_kinds("config_groups.", {key: group}, **{key: dict})
        check_kinds(where := f"config_groups.{key}.", group or {}, weights=dict, targets=list)
        weights = (group or {}).get("weights") or {}
        check_kinds(f"{where}weights.", weights, num_bits=int, group_size=int, strategy=str, symmetric=bool)
        check_block(f"{where}weights.", weights, "block_structure")


def settings(config: dict[str, Any], name: str) -> dict[str, Any]:
    """``schemes``: the weight schemes that may apply to a layer, those that name it, else those for any."""
    groups = [group for group in (config.get("config_groups") or {}).values() if group and group.get("weights")]
    named = [group["weights"] for group in groups if any(_named(t, name) for t in group.get("targets") or [])]
    schemes = named or [group["weights"] for group in groups if "Linear" in (group.get("targets") or ["Linear"])]
    return {**config, "schemes": schemes}


def _named(target: Any, name: str) -> bool:
    if not str(target).startswith("re:"):
        return target == name
    try:
        return re.match(target[3:], name) is not None
    except re.error as error:
        raise CheckpointError(
            f"quantization_config: targets: expected a regular expression, found {target[3:]!r} ({error}). "
            "Take config.json from the original checkpoint."
        ) from None


def decode(layer: Layer) -> Decoded:
    if layer.has("weight_packed", mx.int32, mx.uint32):
        return _packed_integers(layer)
    if layer.has("weight_packed"):
        codes = layer.take("weight_packed", 2)
        if codes.dtype != mx.uint8:
            raise layer.error("weight_packed", "32-bit integers or bytes", codes.dtype)
        _schemes(layer, "float", 4)
        if layer.has("weight_global_scale"):  # which divides
            return nvfp4(layer, codes, layer.take("weight_scale"), 1 / layer.number("weight_global_scale"))
        return mxfp4(layer, codes, layer.take("weight_scale", 2))
    if layer.has("weight", mx.int8):
        return _integers(layer)
    return _floats(layer)


def _packed_integers(layer: Layer) -> Decoded:
    words, scales = layer.words("weight_packed", 2), layer.floats("weight_scale", 0, 1, 2)
    outputs, size = layer.shape(words)
    zeros = layer.words("weight_zero_point", 2) if layer.has("weight_zero_point") else None
    indices = layer.take_optional("weight_g_idx", 1)
    scheme = _scheme(layer, scales, (outputs, size * 32), zeros)
    bits = scheme["num_bits"]
    inputs = size * 32 // bits
    scales = _rows(layer, scales, scheme, (outputs, inputs))
    groups = scales.shape[-1]
    if zeros is None and scheme.get("symmetric") is False:
        layer.take("weight_zero_point")
    if zeros is not None:
        layer.check("weight_zero_point", zeros, (outputs * bits // 32, groups))
        zeros = unpack(mx.contiguous(zeros.swapaxes(-1, -2)), bits).swapaxes(-1, -2)
    group_size = _width(scheme)
    if indices is not None:
        layer.check("weight_g_idx", indices, (inputs,))
        order = group_order(layer, "weight_g_idx", indices, groups, group_size_of(layer, inputs, groups, group_size))
        if order is not None:
            return ungrouped(layer, words, scales, zeros, bits, order, "act-order")
    return affine(layer, words, scales, zeros, bits, group_size)


def _integers(layer: Layer) -> Decoded:
    """8 bits, or fewer that are stored as 8, which MLX packs. Its integers are unsigned: half of the range is added."""
    weight, scales = layer.take("weight", 2), layer.floats("weight_scale", 0, 1, 2)
    zeros = layer.tensors.pop("weight_zero_point", None)
    outputs, inputs = layer.shape(weight)
    schemes = _schemes(layer, "int") or [{}]
    scheme = next((s for s in schemes if _grid(s, scales, layer, (outputs, inputs))), schemes[0])
    bits = bits if (bits := scheme.get("num_bits")) in BITS else 8
    scales = _rows(layer, scales, scheme, (outputs, inputs))
    if zeros is None and scheme.get("symmetric") is False:
        layer.take("weight_zero_point")
    if zeros is not None:
        zeros = _rows(layer, zeros, scheme, (outputs, inputs), "weight_zero_point").astype(mx.int32) + 2 ** (bits - 1)
    if inputs % 32:
        raise layer.error("weight", "a multiple of 32 inputs", inputs)
    unsigned = (weight.astype(mx.int32) + 2 ** (bits - 1)) & (2**bits - 1)
    words = unsigned.astype(mx.uint8).view(mx.uint32) if bits == 8 else pack(unsigned, bits)
    return affine(layer, words, scales, zeros, bits, _width(scheme))


def _floats(layer: Layer) -> Decoded:
    weight = layer.take("weight", 2)
    if weight.dtype != loaded_e4m3():
        raise layer.error("weight", "a known quantized format", f"{weight.dtype} beside {sorted(layer.tensors)}")
    schemes = _schemes(layer, "float", 8)
    if layer.has("weight_scale", mx.uint8):
        return mxfp8(layer, weight, layer.take("weight_scale", 2))
    if schemes and schemes[0].get("scale_dtype") == "torch.uint8":
        raise layer.error("weight_scale", "powers of two (uint8), by scale_dtype", layer.take("weight_scale").dtype)
    suffix = "weight_scale_inv" if layer.has("weight_scale_inv") else "weight_scale"
    scale = layer.tensors.get(suffix)
    if schemes and scale is not None and schemes[0].get("strategy") in ("tensor", "channel"):
        _rows(layer, scale, schemes[0], (layer.shape(weight)[0], layer.shape(weight)[1]))
    return fp8.scaled(layer, weight, suffix, (_block(schemes[0]) or (0, 0)) if schemes else None)


def _schemes(layer: Layer, kind: str, bits: int | None = None) -> list[dict[str, Any]]:
    """The schemes that may apply, of a type and a number of bits; raises `CheckpointError` where all are of others."""
    schemes = layer.settings.get("schemes") or []
    fitting = [s for s in schemes if s.get("type", kind) == kind and (bits or s.get("num_bits")) == s.get("num_bits")]
    if schemes and not fitting:
        found = ", ".join(f"{scheme.get('type')} of {scheme.get('num_bits')} bits" for scheme in schemes)
        expected = f"a scheme for {kind}{f' of {bits} bits' if bits else ''} in config_groups"
        raise layer.error("weight", expected, found)
    return fitting


def _block(scheme: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None for the whole tensor, or one a row."""
    strategy = scheme.get("strategy")
    if (structure := scheme.get("block_structure")) and strategy in ("block", None):
        return structure[0], structure[1]
    if (size := scheme.get("group_size") or 0) > 0 and strategy in ("group", "tensor_group", None):
        return 1, size
    return None


def _grid(scheme: dict[str, Any], scales: mx.array, layer: Layer, shape: tuple[int, int]) -> tuple[int, int] | None:
    """The shape that scales have by a scheme, in blocks; None if these have not."""
    found = layer.shape(scales)
    if block := _block(scheme):
        expected = math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1])
        return expected if found == expected else None
    strategy = scheme.get("strategy")
    if strategy != "channel" and all(axis == 1 for axis in found):
        return 1, 1
    return (shape[0], 1) if strategy != "tensor" and found in ((shape[0],), (shape[0], 1)) else None


def _rows(
    layer: Layer, scales: mx.array, scheme: dict[str, Any], shape: tuple[int, int], suffix: str = "weight_scale"
) -> mx.array:
    """Scales or zero points of any strategy → ``[out, groups]``."""
    grid = _grid(scheme, scales, layer, shape)
    if grid is None:
        block = _block(scheme)
        expected = [[math.ceil(shape[n] / block[n]) for n in (0, 1)]] if block else [[shape[0], 1], [1]]
        if not block and (strategy := scheme.get("strategy")) in ("channel", "tensor"):
            expected = expected[:1] if strategy == "channel" else expected[1:]
        what = f"the shape {' or '.join(map(str, expected))}, by config_groups"
        raise layer.error(suffix, what, list(layer.shape(scales)))
    scales = scales.reshape(*layer.lead, *grid)
    high = (_block(scheme) or (1 if grid[0] == shape[0] else shape[0],))[0]
    return fp8.spread(scales, -2, shape[0], high, 1)


def _width(scheme: dict[str, Any]) -> int | None:
    block = _block(scheme)
    return block[1] if block else None


def _scheme(layer: Layer, scales: mx.array, stream: tuple[int, int], zeros: mx.array | None) -> dict[str, Any]:
    """The one scheme that packed integers fit: ``stream`` is the outputs, and the bits of one."""
    outputs, size = stream
    fitting = {
        scheme["num_bits"]: scheme
        for scheme in reversed(_schemes(layer, "int"))
        if isinstance(bits := scheme.get("num_bits"), int)
        and size % bits == 0
        and _grid(scheme, scales, layer, (outputs, size // bits))
        and (zeros is None or layer.shape(zeros)[0] * 32 == outputs * bits)
    }
    if not fitting and len(found := layer.shape(scales)) == 2 and found[0] not in (1, outputs):
        raise layer.error("weight_scale", f"the shape {[outputs, found[1]]}, or that of blocks", list(found))
    if len(fitting) != 1:
        shapes = f"{[outputs, size // 32]} with scales {list(layer.shape(scales))}"
        raise layer.error(
            "weight_packed",
            "to fit one scheme of config_groups",
            f"{shapes}, which fits {sorted(fitting) or 'no'} bits",
        )
    (scheme,) = fitting.values()
    return scheme
