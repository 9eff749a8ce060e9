"""A linear layer as another tool quantized it → MLX's packed tensors with the same values, or a float weight.

Packed, where MLX can express the format: ``{"weight", "scales", "biases"}`` of `mlx.core.quantized_matmul`. Its affine
mode is ``w = scales * q + biases`` with one scale and bias for 32, 64 or 128 neighbors along *in*; ``q`` is a dense
little-endian bit stream along *in*, in ``uint32``. A zero point ``z`` becomes ``biases = -z * scales``, in float32 (as
are then the scales) unless the format is symmetric: 16 bits would round it, which costs more than 1 % of the logits.

| tensors of one layer                                 | tool, source of the format                 | becomes         |
|------------------------------------------------------|--------------------------------------------|-----------------|
| ``qweight`` packed along *out*, ``qzeros``, …        | AutoAWQ 0.2.9 ``gemm``                     | affine          |
| ``qweight`` packed along *in*, ``qzeros``, …         | GPTQModel 7.7, AutoGPTQ                    | affine or float |
| ``weight_packed`` int32, ``weight_scale``, …         | compressed-tensors 0.19 ``pack-quantized`` | affine or float |
| ``weight`` int8, ``weight_scale``                    | … ``int-quantized``                        | affine          |
| ``weight_packed`` uint8, ``weight_scale`` uint8      | … ``mxfp4-pack-quantized``, ModelOpt MXFP4 | mxfp4           |
| ``weight`` e4m3, ``weight_scale`` uint8              | … ``mxfp8-quantized``                      | mxfp8           |
| ``weight_packed`` uint8, …, ``weight_global_scale``  | … ``nvfp4-pack-quantized``                 | float or nvfp4  |
| ``weight`` uint8, …, ``weight_scale_2``              | ModelOpt 0.47 NVFP4                        | float or nvfp4  |
| ``weight`` e4m3, ``weight_scale`` or ``…_scale_inv`` | transformers, ModelOpt, compressed-tensors | float           |

The tensors decide what a layer is, and the checkpoint's description only what they cannot tell: tools leave layers
unquantized that their description names, and the reverse. Nothing is evaluated.
"""

from __future__ import annotations

import functools
import io
import math
from typing import Any

import mlx.core as mx

from .errors import CheckpointError, MissingTensorError

Tensors = dict[str, mx.array]
Parameters = dict[str, Any]  # of mlx.nn.quantize: group_size, bits, mode, and global_scale for nvfp4

METHODS = ("awq", "compressed-tensors", "fp8", "gptq", "modelopt")
# Of activations, or of no use here: weight_shape repeats what the shapes tell.
IGNORED = {
    *("input_scale", "input_global_scale", "input_zero_point", "output_scale", "weight_shape"),
    *("k_scale", "v_scale", "q_scale", "prob_scale"),
}
_WORDS = {"qweight", "qzeros", "g_idx", "weight_g_idx"}
_FOREIGN = {
    *IGNORED,
    *("qweight", "qzeros", "g_idx", "pre_quant_scale", "weight_packed", "weight_scale", "weight_scale_inv"),
    *("weight_scale_2", "weight_zero_point", "weight_global_scale", "weight_g_idx"),
}


def describe(config: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's own description, flat, from ``quantization_config`` or the content of ``hf_quant_config.json``.

    Raises `CheckpointError` for a method that is not known here, or one that changes more than linear layers' weights.
    """
    if isinstance(nested := config.get("quantization"), dict):  # ModelOpt's hf_quant_config.json
        config = {"quant_method": "modelopt", **config, **nested}
    method = config.get("quant_method")
    if method not in METHODS:
        raise CheckpointError(
            f"quantization_config: quant_method: expected one of {', '.join(METHODS)}, found {method!r}. "
            "Use a checkpoint in one of these formats, or the unquantized one with mlx_lm.convert -q."
        )
    _check_kinds("", config, bits=int, group_size=int, weight_block_size=list, config_groups=dict, sparsity_config=dict)
    for key, group in (config.get("config_groups") or {}).items():
        _check_kinds("config_groups.", {key: group}, **{key: dict})
        _check_kinds(f"config_groups.{key}.", group or {}, weights=dict, targets=list)
        weights = (group or {}).get("weights") or {}
        _check_kinds(f"config_groups.{key}.weights.", weights, num_bits=int, group_size=int, block_structure=list)
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


def _check_kinds(where: str, fields: dict[str, Any], **kinds: type) -> None:
    """Every field that is there is of its type; a number is not zero."""
    for field, kind in kinds.items():
        value = fields.get(field)
        if value is not None and (type(value) is not kind or value == 0):
            raise CheckpointError(
                f"quantization_config: {where}{field}: expected {kind.__name__}, found {value!r}. "
                "Take config.json from the original checkpoint."
            )


def is_foreign(tensors: Tensors) -> bool:
    """Whether the tensors of a layer are neither a float weight nor MLX's own packed ones."""
    weight = tensors.get("weight")
    return not _FOREIGN.isdisjoint(tensors) or (weight is not None and weight.dtype in (mx.uint8, mx.int8))


def decode(
    name: str, tensors: Tensors, config: dict[str, Any], dtype: mx.Dtype, global_scale: bool = False
) -> tuple[Tensors, Parameters | None]:
    """One layer's tensors, by their suffixes, as MLX's packed ones and their parameters, or a float weight and None.

    Args:
        name: of the layer, for errors and for the targets of compressed-tensors' groups.
        tensors: suffix → array. A float8 e4m3 array comes as `mlx.core.load` gives it, its codes in
            ``uint8`` (before MLX 0.30.6 its values in bfloat16).
        config: what `describe` gives.
        dtype: of the float weight, where MLX cannot express the format.
        global_scale: whether the layer can hold NVFP4's second scale.

    Raises:
        CheckpointError: the format is unknown or unsupported, or a tensor is missing or of the wrong shape.
    """
    tensors = {suffix: array for suffix, array in tensors.items() if suffix not in IGNORED}
    if not tensors:
        return {}, None
    layer = _Layer(name, tensors, config, dtype)
    weight = tensors.get("weight")
    if "qweight" in tensors:
        method = config.get("quant_method")
        if method not in ("awq", "gptq"):
            raise layer.error("qweight", "quant_method awq or gptq in quantization_config", repr(method))
        result = _awq(layer) if method == "awq" else _gptq(layer)
    elif "weight_packed" in tensors and not layer.has_bytes("weight_packed"):
        result = _pack_quantized(layer)
    elif "weight_packed" in tensors and "weight_global_scale" in tensors:
        # compressed-tensors divides by this scale.
        scale = 1 / layer.take("weight_global_scale").astype(mx.float32)
        result = _nvfp4(layer, layer.take("weight_packed", 2), scale, global_scale)
    elif "weight_packed" in tensors:
        result = _microscaled(layer, "weight_packed")
    elif weight is None:
        layer.take("weight")
    elif "weight_scale_2" in tensors:
        scale = layer.take("weight_scale_2").astype(mx.float32)
        result = _nvfp4(layer, layer.take("weight", 2), scale, global_scale)
    elif weight.dtype == mx.int8:
        result = _int8(layer)
    elif weight.dtype in (mx.uint8, _loaded_e4m3()) and layer.has_bytes("weight_scale"):
        result = _microscaled(layer, "weight")
    elif weight.dtype == _loaded_e4m3():
        result = _fp8(layer)
    else:
        raise layer.error("weight", "a known quantized format", f"{weight.dtype} beside {sorted(tensors)}")
    if layer.tensors:
        raise layer.error(sorted(layer.tensors)[0], "nothing (it would change the weight)", "the tensor")
    return result


def dequantize(tensors: Tensors, parameters: Parameters, dtype: mx.Dtype) -> mx.array:
    """The float weight of MLX's packed tensors."""
    options = {name: value for name, value in parameters.items() if name != "global_scale"}
    if "global_scale" in tensors:
        options |= {"global_scale": tensors["global_scale"], "dtype": mx.float32}
    if "biases" in tensors:
        scales, biases = (tensors[name].astype(mx.float32) for name in ("scales", "biases"))
    else:  # bfloat16 holds a small float times a power of two
        scales, biases = tensors["scales"], None
    return mx.dequantize(tensors["weight"], scales, biases, **options).astype(dtype)


class _Layer:
    """One layer's tensors, taken one by one: what is left over in the end was not understood."""

    def __init__(self, name: str, tensors: Tensors, config: dict[str, Any], dtype: mx.Dtype):
        self.name, self.tensors, self.config, self.dtype = name, dict(tensors), config, dtype

    def error(self, suffix: str, expected: str, found: object) -> CheckpointError:
        return CheckpointError(
            f"{self.name}.{suffix}: expected {expected}, found {found}. Is quantization_config that of this "
            "checkpoint? If so, use another format, or the unquantized checkpoint with mlx_lm.convert -q."
        )

    def take_optional(self, suffix: str, *ranks: int) -> mx.array | None:
        return self.take(suffix, *ranks) if suffix in self.tensors else None

    def has_bytes(self, suffix: str) -> bool:
        return suffix in self.tensors and self.tensors[suffix].dtype == mx.uint8

    def take(self, suffix: str, *ranks: int) -> mx.array:
        if suffix not in self.tensors:
            raise MissingTensorError(
                f"{self.name}.{suffix}: expected beside the other tensors of its layer, found nothing. "
                "Is a file of the checkpoint missing?"
            )
        array = self.tensors.pop(suffix)
        if (ranks and array.ndim not in ranks) or not array.size:
            raise self.error(suffix, f"{' or '.join(map(str, ranks))} dimensions", list(array.shape))
        if suffix in _WORDS:
            fits = array.dtype in (mx.int32, mx.uint32)
        else:
            packed = array.dtype == mx.uint8 and suffix in ("weight_scale", "weight_scale_inv")
            fits = "scale" not in suffix or packed or mx.issubdtype(array.dtype, mx.floating)
        if not fits:
            raise self.error(suffix, "32-bit integers" if suffix in _WORDS else "floats", array.dtype)
        return array

    def check(self, suffix: str, array: mx.array, *shapes: tuple[int, ...]) -> mx.array:
        if array.shape not in shapes:
            raise self.error(suffix, f"the shape {' or '.join(str(list(s)) for s in shapes)}", list(array.shape))
        return array


def _unpack(words: mx.array, bits: int) -> mx.array:
    """``[…, n * bits / 32]`` dense little-endian bit streams → ``[…, n]`` unsigned integers, as int32."""
    words = words.view(mx.uint32)
    if 32 % bits == 0:
        values = (mx.expand_dims(words, -1) >> _constant(*range(0, 32, bits))) & _constant(2**bits - 1)
    else:
        stream = ((mx.expand_dims(words, -1) >> _constant(*range(32))) & _constant(1)).flatten(-2)
        values = stream.reshape(*words.shape[:-1], -1, bits) << _constant(*range(bits))
        return values.sum(-1).astype(mx.int32)
    return values.flatten(-2).astype(mx.int32)


def _pack(values: mx.array, bits: int) -> mx.array:
    """``[…, n]`` unsigned integers of 4 or 8 bits → MLX's ``[…, n * bits / 32]`` uint32."""
    values = values.astype(mx.uint32).reshape(*values.shape[:-1], -1, 32 // bits)
    return (values << _constant(*range(0, 32, bits))).sum(-1)


@functools.cache
def _constant(*values: int) -> mx.array:
    """A vector that thousands of layers share: making one costs as much as two operations."""
    return mx.array(values, mx.uint32)


def _affine(
    layer: _Layer, packed: mx.array, scales: mx.array, zeros: mx.array | None, bits: int, groups: mx.array | None = None
) -> tuple[Tensors, Parameters | None]:
    """``w = scales * (q - zeros)``, from ``packed [out, in * bits / 32]`` and one column of scales a group of inputs.

    Args:
        scales: ``[out, groups]``. A group that MLX lacks is repeated as 128, 64 or 32, or dequantized.
        zeros: ``[out, groups]`` integers; None means ``2 ** (bits - 1)``.
        groups: the group of every input, ``[in]``, where they are not neighbors (act-order).
    """
    inputs = packed.shape[1] * 32 // bits
    if not mx.issubdtype(scales.dtype, mx.floating):
        raise layer.error("weight_scale", "floats", scales.dtype)
    if scales.dtype not in (mx.float16, mx.bfloat16):
        scales = scales.astype(layer.dtype)
    wide = scales.astype(mx.float32)
    zero = 2 ** (bits - 1) if zeros is None else zeros.astype(mx.float32)
    size = inputs // scales.shape[1]
    group = next((g for g in (128, 64, 32) if size % g == 0 and inputs % size == 0), None)
    if groups is None and group is not None and bits in (2, 3, 4, 5, 6, 8):
        # A zero point of 2 ** (bits - 1) only shifts the exponent; the product with any other one needs more digits.
        scales, biases = (scales, (-zero * wide).astype(scales.dtype)) if zeros is None else (wide, -zero * wide)
        if size > group:  # contiguous, as a repeated scale of a channel is a view that would be copied at every call
            scales, biases = (mx.contiguous(mx.repeat(array, size // group, 1)) for array in (scales, biases))
        tensors = {"weight": packed, "scales": scales, "biases": biases}
        return tensors, {"group_size": group, "bits": bits}
    if groups is None:
        groups = mx.arange(inputs) // size
    zero = zero if zeros is None else mx.take(zero, groups, 1)
    weight = (_unpack(packed, bits) - zero) * mx.take(wide, groups, 1)
    return {"weight": weight.astype(layer.dtype)}, None


def _awq(layer: _Layer) -> tuple[Tensors, Parameters | None]:
    """AutoAWQ ``gemm``: ``w = (q - z) * s``; 4 bits, eight outputs a word, in the order 0, 2, 4, 6, 1, 3, 5, 7.

    ``qweight [in, out / 8]`` int32, ``qzeros [in / g, out / 8]`` int32, ``scales [in / g, out]``. Source:
    ``awq/modules/linear/gemm.py`` and ``awq/utils/packing_utils.py`` of AutoAWQ 0.2.9.
    """
    qweight, scales, qzeros = (layer.take(suffix, 2) for suffix in ("qweight", "scales", "qzeros"))
    if layer.config.get("bits", 4) != 4 or layer.config.get("version", "gemm") != "gemm":
        found = f"{layer.config.get('bits')} bits, version {layer.config.get('version')!r}"
        raise layer.error("qweight", "AWQ with 4 bits and version 'gemm'", found)
    inputs, words = qweight.shape
    groups = scales.shape[0]
    layer.check("scales", scales, (groups, words * 8))
    layer.check("qzeros", qzeros, (groups, words))
    if inputs % groups or inputs % 8:
        raise layer.error("qweight", f"a multiple of 8, and of {groups} groups, of inputs", inputs)

    def outputs(array: mx.array) -> mx.array:  # [n, out / 8] → [out, n]
        nibbles = mx.expand_dims(array.view(mx.uint32), -1) >> _constant(0, 16, 4, 20, 8, 24, 12, 28)
        return (nibbles & _constant(15)).flatten(-2).T

    return _affine(layer, _pack(outputs(qweight), 4), mx.contiguous(scales.T), outputs(qzeros), 4)


def _gptq(layer: _Layer) -> tuple[Tensors, Parameters | None]:
    """GPTQ: ``w = (q - z) * s[g_idx]``; ``qweight`` is packed along *in*, as MLX packs, but transposed.

    ``qweight [in * bits / 32, out]`` int32, ``qzeros [groups, out * bits / 32]`` int32, ``scales [groups, out]``,
    ``g_idx [in]`` int32, the group of each input. Format ``gptq`` stores ``z - 1``, ``gptq_v2`` stores ``z``. Source:
    ``gptqmodel/nn_modules/qlinear`` of GPTQModel 7.7.
    """
    qweight, scales, qzeros = (layer.take(suffix, 2) for suffix in ("qweight", "scales", "qzeros"))
    order = layer.take_optional("g_idx", 1)
    if order is None and layer.config.get("desc_act"):
        layer.take("g_idx")
    form = layer.config.get("checkpoint_format", "gptq")
    if form not in ("gptq", "gptq_v2"):
        raise layer.error("qweight", "checkpoint_format gptq or gptq_v2", repr(form))
    groups, outputs = scales.shape
    layer.check("qweight", qweight, (qweight.shape[0], outputs))
    if order is not None:  # per-module overrides may give some layers other bits than the description
        inputs = order.shape[0]
    elif (size := layer.config.get("group_size", -1)) > 0:
        inputs = groups * size
    else:
        inputs = qweight.shape[0] * 32 // layer.config["bits"]
    bits = qweight.shape[0] * 32 // inputs
    if bits not in (2, 3, 4, 5, 6, 8) or qweight.shape[0] * 32 != inputs * bits:
        raise layer.error("qweight", f"2, 3, 4, 5, 6 or 8 bits for each of {inputs} inputs", list(qweight.shape))
    layer.check("qzeros", qzeros, (groups, outputs * bits // 32))
    if form == "gptq" and 32 % bits == 0:  # the tool subtracts from whole words: 1 comes back with the carries
        qzeros = qzeros.view(mx.uint32) + sum(1 << i for i in range(0, 32, bits))
    zeros = _unpack(qzeros, bits)
    if form == "gptq" and 32 % bits:
        zeros = (zeros + 1) & (2**bits - 1)
    # Whether g_idx is out of order cannot be seen without evaluating it: only a description that says no is believed.
    ordered = layer.config.get("desc_act") is False and inputs % groups == 0
    packed = mx.contiguous(qweight.T).view(mx.uint32)
    return _affine(layer, packed, mx.contiguous(scales.T), zeros.T, bits, None if ordered or order is None else order)


def _pack_quantized(layer: _Layer) -> tuple[Tensors, Parameters | None]:
    """compressed-tensors ``pack-quantized``: ``w = (q - z) * s``, packed as MLX packs.

    ``weight_packed [out, in * bits / 32]`` int32, ``weight_scale [out, groups]`` (``[out, 1]`` a channel, ``[1]`` the
    whole), asymmetric: ``weight_zero_point [out * bits / 32, groups]`` packed along *out*; act-order: ``weight_g_idx
    [in]``. Integers are stored with ``2 ** (bits - 1)`` added. Source: ``compressors/pack_quantized`` of
    compressed-tensors 0.19.
    """
    packed, scales = layer.take("weight_packed", 2), layer.take("weight_scale", 0, 1, 2)
    zeros, order = layer.take_optional("weight_zero_point", 2), layer.take_optional("weight_g_idx", 1)
    for suffix, array in (("weight_packed", packed), ("weight_zero_point", zeros)):
        if array is not None and array.dtype not in (mx.int32, mx.uint32):
            raise layer.error(suffix, "32-bit integers", array.dtype)
    packed = packed.view(mx.uint32)
    outputs, words = packed.shape
    if scales.size == 1:
        scales = mx.broadcast_to(scales.reshape(1, 1), (outputs, 1))
    layer.check("weight_scale", scales, (outputs, scales.shape[-1]))
    groups = scales.shape[1]
    fitting = {
        scheme["num_bits"]
        for scheme in _schemes(layer)
        if scheme.get("num_bits")
        and words * 32 % scheme["num_bits"] == 0
        and (groups == 1 or groups * (scheme.get("group_size") or 0) == words * 32 // scheme["num_bits"])
        and (zeros is None or zeros.shape[0] * 32 == outputs * scheme["num_bits"])
        and (order is None or order.shape[0] * scheme["num_bits"] == words * 32)
    }
    if len(fitting) != 1:
        what = f"{list(packed.shape)} with scales {list(scales.shape)}, which fits {sorted(fitting) or 'no'} bits"
        raise layer.error("weight_packed", "to fit one scheme of config_groups", what)
    (bits,) = fitting
    if zeros is None and _asymmetric(layer):
        layer.take("weight_zero_point")
    if zeros is not None:
        layer.check("weight_zero_point", zeros, (outputs * bits // 32, groups))
        zeros = _unpack(mx.contiguous(zeros.T), bits).T
    return _affine(layer, packed, scales, zeros, bits, order)


def _schemes(layer: _Layer) -> list[dict[str, Any]]:
    """The weight schemes of compressed-tensors that may apply to a layer: those that name it, else those for any."""
    groups = [group for group in (layer.config.get("config_groups") or {}).values() if group and group.get("weights")]
    # Its targets have transformers' names of the modules.
    name = layer.name.replace("language_model.model.", "model.language_model.").replace(
        "language_model.lm_head", "lm_head"
    )
    named = [
        group["weights"]
        for group in groups
        if any(t == name or (str(t).startswith("re:") and _matches(t[3:], name)) for t in group.get("targets") or [])
    ]
    return named or [group["weights"] for group in groups if "Linear" in (group.get("targets") or ["Linear"])]


def _asymmetric(layer: _Layer) -> bool:
    """Whether a layer has zero points by every scheme that may apply to it."""
    schemes = _schemes(layer)
    return bool(schemes) and all(scheme.get("symmetric") is False for scheme in schemes)


def _matches(pattern: str, name: str) -> bool:
    import re

    try:
        return re.match(pattern, name) is not None
    except re.error as error:
        raise CheckpointError(
            f"quantization_config: targets: expected a regular expression, found {pattern!r} ({error}). "
            "Take config.json from the original checkpoint."
        ) from None


def _int8(layer: _Layer) -> tuple[Tensors, Parameters | None]:
    """compressed-tensors ``int-quantized``: ``w = q * s`` (or ``(q - z) * s``), from ``weight [out, in]`` int8.

    ``weight_scale [out, groups]`` or ``[1]``, ``weight_zero_point`` int8 alike. MLX's integers are unsigned: 128 more.
    """
    weight, scales = layer.take("weight", 2), layer.take("weight_scale")
    zeros = layer.tensors.pop("weight_zero_point", None)
    outputs, inputs = weight.shape
    if scales.size in (1, outputs):
        scales = mx.broadcast_to(scales.reshape(-1, 1), (outputs, 1))
    layer.check("weight_scale", scales, (outputs, scales.shape[-1]))
    if zeros is None and _asymmetric(layer):
        layer.take("weight_zero_point")
    if zeros is not None:
        zeros = mx.broadcast_to(zeros.reshape(-1, scales.shape[1]), scales.shape).astype(mx.int32) + 128
    unsigned = weight.astype(mx.int32) + 128
    if inputs % 32:
        raise layer.error("weight", "a multiple of 32 inputs", inputs)
    return _affine(layer, unsigned.astype(mx.uint8).view(mx.uint32), scales, zeros, 8)


def _microscaled(layer: _Layer, suffix: str) -> tuple[Tensors, Parameters | None]:
    """OCP MXFP4 and MXFP8, as in MLX: ``w = fp4 * 2 ** (s - 127)``, low nibble first, or ``e4m3 * 2 ** (s - 127)``.

    ``[out, in / 2]`` or ``[out, in]`` uint8, ``weight_scale [out, in / 32]`` uint8 (E8M0). Source: OCP Microscaling
    Formats 1.0.
    """
    weight, scales = layer.take(suffix, 2), layer.take("weight_scale", 2)
    outputs, size = weight.shape
    layer.check("weight_scale", scales, (outputs, size // 16), (outputs, size // 32))
    mode, bits = ("mxfp4", 4) if scales.shape[1] == size // 16 else ("mxfp8", 8)
    if _has_mode(mode) and weight.dtype == mx.uint8:  # not the values that an older MLX has decoded
        return {"weight": weight.view(mx.uint32), "scales": scales}, {"group_size": 32, "bits": bits, "mode": mode}
    values = _fp4(weight) if bits == 4 else _e4m3(weight)
    return {"weight": (values * mx.repeat(_e8m0(scales), 32, 1)).astype(layer.dtype)}, None


def _nvfp4(layer: _Layer, weight: mx.array, scale: mx.array, global_scale: bool) -> tuple[Tensors, Parameters | None]:
    """NVFP4: ``w = fp4 * e4m3 * scale``, low nibble first.

    ``weight [out, in / 2]`` uint8, ``weight_scale [out, in / 16]`` e4m3, and one float32 scale for the whole, which
    ModelOpt stores (``weight_scale_2``) and compressed-tensors stores inverted (``weight_global_scale``). MLX's
    ``global_scale`` is that times 448 · 6, the largest product of the other two.
    """
    scales = layer.take("weight_scale")
    if weight.dtype != mx.uint8:
        raise layer.error("weight", "two values a byte (uint8)", weight.dtype)
    layer.check("weight_scale", scales, (weight.shape[0], weight.shape[1] // 8))
    if scale.size != 1:
        raise layer.error("weight_scale_2 or weight_global_scale", "one number", list(scale.shape))
    if global_scale:
        tensors = {"weight": weight.view(mx.uint32), "scales": scales, "global_scale": scale.reshape(()) * (448 * 6)}
        return tensors, {"group_size": 16, "bits": 4, "mode": "nvfp4", "global_scale": True}
    wide = _fp4(weight) * mx.repeat(_e4m3(scales) * scale.reshape(()), 16, 1)
    return {"weight": wide.astype(layer.dtype)}, None


def _fp8(layer: _Layer) -> tuple[Tensors, Parameters | None]:
    """FP8: ``w = e4m3 * s`` of the whole, the output channel or the block; despite its name, ``_inv`` multiplies too.

    ``weight […, R, C]`` e4m3; the scale is ``[]`` or ``[1]``, ``[R]`` or ``[R, 1]``, or ``[…, ⌈R/b⌉, ⌈C/b⌉]`` in the
    orientation of the weight, with the last blocks cut short (ModelOpt: ``[R/b, 1, C/b, 1]``). Blocks with E8M0 scales
    (uint8, powers of two) are MXFP8 with every scale repeated, and stay packed where 32 divides them. Sources:
    ``integrations/finegrained_fp8.py`` of transformers 5.23, compressed-tensors 0.19, ModelOpt 0.47.
    """
    weight = layer.take("weight", 2, 3)
    suffix = "weight_scale_inv" if "weight_scale_inv" in layer.tensors else "weight_scale"
    power = layer.has_bytes(suffix)
    scale = layer.take(suffix) if power else layer.take(suffix).astype(mx.float32)
    *lead, rows, columns = weight.shape
    if scale.ndim == 4 and scale.shape[1] == scale.shape[3] == 1:
        scale = scale.squeeze((1, 3))
    high, wide = _block_size(layer)
    blocks = (*lead, math.ceil(rows / high), math.ceil(columns / wide))
    if scale.shape == blocks:
        scale = mx.repeat(scale, high, -2)[..., :rows, :]
        if power and not lead and columns % 32 == wide % 32 == 0 and _has_mode("mxfp8"):
            scale = mx.repeat(scale, wide // 32, -1)[:, : columns // 32]
            return {"weight": weight.view(mx.uint32), "scales": scale}, {"group_size": 32, "bits": 8, "mode": "mxfp8"}
        scale = mx.repeat(scale, wide, -1)[..., :columns]
    elif scale.size == 1 and not lead and not layer.config.get("weight_block_size"):
        scale = scale.reshape(1, 1)
    elif scale.shape == (rows,) and not lead:
        scale = scale[:, None]
    else:
        layer.check(suffix, scale, blocks, (*lead, rows, 1), *([] if lead else [(1,)]))
    scale = _e8m0(scale) if power else scale
    return {"weight": (_e4m3(weight) * scale).astype(layer.dtype)}, None


def _block_size(layer: _Layer) -> tuple[int, int]:
    """Rows and columns of an FP8 block, from any description; 128 by 128 where none says."""
    blocks = [layer.config.get("weight_block_size"), *(s.get("block_structure") for s in _schemes(layer))]
    block = next((b for b in blocks if b), (128, 128))
    if len(block) != 2 or not all(isinstance(b, int) and b > 0 for b in block):
        raise layer.error("weight", "two positive integers for the block size", block)
    return block[0], block[1]


@functools.cache
def _loaded_e4m3() -> Any:
    """What `mlx.core.load` makes of float8 e4m3 here, from a file of one element."""
    header = b'{"x":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}'
    file = io.BytesIO(len(header).to_bytes(8, "little") + header + b"\0")
    arrays: Any = mx.load(file, format="safetensors")
    return arrays["x"].dtype


@functools.cache
def _has_mode(mode: str) -> bool:
    """Whether this MLX knows a quantization mode."""
    try:
        mx.quantize(mx.zeros((1, 32)), 32, {"mxfp4": 4, "mxfp8": 8}[mode], mode=mode)
    except (TypeError, ValueError):
        return False
    return True


@functools.cache
def _table(bits: int) -> mx.array:
    """The values of all codes of a small float: e2m1 (4 bits) and e4m3 (8 bits, the last of each sign is NaN)."""
    mantissa_bits, bias = (1, 1) if bits == 4 else (3, 7)
    values = []
    for code in range(2 ** (bits - 1)):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        fraction = mantissa / 2**mantissa_bits
        values.append((1 + fraction) * 2.0 ** (exponent - bias) if exponent else fraction * 2.0 ** (1 - bias))
    if bits == 8:
        values[-1] = math.nan
    return mx.array(values + [-value for value in values])


def _e4m3(codes: mx.array) -> mx.array:
    """The values of e4m3 in float32, from its codes, or from what an older MLX has decoded."""
    return _table(8)[codes] if codes.dtype == mx.uint8 else codes.astype(mx.float32)


def _fp4(pairs: mx.array) -> mx.array:
    """``[out, in / 2]`` bytes of two e2m1 codes, low nibble first → ``[out, in]`` float32."""
    return _table(4)[mx.stack([pairs & 15, pairs >> 4], -1).flatten(-2)]


def _e8m0(codes: mx.array) -> mx.array:
    """Powers of two with a bias of 127."""
    return mx.power(2.0, codes.astype(mx.float32) - 127)
