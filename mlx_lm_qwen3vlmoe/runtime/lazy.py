"""In which order lazy arrays are computed, so that little of them is in memory at a time.

The host quantizes lazily, and then saves 5 GB with one `mx.eval`. That computes what is furthest from the end first,
and knows nothing of sizes: as all layers are alike, the floats of all would be made before any of them are packed. Only
a path from one array to another orders the two. There are two kinds of them here. Until: none known.

**Pieces** (`in_pieces`): a projection of all experts is put together a few experts at a time. Each piece is written
into the array that has those before it. On the CPU, pieces are made by all cores in turn.

**Turns** (`quantize_in_turn`): a module is quantized after the one before it. But its weight has its path from the file
before anybody asks for that, so it can only wait once it is decoded:

    file ── decoding ── weight 1 ── quantizing ── not ── not ── … ── not ─┐
                      file ── decoding ── weight 2 ─────────────────── depends ── quantizing ── not ── …

Without the chain of ``not``, the decoding of 2 would be as far from the end as the quantizing of 1, and be computed
beside it. As the chain is longer than any path from a file to a weight, all of 1 is further from the end than any of 2.
Each ``not`` is of one boolean. If there were too few, all values would be the same, and more floats in memory.

Source: ``eval_impl`` in MLX's ``mlx/transforms.cpp``. It walks back from the end, breadth first, but into the depth
from where about twenty arrays wait, and then computes in the reverse of that order.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from . import streams

Arrays = dict[str, mx.array]
_DEPTH = 32  # more than the steps from a file to a piece of a decoded weight; tests/test_lazy.py counts them
_ARRAYS = 8  # experts in a piece: what depends on more arrays than are walked in breadth is begun with the last
_PIECE = 1 << 25  # bytes; allocators use memory again that is freed in small pieces, where large ones are fresh pages


def in_pieces(whole: Arrays, function: Callable[[slice], Arrays], spared: int = 0) -> Arrays:
    """``whole``, put together from what ``function`` has for a few experts, or rows of a matrix, at a time.

    Args:
        whole: arrays ``[experts, …]`` or ``[rows, …]``, not evaluated: ``function`` of all.
        function: a range of experts or rows → such arrays.
        spared: 1 where reading the file takes about as long, which the stream in force does beside it.
    """
    size, *others = next(iter(whole.values())).shape
    step = max(1, _PIECE * size // sum(array.nbytes for array in whole.values()))
    if step >= size:
        return whole
    step = min(step, _ARRAYS) if len(others) > 1 else step
    results = {name: mx.zeros(array.shape, array.dtype) for name, array in whole.items()}
    for n, start in enumerate(range(0, size, step)):
        part = slice(start, min(start + step, size))
        with streams.on(spared + n % max(1, streams.count() - spared)):
            piece = function(part)
        for name, array in piece.items():
            results[name][part] = array
    return results


def longest_path(weight: mx.array) -> int:
    """More steps than from a file to any part of a weight, ``[out, in]`` or ``[experts, out, in]``: a piece is one."""
    return _DEPTH + (weight.shape[0] if weight.ndim == 3 else 0)


def quantize_in_turn(model: nn.Module) -> None:
    """From now on, the modules of a model are quantized one after the other, each in pieces if it is large."""
    turns = _Turns()
    for module in model.modules():
        if hasattr(module, "to_quantized"):
            module.to_quantized = _InTurn(module, turns)


class _Turns:
    """The end of the turn before."""

    def __init__(self) -> None:
        self.last: mx.array | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Turns, ()  # a copy has turns of its own

    def wait(self, weight: mx.array) -> mx.array:
        """The same weight, not used before the end of the turn before."""
        if self.last is None:
            return weight
        end = self.last
        for _ in range(longest_path(weight)):
            end = mx.logical_not(end)
        return mx.depends([weight], [end])[0]

    def end(self, result: mx.array) -> None:
        self.last = result.reshape(-1)[:1] == 0  # a copy: a view would keep the array


class _InTurn:
    """The method ``to_quantized`` of a module, which is not computed before that of the module before."""

    def __init__(self, module: nn.Module, turns: _Turns):
        self.module, self.turns = weakref.ref(module), turns  # the module has this: it is freed at once

    def __call__(self, *arguments: Any, **options: Any) -> nn.Module:
        module: Any = self.module()
        stored = module["weight"]
        weight = self.turns.wait(stored)

        def quantized(weight: mx.array) -> Any:
            module["weight"] = weight
            return type(module).to_quantized(module, *arguments, **options)

        try:
            result = quantized(weight)
            names = [name for name in ("weight", "scales", "biases") if name in result]

            def of(part: slice) -> Arrays:
                some = quantized(weight[part])
                return {name: some[name] for name in names}

            result.update(in_pieces({name: result[name] for name in names}, of))
        finally:
            module["weight"] = stored
        self.turns.end(result["weight"])
        return result

    @property
    def __signature__(self) -> inspect.Signature:
        module: Any = self.module()
        return inspect.signature(type(module).to_quantized.__get__(module))

    def __reduce__(self) -> tuple[Any, ...]:  # by which it is copied, too
        return _InTurn, (self.module(), self.turns)
