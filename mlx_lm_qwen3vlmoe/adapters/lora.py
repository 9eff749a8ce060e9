"""An adapter apart from any format: a low-rank change of the weights of some modules of the host's.

``weight + scale * b @ a``, with ``a [rank, in]`` and ``b [out, rank]``, or ``[experts, rank, in]`` and ``[experts, out,
rank]`` for the experts of a layer. For embeddings, in is the vocabulary and out the hidden size. With DoRA, a row of
the sum is then brought to the length that ``magnitude [out]`` gives.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx

from ..config import axes
from ..errors import CheckpointError
from ..layouts.names import EMBEDDINGS, HEAD, MODEL_PREFIX, NUMBER, host_name
from .files import broken

_LAYER = rf"{re.escape(MODEL_PREFIX)}layers\.{NUMBER}"
_MODULE = re.compile(
    rf"{_LAYER}\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|(?:switch_mlp\.)?(?:gate|up|down)_proj))"
    rf"|{re.escape(HEAD)}|{re.escape(EMBEDDINGS)}"
)


MERGE = "Merge the adapter with PEFT, and load the merged checkpoint."


class Lora(NamedTuple):
    """The change of one module."""

    a: mx.array
    b: mx.array
    scale: float
    magnitude: mx.array | None = None

    @property
    def rank(self) -> int:
        return int(self.a.shape[-2])

    def with_rank(self, rank: int) -> Lora:
        """The same change, with zeros up to a rank."""
        none = [(0, 0)] * (self.a.ndim - 2)
        missing = rank - self.rank
        a, b = mx.pad(self.a, [*none, (0, missing), (0, 0)]), mx.pad(self.b, [*none, (0, 0), (0, missing)])
        return self._replace(a=a, b=b) if missing else self

    def cut(self, rank: int) -> Lora:
        """The same change, without what `with_rank` put there."""
        return self._replace(a=self.a[..., :rank, :], b=self.b[..., :rank])

    def used_rank(self) -> int:
        """The rank without zeros at the end. Evaluates both matrices."""
        used = ((self.a != 0).any(axis=-1) | (self.b != 0).any(axis=-2)).reshape(-1, self.rank).any(axis=0)
        last: Any = (used * mx.arange(1, self.rank + 1)).max().item()
        return max(last, 1)

    def with_scale(self, scale: float) -> Lora:
        """The same change in float32, with the scale that it had in B."""
        if scale == self.scale:
            return self
        return self._replace(b=self.b.astype(mx.float32) * (self.scale / scale), scale=scale)


@dataclass
class Adapter:
    """The modules by their paths in the host's model, and what both formats have in their configs.

    Attributes:
        modules: path in the host's model → its change.
        names: path in the host's model → the module's name in the file.
        dropout: of further training.
        base: the base model's name, as the adapter has it.
    """

    modules: dict[str, Lora] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    dropout: float = 0.0
    base: str | None = None

    @property
    def dora(self) -> bool:
        return any(lora.magnitude is not None for lora in self.modules.values())


def in_common(changes: Iterable[Lora]) -> tuple[int, float]:
    """A rank that is enough for all, and their scale if it is one."""
    changes = list(changes)
    scales = {lora.scale for lora in changes}
    return max(lora.rank for lora in changes), scales.pop() if len(scales) == 1 else 1.0


def stack(path: str, experts: list[Lora | None]) -> Lora:
    """Separate experts as one change; None is one that is not changed."""
    rank, scale = in_common(lora for lora in experts if lora)
    first = next(lora for lora in experts if lora)
    none = Lora(mx.zeros_like(first.a), mx.zeros_like(first.b), scale)
    found = [(lora or none).with_scale(scale).with_rank(rank) for lora in experts]
    for number, lora in enumerate(found):
        if lora.a.shape != found[0].a.shape or lora.b.shape != found[0].b.shape:
            shapes, others = (f"A {list(each.a.shape)} and B {list(each.b.shape)}" for each in (lora, found[0]))
            where = path.replace("switch_mlp", f"experts.{number}")
            raise broken(where, f"{others}, as in the other experts", shapes)
    return Lora(mx.stack([lora.a for lora in found]), mx.stack([lora.b for lora in found]), scale, first.magnitude)


def host_path(module: str) -> str | None:
    """The path of a module in the host's model: None for one of vision, and empty for what no such model has."""
    try:
        name = host_name(f"{module}.weight")
    except CheckpointError:
        return ""
    return name and name.removesuffix(".weight")


def is_expert(path: str) -> bool:
    return ".switch_mlp." in path


def layer_order(path: str) -> tuple[int, str]:
    """For sorting: layer by layer, what is of no layer first."""
    match = re.search(r"\.layers\.(\d+)\.", path)
    return (int(match[1]) if match else -1, path)


def sizes(modules: dict[str, Lora]) -> dict[str, int]:
    """The sizes of the model that changes of its modules tell, by the names that its config has for them.

    Raises `CheckpointError` where two modules tell different ones.
    """
    known: dict[str, tuple[int, str]] = {}
    for path, lora in modules.items():
        outputs, inputs = axes(path)[-2:] if path != EMBEDDINGS else axes(path)[::-1]
        found = [(inputs, lora.a.shape[-1]), (outputs, lora.b.shape[-2])]
        if is_expert(path):
            found.append(("num_experts", lora.a.shape[0]))
        for name, size in found:
            first, where = known.setdefault(name, (size, path))
            if first != size:
                raise broken((where, path), f"one value for {name}", f"{first} and {size}")
    return {name: size for name, (size, _) in known.items()}


def check_shapes(path: str, lora: Lora) -> None:
    """Raise `CheckpointError` for a change of what no host has, or whose matrices do not belong together."""
    if not _MODULE.fullmatch(path):
        raise CheckpointError(path, "a linear layer of the language model", "another module", MERGE)
    stack, stacked, outputs = lora.a.shape[:-2], is_expert(path), lora.b.shape[-2]
    if len(stack) != stacked or lora.b.shape != (*stack, outputs, lora.rank):
        raise broken(path, "A [rank, in] and B [out, rank]", f"A {list(lora.a.shape)} and B {list(lora.b.shape)}")
    if lora.magnitude is not None and (stacked or path == EMBEDDINGS):
        raise CheckpointError(path, "LoRA", "DoRA, which differs between mlx_lm and PEFT for this module", MERGE)
    if lora.magnitude is not None and lora.magnitude.shape != (outputs,):
        raise broken(path, f"a magnitude of the shape [{outputs}]", list(lora.magnitude.shape))


def unlike_base(path: str, expected: str, found: object) -> CheckpointError:
    remedy = "Is the base model the one that the adapter was trained on? If not, name that one with --model."
    return CheckpointError(path, expected, found, remedy)


def check(adapter: Adapter, shapes: dict[str, tuple[int, ...]] | None) -> None:
    """Raise `CheckpointError` for a change that has no module, or other sizes than its own or those of the others.

    Args:
        adapter: of any format.
        shapes: path → shape of the weight, of the base model; None where it is not at hand.
    """
    if not adapter.modules:
        remedy = "Is the adapter for vision layers only? A text model has no use for it."
        raise CheckpointError("adapter", "LoRA of the language model", "none", remedy)
    for path, lora in adapter.modules.items():
        check_shapes(path, lora)
        if adapter.dora and lora.magnitude is None:
            raise broken(path, "DoRA, as in the other modules", "LoRA")
        found = (*lora.a.shape[:-2], lora.b.shape[-2], lora.a.shape[-1])
        if path == EMBEDDINGS:
            found = found[::-1]
        if shapes is not None and shapes.get(path) != found:
            if path not in shapes:
                raise unlike_base(path, "a module that the base model has", "one that it does not have")
            raise unlike_base(path, f"{list(shapes[path])}, as the weight of the base model", list(found))
    sizes(adapter.modules)
