"""Layers of programs that bring their own: handed on as they are stored, as by the host, for the program to load.

| told by                                                                 | for example                                |
|-------------------------------------------------------------------------|--------------------------------------------|
| a tensor that no format has, in a layer that MLX does not describe      | ``codebook``, ``signs``; ``weight.raw``    |
| words and scales beside such a layer, and no description of them        | embeddings that MLX packed for the program |
| words and scales where MLX's description names a mode that MLX lacks    | ``"mode": "turboquant"``                   |
| a layer in the model that is not MLX's, whatever its tensors are called | layers that were put in before `sanitize`  |

A checkpoint that another quantization tool describes has none of the first three: what is unknown there is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import quantization
from ..errors import CheckpointError, shown
from ..quantization.description import is_mlx_mode
from .decoder import ROUTER_BIAS
from .names import HEAD, MODEL_PREFIX, NUMBER, layer_and_suffix
from .stacking import Layers

# Of MLX's own layers, of adapters, and one that the model has none of: a tensor with such a name is refused or taken.
_KNOWN = {"weight", "scales", "biases", "global_scale", "bias", ROUTER_BIAS, "lora_a", "lora_b", "m"}
_LAYER = re.compile(
    rf"{re.escape(HEAD)}|{re.escape(MODEL_PREFIX)}(?:embed_tokens|norm|layers\.{NUMBER}\.(?:"
    r"input_layernorm|post_attention_layernorm|self_attn\.(?:[qkvo]_proj|[qk]_norm)|mlp\."
    rf"(?:gate|(?:switch_mlp\.|experts\.{NUMBER}\.)?(?:gate|up|down)_proj|experts\.(?:gate_up|down)_proj)))"
)


def guests(layers: Layers, description: dict[str, Any], own: dict[str, Any]) -> set[str]:
    """The paths of layers to hand on.

    Args:
        description: how another tool quantized the checkpoint, if one did.
        own: MLX's own description, if there is one.
    """
    if description:
        return set()
    found = {path for path, tensors in layers.items() if any(_is_strange(suffix) for suffix in tensors)}
    packed = {path for path, tensors in layers.items() if "scales" in tensors}
    if not is_mlx_mode(own.get("mode", "affine")) or (found and not own):
        found |= packed
    elif own:  # the host makes a layer of MLX's for these
        found -= packed
    return {path for path in found if _LAYER.fullmatch(path)}


def _is_strange(suffix: str) -> bool:
    return suffix not in _KNOWN and not quantization.is_suffix(suffix)


def is_guest(module: Any) -> bool:
    """Whether a layer in a model is another program's."""
    return isinstance(module, nn.Module) and type(module).__module__.partition(".")[0] not in (
        *("mlx", "mlx_lm"),
        __package__.partition(".")[0],
    )


def check_taken(weights: Iterable[tuple[str, mx.array]], model: nn.Module, own: dict[str, Any]) -> None:
    """Raise `CheckpointError` for a tensor of a guest that the model has no place for, or only MLX's in its stead.

    Left to the host, it would be dropped without a word by ``load_weights(strict=False)``, as of `sharded_load`.
    """
    modules = dict(model.named_modules())
    for name, array in weights:
        path = layer_and_suffix(name)[0]
        module = modules.get(path)
        packed = "scales" in (module or {}) and not is_guest(module) and not is_mlx_mode(own.get("mode", "affine"))
        if packed or not _fits(module, name[len(path) + 1 :], array):
            mode = f" (quantization in config.json has the mode {shown(own['mode'])})" if "mode" in own else ""
            found = f"one that another program's layer has{mode}"
            remedy = "Load this checkpoint with the program that made it."
            raise CheckpointError(name, "a tensor that MLX's layer has", found, remedy)


def _fits(module: Any, suffix: str, array: mx.array) -> bool:
    found = module
    for part in suffix.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return isinstance(found, mx.array) and found.shape == array.shape
