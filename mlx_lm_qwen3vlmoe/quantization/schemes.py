"""The description of compressed-tensors, ``config_groups``: each a scheme for the layers that its targets name.

A scheme has ``type`` (int or float), ``num_bits``, ``symmetric`` and a ``strategy``, which says what shares a scale:

| ``strategy``            | share a scale                              | shape of the scales                  |
|-------------------------|--------------------------------------------|--------------------------------------|
| ``tensor``              | all                                        | ``[1]``                              |
| ``channel``             | an output                                  | ``[out, 1]``                         |
| ``group, tensor_group`` | ``group_size`` neighbors of an output      | ``[out, ⌈in / g⌉]``                  |
| ``block``               | ``block_structure``, outputs by inputs     | ``[⌈out / high⌉, ⌈in / wide⌉]``      |

Source: ``compressed_tensors/quantization/quant_args.py`` and ``compressors/format.py`` of compressed-tensors 0.20.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx

from ..errors import check_block, check_kinds, description_error, series
from .fields import Part, objects
from .fp8 import CHANNEL, TENSOR, spread
from .layer import Layer
from .patterns import pattern

Scheme = dict[str, Any]
_FIELDS = (
    *("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder"),
    *("scale_dtype", "zp_dtype", "observer", "observer_kwargs"),
)
_FORMATS = (
    *("dense", "mixed-precision", "naive-quantized", "int-quantized", "float-quantized", "pack-quantized"),
    *("mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized", "nvfp4-pack-quantized"),
)


def check(config: dict[str, Any]) -> None:
    check_kinds("", config, config_groups=dict)
    if (form := config.get("format") or "dense") not in _FORMATS:
        raise description_error("format", f"one of {', '.join(_FORMATS)}", form)
    for key, group in (config.get("config_groups") or {}).items():
        check_kinds("config_groups.", {key: group}, **{key: dict})
        check_kinds(where := f"config_groups.{key}.", group or {}, weights=dict, targets=list)
        for target in (group or {}).get("targets") or []:
            is_named(target, "")
        weights = (group or {}).get("weights") or {}
        check_kinds(f"{where}weights.", weights, num_bits=int, group_size=int, strategy=str, symmetric=bool)
        check_block(f"{where}weights.", weights, "block_structure")


def groups(description: dict[str, Any]) -> list[Part]:
    """The groups of a checked description and their schemes, with the fields that are known."""
    described = description.get("config_groups") or {}
    schemes = [{"weights": (group or {}).get("weights")} for group in described.values()]
    nested = [part for key, each in zip(described, schemes, strict=True) for part in objects(key, each, _FIELDS)]
    return [*objects("config_groups", described, ("targets", "weights", "format")), *nested]


def is_named(target: Any, name: str) -> bool:
    """Whether a target of ``config_groups`` is this layer."""
    return pattern("targets", target[3:]).match(name) if str(target).startswith("re:") else bool(target == name)


def schemes_for(layer: Layer, kind: str, *bits: int) -> list[Scheme]:
    """The schemes that may apply, of a type and numbers of bits; raises `CheckpointError` where all are of others."""
    schemes: list[Scheme] = layer.settings.get("schemes") or []
    fitting = [s for s in schemes if s.get("type", kind) == kind and (not bits or s.get("num_bits") in bits)]
    if schemes and not fitting:
        kinds = [f"{scheme.get('num_bits') or 'some'} bits of {scheme.get('type') or kind}" for scheme in schemes]
        expected = f"{series(bits)} bits of {kind}" if bits else f"the type {kind}"
        raise layer.error("weight", f"{expected} in config_groups", series(kinds, "and"))
    return fitting


def scheme_of_words(layer: Layer, scales: mx.array, stream: tuple[int, int], zeros: mx.array | None) -> Scheme:
    """The one scheme that packed integers fit: ``stream`` is the outputs, and the bits of one."""
    outputs, size = stream
    fitting = {
        scheme["num_bits"]: scheme
        for scheme in reversed(schemes_for(layer, "int"))
        if isinstance(bits := scheme.get("num_bits"), int)
        and size % bits == 0
        and grid_of(layer, scales, scheme, (outputs, size // bits))
        and (zeros is None or layer.shape(zeros)[:1] == (outputs * bits // 32,))
    }
    if not fitting and len(found := layer.shape(scales)) == 2 and found[0] not in (1, outputs):
        raise layer.error("weight_scale", f"the shape {[outputs, found[1]]}, or one scale a block", list(found))
    if len(fitting) != 1:
        shapes = f"the shape {[outputs, size // 32]} with scales {list(layer.shape(scales))}"
        shapes += f", which fits {series(sorted(fitting), 'and') if fitting else 'no'} bits"
        raise layer.error("weight_packed", "a shape that fits one scheme of config_groups", shapes)
    (scheme,) = fitting.values()
    return scheme


def block_of(scheme: Scheme) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None for the whole tensor, or one a row."""
    strategy = scheme.get("strategy")
    if (structure := scheme.get("block_structure")) and strategy in ("block", None):
        return structure[0], structure[1]
    if (size := scheme.get("group_size") or 0) > 0 and strategy in ("group", "tensor_group", None):
        return 1, size
    return None


def shared_by(scheme: Scheme) -> tuple[int, int] | None:
    """The same in the terms of `fp8.scaled`."""
    return block_of(scheme) or {"tensor": TENSOR, "channel": CHANNEL}.get(str(scheme.get("strategy")))


def width_of(scheme: Scheme) -> int | None:
    """The size of groups."""
    block = block_of(scheme)
    return block[1] if block else None


def grid_of(layer: Layer, scales: mx.array, scheme: Scheme, shape: tuple[int, int]) -> tuple[int, int] | None:
    """The shape that scales have by a scheme, in blocks; None if these have not."""
    found = layer.shape(scales)
    if block := block_of(scheme):
        expected = math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1])
        return expected if found == expected else None
    strategy = scheme.get("strategy")
    if strategy != "channel" and all(axis == 1 for axis in found):
        return 1, 1
    return (shape[0], 1) if strategy != "tensor" and found in ((shape[0],), (shape[0], 1)) else None


def of_each_output(
    layer: Layer, scales: mx.array, scheme: Scheme, shape: tuple[int, int], suffix: str = "weight_scale"
) -> mx.array:
    """Scales or zero points of any strategy → ``[out, groups]``."""
    grid, block = grid_of(layer, scales, scheme, shape), block_of(scheme)
    if grid is None:
        expected = [[math.ceil(shape[n] / block[n]) for n in (0, 1)]] if block else [[shape[0], 1], [1]]
        if not block and (strategy := scheme.get("strategy")) in ("channel", "tensor"):
            expected = expected[:1] if strategy == "channel" else expected[1:]
        what = f"the shape {series(expected)}, according to config_groups"
        raise layer.error(suffix, what, list(layer.shape(scales)))
    high = block[0] if block else 1 if grid[0] == shape[0] else shape[0]
    return spread(scales.reshape(*layer.stack_shape, *grid), -2, shape[0], high, 1)
