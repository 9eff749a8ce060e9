"""What MLX packed: whether the tensors of a layer belong together."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..errors import CheckpointError


def check_packed(path: str, tensors: dict[str, mx.array], shape: tuple[int, ...], parameters: dict[str, Any]) -> None:
    """Words, scales and biases of one layer, or of a stack, have the shapes that its description gives.

    Args:
        shape: of the float weight, ``[…, out, in]``.
        parameters: ``group_size``, ``bits`` and, unless it is affine, ``mode``.
    """
    *rows, inputs = shape
    bits, group_size = parameters.get("bits"), parameters.get("group_size")
    if not bits or not group_size:
        raise CheckpointError(
            f"{path}.scales: expected group_size and bits in quantization of config.json, found none. Take config.json "
            "from the original checkpoint."
        )
    affine = parameters.get("mode", "affine") == "affine"
    expected = {"weight": [*rows, inputs * bits // 32], "scales": [*rows, inputs // group_size]}
    if affine:
        expected["biases"] = expected["scales"]
    if "global_scale" in tensors:
        expected["global_scale"] = rows[:-1]
    described = f"by {bits} bits in groups of {group_size}"
    for suffix in sorted(expected.keys() | tensors.keys()):
        if suffix not in tensors or suffix not in expected:
            wanted, found = ("a tensor", "nothing") if suffix in expected else ("nothing", "a tensor")
            raise CheckpointError(
                f"{path}.{suffix}: expected {wanted} beside the others of its layer, {described}, found {found}. "
                "Is a file missing, or quantization in config.json that of another checkpoint?"
            )
        array, kind = tensors[suffix], mx.uint32 if suffix == "weight" else mx.floating
        if suffix == "scales" and not affine:
            kind = mx.uint8
        fits = mx.issubdtype(array.dtype, kind) if kind == mx.floating else array.dtype == kind
        if not fits or list(array.shape) != expected[suffix] or inputs * bits % 32 or inputs % group_size:
            raise shape_error(f"{path}.{suffix}", f"{expected[suffix]}, {described} of", shape, array)


def shape_error(name: str, expected: str, shape: tuple[int, ...], found: mx.array) -> CheckpointError:
    return CheckpointError(
        f"{name}: expected {expected} {list(shape)}, found {found.dtype} {list(found.shape)}. Are the sizes in "
        "config.json those of this checkpoint, and is no file of it missing?"
    )
