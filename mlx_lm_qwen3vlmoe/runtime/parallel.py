"""Over how many ranks a model can be spread: known from its sizes, before anything is read or sent.

Tensor parallelism gives every rank a part of every layer: of the attention heads, and of the width of each MLP and each
expert. Pipeline parallelism gives every rank some of the layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import mlx.nn as nn

from ..errors import CheckpointError, series


def pieces(text: dict[str, Any], modules: Iterable[tuple[str, nn.Module]]) -> dict[str, int]:
    """What tensor parallelism cuts → into how many pieces it can be cut at most, each number of ranks dividing it.

    Args:
        text: the normalized text config.
        modules: paths and modules. Quantized ones are cut between groups only.
    """
    found = {name: text[name] for name in ("num_key_value_heads", "num_attention_heads")}
    for path, module in modules:
        if path.endswith(".switch_mlp.down_proj"):
            name, size = "moe_intermediate_size", text["moe_intermediate_size"]
        elif path.endswith(".mlp.down_proj"):
            name, size = "intermediate_size", text["intermediate_size"]
        elif path.endswith(".self_attn.o_proj") and hasattr(module, "group_size"):
            name, size = "num_attention_heads * head_dim", text["num_attention_heads"] * text["head_dim"]
        else:
            continue
        if (group_size := getattr(module, "group_size", 1)) > 1:
            name, size = f"{name} in groups of {group_size}", size // group_size
        found[name] = size
    return found


def allowed(mode: str, sizes: dict[str, int]) -> list[int]:
    """The numbers of ranks that a model can be spread over in a mode, ``tensor`` or ``pipeline``."""
    least = min(sizes.values())
    return [n for n in range(1, least + 1) if mode == "pipeline" or not any(size % n for size in sizes.values())]


def check(ranks: int, mode: str, sizes: dict[str, int]) -> None:
    """Raise `CheckpointError` where a model cannot be spread over so many ranks.

    Args:
        sizes: for tensor parallelism what `pieces` gives, for a pipeline ``{"num_hidden_layers": n}``.
    """
    if ranks in (numbers := allowed(mode, sizes)):
        return
    if mode == "tensor":
        culprits = {name: size for name, size in sizes.items() if size % ranks}
        rule, remedy = "as the number of ranks has to divide", "Launch that many, or use a pipeline."
    else:
        culprits, rule, remedy = sizes, "no more than", "Launch that many."
    named = series([f"{name} ({size})" for name, size in culprits.items()], "and")
    raise CheckpointError(f"{mode} parallelism", f"{counted(numbers)}, {rule} {named}", counted([ranks]), remedy)


def cut(model: nn.Module, group: Any) -> None:
    """Cut the layers of the host's model to this rank's parts, lazily.

    Args:
        model: the host's ``qwen3_moe.Model``, whose ``shard`` does the work.
        group: an `mlx.core.distributed.Group`, or anything with its ``rank()`` and ``size()``.
    """
    # The host would cut NVFP4's second scale, which is one number an expert, but every rank has a part of all experts.
    # Until: none known.
    with without_global_scales(model):
        model.shard(group)


@contextlib.contextmanager
def without_global_scales(model: nn.Module) -> Iterator[None]:
    """Take NVFP4's second scales out of experts meanwhile."""
    scales = [(m, m.global_scale) for _, m in model.named_modules() if m.get("global_scale") is not None]
    for module, _ in scales:
        module.global_scale = None
    try:
        yield
    finally:
        for module, scale in scales:
            module.global_scale = scale


def counted(numbers: list[int]) -> str:
    """``1 or 2 ranks``."""
    return f"{listed(numbers)} {'rank' if numbers == [1] else 'ranks'}"


def listed(numbers: list[int]) -> str:
    """Numbers of ranks in words."""
    if len(numbers) > 2 and numbers == list(range(1, len(numbers) + 1)):
        return f"1 to {len(numbers)}"
    return series(numbers)
