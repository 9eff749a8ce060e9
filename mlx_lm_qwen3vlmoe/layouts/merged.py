"""Projections that an engine merged into one, as vLLM's sharded state has them → the host's, in floats.

| merged                                   | rows, one after the other                   |
|------------------------------------------|---------------------------------------------|
| ``self_attn.qkv_proj [q + k + v, H]``    | ``q_proj``, ``k_proj``, ``v_proj``          |
| ``mlp.gate_up_proj [2 * dense width, H]``| ``gate_proj``, ``up_proj``                  |

Source: `QKVParallelLinear` and `MergedColumnParallelLinear` of vLLM, saved by `ShardedStateLoader` of one rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx

from ..config import linear_shape
from ..errors import CheckpointError
from .stacking import Layers

_MERGED = {
    ".self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    ".mlp.gate_up_proj": ("gate_proj", "up_proj"),
}
_ENDS = tuple(_MERGED)


def cut_merged(layers: Layers, sizes: dict[str, Any]) -> Layers:
    """Cut merged projections by their rows; raises `CheckpointError` for one that is quantized or does not fit."""
    found = [path for path in layers if path.endswith(_ENDS)]
    if not found:
        return layers
    layers = dict(layers)
    for path in found:
        tensors, parts = layers.pop(path), parts_of(path)
        shapes = [linear_shape(part, sizes) or (0, 0) for part in parts]
        rows = [shape[0] for shape in shapes]
        expected = (sum(rows), shapes[0][1])
        for suffix, array in tensors.items():
            if suffix != "weight" or array.shape != expected or not mx.issubdtype(array.dtype, mx.floating):
                merged = ", ".join(part.rpartition(".")[2] for part in parts)
                raise CheckpointError(
                    f"{path}.{suffix}",
                    f"one weight in floats, of the shape {list(expected)}, for {merged}",
                    f"{array.dtype} {list(array.shape)}",
                    "Use a checkpoint whose projections no engine has merged, sharded or quantized.",
                )
        if twice := [part for part in parts if part in layers]:
            raise CheckpointError(
                (f"{path}.weight", f"{twice[0]}.weight"),
                "one of these",
                "both",
                "Remove the file that a second tool left in the folder.",
            )
        starts = [sum(rows[:n]) for n in range(1, len(rows))]
        for part, piece in zip(parts, mx.split(tensors["weight"], starts), strict=True):
            layers[part] = {"weight": piece}
    return layers


def refuse_merged(layers: Iterable[str]) -> None:
    """There is no inverse, as the rows of one stored tensor are of layers of different heights."""
    if path := next((path for path in layers if path.endswith(_ENDS)), None):
        raise CheckpointError(
            f"{path}.weight",
            "separate projections in an original",
            "merged ones",
            "Use the checkpoint from which the engine that saved this one was started.",
        )


def parts_of(path: str) -> tuple[str, ...]:
    """The paths of what a projection was merged from; none if it was not."""
    parent = path.rpartition(".")[0]
    return tuple(f"{parent}.{part}" for end, parts in _MERGED.items() if path.endswith(end) for part in parts)
