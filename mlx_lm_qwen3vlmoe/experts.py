"""The experts of a layer, however stored ↔ the three arrays of the host's ``SwitchGLU``.

E = num_experts, H = hidden_size, I = moe_intermediate_size. The host keeps one array a projection for all experts of a
layer: gate and up ``[E, I, H]``, down ``[E, H, I]``, the ``[out, in]`` of a linear layer with the experts in front.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import mlx.core as mx

from .backend import as_out_in
from .decoding import Decoder
from .errors import CheckpointError, MissingTensorError
from .lazy import in_pieces
from .names import NUMBER
from .quantization import Decoded, Tensors, is_foreign
from .quantization.fp8 import halves

Shapes = dict[str, tuple[int, ...]]  # projection → experts, outputs and inputs
Layers = dict[str, Tensors]  # path → suffix → array
_EXPERT = re.compile(rf"(.+\.mlp)\.experts\.({NUMBER})\.((?:gate|up|down|gate_up)_proj)")
_FUSED = re.compile(r"(.+\.mlp)\.experts\.(gate_up_proj|down_proj)")
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class Experts:
    """The experts of one layer as they are stored: fused, or one by one.

    Attributes:
        fused: ``gate_up_proj`` and ``down_proj`` → their tensors.
        single: projection → number of the expert → its tensors.
    """

    def __init__(self, mlp: str):
        self.mlp = mlp
        self.fused: Layers = {}
        self.single: dict[str, dict[int, Tensors]] = {}

    def _first_missing(self, experts: int) -> str | None:
        """The name of the first weight that is not there."""
        if self.fused:
            names = ("gate_up_proj", "down_proj")
            return next((f"{self.mlp}.experts.{n}" for n in names if "weight" not in self.fused.get(n, {})), None)
        for projection in ("gate_up_proj", "down_proj") if "gate_up_proj" in self.single else _PROJECTIONS:
            found = self.single.get(projection, {})
            if len(found) < experts:
                number = next(number for number in range(experts) if number not in found)
                return f"{self.mlp}.experts.{number}.{projection}.weight"
        return None

    def check(self, experts: int, others: Layers) -> None:
        """One layout, and no expert too many."""
        mixed = "gate_up_proj" in self.single and len(self.single) > 2
        if (self.fused and self.single) or mixed or f"{self.mlp}.switch_mlp.down_proj" in others:
            raise CheckpointError(
                f"{self.mlp}: expected its experts in one layout, found two (of experts.gate_up_proj, "
                "experts.0.gate_proj, switch_mlp.gate_proj). Remove the file that a second tool left in the folder."
            )
        for projection, found in self.single.items():
            if beyond := [number for number in found if number >= experts]:
                raise CheckpointError(
                    f"{self.mlp}.experts.{min(beyond)}.{projection}.weight: expected experts 0 to {experts - 1}, found "
                    "it. Correct num_experts in config.json."
                )

    def in_out(self, sizes: dict[str, Any]) -> bool | None:
        """How fused experts are stored; None for others, or where one of the two tensors is not there."""
        fused = len(self.fused) == 2 and all("weight" in tensors for tensors in self.fused.values())
        return orientation(self.mlp, self.fused, sizes) if fused else None

    def decoded(self, sizes: dict[str, Any], decode: Decoder) -> dict[str, Decoded]:
        """``gate_proj``, ``up_proj`` and ``down_proj``, stacked as the host has them."""
        if missing := self._first_missing(sizes["num_experts"]):
            raise _missing(missing)
        if self.fused:
            return split(self.mlp, self.fused, sizes, decode)
        stacked = {
            projection: stack(f"{self.mlp}.experts", projection, experts, sizes, decode)
            for projection, experts in self.single.items()
        }
        return rejoined(self.mlp, stacked, sizes, decode)


def gather(layers: Layers) -> tuple[Layers, list[Experts]]:
    """Layers that are no experts, and the experts by the layers that they are of."""
    others: Layers = {}
    found: dict[str, Experts] = {}
    for path, tensors in layers.items():
        if ".mlp.experts" not in path:
            others[path] = tensors
        elif match := _EXPERT.fullmatch(path):
            mlp, number, projection = match.groups()
            found.setdefault(mlp, Experts(mlp)).single.setdefault(projection, {})[int(number)] = tensors
        elif match := _FUSED.fullmatch(path):
            found.setdefault(match[1], Experts(match[1])).fused[match[2]] = tensors
        else:
            raise CheckpointError(
                f"{path}.{next(iter(tensors))}: expected experts.gate_up_proj, experts.down_proj or "
                "experts.<e>.<p>_proj.weight, found a tensor of experts that belongs to nothing. Take the original "
                "checkpoint."
            )
    return others, list(found.values())


def check_orientations(found: list[Experts], sizes: dict[str, Any]) -> None:
    """Where one tensor of each layer is square, the layers have to agree on the other: it may have been reshaped."""
    if sizes["hidden_size"] not in (sizes["moe_intermediate_size"], 2 * sizes["moe_intermediate_size"]):
        return
    first: dict[bool, str] = {}
    for experts in found:
        if (in_out := experts.in_out(sizes)) is not None:
            first.setdefault(in_out, experts.mlp)
    if len(first) > 1:
        raise CheckpointError(
            f"{first[True]}.experts, {first[False]}.experts: expected one orientation in all layers, found [experts, "
            "in, out] and [experts, out, in]. Take the original checkpoint."
        )


def split(mlp: str, fused: Layers, sizes: dict[str, Any], decode: Decoder) -> dict[str, Decoded]:
    """Cut a layer's fused experts into gate, up and down, each ``[E, out, in]``.

    ``gate_up_proj`` holds two projections of every expert, first gate, then up, as the two halves of one axis (never
    interleaved): the origin multiplies once and cuts the product. The host multiplies twice, so the array is cut here.

    The official release stores ``[in, out]`` and multiplies ``x @ w``, so the halves lie on the last axis. The host
    keeps ``[out, in]``, as in every linear layer, and multiplies by the transpose, so the last two axes change places.
    transformers ≥ 5.2 stores ``[out, in]`` like the host: its halves lie on the axis before, and no axis moves.
    """
    e = sizes["num_experts"]
    in_out = orientation(mlp, fused, sizes)
    parts: dict[str, Decoded] = {}
    for name, tensors in fused.items():
        path, axis = f"{mlp}.experts.{name}", -1 if in_out else -2
        tensors = {suffix: _of_each(array, e) for suffix, array in tensors.items()}
        if name == "down_proj":
            parts[name] = _oriented(_decoded(path, tensors, e, decode), in_out)
        # Codes are cut before they are decoded: what waits for the other half is then small.
        elif pair := halves(tensors, axis, decode.settings(path)):
            for projection, half in zip(("gate_proj", "up_proj"), pair, strict=True):
                parts[projection] = _oriented(_decoded(path, half, e, decode), in_out)
        else:
            whole = _decoded(path, tensors, e, decode)
            cut = mx.split(whole.tensors["weight"], 2, axis)
            for projection, weight in zip(("gate_proj", "up_proj"), cut, strict=True):
                parts[projection] = _oriented(whole._replace(tensors={"weight": weight}), in_out)
    return parts


def _decoded(path: str, tensors: Tensors, experts: int, decode: Decoder) -> Decoded:
    return decode.of_experts(
        path, experts, lambda part: {suffix: array[part] if array.ndim else array for suffix, array in tensors.items()}
    )


def _of_each(array: mx.array, experts: int) -> mx.array:
    """One number for all experts → ``[E, 1, 1]``; other arrays as they are."""
    return mx.broadcast_to(array.reshape(1, 1, 1), (experts, 1, 1)) if array.shape in ((), (1,)) else array


def _oriented(decoded: Decoded, in_out: bool) -> Decoded:
    weight = decoded.tensors["weight"]
    return decoded._replace(tensors={"weight": as_out_in(weight)}) if in_out else decoded


def orientation(mlp: str, fused: Layers, sizes: dict[str, Any]) -> bool:
    """Whether fused experts are stored as ``[E, in, out]``, or with the axes swapped.

    Only the shape tells. H = 2I makes one tensor square, H = I the other: one always tells for both, which is also how
    transformers 5 reads what it saved of an official checkpoint with a square tensor, whose axes it leaves alone. Two
    tensors that contradict each other are nobody's.
    """
    e, h, i = sizes["num_experts"], sizes["hidden_size"], sizes["moe_intermediate_size"]
    found: dict[str, bool | None] = {}
    for name, shape in (("gate_up_proj", (e, h, 2 * i)), ("down_proj", (e, i, h))):
        swapped = (*shape[:-2], shape[-1], shape[-2])
        stored = fused[name]["weight"].shape
        if stored not in (shape, swapped):
            raise CheckpointError(
                f"{mlp}.experts.{name}: expected the shape {list(shape)} or {list(swapped)}, found "
                f"{list(stored)}. Are num_experts, hidden_size and moe_intermediate_size in config.json those of this "
                "checkpoint?"
            )
        found[name] = None if shape == swapped else stored == shape
    told = {name: in_out for name, in_out in found.items() if in_out is not None}
    if len(set(told.values())) > 1:
        raise CheckpointError(
            f"{mlp}.experts: expected gate_up_proj and down_proj in one orientation, [experts, in, out] or [experts, "
            f"out, in], found {list(fused['gate_up_proj']['weight'].shape)} and "
            f"{list(fused['down_proj']['weight'].shape)}. Take the original checkpoint."
        )
    return next(iter(told.values()))


def stack(path: str, projection: str, experts: dict[int, Tensors], sizes: dict[str, Any], decode: Decoder) -> Decoded:
    """Stack separate experts, each a linear layer ``[out, in]``, to ``[E, out, in]``: as stored, then decoded as one.

    Experts in different formats are decoded one by one, and brought to one that has the values of all.
    """
    paths = [f"{path}.{number}.{projection}" for number in range(sizes["num_experts"])]
    first = experts[0]
    if all(_alike(first, experts[n]) for n in range(1, len(paths))) and decode.describes_alike(paths):

        def stored(part: slice) -> Tensors:
            some = [experts[n] for n in range(len(paths))[part]]
            return {suffix: decode.stack(suffix, [tensors[suffix] for tensors in some]) for suffix in first}

        if is_foreign(first):
            return _with_weight(paths[0], decode.of_experts(paths[0], len(paths), stored))
        return _with_weight(paths[0], decode(paths[0], in_pieces(len(paths), stored)))
    single = [_with_weight(each, decode(each, experts[n])) for n, each in enumerate(paths)]
    shapes = [_shape(each) for each in single]
    ((most, _),) = Counter(shapes).most_common(1)
    for each, shape in zip(paths, shapes, strict=True):
        if shape != most:
            raise CheckpointError(
                f"{each}.weight: expected the shape {list(most)}, found {list(shape)}, unlike the other experts. "
                "Take the original checkpoint."
            )
    single = decode.in_common(single)
    tensors = {suffix: mx.stack([each.tensors[suffix] for each in single]) for suffix in single[0].tensors}
    return single[0]._replace(tensors=tensors)


def _with_weight(path: str, decoded: Decoded) -> Decoded:
    if "weight" not in decoded.tensors:
        raise _missing(f"{path}.weight")
    return decoded


def _missing(name: str) -> MissingTensorError:
    return MissingTensorError(
        f"{name}: expected with the other experts of its layer, found nothing. "
        "Is a file of the checkpoint missing, or num_experts wrong in config.json?"
    )


def _alike(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(
        array.shape == other[suffix].shape and array.dtype == other[suffix].dtype for suffix, array in one.items()
    )


def _shape(decoded: Decoded) -> tuple[int, ...]:
    """Experts, if they are stacked, outputs and inputs of a layer."""
    *rows, columns = decoded.tensors["weight"].shape or (1,)
    return *rows, columns * 32 // decoded.parameters["bits"] if decoded.parameters else columns


def rejoined(mlp: str, stacked: dict[str, Decoded], sizes: dict[str, Any], decode: Decoder) -> dict[str, Decoded]:
    """Stacked experts as gate, up and down, from what tools have made of them.

    - One ``gate_up_proj [2I, H]`` an expert, gate first, is cut in two.
    - transformers 5.0 and 5.1 took ``[E, H, 2I]`` for ``[E, 2I, H]``: they cut the wrong axis in two. Their "gate" is
      the upper half of an expert's ``gate_up [H, 2I]``, their "up" the lower, each ``[H/2, 2I]``, and "down" is still
      ``[I, H]``. Nothing is lost: rejoined, it is the official layout again (a packed one in float, as its groups run
      along the wrong axis). llm-compressor's and auto-round's model-free ways do the same.
    """
    e, h, i = sizes["num_experts"], sizes["hidden_size"], sizes["moe_intermediate_size"]
    good: Shapes = {"gate_proj": (e, i, h), "up_proj": (e, i, h), "down_proj": (e, h, i)}
    miscut: Shapes = {"gate_proj": (e, h // 2, 2 * i), "up_proj": (e, h // 2, 2 * i), "down_proj": (e, i, h)}
    if gate_up := stacked.pop("gate_up_proj", None):
        if _shape(gate_up) == (e, 2 * i, h):
            cut = {suffix: mx.split(array, 2, -2) for suffix, array in gate_up.tensors.items()}
            for half, projection in enumerate(("gate_proj", "up_proj")):
                tensors = {suffix: parts[half] for suffix, parts in cut.items()}
                stacked[projection] = gate_up._replace(tensors=tensors)
        else:
            good, stacked = {"gate_up_proj": (e, 2 * i, h), **good}, {"gate_up_proj": gate_up, **stacked}
    shapes = {projection: _shape(decoded) for projection, decoded in stacked.items()}
    # One of the two kinds of shapes may coincide (H = 2I or H = I), never both.
    if shapes == good:
        return stacked
    if shapes != miscut:
        wrong = next(projection for projection in shapes if shapes[projection] != good[projection])
        raise CheckpointError(
            f"{mlp}.experts.0.{wrong}.weight: expected the shape {list(good[wrong][1:])}, "
            f"found {list(shapes[wrong][1:])}. "
            "Are hidden_size and moe_intermediate_size in config.json those of this checkpoint?"
        )
    arrays = {name: decode.as_float(decoded, "cut along the wrong axis") for name, decoded in stacked.items()}
    gate, up = mx.split(mx.concatenate([arrays["gate_proj"], arrays["up_proj"]], -2), 2, -1)
    whole = {"gate_proj": gate, "up_proj": up, "down_proj": arrays["down_proj"]}
    return {projection: Decoded({"weight": as_out_in(array)}) for projection, array in whole.items()}
