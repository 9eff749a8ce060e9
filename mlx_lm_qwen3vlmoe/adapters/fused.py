"""PEFT's two matrices for all experts of a layer ↔ the changes of gate, up and down.

E = experts, r = rank, H = hidden_size, I = moe_intermediate_size. PEFT's ``ParamWrapper`` adapts a parameter of three
axes, ``gate_up_proj`` or ``down_proj``, by ``lora_A [r·E, x]`` and ``lora_B [y, r·E]``: of A's rows the experts are
blocks (``[E, r, x]``), of B's columns they are the fastest (``[y, r, E]``). Which of the axes x is, has changed:

| transformers | PEFT to 0.19.0 | PEFT ≥ 0.19.1 |
|--------------|----------------|---------------|
| 4.57         | x = in         | x = out       |
| 5            | x = out        | x = in        |

Either way the change is ``b @ a`` for every expert, with A as ``a`` where x is in, and as ``b`` where x is out. Nothing
but the sizes tells: of ``gate_up_proj`` in is H and out is 2I, of ``down_proj`` I and H.

gate and up share one A, of which each has a half of B's rows. Two A's of their own are one of twice the rank, with B in
two blocks on a diagonal: so does transformers 5 with adapters of separate experts.

Sources: ``tuners/lora/layer.py`` of PEFT 0.17.0 to 0.21.2; ``transformers_weight_conversion.py`` of PEFT 0.21.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from ..errors import CheckpointError
from .files import broken
from .lora import Lora

GATE_UP, DOWN = "gate_up_proj", "down_proj"


class Pair(NamedTuple):
    """The two matrices of one parameter, and their rank and scale."""

    a: mx.array
    b: mx.array
    rank: int
    scale: float


def over_inputs(layers: dict[str, dict[str, Pair]], hidden: int | None, ask: Callable[[str], int]) -> bool:
    """Whether A belongs to the inputs, which is so in all layers or in none.

    Args:
        layers: path of an MLP → its parameters.
        hidden: hidden_size, if other tensors of the adapter tell it.
        ask: gives it where they do not, or raises `CheckpointError`; takes what it is for.
    """
    found = _shared(layers, hidden)
    if len(found) == 2 and hidden is None:
        found = _shared(layers, ask(f"{next(iter(layers))}.experts"))
    if len(found) == 2:
        raise CheckpointError(
            f"{next(iter(layers))}.experts",
            "sizes that show whether lora_A belongs to the inputs or to the outputs",
            "equal numbers of inputs and outputs",
            "Merge the adapter with PEFT, or train one that has both gate_up_proj and down_proj.",
        )
    return found.pop()


def _shared(layers: dict[str, dict[str, Pair]], hidden: int | None) -> set[bool]:
    """The answers that fit the sizes in all layers, of which there is one or two."""
    shared, first = {True, False}, next(iter(layers))
    for mlp, pairs in layers.items():
        if not (found := {over_in for over_in in (True, False) if _fits(pairs, over_in, hidden)}):
            one = f"with H = {hidden}" if hidden else "with one H"
            sizes = f"[H, 2I] of gate_up_proj and [I, H] of down_proj {one}, in this order or both the other way around"
            raise broken(f"{mlp}.experts", sizes, _shown(pairs))
        if not (shared := shared & found):
            both = f"{_shown(layers[first])}, then {_shown(pairs)}"
            where = f"{first}.experts", f"{mlp}.experts"
            raise broken(where, "lora_A to belong to the inputs in all layers or in none", both)
    return shared


def _fits(pairs: dict[str, Pair], over_in: bool, hidden: int | None) -> bool:
    def in_out(name: str) -> tuple[int, int]:
        sizes = pairs[name].a.shape[1], pairs[name].b.shape[0]
        return sizes if over_in else sizes[::-1]

    hiddens, widths = {hidden} - {None}, set()
    if GATE_UP in pairs:
        hiddens.add(in_out(GATE_UP)[0])
        widths.add(in_out(GATE_UP)[1])
    if DOWN in pairs:
        hiddens.add(in_out(DOWN)[1])
        widths.add(2 * in_out(DOWN)[0])
    return len(hiddens) == len(widths) == 1 and not widths.pop() % 2


def _shown(pairs: dict[str, Pair]) -> str:
    return ", ".join(f"{name}: A {list(pair.a.shape)} and B {list(pair.b.shape)}" for name, pair in pairs.items())


def separate(mlp: str, name: str, pair: Pair, over_in: bool, blocks: bool, in_two: bool = False) -> dict[str, Lora]:
    """The changes of ``switch_mlp``'s projections that one parameter's is, by their paths.

    Args:
        mlp: path of the MLP.
        name: ``gate_up_proj`` or ``down_proj``.
        pair: its two matrices.
        over_in: whether A belongs to the inputs.
        blocks: whether the experts are blocks of B's columns, too.
        in_two: whether gate and up have an A of their own: see `is_in_two`.
    """
    a, b = _stacked(pair, over_in, blocks)
    if name == DOWN:
        return {f"{mlp}.switch_mlp.down_proj": Lora(a, b, pair.scale)}
    gate, up = mx.split(b, 2, axis=1)
    if in_two:
        a_gate, a_up = mx.split(a, 2, axis=1)
        gate, up = gate[..., : pair.rank // 2], up[..., pair.rank // 2 :]
    else:
        a_gate = a_up = a
    return {
        f"{mlp}.switch_mlp.gate_proj": Lora(a_gate, gate, pair.scale),
        f"{mlp}.switch_mlp.up_proj": Lora(a_up, up, pair.scale),
    }


def is_in_two(pair: Pair, over_in: bool, blocks: bool) -> bool:
    """Whether ``gate_up_proj`` is two changes side by side: B is nothing but two blocks on a diagonal. Evaluates it."""
    gate, up = mx.split(_stacked(pair, over_in, blocks)[1] != 0, 2, axis=1)
    half = pair.rank // 2
    beside = gate[..., half:].any() | up[..., :half].any()
    return pair.rank % 2 == 0 and bool((gate.any() & up.any() & ~beside).item())


def _stacked(pair: Pair, over_in: bool, blocks: bool) -> tuple[mx.array, mx.array]:
    """``a [E, r, in]`` and ``b [E, out, r]``."""
    first = pair.a.reshape(-1, pair.rank, pair.a.shape[1])
    experts, rows = first.shape[0], pair.b.shape[0]
    if blocks:
        second = pair.b.reshape(rows, experts, pair.rank).transpose(1, 0, 2)
    else:
        second = pair.b.reshape(rows, pair.rank, experts).transpose(2, 0, 1)
    return (first, second) if over_in else (second.swapaxes(1, 2), first.swapaxes(1, 2))


def by_expert(module: str, a: mx.array, b: mx.array, rank: int) -> tuple[mx.array, mx.array]:
    """``a [E, r, in]`` and ``b [E, out, r]`` of matrices with an axis for the experts, which in B is first or last.

    So do trainers on Megatron have them: Megatron-Bridge and SkyRL. Raises `CheckpointError`.
    """
    experts = a.shape[0]
    if a.ndim == b.ndim == 3 and a.shape[1] == rank:
        first, last = (b.shape[0], b.shape[2]) == (experts, rank), b.shape[1:] == (rank, experts)
        if first != last:
            return a, b if first else b.transpose(2, 0, 1)
    expected = f"lora_A [experts, {rank}, in] and lora_B [experts, out, {rank}] or [out, {rank}, experts]"
    raise broken(module, f"{expected}, according to r and rank_pattern", f"{list(a.shape)} and {list(b.shape)}")


def join(gate: Lora | None, up: Lora | None, shared: bool) -> Lora:
    """The change of ``gate_up_proj``, stacked, of those of gate and up, or of one of the two alone.

    Args:
        gate: or None.
        up: or None, but for one of the two.
        shared: whether both have the same A, so that the rank stays what it is.
    """
    if gate is None or up is None:
        one = gate or up
        assert one is not None
        none = one._replace(b=mx.zeros_like(one.b))
        return join(gate or none, up or none, True)
    if shared:
        return gate._replace(b=mx.concatenate([gate.b, up.b], axis=1))
    right = mx.pad(gate.b, [(0, 0), (0, 0), (0, up.rank)])
    left = mx.pad(up.b, [(0, 0), (0, 0), (gate.rank, 0)])
    return gate._replace(a=mx.concatenate([gate.a, up.a], axis=1), b=mx.concatenate([right, left], axis=1))


def flat(a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
    """``lora_A [r·E, in]`` and ``lora_B [out, r·E]`` of a stacked change, as PEFT ≥ 0.19.1 has them."""
    return a.flatten(0, 1), b.transpose(1, 2, 0).flatten(1, 2)
