"""The experts of a layer, however stored ↔ the three arrays of the host's ``SwitchGLU``.

E = num_experts, H = hidden_size, I = moe_intermediate_size. The host keeps one array a projection for all experts of a
layer: gate and up ``[E, I, H]``, down ``[E, H, I]``, the ``[out, in]`` of a linear layer with the experts in front.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..errors import CheckpointError, beyond, series, shape_error
from ..quantization import Decoded, Tensors, is_foreign
from .decoder import Decoder
from .names import NUMBER, stranger
from .stacking import PROJECTIONS, Layers, Part, Shapes, missing, rejoined, split, stack, unsplit, unstack

_EXPERT = re.compile(rf"(.+\.mlp)\.experts\.({NUMBER})\.((?:gate|up|down|gate_up)_proj)")
_FUSED = re.compile(r"(.+\.mlp)\.experts\.(gate_up_proj|down_proj)")


class Layout(NamedTuple):
    """A row of the table of layouts in docs/checkpoints.md: its name in `inspect`, and its tensors."""

    name: str
    tensors: str


IN_OUT = Layout(
    "fused experts, [experts, in, out] (official release, transformers 4.57)",
    "`experts.gate_up_proj [E, H, 2I]`, `experts.down_proj [E, I, H]`",
)
OUT_IN = Layout(
    "fused experts, [experts, out, in] (transformers 5.2 or newer)",
    "`experts.gate_up_proj [E, 2I, H]`, `experts.down_proj [E, H, I]`; or `experts.w13_weight`, `experts.w2_weight`",
)
FLAT = Layout(
    "fused experts, flat, in either order (bitsandbytes)",
    "`experts.gate_up_proj [E * 2I * H / 2, 1]` of two values a byte, with `.quant_state…`",
)
MISCUT = Layout(
    "one tensor an expert, cut along the wrong axis (transformers 5.0, 5.1)",
    "`experts.0.gate_proj.weight [H/2, 2I]`, … `down_proj.weight [I, H]`",
)
SINGLE = Layout(
    "one tensor an expert",
    "`experts.0.gate_proj.weight [I, H]`, … `down_proj.weight [H, I]`; or `experts.gate_proj.0.weight`, …",
)
GATE_UP = Layout(
    "one tensor an expert, gate and up in one (AutoRound)",
    "`experts.gate_up_projs.0.qweight`, `experts.down_projs.0.qweight`",
)
STACKED = Layout(
    "stacked experts (mlx-lm, mlx-vlm)",
    "`switch_mlp.gate_proj.weight`, with `.scales` and `.biases` if quantized",
)
LAYOUTS = (IN_OUT, OUT_IN, FLAT, MISCUT, SINGLE, GATE_UP, STACKED)
ONE_BY_ONE = (MISCUT, SINGLE, GATE_UP)


class Experts:
    """The experts of one layer as they are stored: fused, or one by one.

    Attributes:
        fused: ``gate_up_proj`` and ``down_proj`` → their tensors, as stored, or by `unfold`.
        shapes: the same → their shape ``(experts, rows, columns)`` as floats, where it is known.
        single: projection → number of the expert → its tensors.
    """

    def __init__(self, mlp: str):
        self.mlp = mlp
        self.fused: Layers = {}
        self.shapes: Shapes = {}
        self.single: dict[str, dict[int, Tensors]] = {}

    def _first_missing(self, experts: int) -> str | None:
        """The name of the first weight that is not there."""
        if self.fused:
            names = ("gate_up_proj", "down_proj")
            return next((f"{self.mlp}.experts.{n}.weight" for n in names if n not in self.shapes), None)
        for projection in ("gate_up_proj", "down_proj") if "gate_up_proj" in self.single else PROJECTIONS:
            found = self.single.get(projection, {})
            if len(found) < experts:
                number = next(number for number in range(experts) if number not in found)
                return f"{self.mlp}.experts.{number}.{projection}.weight"
        return None

    def check(self, experts: int, others: Layers) -> None:
        """One layout, and no expert too many."""
        mixed = "gate_up_proj" in self.single and len(self.single) > 2
        if (self.fused and self.single) or mixed or f"{self.mlp}.switch_mlp.down_proj" in others:
            names = [f"experts.{name}" for name in self.fused]
            names += [f"experts.{min(found)}.{projection}" for projection, found in self.single.items()]
            names += [f"switch_mlp.{name}" for name in PROJECTIONS if f"{self.mlp}.switch_mlp.{name}" in others]
            raise CheckpointError(
                tuple(f"{self.mlp}.{name}.weight" for name in names),
                "the experts of a layer in one layout",
                "more than one",
                "Remove the file that a second tool left in the folder.",
            )
        for projection, found in self.single.items():
            if extra := [number for number in found if number >= experts]:
                name = f"{self.mlp}.experts.{min(extra)}.{projection}.weight"
                raise beyond(name, "expert", min(extra), experts, "num_experts")

    def unfold(self, experts: int, decoder: Decoder | None = None) -> None:
        """Find the shapes of fused experts, and give each tensor that another tool stores flat an axis for them."""
        for name, tensors in self.fused.items():
            shape = tensors["weight"].shape if "weight" in tensors else None
            if decoder and is_foreign(tensors):
                self.fused[name], shape = decoder.fused(f"{self.mlp}.experts.{name}", tensors, experts)
            if shape is not None:
                self.shapes[name] = shape

    def layout(self, sizes: dict[str, Any]) -> Layout:
        """As the shapes of stored weights tell; those that a tool packed tell it only once they are decoded."""
        stored = self.fused | {name: next(iter(found.values())) for name, found in self.single.items()}
        shapes = {name: list(tensors["weight"].shape) for name, tensors in stored.items() if "weight" in tensors}
        gate_up, gate, down = (shapes.get(name, []) for name in ("gate_up_proj", "gate_proj", "down_proj"))
        if self.fused:
            if len(gate_up) == 2:
                return FLAT
            return IN_OUT if _inputs_first(gate_up, down) else OUT_IN
        if "gate_up_proj" in self.single:
            return GATE_UP
        h, i = sizes.get("hidden_size"), sizes.get("moe_intermediate_size")
        return MISCUT if down == [i, h] and gate == [down[1] // 2, 2 * down[0]] else SINGLE

    def in_out(self, sizes: dict[str, Any]) -> bool | None:
        """How fused experts are stored; None for others, or where one of the two tensors is not there."""
        return orientation(self.mlp, self.shapes, sizes) if len(self.shapes) == 2 else None

    def decoded(self, sizes: dict[str, Any], decoder: Decoder) -> dict[str, Decoded]:
        """``gate_proj``, ``up_proj`` and ``down_proj``, stacked as the host has them."""
        if name := self._first_missing(sizes["num_experts"]):
            raise missing(name)
        if self.fused:
            in_out = orientation(self.mlp, self.shapes, sizes)
            return split(self.mlp, self.fused, in_out, sizes["num_experts"], decoder)
        stacked = {
            projection: stack(f"{self.mlp}.experts", projection, experts, sizes, decoder)
            for projection, experts in self.single.items()
        }
        return rejoined(self.mlp, stacked, sizes, decoder)

    def parts(self, sizes: dict[str, Any]) -> dict[str, Part]:
        """The inverse of `decoded`, of complete and unquantized experts: what each is made of, by its path."""
        if self.fused:
            self.unfold(sizes["num_experts"])
            return unsplit(self.mlp, orientation(self.mlp, self.shapes, sizes))
        shapes = {
            projection: (sizes["num_experts"], *experts[0]["weight"].shape)
            for projection, experts in self.single.items()
        }
        return unstack(self.mlp, shapes, sizes)


def layout_of(layers: Layers, sizes: dict[str, Any]) -> Layout | None:
    """How the first experts of a checkpoint are stored; None without experts. Raises `CheckpointError`."""
    others, found = gather(layers)
    if found:
        return found[0].layout(sizes)
    return STACKED if any(".switch_mlp." in path for path in others) else None


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
            raise stranger(f"{path}.{next(iter(tensors))}")
    return others, list(found.values())


def host_paths(path: str) -> tuple[str, ...]:
    """The host's layers that a stored layer is part of."""
    match = _EXPERT.fullmatch(path)
    mlp, name = (match[1], match[3]) if match else (path.rpartition(".experts.")[0], path.rpartition(".")[2])
    if not match and not _FUSED.fullmatch(path):
        return (path,)
    names = PROJECTIONS[:2] if name == "gate_up_proj" else (name,)
    return tuple(f"{mlp}.switch_mlp.{each}" for each in names)


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
            tuple(f"{first[in_out]}.experts.gate_up_proj.weight" for in_out in (True, False)),
            "experts with their axes in one order in all layers",
            "[experts, in, out] and [experts, out, in]",
            "Is a file from another checkpoint in the folder? If not, save the checkpoint again with one version of "
            "transformers.",
        )


def orientation(mlp: str, shapes: Shapes, sizes: dict[str, Any]) -> bool:
    """Whether fused experts of these shapes are stored as ``[E, in, out]``, or with the axes swapped.

    Only the shape tells. H = 2I makes one tensor square, H = I the other: one always tells for both, which is also how
    transformers 5 reads what it saved of an official checkpoint with a square tensor, whose axes it leaves alone. Two
    tensors that contradict each other are nobody's.
    """
    e, h, i = sizes["num_experts"], sizes["hidden_size"], sizes["moe_intermediate_size"]
    in_out = _inputs_first(shapes["gate_up_proj"], shapes["down_proj"])
    contradicting = False
    for name, shape in (("gate_up_proj", (e, h, 2 * i)), ("down_proj", (e, i, h))):
        swapped = (*shape[:-2], shape[-1], shape[-2])
        stored = shapes[name]
        if stored not in (shape, swapped):
            fields = {"num_experts": e, "hidden_size": h, "moe_intermediate_size": math.prod(shape) // (e * h)}
            changed = len(stored) == 3 and sorted(stored) != sorted(shape)
            wrong = [field for field, size in fields.items() if changed and size not in stored]
            expected = f"the shape {series(dict.fromkeys([str(list(shape)), str(list(swapped))]))}"
            raise shape_error(f"{mlp}.experts.{name}.weight", expected, list(stored), wrong)
        contradicting |= stored != (shape if in_out else swapped)
    if contradicting:
        found = (str(list(shapes[name])) for name in ("gate_up_proj", "down_proj"))
        raise CheckpointError(
            (f"{mlp}.experts.gate_up_proj.weight", f"{mlp}.experts.down_proj.weight"),
            "both [experts, in, out] or both [experts, out, in]",
            " and ".join(found),
            "No known tool writes one of each. Was one of the two transposed by hand?",
        )
    return in_out


def _inputs_first(gate_up: Sequence[int], down: Sequence[int]) -> bool:
    """``[E, H, 2I]`` and ``[E, I, H]``: H is the inputs of gate and up, and the outputs of down."""
    return gate_up[1:2] == down[2:3]
