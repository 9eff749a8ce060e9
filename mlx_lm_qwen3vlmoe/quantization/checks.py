"""What MLX packed: whether the tensors of a layer belong together."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..errors import DAMAGED, MISSING_FILE, CheckpointError, MissingTensorError, differing, series, shape_error


def check_packed(
    path: str, tensors: dict[str, mx.array], shape: tuple[int, ...], fields: tuple[str, ...], parameters: dict[str, Any]
) -> None:
    """Words, scales and biases of one layer, or of a stack, have the shapes that its description gives.

    Args:
        shape: of the float weight, ``[…, out, in]``.
        fields: of the config, one an axis of ``shape``.
        parameters: ``group_size``, ``bits`` and, unless it is affine, ``mode``.
    """
    *rows, inputs = shape
    bits, group_size = parameters.get("bits"), parameters.get("group_size")
    described = f"({bits} bits in groups of {group_size})"
    affine = parameters.get("mode", "affine") == "affine"
    for suffix in ("weight", "scales", *(["biases"] if affine else [])):
        if suffix not in tensors:
            beside = f"this tensor beside the others of its layer {described if bits else ''}".rstrip()
            raise MissingTensorError(f"{path}.{suffix}", beside, "none", MISSING_FILE)
    if not bits or not group_size:
        raise CheckpointError(
            f"{path}.scales",
            "bits and group_size under quantization in config.json",
            "neither",
            "Use the config.json from the folder that mlx_lm.convert wrote.",
        )
    expected = {"weight": [*rows, inputs * bits // 32], "scales": [*rows, inputs // group_size]}
    if affine:
        expected["biases"] = expected["scales"]
    if "global_scale" in tensors:
        expected["global_scale"] = rows[:-1]
    remedy = f"Is quantization in config.json from this checkpoint? {DAMAGED}"
    for suffix, array in sorted(tensors.items()):
        name = f"{path}.{suffix}"
        if suffix not in expected:
            what = f"only {series(sorted(expected), 'and')} {described}"
            raise CheckpointError(name, what, "this tensor", remedy)
        kind = mx.uint32 if suffix == "weight" else mx.floating if affine or suffix != "scales" else mx.uint8
        if not (mx.issubdtype(array.dtype, kind) if kind == mx.floating else array.dtype == kind):
            what = "floats" if kind == mx.floating else str(kind)
            raise CheckpointError(name, f"{what} {described}", array.dtype, remedy)
        if list(array.shape) == expected[suffix] and inputs * bits % 32 == inputs % group_size == 0:
            continue
        wrong = differing(fields[:-1], rows, array.shape[:-1])
        if list(array.shape[:-1]) == expected[suffix][:-1]:
            wrong = ["bits and group_size under quantization"]
        what = f"the shape {expected[suffix]} for a weight {list(shape)} {described}"
        raise shape_error(name, what, list(array.shape), wrong)
