"""Linear layers as other tools quantized them → MLX's packed tensors with the same values, or float weights.

One file is one `Family` of formats, found by the ``quant_method`` of the checkpoint's description. Formulas that
families share are in `affine`, `microscaling` and `fp8`, numbers in `numbers`, words in `packing`. `description` takes
descriptions out of a config and puts MLX's in, `checks` checks what MLX packed. Nothing here knows how experts are
stored.

The *description* is ``quantization_config``; the *settings* of a layer are what the description says of that layer.

Nothing is evaluated, but for the order of inputs in act-order (see `gptq.group_order`) and the few bytes in which
bitsandbytes and HQQ describe a layer.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..errors import CheckpointError, check_kinds, series, shown
from . import (
    auto_round,
    awq,
    bitsandbytes,
    compressed_tensors,
    fp8,
    gguf,
    gptq,
    hqq,
    integers,
    metal,
    modelopt,
    quanto,
    quark,
    torchao,
)
from .affine import common, dequantize
from .family import Family
from .fields import check_fields
from .gptq import ACT_ORDER
from .layer import IGNORED, Decoded, Layer, Parameters, Tensors

__all__ = ["ACT_ORDER", "FAMILIES", "IGNORED", "Decoded", "Layer", "Parameters", "Tensors", "common", "decode"]
__all__ += ["dequantize", "fused", "halves", "is_foreign", "is_suffix", "layer_settings", "read_description", "stacks"]
__all__ += ["title", "turned"]

FAMILIES: tuple[Family, ...] = (
    auto_round.AutoRound(),
    awq.Awq(),
    bitsandbytes.BitsAndBytes(),
    compressed_tensors.CompressedTensors(),
    fp8.Fp8(),
    gguf.Gguf(),
    gptq.Gptq(),
    hqq.Hqq(),
    integers.EightBits(),
    integers.FourBits(),
    metal.Metal(),
    modelopt.ModelOpt(),
    quanto.Quanto(),
    quark.Quark(),
    torchao.TorchAo(),
)
_BY_METHOD = {method: family for family in FAMILIES for method in family.methods}
CAST: dict[str, Any] = {"quant_method": fp8.Cast.methods[0]}  # the description of a model for which `is_cast`
_CAST = fp8.Cast()
_FOREIGN = IGNORED.union(*(family.marks for family in FAMILIES))


def read_description(config: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's own description, flat, from ``quantization_config`` or the content of ``hf_quant_config.json``.

    Raises `CheckpointError` for a method that is not known here, or one that changes more than linear layers' weights.
    """
    if isinstance(nested := config.get("quantization"), dict):  # ModelOpt's hf_quant_config.json
        config = {"quant_method": "modelopt", **config, **nested}
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in _BY_METHOD:
        raise CheckpointError(
            "quantization_config: quant_method",
            f"one of {', '.join(sorted(_BY_METHOD))}",
            shown(method),
            "Use a checkpoint in one of these formats, or the unquantized one with mlx_lm.convert -q.",
        )
    check_kinds("", config, bits=int, sparsity_config=dict)
    family = _BY_METHOD[method]
    family.check(config)
    check_fields(family.parts(config))
    sparsity = config.get("sparsity_config") or {}
    for field, value in (
        ("transform_config", config.get("transform_config")),
        ("sparsity_config", sparsity.get("format", "dense") != "dense" and sparsity),
    ):
        if value:
            raise CheckpointError(
                f"quantization_config: {field}",
                "nothing",
                shown(value),
                "Use a checkpoint that is quantized only, or the unquantized one with mlx_lm.convert -q.",
            )
    return config


def title(config: dict[str, Any]) -> str:
    """The method of a description and the format, in its own terms, and nothing twice."""
    method = config["quant_method"]
    detail = str(config.get(_BY_METHOD[method].detail) or "").removeprefix("auto_round:")
    return method if detail in ("", method, "auto_round") else f"{method} {detail}"


def is_foreign(tensors: Tensors) -> bool:
    """Whether the tensors of a layer are neither a float weight nor MLX's own packed ones."""
    weight = tensors.get("weight")
    return not _FOREIGN.isdisjoint(tensors) or (weight is not None and weight.dtype in (mx.uint8, mx.int8, mx.int32))


def is_suffix(suffix: str) -> bool:
    """Whether a tool gives this name to a tensor of a quantized layer."""
    return suffix in _FOREIGN


def layer_settings(description: dict[str, Any], name: str) -> dict[str, Any]:
    """What the description says of a layer; ``name`` as transformers has it, ``model.language_model.layers.…``."""
    family = _BY_METHOD.get(description.get("quant_method", ""))
    return family.settings(description, name) if family else description


def turned(description: dict[str, Any]) -> tuple[str, ...]:
    """The suffixes of large tensors whose last two axes `decode` swaps."""
    family = _BY_METHOD.get(description.get("quant_method", ""))
    return family.turned if family else ()


def halves(tensors: Tensors, axis: int, settings: dict[str, Any]) -> tuple[Tensors, Tensors] | None:
    """Fused experts cut in two along an axis of the weight, -1 or -2; None if they have to be decoded before that.

    AngelSlim has a scale for each half, ``weight_scale [E, 2]``.
    """
    if tensors.keys() - IGNORED == {"weight", "weight_scale"} and tensors["weight_scale"].shape[1:] == (2,):
        weights, scales = mx.split(tensors["weight"], 2, axis), mx.split(tensors["weight_scale"], 2, -1)
        first, second = ({"weight": weights[n], "weight_scale": scales[n]} for n in (0, 1))
        return first, second
    family = _family(tensors, settings)
    return family.halves(tensors, axis, settings) if family else None


def fused(layer: Layer, experts: int) -> tuple[Tensors, tuple[int, ...] | None]:
    """The tensors of fused experts with an axis for the experts in front of each, and their shape: `Family.fused`."""
    if family := _family(layer.tensors, layer.settings):
        return family.fused(layer, experts)
    return layer.tensors, layer.tensors["weight"].shape if "weight" in layer.tensors else None


def stacks(tensors: Tensors, settings: dict[str, Any]) -> bool:
    """Whether alike layers with such tensors can be decoded as one stack."""
    family = _family(tensors, settings)
    return not family or family.stacks(tensors)


def is_cast(layers: dict[str, Tensors]) -> bool:
    """Whether a model without a description is e4m3 without scales: bytes in all projections, and nothing beside them.

    MLX reads e4m3 as bytes, so that bytes in some layers may be anything.
    """
    projections = (tensors for path, tensors in layers.items() if path.endswith("_proj"))
    first = next(projections, {})
    return _is_bare(first) and all(map(_is_bare, projections))


def _is_bare(tensors: Tensors) -> bool:
    weight = tensors.get("weight")
    return weight is not None and weight.dtype == mx.uint8 and tensors.keys() - IGNORED == {"weight"}


def _family(tensors: Tensors, settings: dict[str, Any]) -> Family | None:
    """The family of a layer, by its settings, or by its tensors where there is no description."""
    if settings is CAST:
        return _CAST
    undescribed = (family for family in FAMILIES if any(suffix in tensors for suffix in family.undescribed))
    return _BY_METHOD.get(settings.get("quant_method", "")) or next(undescribed, None)


def decode(layer: Layer) -> Decoded:
    """MLX's packed tensors and their parameters, or a float weight.

    Raises:
        CheckpointError: the format is unknown or unsupported, or a tensor is missing or of the wrong shape.
    """
    if not layer.tensors:
        return Decoded({})
    family = _family(layer.tensors, layer.settings)
    marks = sorted(_FOREIGN.intersection(layer.tensors))
    if family is None or (marks and not set(marks).intersection(family.marks)):
        fitting = [name for name, each in sorted(_BY_METHOD.items()) if set(marks).intersection(each.marks)]
        expected = f"the quant_method {series(fitting or ['of the tool that wrote it'])} in quantization_config"
        found, suffix = shown(layer.settings.get("quant_method")), marks[0] if marks else "weight"
        remedy = "Use the config.json that the quantization tool wrote beside this tensor."
        raise CheckpointError(f"{layer.name}.{suffix}", expected, found, remedy)
    decoded = family.decode(layer)
    if layer.tensors:
        expected, found = f"only the tensors of {family.methods[0]}", "this one, which may change the weight"
        raise layer.unsupported(sorted(layer.tensors)[0], expected, found)
    return decoded
