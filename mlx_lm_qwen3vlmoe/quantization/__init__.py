"""Linear layers as other tools quantized them → MLX's packed tensors with the same values, or float weights.

One file is one family of formats, found by the ``quant_method`` of the checkpoint's description. Its table ``FORMATS``
says what the family has; formulas that families share are in `affine`, `microscaling` and `fp8`, numbers in `numbers`,
words in `packing`. `description` reads and writes what a config says of quantization, `packed` checks what MLX packed.
Nothing here knows how experts are stored. A family has

- ``METHODS``: the values of ``quant_method``; ``DETAIL``: the field of the description that tells the format;
- ``TENSORS``: suffixes that mark a layer as quantized, whatever the description says: tools leave layers unquantized
  that their description names, and the reverse;
- ``TURNED``, if the last two axes of large tensors change places: their suffixes;
- ``check(config)``, if the description has fields of its own whose types it relies on;
- ``settings(config, name)``, if the description has fields for single layers;
- ``decode(layer)``: the tensors of one layer, or of a stack of alike ones, as MLX's.

Nothing is evaluated, but for the order of inputs in act-order (see `gptq.group_order`) and the few bytes in which
bitsandbytes and HQQ describe a layer.
"""

from __future__ import annotations

from collections.abc import Collection
from types import ModuleType
from typing import Any

import mlx.core as mx

from ..errors import CheckpointError, check_kinds
from . import auto_round, awq, bitsandbytes, compressed_tensors, fp8, gptq, hqq, metal, modelopt, quark, torchao
from .affine import common, dequantize
from .gptq import ACT_ORDER
from .layer import IGNORED, Decoded, Format, Layer, Parameters, Tensors

__all__ = [
    "ACT_ORDER",
    "FAMILIES",
    "IGNORED",
    "Decoded",
    "Format",
    "Layer",
    "Parameters",
    "Tensors",
    "common",
    "decode",
    "dequantize",
    "describe",
    "is_foreign",
    "settings",
    "title",
    "turned",
]

FAMILIES: tuple[ModuleType, ...] = (
    *(auto_round, awq, bitsandbytes, compressed_tensors, fp8, gptq, hqq, metal, modelopt, quark, torchao),
)
_BY_METHOD = {method: family for family in FAMILIES for method in family.METHODS}
_FOREIGN = IGNORED.union(*(family.TENSORS for family in FAMILIES))
# What tells the family where there is no description.
_UNDESCRIBED = {"weight_scale_2": modelopt, "weight_global_scale": compressed_tensors, "weight_scale_inv": fp8}


def describe(config: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's own description, flat, from ``quantization_config`` or the content of ``hf_quant_config.json``.

    Raises `CheckpointError` for a method that is not known here, or one that changes more than linear layers' weights.
    """
    if isinstance(nested := config.get("quantization"), dict):  # ModelOpt's hf_quant_config.json
        config = {"quant_method": "modelopt", **config, **nested}
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in _BY_METHOD:
        raise CheckpointError(
            f"quantization_config: quant_method: expected one of {', '.join(sorted(_BY_METHOD))}, found {method!r}. "
            "Use a checkpoint in one of these formats, or the unquantized one with mlx_lm.convert -q."
        )
    check_kinds("", config, bits=int, sparsity_config=dict)
    family = _BY_METHOD[method]
    if hasattr(family, "check"):
        family.check(config)
    sparsity = config.get("sparsity_config") or {}
    for field, value in (
        ("transform_config", config.get("transform_config")),
        ("sparsity_config", sparsity.get("format", "dense") != "dense" and sparsity),
    ):
        if value:
            raise CheckpointError(
                f"quantization_config: {field}: expected nothing, found {value!r}. "
                "Use a checkpoint that is quantized only, or the unquantized one with mlx_lm.convert -q."
            )
    return config


def title(config: dict[str, Any]) -> str:
    """The method of a description and the format, in its own terms."""
    method = config["quant_method"]
    return f"{method} {config.get(_BY_METHOD[method].DETAIL) or ''}".strip()


def is_foreign(tensors: Tensors) -> bool:
    """Whether the tensors of a layer are neither a float weight nor MLX's own packed ones."""
    weight = tensors.get("weight")
    return not _FOREIGN.isdisjoint(tensors) or (weight is not None and weight.dtype in (mx.uint8, mx.int8, mx.int32))


def settings(config: dict[str, Any], name: str) -> dict[str, Any]:
    """What the description says of a layer; ``name`` as transformers has it, ``model.language_model.layers.…``."""
    family = _BY_METHOD.get(config.get("quant_method"))
    return family.settings(config, name) if hasattr(family, "settings") else config  # type: ignore[union-attr]


def turned(config: dict[str, Any]) -> Collection[str]:
    """The suffixes of tensors whose last two axes `decode` swaps."""
    return getattr(_BY_METHOD.get(config.get("quant_method")), "TURNED", ())


def decode(layer: Layer) -> Decoded:
    """MLX's packed tensors and their parameters, or a float weight.

    Raises:
        CheckpointError: the format is unknown or unsupported, or a tensor is missing or of the wrong shape.
    """
    if not layer.tensors:
        return Decoded({})
    method = layer.settings.get("quant_method")
    family = _BY_METHOD.get(method)
    if family is None:
        family = next((family for suffix, family in _UNDESCRIBED.items() if suffix in layer.tensors), None)
    marks = sorted(_FOREIGN.intersection(layer.tensors))
    if family is None or (marks and family.TENSORS.isdisjoint(marks)):
        fitting = [name for name, each in sorted(_BY_METHOD.items()) if not each.TENSORS.isdisjoint(marks)]
        expected = f"quant_method {' or '.join(fitting) or 'of the tool that made it'} in quantization_config"
        raise layer.error(marks[0] if marks else "weight", expected, repr(method))
    decoded: Decoded = family.decode(layer)
    if layer.tensors:
        raise layer.error(sorted(layer.tensors)[0], "nothing (it would change the weight)", "the tensor")
    return decoded
