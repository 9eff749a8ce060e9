"""How a model is called on the CPU: experts of 16 bits in float32, and large products on every core.

What is called is a copy of the host's modules that lives as long as the call and shares all arrays. In the model
itself, no array changes, and no class but that of `SwitchGLU`: programs that look at types, edit weights or replace
layers find what the host made.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_moe, switch_layers
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from .backend import device, planning
from .streams import count, on, side_by_side


def adapt(model: nn.Module) -> None:
    """Prepare a new model's experts for the device."""
    if device() == mx.cpu:
        for module in model.modules():
            if type(module) is switch_layers.SwitchGLU:
                module.__class__ = SwitchGLU


def casts(model: nn.Module) -> bool:
    """Whether each call casts experts to float32, which takes time."""
    experts = (m for m in model.modules() if type(m) is SwitchLinear)
    return device() == mx.cpu and any(module["weight"].dtype != mx.float32 for module in experts)


def spread(model: nn.Module) -> nn.Module:
    """The host's model for one call, with its dense products on several streams; itself where there is but one."""
    return model if count() == 1 else _spread(model, model.training)


def _spread(module: Any, training: bool) -> Any:
    if isinstance(module, list):
        return [_spread(child, training) for child in module]
    if _takes_streams(module, training):
        return _Dense(module, training)
    if not isinstance(module, nn.Module):
        return module
    if type(module).__module__ != qwen3_moe.__name__:
        return _with_base(module, lambda linear: _spread(linear, training))
    twin: Any = copy.copy(module)
    for name, child in module.items():
        twin[name] = _spread(child, training)
    return twin


def _takes_streams(module: Any, training: bool) -> bool:
    """Whether the host's layer can be cut without another result, and MLX computes it on one thread.

    Floats of a model in training stay whole, as a gradient would be summed in another order; what is packed has none.
    (The model is asked: a layer that was just quantized says that it is in training.)
    On macOS, Apple's BLAS uses all cores for them. MLX's wheels for Linux have the reference BLAS, on one thread.
    """
    if type(module) in (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear):
        return True
    floats = type(module) in (nn.Linear, nn.Embedding, SwitchLinear)
    return floats and not training and sys.platform != "darwin"


def _with_base(module: nn.Module, change: Callable[[Any], Any]) -> nn.Module:
    """A layer of LoRA around what a change makes of its base. All others, such as DoRA, look into theirs, and stay."""
    if type(module).__module__ != "mlx_lm.tuner.lora" or "linear" not in module:
        return module
    twin: Any = copy.copy(module)
    twin["linear"] = change(module["linear"])
    return twin


class _Dense:
    """A dense layer, or a tied head, that is cut by tokens or, for a single token, by the rows of its weight."""

    def __init__(self, layer: Any, training: bool):
        self.layer, self.training = layer, training

    def __call__(self, x: mx.array) -> mx.array:
        if hasattr(self.layer, "as_linear"):  # ids, of which embeddings are looked up
            return self.layer(x)
        return self._product(x, lambda layer, x: layer(x))

    def as_linear(self, x: mx.array) -> mx.array:
        return self._product(x, lambda layer, x: layer.as_linear(x))

    def _product(self, x: mx.array, call: Callable[[Any, mx.array], mx.array]) -> mx.array:
        tokens, rows = x.size // x.shape[-1], len(self.layer["weight"])
        if tokens >= count() or self.training:  # the gradient of a cut weight would be summed in another order
            flat = x.reshape(tokens, -1)
            y = side_by_side(lambda part: call(self.layer, flat[part]), tokens, x.size * rows, 0)
            return y.reshape(*x.shape[:-1], rows)
        return side_by_side(lambda part: call(_cut(self.layer, part), x), rows, x.size * rows, -1)


def _cut(layer: Any, rows: slice) -> Any:
    """Some rows of a layer, as views."""
    twin = copy.copy(layer)
    for name, array in layer.items():
        if isinstance(array, mx.array):
            twin[name] = array[rows]
    return twin


class SwitchGLU(switch_layers.SwitchGLU):
    """The host's experts of one layer, multiplied in float32 on several streams, with results in the dtype of ``x``.

    16-bit weights are cast inside the call, and no copy is kept. Until: none known.
    """

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        twin: Any = copy.copy(self)
        for n, (name, child) in enumerate(self.items()):
            with on(n):  # each projection is cast on a stream of its own
                twin[name] = _projection(child, indices.size, self.training)
        indices = mx.stop_gradient(indices)  # Until: mlx-lm 0.32.0. Older ones do so in training only.
        y: mx.array = switch_layers.SwitchGLU.__call__(twin, x.astype(mx.float32), indices)
        return y.astype(x.dtype)


def _projection(module: Any, pairs: int, training: bool) -> Any:
    """A projection for one call, with so many pairs of a token and an expert."""
    linear: Any = module
    if type(module) is QuantizedSwitchLinear:
        linear = _packed(module, pairs)
    elif type(module) is SwitchLinear and module["weight"].dtype != mx.float32:
        linear = _in_float32(module, pairs, training)
    elif isinstance(module, nn.Module):
        linear = _with_base(module, lambda base: _projection(base, pairs, training))
    return _Experts(linear, module["weight"].shape[-2]) if _takes_streams(module, training) else linear


class _Experts:
    """A projection of experts to ``width`` values that is cut by pairs of a token and an expert."""

    def __init__(self, linear: Callable[..., mx.array], width: int):
        self.linear, self.width = linear, width

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        def some(part: slice) -> mx.array:
            own = x if x.shape[-3] == 1 else x[..., part, :, :]  # one token has one row for all of its experts
            return self.linear(own, indices[..., part], sorted_indices=sorted_indices)

        return side_by_side(some, indices.shape[-1], indices.size * self.width * x.shape[-1], -3)


def _packed(linear: Any, pairs: int) -> Callable[..., mx.array]:
    """The same products with fewer casts: MLX casts the scales of all experts for each product.

    To copy up to an eighth of the experts costs less. For more, all streams share one cast.
    """
    scales: mx.array = linear["scales"]
    if scales.dtype not in (mx.bfloat16, mx.float16):
        return linear
    if 8 * pairs <= len(scales):
        return functools.partial(_chosen, linear)
    twin: Any = copy.copy(linear)
    twin["scales"], twin["biases"] = scales.astype(mx.float32), linear["biases"].astype(mx.float32)
    return twin


def _chosen(linear: nn.Module, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
    """The products of a layer that has the chosen experts only."""
    twin: Any = copy.copy(linear)
    for name, array in linear.items():
        if isinstance(array, mx.array):
            twin[name] = array[indices.flatten()]
    return twin(x, mx.arange(indices.size).reshape(indices.shape), sorted_indices=sorted_indices)


def _in_float32(linear: SwitchLinear, pairs: int, training: bool) -> Callable[..., mx.array]:
    """What multiplies 16-bit experts as `SwitchLinear` does, which MLX does in float32 only."""
    weight: mx.array = linear["weight"]
    turned = _turned(weight)
    rows = weight.swapaxes(-1, -2) if turned else weight  # as it lies in memory: a copy in another order is slow
    # All experts cost about four times their number of single ones: most of it is fresh pages. In training, single ones
    # would cost more: the gradient of each is as large as that of all.
    if pairs <= 4 * len(weight) and not training and "bias" not in linear:
        return functools.partial(_one_by_one, rows, turned)
    wide = rows.astype(mx.float32)
    twin: Any = copy.copy(linear)
    twin["weight"] = wide.swapaxes(-1, -2) if turned else wide
    return twin


def _one_by_one(rows: mx.array, turned: bool, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
    """The products that ``gather_mm`` has, of which each casts one expert and forgets it."""
    tokens = mx.broadcast_to(x, (*indices.shape, *x.shape[-2:])).flatten(0, -3)
    products = []
    for n, expert in enumerate(mx.split(indices.flatten(), indices.size)):
        wide = mx.slice(rows, expert, [0], (1, *rows.shape[1:]))[0].astype(mx.float32)
        products.append(tokens[n] @ (wide if turned else wide.T))
    return mx.stack(products).reshape(*indices.shape, *products[0].shape)


def _turned(weight: mx.array) -> bool:
    """Whether ``[E, out, in]`` is known to lie in memory as ``[E, in, out]``."""
    if planning():
        return False
    try:
        buffer: Any = weight.view(mx.uint16)  # which bfloat16 cannot be
        mx.eval(buffer)  # Until: MLX 0.32.4. In older ones, `memoryview` of a traced array fails too late to be caught.
        strides: Any = memoryview(buffer).strides
    except (RuntimeError, ValueError):  # traced by mx.compile: there are no values to lie anywhere
        return False
    return bool(strides[-2] < strides[-1])
