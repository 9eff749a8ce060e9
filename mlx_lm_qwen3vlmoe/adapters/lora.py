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

from ..errors import CheckpointError
from ..layouts.names import EMBEDDINGS, HEAD, MODEL_PREFIX, NUMBER
from .files import broken

_LAYER = rf"{re.escape(MODEL_PREFIX)}layers\.{NUMBER}"
_MODULE = re.compile(
    rf"{_LAYER}\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|(?:switch_mlp\.)?(?:gate|up|down)_proj))"
    rf"|{re.escape(HEAD)}|{re.escape(EMBEDDINGS)}"
)
_H, _HEADS, _KV = "hidden_size", "num_attention_heads · head_dim", "num_key_value_heads · head_dim"
_SIZES = {  # end of a path → its inputs and its outputs
    ".q_proj": (_H, _HEADS),
    ".k_proj": (_H, _KV),
    ".v_proj": (_H, _KV),
    ".o_proj": (_HEADS, _H),
    ".mlp.gate": (_H, "num_experts"),
    ".mlp.gate_proj": (_H, "intermediate_size"),
    ".mlp.up_proj": (_H, "intermediate_size"),
    ".mlp.down_proj": ("intermediate_size", _H),
    ".switch_mlp.gate_proj": (_H, "moe_intermediate_size"),
    ".switch_mlp.up_proj": (_H, "moe_intermediate_size"),
    ".switch_mlp.down_proj": ("moe_intermediate_size", _H),
    HEAD: (_H, "vocab_size"),
    EMBEDDINGS: ("vocab_size", _H),
}


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
        if lora.a.shape != found[0].a.shape or lora.b.shape != found[0].b.shape:
            shapes = f"{list(lora.a.shape)} and {list(lora.b.shape)}"
            raise broken(path.replace("switch_mlp", f"experts.{number}"), "the shapes of the other experts", shapes)
    return Lora(mx.stack([lora.a for lora in found]), mx.stack([lora.b for lora in found]), scale, first.magnitude)


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
        inputs, outputs = next(names for end, names in _SIZES.items() if path.endswith(end))
        found = [(inputs, lora.a.shape[-1]), (outputs, lora.b.shape[-2])]
        if is_expert(path):
            found.append(("num_experts", lora.a.shape[0]))
        for name, size in found:
            first, where = known.setdefault(name, (size, path))
            if first != size:
                raise broken(path, f"{first} for {name} as in {where}", size)
    return {name: size for name, (size, _) in known.items()}


def check_shapes(path: str, lora: Lora) -> None:
    """Raise `CheckpointError` for a change of what no host has, or whose matrices do not belong together."""
    if not _MODULE.fullmatch(path):
        raise broken(path, "a linear layer of the language model", "another")
    stack, stacked, outputs = lora.a.shape[:-2], is_expert(path), lora.b.shape[-2]
    if len(stack) != stacked or lora.b.shape != (*stack, outputs, lora.rank):
        raise broken(path, "A [rank, in] and B [out, rank]", f"{list(lora.a.shape)} and {list(lora.b.shape)}")
    if lora.magnitude is not None and (stacked or path == EMBEDDINGS):
        raise CheckpointError(f"{path}: expected LoRA, found DoRA, which mlx_lm and PEFT do not have alike for it.")
    if lora.magnitude is not None and lora.magnitude.shape != (outputs,):
        raise broken(path, f"a magnitude of the shape [{outputs}]", list(lora.magnitude.shape))


def unlike_base(path: str, expected: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: expected {expected} as in the base model, found {found}. Is that the model that the adapter was "
        "trained on? If not, name it with --model."
    )


def check(adapter: Adapter, shapes: dict[str, tuple[int, ...]] | None) -> None:
    """Raise `CheckpointError` for a change that has no module, or other sizes than its own or those of the others.

    Args:
        adapter: of any format.
        shapes: path → shape of the weight, of the base model; None where it is not at hand.
    """
    if not adapter.modules:
        raise CheckpointError("adapter: expected LoRA of the language model, found none. Is it for vision layers only?")
    for path, lora in adapter.modules.items():
        check_shapes(path, lora)
        if adapter.dora and lora.magnitude is None:
            raise broken(path, "DoRA as the other modules have", "LoRA")
        found = (*lora.a.shape[:-2], lora.b.shape[-2], lora.a.shape[-1])
        if path == EMBEDDINGS:
            found = found[::-1]
        if shapes is not None and shapes.get(path) != found:
            expected = f"a weight {list(shapes[path])}" if path in shapes else "no adapter"
            raise unlike_base(path, expected, f"one for {list(found)}")
    sizes(adapter.modules)
