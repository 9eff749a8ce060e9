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

import copy
import functools
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
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

    16-bit weights are cast inside the call, which keeps no copy and changes no module: whoever edits, replaces, saves
    or quantizes them, in whatever thread, finds what is stored.
    """

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        wide: Any = copy.copy(self)
        for name, child in self.items():
            wide[name] = _in_float32(child)
        y: mx.array = switch_layers.SwitchGLU.__call__(wide, x.astype(mx.float32), indices)
        return y.astype(x.dtype)


def _in_float32(module: Any) -> Any:
    """What casts a 16-bit projection for one call, also of one that LoRA has wrapped; any other module as it is.

    What other programs wrap is theirs, and MLX casts it as a whole, since ``x`` is float32.
    """
    if type(module) is SwitchLinear and module["weight"].dtype != mx.float32:
        return _Cast(module)
    if isinstance(module, nn.Module) and "lora_a" in module:
        module = copy.copy(module)
        module["linear"] = _in_float32(module["linear"])
    return module


class _Cast:
    """A 16-bit projection that is called in the place of the host's, and casts what the call uses."""

    def __init__(self, linear: SwitchLinear):
        self.linear = linear
        if not planning():
            _announce_cast(linear["weight"].dtype)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        weight: mx.array = self.linear["weight"]
        turned = _turned(weight)
        if turned is None:
            return self.linear(x, indices, sorted_indices=sorted_indices)  # MLX casts all of it, in a slow order
        rows = weight.swapaxes(-1, -2) if turned else weight  # as it lies in memory: a copy in another order is slow
        # All experts cost about four times their number of single ones: most of it is fresh pages. In training, single
        # ones would cost more: the gradient of each is as large as that of all.
        few = indices.size <= 4 * len(weight) and not self.linear.training and "bias" not in self.linear
        if few:
            return _one_by_one(x, rows, turned, indices)
        wide = mx.contiguous(rows).astype(mx.float32)  # two steps, which are faster than one
        linear: Any = copy.copy(self.linear)
        linear["weight"] = wide.swapaxes(-1, -2) if turned else wide
        return linear(x, indices, sorted_indices=sorted_indices)


def _one_by_one(x: mx.array, rows: mx.array, turned: bool, indices: mx.array) -> mx.array:
    """The products that ``gather_mm`` has, of which each casts one expert and forgets it."""
    tokens = mx.broadcast_to(x, (*indices.shape, *x.shape[-2:])).flatten(0, -3)
    products = []
    for n, expert in enumerate(mx.split(indices.flatten(), indices.size)):
        wide = mx.slice(rows, expert, [0], (1, *rows.shape[1:]))[0].astype(mx.float32)
        products.append(tokens[n] @ (wide if turned else wide.T))
    return mx.stack(products).reshape(*indices.shape, *products[0].shape)


def _turned(weight: mx.array) -> bool | None:
    """Whether ``[E, out, in]`` lies in memory as ``[E, in, out]``; None where there are no values to lie there yet."""
    if planning():
        return None
    try:
        buffer: Any = weight.view(mx.uint16)  # which bfloat16 cannot be
        strides: Any = memoryview(buffer).strides
    except (RuntimeError, ValueError):  # traced by mx.compile
        return None
    return bool(strides[-2] < strides[-1])


def adapt(model: nn.Module) -> None:
    """Prepare a new model's experts for the device."""
    if device() == mx.cpu:
        for module in model.modules():
            if type(module) is switch_layers.SwitchGLU:
                module.__class__ = SwitchGLU


@functools.cache
def _announce_cast(dtype: mx.Dtype) -> None:
    logger.warning(
        "On the CPU, MLX multiplies unquantized experts in float32 only: they are cast from %s at every use, which "
        "takes time. Quantized experts (mlx_lm.convert -q) run as they are, and faster.",
        str(dtype).rpartition(".")[2],
    )
