"""Experts as files have them ↔ gate, up and down as the host stacks them; each step with its inverse beside it.

E = num_experts, H = hidden_size, I = moe_intermediate_size.

| step                                            | inverse                                      |
|-------------------------------------------------|----------------------------------------------|
| `split`: ``gate_up_proj [E, H, 2I]`` → two      | `join`, `as_in_out`                          |
| `as_out_in`: ``[E, in, out]`` → ``[E, out, in]`` | `as_in_out`                                  |
| `stack`: a tensor an expert → one for all       | `Part`: one row of the stack                 |
| `rejoined`: cut along the wrong axis → rightly  | `miscut`                                     |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx

from ..errors import MISSING_FILE, MissingTensorError, differing, shape_error
from ..quantization import Decoded, Tensors, halves, is_foreign
from ..runtime.backend import as_out_in
from ..runtime.lazy import in_pieces
from .decoder import Decoder

Shapes = dict[str, tuple[int, ...]]  # projection → experts, outputs and inputs
Layers = dict[str, Tensors]  # path → suffix → array
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class Part(NamedTuple):
    """The way back of one stored tensor: what of the host's it is made of, and how.

    Attributes:
        layers: paths of the host's layers, whose weights it is made of.
        form: these weights, or the same rows of each, ``[rows, …]`` → those rows of the stored tensor.
        row: the only row of theirs (an expert) that is stored here, without its axis; None for all.
    """

    layers: tuple[str, ...]
    form: Callable[..., mx.array] = lambda weight: weight
    row: int | None = None


def split(mlp: str, fused: Layers, in_out: bool, e: int, decoder: Decoder) -> dict[str, Decoded]:
    """Cut a layer's fused experts into gate, up and down, each ``[E, out, in]``.

    ``gate_up_proj`` holds two projections of every expert, first gate, then up, as the two halves of one axis (never
    interleaved): the origin multiplies once and cuts the product. The host multiplies twice, so the array is cut here.

    The official release stores ``[in, out]`` and multiplies ``x @ w``, so the halves lie on the last axis. The host
    keeps ``[out, in]``, as in every linear layer, and multiplies by the transpose, so the last two axes change places.
    transformers ≥ 5.2 stores ``[out, in]`` like the host: its halves lie on the axis before, and no axis moves.
    """
    parts: dict[str, Decoded] = {}
    axis = -1 if in_out else -2
    for name, tensors in fused.items():
        path, tensors = f"{mlp}.experts.{name}", {suffix: _of_each(array, e) for suffix, array in tensors.items()}
        projections = PROJECTIONS[:2] if name == "gate_up_proj" else PROJECTIONS[2:]
        # Codes are cut before they are decoded, if they can be: what waits for the other half is then small.
        pair = halves(tensors, axis, decoder.settings(path)) if name == "gate_up_proj" else None
        found = [_decoded(path, each, e, decoder) for each in pair or [tensors]]
        if in_out:  # MLX packs along the last axis, so what is turned below has to be floats
            found = [Decoded({"weight": decoder.as_float(each, "experts stored as [in, out]")}) for each in found]
        if len(found) < len(projections):
            found = cut(found[0], axis)
        for projection, each in zip(projections, found, strict=True):
            parts[projection] = Decoded({"weight": as_out_in(each.tensors["weight"])}) if in_out else each
    return parts


def cut(whole: Decoded, axis: int) -> list[Decoded]:
    """The first half and the second along an axis, -1 or -2, of floats; of what is packed, along -2, its outputs.

    Every tensor is cut but NVFP4's ``global_scale [E]``, one number for both halves of an expert.
    """
    pairs = {s: (a, a) if a.ndim == 1 else mx.split(a, 2, axis) for s, a in whole.tensors.items()}
    return [whole._replace(tensors={suffix: pair[half] for suffix, pair in pairs.items()}) for half in (0, 1)]


def join(gate: mx.array, up: mx.array) -> mx.array:
    """The inverse of the cut in `split`: gate and up ``[…, I, H]`` → ``[…, 2I, H]``."""
    return mx.concatenate([gate, up], -2)


def as_in_out(array: mx.array) -> mx.array:
    """The inverse of `as_out_in`: ``[…, out, in]`` → ``[…, in, out]``; its order in memory is the writer's affair."""
    return array.swapaxes(-1, -2)


def unsplit(mlp: str, in_out: bool) -> dict[str, Part]:
    """The inverse of `split`: fused tensors by their paths."""
    gate, up, down = (f"{mlp}.switch_mlp.{projection}" for projection in PROJECTIONS)
    return {
        f"{mlp}.experts.gate_up_proj": Part((gate, up), _joined_in_out if in_out else join),
        f"{mlp}.experts.down_proj": Part((down,), as_in_out) if in_out else Part((down,)),
    }


def _joined_in_out(gate: mx.array, up: mx.array) -> mx.array:
    return as_in_out(join(gate, up))


def _decoded(path: str, tensors: Tensors, experts: int, decoder: Decoder) -> Decoded:
    def stored(part: slice) -> Tensors:
        return {suffix: array[part] if array.ndim else array for suffix, array in tensors.items()}

    return decoder.stacked(path, experts, stored)


def _of_each(array: mx.array, experts: int) -> mx.array:
    """One number for all experts → ``[E, 1, 1]``; other arrays as they are."""
    return mx.broadcast_to(array.reshape(1, 1, 1), (experts, 1, 1)) if array.shape in ((), (1,)) else array


def stack(path: str, projection: str, experts: dict[int, Tensors], sizes: dict[str, Any], decoder: Decoder) -> Decoded:
    """Stack separate experts, each a linear layer ``[out, in]``, to ``[E, out, in]``: as stored, then decoded as one.

    Experts in different formats are decoded one by one, and brought to one that has the values of all.
    """
    paths = [f"{path}.{number}.{projection}" for number in range(sizes["num_experts"])]
    first = experts[0]
    alike = all(_alike(first, experts[n]) for n in range(1, len(paths))) and decoder.describes_alike(paths)
    if alike and decoder.stacks(paths[0], first):

        def stored(part: slice) -> Tensors:
            some = [experts[n] for n in range(len(paths))[part]]
            return {suffix: decoder.stack(suffix, [tensors[suffix] for tensors in some]) for suffix in first}

        if is_foreign(first):
            return _with_weight(paths[0], decoder.stacked(paths[0], len(paths), stored))
        return _with_weight(paths[0], decoder(paths[0], in_pieces(stored(slice(0, len(paths))), stored)))
    single = [_with_weight(each, decoder(each, experts[n])) for n, each in enumerate(paths)]
    shapes = [float_shape(each) for each in single]
    ((most, _),) = Counter(shapes).most_common(1)
    for each, shape in zip(paths, shapes, strict=True):
        if shape != most:
            raise shape_error(f"{each}.weight", f"the shape {list(most)} of the other experts", list(shape))
    single = decoder.in_common(single)
    tensors = {suffix: mx.stack([each.tensors[suffix] for each in single]) for suffix in single[0].tensors}
    return single[0]._replace(tensors=tensors)


def _with_weight(path: str, decoded: Decoded) -> Decoded:
    if "weight" not in decoded.tensors:
        raise missing(f"{path}.weight")
    return decoded


def missing(name: str) -> MissingTensorError:
    remedy = "Is a file of the checkpoint missing, or num_experts in config.json too large?"
    if ".mlp.experts.0." in name or name.endswith(
        (".mlp.experts.gate_up_proj.weight", ".mlp.experts.down_proj.weight")
    ):
        remedy = MISSING_FILE
    return MissingTensorError(name, "this tensor beside the other experts of its layer", "none", remedy)


def _alike(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(
        array.shape == other[suffix].shape and array.dtype == other[suffix].dtype for suffix, array in one.items()
    )


def float_shape(decoded: Decoded) -> tuple[int, ...]:
    """Experts, if they are stacked, outputs and inputs of a layer."""
    *rows, columns = decoded.tensors["weight"].shape or (1,)
    return *rows, columns * 32 // decoded.parameters["bits"] if decoded.parameters else columns


def rejoined(mlp: str, stacked: dict[str, Decoded], sizes: dict[str, Any], decoder: Decoder) -> dict[str, Decoded]:
    """Stacked experts as gate, up and down, from what tools have made of them.

    - One ``gate_up_proj [2I, H]`` an expert, gate first, is cut in two.
    - transformers 5.0 and 5.1 took ``[E, H, 2I]`` for ``[E, 2I, H]``: they cut the wrong axis in two. Their "gate" is
      the upper half of an expert's ``gate_up [H, 2I]``, their "up" the lower, each ``[H/2, 2I]``, and "down" is still
      ``[I, H]``. Nothing is lost: rejoined, it is the official layout again (a packed one in float, as its groups run
      along the wrong axis). llm-compressor's and auto-round's model-free ways do the same.
    """
    i, h = sizes["moe_intermediate_size"], sizes["hidden_size"]
    if (gate_up := stacked.get("gate_up_proj")) and float_shape(gate_up)[1:] == (2 * i, h):
        stacked["gate_proj"], stacked["up_proj"] = cut(stacked.pop("gate_up_proj"), -2)
    if not is_miscut(mlp, {projection: float_shape(decoded) for projection, decoded in stacked.items()}, sizes):
        return stacked
    arrays = {name: decoder.as_float(decoded, "cut along the wrong axis") for name, decoded in stacked.items()}
    gate, up = mx.split(mx.concatenate([arrays["gate_proj"], arrays["up_proj"]], -2), 2, -1)
    whole = {"gate_proj": gate, "up_proj": up, "down_proj": arrays["down_proj"]}
    return {projection: Decoded({"weight": as_out_in(array)}) for projection, array in whole.items()}


def is_miscut(mlp: str, shapes: Shapes, sizes: dict[str, Any]) -> bool:
    """Whether stacked experts were cut along the wrong axis; raises `CheckpointError` for shapes of neither kind."""
    e, h, i = sizes["num_experts"], sizes["hidden_size"], sizes["moe_intermediate_size"]
    good: Shapes = {"gate_up_proj": (e, 2 * i, h), "gate_proj": (e, i, h), "up_proj": (e, i, h), "down_proj": (e, h, i)}
    wrong: Shapes = {"gate_proj": (e, h // 2, 2 * i), "up_proj": (e, h // 2, 2 * i), "down_proj": (e, i, h)}
    # One of the two kinds of shapes may coincide (H = 2I or H = I), never both.
    for projection, shape in shapes.items():
        if shape != good[projection]:
            if shapes == wrong:
                return True
            name, expected, found = f"{mlp}.experts.0.{projection}.weight", good[projection][1:], shape[1:]
            fields = ["hidden_size", "moe_intermediate_size"][:: 1 if projection == "down_proj" else -1]
            raise shape_error(name, f"the shape {list(expected)}", list(found), differing(fields, expected, found))
    return False


def miscut(half: int, gate: mx.array, up: mx.array) -> mx.array:
    """The inverse of `rejoined` for what was cut along the wrong axis: an upper or lower half ``[…, H/2, 2I]``."""
    return mx.split(_joined_in_out(gate, up), 2, -2)[half]


def unstack(mlp: str, shapes: Shapes, sizes: dict[str, Any]) -> dict[str, Part]:
    """The inverse of `stack` and `rejoined`: one tensor an expert, by their paths.

    Args:
        shapes: of the stored tensors, with the number of experts in front.
    """
    gate, up, down = (f"{mlp}.switch_mlp.{projection}" for projection in PROJECTIONS)
    parts = {
        "gate_up_proj": Part((gate, up), join),
        "gate_proj": Part((gate,)),
        "up_proj": Part((up,)),
        "down_proj": Part((down,)),
    }
    if is_miscut(mlp, shapes, sizes):
        parts = {
            "gate_proj": Part((gate, up), partial(miscut, 0)),
            "up_proj": Part((gate, up), partial(miscut, 1)),
            "down_proj": Part((down,), as_in_out),
        }
    return {
        f"{mlp}.experts.{expert}.{projection}": parts[projection]._replace(row=expert)
        for projection in shapes
        for expert in range(sizes["num_experts"])
    }
