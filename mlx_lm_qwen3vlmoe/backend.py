"""What MLX's backends ask of experts: an order in memory, and on the CPU a dtype.

Read from the ``GatherMM`` of MLX's backends (https://github.com/ml-explore/mlx/tree/main/mlx/backend):

| backend | takes, of the last two axes                        | in      | fastest                             |
|---------|----------------------------------------------------|---------|-------------------------------------|
| CPU     | either order, exactly contiguous; copies any other | float32 | ``[E, in, out]``, viewed transposed |
| CUDA    | the same                                           | any     | ``[E, out, in]``                    |
| Metal   | any                                                | any     | either                              |
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear

logger = logging.getLogger(__name__)

_planned: ContextVar[mx.Device | None] = ContextVar("planned", default=None)


@contextmanager
def planned(device: mx.Device | None = None) -> Iterator[None]:
    """Lay arrays out for a device, MLX's default or one that need not be there, and evaluate none."""
    token = _planned.set(device or mx.default_device())
    try:
        yield
    finally:
        _planned.reset(token)


def planning() -> bool:
    """Whether arrays have no values."""
    return _planned.get() is not None


def device() -> mx.Device:
    """The device that arrays are laid out for."""
    return _planned.get() or mx.default_device()


def as_out_in(array: mx.array) -> mx.array:
    """``[E, in, out]`` as the ``[E, out, in]`` of the host, in an order in memory that the backend takes uncopied.

    In 16 bits, no order helps the CPU: see `CPUSwitchLinear`.
    """
    if device() != mx.cpu:
        return mx.contiguous(array.swapaxes(-1, -2))
    if array.dtype == mx.float32:
        array = mx.contiguous(array)
    return array.swapaxes(-1, -2)


def takes_global_scale() -> bool:
    """Whether stacked experts can hold NVFP4's second scale: mlx-lm 0.32.1 and newer, on a GPU."""
    return device() == mx.gpu and "global_scale" in inspect.signature(SwitchLinear.to_quantized).parameters


class CPUSwitchLinear(SwitchLinear):
    """The host's stacked experts of one projection, on the CPU, where 16-bit ones are cast when they are first used.

    Not when they are loaded: what is only converted, quantized or saved keeps its dtype, and takes no memory for it.
    """

    weight: mx.array

    def __call__(self, *arguments: Any, **options: Any) -> mx.array:
        stored = self.weight
        if stored.dtype == mx.float32:
            return super().__call__(*arguments, **options)
        wide = _widened(stored)
        self.weight = stored.astype(mx.float32) if wide is None else wide
        try:
            return super().__call__(*arguments, **options)
        finally:
            if wide is None:
                self.weight = stored


def adapt(model: nn.Module) -> None:
    """Prepare a new model's experts for the device."""
    if device() == mx.cpu:
        for module in model.modules():
            if isinstance(module, SwitchLinear):
                module.__class__ = CPUSwitchLinear


def narrow(model: nn.Module) -> list[CPUSwitchLinear]:
    """The experts of a model that will be cast."""
    return [m for m in model.modules() if isinstance(m, CPUSwitchLinear) and m.weight.dtype != mx.float32]


def _widened(weight: mx.array) -> mx.array | None:
    """Evaluated in float32, contiguous in the order that it is stored in; None where there are no values yet."""
    if _planned.get() is not None:
        return None
    try:
        buffer: Any = weight.view(mx.uint16)  # which bfloat16 cannot be
        strides: Any = memoryview(buffer).strides
    except RuntimeError:  # traced by mx.compile
        return None
    _announce_cast(weight.dtype)
    if strides[-2] < strides[-1]:
        wide = weight.swapaxes(-1, -2).astype(mx.float32).swapaxes(-1, -2)
    else:
        wide = weight.astype(mx.float32)
    mx.eval(wide)  # before the next one, so that only one is in memory twice
    return wide


@functools.cache
def _announce_cast(dtype: mx.Dtype) -> None:
    logger.warning(
        "On the CPU, MLX multiplies unquantized experts in float32 only: they are cast from %s as they are used, and "
        "take twice the memory. Quantized experts (mlx_lm.convert -q) run as they are.",
        str(dtype).rpartition(".")[2],
    )
