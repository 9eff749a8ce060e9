"""FP8: ``w = e4m3 * s``, with one scale for the whole, for each output, each block or each group; becomes float.

``weight […, R, C]`` e4m3. Despite its name, ``weight_scale_inv`` multiplies too. The scale is ``[]`` or ``[1]``,
``[R]`` or ``[R, 1]``, or ``[⌈R/b⌉, ⌈C/b⌉]`` in the orientation of the weight, with the last blocks cut short
(ModelOpt: ``[R/b, 1, C/b, 1]``). Blocks with e8m0 scales (powers of two) are MXFP8 with every scale repeated, and stay
packed where 32 divides them. Where GPTQModel says ``weight_scale_semantics`` ``inverse``, ``w = e4m3 /
weight_scale_inv``. `fbgemm_fp8` and SGLang's `w8a8_fp8` have a scale an output. ComfyUI's ``scale_weight`` is one for
the whole, and needs no description. AngelSlim 0.5 has two for fused experts, of gate and of up: ``[E, 2]``. Sources:
``integrations/finegrained_fp8.py`` of transformers 5.23, compressed-tensors 0.19, ModelOpt 0.47, GPTQModel 7.7.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import mlx.core as mx

from ..errors import check_block, series
from .family import Description, Family, by_rules, check_rules, rules
from .fields import Part
from .layer import IGNORED, Decoded, Layer, Tensors
from .microscaling import mxfp8
from .numbers import e4m3, e8m0, has_mode, loaded_e4m3

TENSOR, CHANNEL = (0, 0), (1, 0)
_SHARED: dict[Any, tuple[int, int]] = {"tensor": TENSOR, "row": CHANNEL}  # by GPTQModel's ``weight_scale_method``
_BLOCK = (128, 128)  # of the official releases; where nothing is said, the shape has to fit it


class Fp8(Family):
    methods = ("fp8", "fbgemm_fp8", "w8a8_fp8")
    detail = "fmt"
    marks = ("weight_scale_inv", "weight_scale", "scale_weight")
    fields = (
        *("fmt", "weight_block_size", "scale_fmt", "weight_scale_semantics", "weight_scale_method", "bits", "sym"),
        *("group_size", "desc_act", "format", "checkpoint_format", "data_type", "extra_config"),
        "is_checkpoint_fp8_serialized",
    )
    formats = (
        (
            "FP8 of the official releases, transformers, ModelOpt, compressed-tensors, AutoFP8, AngelSlim, fbgemm and "
            "SGLang (`w8a8_fp8`) | "
            "`weight` in e4m3, with float scales for the tensor, the channel or the block | float | 16 bits"
        ),
        (
            "FP8 in blocks with power-of-two scales | e4m3, with scales in E8M0 | "
            "`mxfp8`, with scales repeated; experts fused as `[E, in, out]` float | packed; 16 bits"
        ),
        "FP8 of ComfyUI | `weight` in e4m3, `scale_weight` | float | 16 bits",
        "FP8 by a cast, without scales | `weight` in e4m3, and no description | float | 16 bits",
    )
    undescribed = ("weight_scale_inv", "scale_weight")

    def check(self, description: Description) -> None:
        check_block("", description, "weight_block_size")
        check_rules(description)

    def parts(self, description: Description) -> Iterable[Part]:
        return rules(description, self.fields)

    def settings(self, description: Description, name: str) -> Description:
        return by_rules(description, name)

    def halves(self, tensors: Tensors, axis: int, settings: Description) -> tuple[Tensors, Tensors] | None:
        """A layer cut in two along an axis, -1 or -2, before it is decoded; None where that goes through a block."""
        *stack_shape, rows, columns = tensors["weight"].shape
        high, wide = described_block(settings) or _BLOCK
        border, block = (rows // 2, high) if axis == -2 else (columns // 2, wide)
        first, second = {}, {}
        for suffix, array in tensors.items():
            if suffix in IGNORED:
                continue
            shape = array.shape[len(stack_shape) :]
            if suffix == "weight" or (high and shape == _grid(rows, columns, high, wide) and border % block == 0):
                first[suffix], second[suffix] = mx.split(array, 2, axis)
            elif shape == (1, 1) and _grid(rows, columns, high or rows, wide or columns) == (1, 1):
                first[suffix] = second[suffix] = array
            else:
                return None
        return first, second

    def decode(self, layer: Layer) -> Decoded:
        if layer.has("scale_weight"):
            return scaled(layer, layer.take("weight", 2), "scale_weight", TENSOR)
        suffix = "weight_scale" if layer.has("weight_scale") else "weight_scale_inv"
        form = layer.settings.get("scale_fmt") or "ue8m0"
        if layer.has(suffix, mx.uint8) and form != "ue8m0":
            raise layer.error(suffix, f"floats, according to scale_fmt {form!r}", "powers of two (uint8)")
        shared = described_block(layer.settings)
        if method := layer.setting("weight_scale_method", "tensor, row or block", *_SHARED, "block", None):
            shared = _SHARED.get(method, shared)
        if layer.setting("weight_scale_semantics", "inverse, or nothing", "inverse", None):
            layer.tensors[suffix] = 1 / layer.floats(suffix).astype(mx.float32)
        return scaled(layer, layer.take("weight", 2), suffix, shared)


class Cast(Family):
    """A whole model that was cast to e4m3, which nothing describes: ``w = e4m3``."""

    methods = ("e4m3 without scales",)  # of `quantization.CAST`
    detail = ""
    marks = ()
    formats = ()

    def halves(self, tensors: Tensors, axis: int, settings: Description) -> tuple[Tensors, Tensors] | None:
        first, second = mx.split(tensors["weight"], 2, axis)
        return {"weight": first}, {"weight": second}

    def decode(self, layer: Layer) -> Decoded:
        weight = layer.take("weight", 2)
        if weight.dtype != loaded_e4m3():
            raise layer.error("weight", "e4m3", weight.dtype)
        return Decoded({"weight": e4m3(weight, layer.dtype)}, None, "FP8 without scales")


def scaled(layer: Layer, weight: mx.array, suffix: str, block: tuple[int, int] | None) -> Decoded:
    """e4m3 times the scale of that name.

    Args:
        block: rows and columns that share a scale, as described, where 0 is all of them: `TENSOR`, `CHANNEL` or blocks;
            None where the description says nothing.
    """
    scale = layer.take(suffix)
    if weight.dtype != loaded_e4m3():
        raise layer.error("weight", "e4m3", weight.dtype)
    rows, columns = layer.shape(weight)
    scale, high, wide = _in_blocks(layer, suffix, scale, (rows, columns), block)
    power = scale.dtype == mx.uint8
    if power and columns % 32 == wide % 32 == 0 and weight.dtype == mx.uint8 and has_mode("mxfp8"):
        return mxfp8(layer, weight, spread(spread(scale, -2, rows, high, 1), -1, columns, wide, 32))
    # A product is rounded once in 16 bits as well, if both factors have that type.
    exact = layer.dtype if scale.dtype == layer.dtype else mx.float32
    scale = e8m0(scale) if power else scale.astype(exact)
    # The largest pieces that make up the blocks, of which the last may be cut short, and the whole.
    tall, broad = math.gcd(rows, high), math.gcd(columns, wide)
    scale = spread(spread(scale, -2, rows, high, tall), -1, columns, wide, broad)
    pieces = e4m3(weight, exact).reshape(*layer.stack_shape, rows // tall, tall, columns // broad, broad)
    product = pieces * mx.expand_dims(scale, (-3, -1))
    return Decoded({"weight": product.reshape(weight.shape).astype(layer.dtype)}, None, "FP8 with float scales")


def _in_blocks(
    layer: Layer, suffix: str, scale: mx.array, shape: tuple[int, int], block: tuple[int, int] | None
) -> tuple[mx.array, int, int]:
    """The scale as ``[⌈rows / high⌉, ⌈columns / wide⌉]``, and these two."""
    rows, columns = shape
    found = layer.shape(scale)
    if len(found) == 4 and found[1] == found[3] == 1:  # ModelOpt's
        scale = scale.squeeze((-3, -1))
        found = layer.shape(scale)
    expected = []
    for high, wide in [_BLOCK, TENSOR, CHANNEL] if block is None else [block]:
        high, wide = high or rows, wide or columns
        grid = _grid(rows, columns, high, wide)
        # One number may be written in any way, and a column without its axis; but not in ``weight_scale_inv``'s blocks.
        flat = (rows,) if grid == (rows, 1) else (1,) * len(found) if grid == (1, 1) else grid
        if found == grid or (found == flat and not (suffix == "weight_scale_inv" and block and block[0] and block[1])):
            return scale.reshape(*layer.stack_shape, *grid), high, wide
        expected.append(list(grid))
    raise layer.error(suffix, f"the shape {series(expected)}", list(found))


def described_block(settings: dict[str, Any]) -> tuple[int, int] | None:
    """What `scaled` takes as ``block``, from ``weight_block_size``."""
    if "weight_block_size" not in settings:
        return None
    high, wide = settings["weight_block_size"] or TENSOR
    return high, wide


def spread(scale: mx.array, axis: int, size: int, block: int, piece: int) -> mx.array:
    """One number a block along an axis of ``size`` → one a piece of it, where pieces divide the blocks and the axis."""
    if piece == block:
        return scale
    # Until: MLX 0.30.1. Older ones take wrong numbers of what was taken along another axis, unless that is contiguous.
    return mx.contiguous(mx.take(scale, mx.arange(0, size, piece) // block, axis))


def _grid(rows: int, columns: int, high: int, wide: int) -> tuple[int, int]:
    """How many blocks, the last of which may be cut short, make up a matrix."""
    return math.ceil(rows / high), math.ceil(columns / wide)
