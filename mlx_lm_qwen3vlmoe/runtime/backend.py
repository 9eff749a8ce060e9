"""What MLX's backends ask of a model: of experts an order in memory, and on the CPU float32.

Nothing that is stored changes, nor does the class of a module, but for `SwitchGLU` on the CPU.

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
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import switch_layers
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

    In 16 bits, no order helps the CPU: see `SwitchGLU`.
    """
    if device() != mx.cpu:
        return mx.contiguous(array.swapaxes(-1, -2))
    if array.dtype == mx.float32:
        array = mx.contiguous(array)
    return array.swapaxes(-1, -2)


def takes_global_scale() -> bool:
    """Whether stacked experts can hold NVFP4's second scale: mlx-lm 0.32.1 and newer, on a GPU."""
    return device() == mx.gpu and "global_scale" in inspect.signature(SwitchLinear.to_quantized).parameters


def widens(decoder: nn.Module) -> bool:
    """Whether a decoder's layers pass float32 on whatever their weights are stored in: on the CPU, where any is packed.

    Products on the CPU, in ms of processor time, by the dtype of the activations (MLX 0.32.4; 8 experts of 768 x 2048
    or a matrix of 4096 x 2048, one token):

    | weights                              | bfloat16 | float16 | float32 |
    |--------------------------------------|----------|---------|---------|
    | affine, 2 to 8 bits, bfloat16 scales | 72 to 79 | 9 to 12 | 9 to 12 |
    | affine, 4 or 8 bits, float16 scales  | 10       | 360     | 10      |
    | affine, 4 or 8 bits, float32 scales  | 9        | 9       | 9       |
    | mxfp4, nvfp4                         | 47       | 185     | 5       |
    | mxfp8                                | 74       | 225     | 26      |
    | a matrix in bfloat16                 | 6        | 27      | 27      |
    | a matrix in float16                  | 36       | 19      | 35      |

    So packed layers want float32, and floats of 16 bits their own dtype. Experts see to themselves: `SwitchGLU`.
    """
    return device() == mx.cpu and any(_packed(layer) for layer in decoder.layers)


def _packed(module: Any) -> bool:
    if not isinstance(module, nn.Module) or isinstance(module, SwitchGLU):
        return False
    return "scales" in module or any(map(_packed, module.values()))


class SwitchGLU(switch_layers.SwitchGLU):
    """The host's experts of one layer, on the CPU: multiplied in float32, with results in the dtype of ``x``.

    16-bit weights are cast when they are first used, not when a checkpoint is loaded: what is only converted, quantized
    or saved takes no memory for it. The float32 copies lie beside the parameters, where nothing looks, and take the
    place of what is stored for the time of a call.
    """

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        stored = []
        try:
            for linear in _experts(self):
                wide, narrow = _copied(linear)
                stored.append((linear, narrow))
                linear["weight"] = wide
            return super().__call__(x.astype(mx.float32), indices).astype(x.dtype)
        finally:
            for linear, narrow in stored:
                linear["weight"] = narrow


@dataclass(frozen=True, eq=False)
class _Copy:
    """A float32 copy, and the array of which it is one. It stays behind where its layer is copied or pickled."""

    stored: mx.array
    wide: mx.array

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def adapt(model: nn.Module) -> None:
    """Prepare a new model's experts for the device."""
    if device() == mx.cpu:
        for module in model.modules():
            if type(module) is switch_layers.SwitchGLU:
                module.__class__ = SwitchGLU


def let_go(model: nn.Module) -> None:
    """Free the float32 copies; the next call makes new ones."""
    for module in model.modules():
        vars(module).pop("_copy", None)


def narrow(model: nn.Module) -> list[SwitchLinear]:
    """The experts of a model that are cast when they are first used."""
    return [linear for m in model.modules() if isinstance(m, SwitchGLU) for linear in _experts(m)]


def _experts(glu: nn.Module) -> Iterator[SwitchLinear]:
    """The 16-bit projections, also those that a LoRA layer or a calibration has wrapped."""
    for child in glu.values():
        if isinstance(child, nn.Module) and "scales" not in child:
            for module in [child] if isinstance(child, SwitchLinear) else child.modules():
                if isinstance(module, SwitchLinear) and module["weight"].dtype != mx.float32:
                    yield module


def _copied(linear: SwitchLinear) -> tuple[mx.array, mx.array]:
    """A weight in float32, and what to store of it: as it is, it would be in memory twice, so it is a cast of the copy.

    That is exact, and costs nothing until somebody saves it or quantizes it.
    """
    stored: mx.array = linear["weight"]
    copy = vars(linear).get("_copy")
    if copy is None or copy.stored is not stored:  # loaded, trained, fused or moved meanwhile
        copy = vars(linear)["_copy"] = None  # before the next takes memory
        wide = _widened(stored)
        if wide is None:
            return stored.astype(mx.float32), stored
    else:
        wide = copy.wide
    stored = wide.astype(stored.dtype)
    vars(linear)["_copy"] = _Copy(stored, wide)
    return wide, stored


def _widened(weight: mx.array) -> mx.array | None:
    """Evaluated in float32, contiguous in the order that it is stored in; None where there are no values yet."""
    if _planned.get() is not None:
        return None
    try:
        mx.eval(weight)
    except (RuntimeError, ValueError):  # traced by mx.compile
        return None
    buffer: Any = weight.view(mx.uint16)  # which bfloat16 cannot be
    strides: Any = memoryview(buffer).strides
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
