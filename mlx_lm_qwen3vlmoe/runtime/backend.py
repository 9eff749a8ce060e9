"""What MLX's backends ask of a model: of experts an order in memory, and on the CPU float32.

Read from the ``GatherMM`` of MLX's backends (https://github.com/ml-explore/mlx/tree/main/mlx/backend):

| backend | takes, of the last two axes                        | in      | fastest                             |
|---------|----------------------------------------------------|---------|-------------------------------------|
| CPU     | either order, exactly contiguous; copies any other | float32 | ``[E, in, out]``, viewed transposed |
| CUDA    | the same                                           | any     | ``[E, out, in]``                    |
| Metal   | any                                                | any     | either                              |
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import switch_layers
from mlx_lm.models.switch_layers import SwitchLinear

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

    In 16 bits, no order helps the CPU: see `cpu.SwitchGLU`.
    """
    if device() != mx.cpu:
        return mx.contiguous(array.swapaxes(-1, -2))
    if array.dtype == mx.float32:
        array = mx.contiguous(array)
    return array.swapaxes(-1, -2)


def takes_global_scale() -> bool:
    """Whether stacked experts can hold NVFP4's second scale: on a GPU. Until: mlx-lm 0.32.1."""
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

    `benchmarks/dtypes.py` measures it, and says when float32 is not the fastest any more, as it may be once MLX has
    AVX2 kernels: then this function, and what asks it, can go. Until: MLX #3019.

    So packed layers want float32, and floats of 16 bits their own dtype. Experts see to themselves: `cpu.SwitchGLU`.
    """
    return device() == mx.cpu and any(_packed(layer) for layer in decoder.layers)


def _packed(module: Any) -> bool:
    if not isinstance(module, nn.Module) or isinstance(module, switch_layers.SwitchGLU):
        return False
    return "scales" in module or any(map(_packed, module.values()))
