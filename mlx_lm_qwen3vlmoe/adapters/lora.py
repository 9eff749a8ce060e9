"""An adapter apart from any format: a low-rank change of the weights of some modules of the host's.

``weight + scale * b @ a``, with ``a [rank, in]`` and ``b [out, rank]``, or ``[experts, rank, in]`` and ``[experts, out,
rank]`` for the experts of a layer. For embeddings, in is the vocabulary and out the hidden size. With DoRA, a row of the
sum is then brought to the length that ``magnitude [out]`` gives.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import mlx.core as mx

from ..errors import CheckpointError
from ..names import DECODER, EMBEDDINGS, HEAD, NUMBER, shortened

LAYER = rf"{re.escape(DECODER)}layers\.{NUMBER}"
_MODULE = re.compile(
    rf"{LAYER}\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|(?:switch_mlp\.)?(?:gate|up|down)_proj))"
    rf"|{re.escape(HEAD)}|{re.escape(EMBEDDINGS)}"
)


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
        dropout: of further training.
        base: the base model's name, as the adapter has it.
    """

    modules: dict[str, Lora] = field(default_factory=dict)
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
        if lora.a.shape != found[0].a.shape or lora.b.shape != found[0].b.shape or lora.magnitude is not None:
            raise CheckpointError(
                f"{path.replace('switch_mlp', f'experts.{number}')}: expected LoRA of the shapes of the other experts, "
                f"found {list(lora.a.shape)} and {list(lora.b.shape)}{' with DoRA' * (lora.magnitude is not None)}."
            )
    return Lora(mx.stack([lora.a for lora in found]), mx.stack([lora.b for lora in found]), scale)


def is_expert(path: str) -> bool:
    return ".switch_mlp." in path


def layer_order(path: str) -> tuple[int, str]:
    """For sorting: layer by layer, what is of no layer first."""
    match = re.search(r"\.layers\.(\d+)\.", path)
    return (int(match[1]) if match else -1, path)


def sizes(path: str, lora: Lora) -> dict[str, int]:
    """The sizes of the model that a module's change tells: ``hidden_size``, ``num_experts``."""
    inputs, outputs = lora.a.shape[-1], lora.b.shape[-2]
    into = path.endswith(("down_proj", "o_proj", EMBEDDINGS))
    found = {"hidden_size": outputs if into else inputs}
    if path.endswith("mlp.gate"):
        found["num_experts"] = outputs
    elif is_expert(path):
        found["num_experts"] = lora.a.shape[0]
    return found


def check(adapter: Adapter, shapes: dict[str, tuple[int, ...]] | None) -> None:
    """Raise `CheckpointError` for a change that has no module, or other sizes than its own or those of the others.

    Args:
        adapter: of any format.
        shapes: path → shape of the weight, of the base model; None where it is not at hand.
    """
    if not adapter.modules:
        raise CheckpointError("adapter: expected LoRA of the language model, found none. Is it for vision layers only?")
    known: dict[str, tuple[int, str]] = {}
    for path, lora in adapter.modules.items():
        if not _MODULE.fullmatch(path):
            raise CheckpointError(
                f"{shortened(path)}: expected a linear layer of the language model, found another. Is the adapter of "
                "another model type?"
            )
        stack, stacked = lora.a.shape[:-2], is_expert(path)
        inputs, outputs = lora.a.shape[-1], lora.b.shape[-2]
        if len(stack) != stacked or lora.b.shape != (*stack, outputs, lora.rank):
            raise CheckpointError(
                f"{path}: expected A [rank, in] and B [out, rank], found {list(lora.a.shape)} and "
                f"{list(lora.b.shape)}. Take the original adapter."
            )
        if lora.magnitude is not None and lora.magnitude.shape != (outputs,):
            raise CheckpointError(
                f"{path}: expected a magnitude of the shape [{outputs}], found {list(lora.magnitude.shape)}. Take the "
                "original adapter."
            )
        if lora.magnitude is not None and (stacked or path == EMBEDDINGS):
            raise CheckpointError(f"{path}: expected LoRA, found DoRA, which the two formats do not share here.")
        for name, size in sizes(path, lora).items():
            first, where = known.setdefault(name, (size, path))
            if first != size:
                raise CheckpointError(
                    f"{path}: expected the {name} of {where}, {first}, found {size}. Take the original adapter."
                )
        found = (inputs, outputs) if path == EMBEDDINGS else (*stack, outputs, inputs)
        if shapes is not None and shapes.get(path) != found:
            expected = f"a weight {list(shapes[path])}" if path in shapes else "no adapter"
            raise CheckpointError(
                f"{path}: expected {expected} as in the base model, found one for {list(found)}. Is that the model that "
                "the adapter was trained on? If not, name it with --model."
            )
