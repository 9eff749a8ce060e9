"""In which order lazy arrays are computed, so that little of them is in memory at a time.

`mx.eval` walks back from the arrays that it is given, about twenty at a time, and knows nothing of their size. The host
saves 5 GB at once, in the order of a hash table: the floats of many layers would be in memory together. But what
depends on another array is computed after it.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

Arrays = dict[str, mx.array]
_STEPS = 64  # more than to a decoded weight: arrays that are as far from the end are computed side by side
_ARRAYS = 8  # of what depends on more than about twenty arrays, `mx.eval` begins with the last
_PIECE = 1 << 24  # bytes; allocators use memory again that is freed in small pieces, where large ones are fresh pages


def in_pieces(whole: Arrays, function: Callable[[slice], Arrays]) -> Arrays:
    """``whole``, put together from what ``function`` has for a few experts at a time.

    Args:
        whole: arrays ``[experts, …]``, not evaluated: ``function`` of all experts.
        function: a range of experts → such arrays.
    """
    experts = len(next(iter(whole.values())))
    step = max(1, _PIECE * experts // sum(array.nbytes for array in whole.values()))
    if step >= experts:
        return whole
    step = min(step, _ARRAYS)
    results = {name: mx.zeros(array.shape, array.dtype) for name, array in whole.items()}
    for start in range(0, experts, step):
        part = slice(start, min(start + step, experts))
        for name, array in function(part).items():
            results[name][part] = array
    return results


class Turns:
    """Modules that are quantized one after the other."""

    def __init__(self) -> None:
        self.last: mx.array | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Turns, ()  # a copy has turns of its own

    def take(self, model: nn.Module) -> None:
        """From now on, the modules of a model are quantized in turn, experts a few at a time."""
        for module in model.modules():
            if hasattr(module, "to_quantized"):
                module.to_quantized = InTurn(module, self)

    def wait(self, array: mx.array) -> mx.array:
        """The same array, which is used after the turns before."""
        return array if self.last is None else mx.depends([array], [self.last])[0]

    def end(self, array: mx.array) -> None:
        self.last = array.reshape(-1)[:1] == 0  # a copy: a view would keep the array
        for _ in range(_STEPS):
            self.last = mx.logical_not(self.last)


class InTurn:
    """The method ``to_quantized`` of a module, which is not computed before that of the module before."""

    def __init__(self, module: nn.Module, turns: Turns):
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
            if weight.ndim == 3:
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

    def __deepcopy__(self, memo: dict[int, Any]) -> InTurn:
        return InTurn(copy.deepcopy(self.module(), memo), copy.deepcopy(self.turns, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return InTurn, (self.module(), self.turns)
