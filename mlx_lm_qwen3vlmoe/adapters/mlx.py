"""Adapters of ``mlx_lm``: ``adapters.safetensors`` and an ``adapter_config.json`` of its own.

``lora_parameters`` has **one** rank and one scale for all modules. A module by another rank is filled with zeros, and
another scale goes into B.

| tensor, in the host's names   | a linear layer | the experts of a layer, stacked                               |
|-------------------------------|----------------|---------------------------------------------------------------|
| ``lora_a``                    | ``[in, rank]`` | ``[experts, rank, in]``; 0.28.2: ``[experts · rank, in]``     |
| ``lora_b``                    | ``[rank, out]``| ``[experts, out, rank]``                                      |
| ``m``, with ``dora``          | ``[out]``      |                                                               |

``keys`` are names within a layer, for the last ``num_layers`` layers, or the paths of modules in the whole model (read
in ``linear_to_lora_layers``, mlx-lm 0.28.2 to 0.32.2). The paths are what is written: they hold any choice of modules,
and need no number of layers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import CheckpointError, series
from .fields import CORRECT, Fields
from .files import as_in_file, broken, read_config, read_tensors
from .lora import Adapter, Lora, host_path, in_common, is_expert

FILE = "adapters.safetensors"
_TENSOR = re.compile(r"(.+)\.(lora_a|lora_b|m)")


def read(folder: Path) -> Adapter:
    """Read an adapter that ``mlx_lm.lora`` trained; raises `CheckpointError`."""
    config = Fields(read_config(folder))
    kind = config.text("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        remedy = "The file of full training has whole weights, which mlx_lm.fuse puts into the model."
        raise config.error("fine_tune_type", "lora or dora", kind, remedy if kind == "full" else CORRECT)
    parameters = Fields(config.object("lora_parameters"), "lora_parameters.")
    rank, scale = parameters.integer("rank"), parameters.number("scale")
    adapter = Adapter(dropout=parameters.number("dropout", 0.0), base=config.text("model", "") or None)
    modules = _by_module(read_tensors(folder / FILE), adapter.names)
    with as_in_file(adapter.names):
        for path, parts in modules.items():
            change = adapter.modules[path] = _module(path, parts, scale, kind == "dora")
            if change.a.ndim < 2 or change.b.ndim < 2 or (change.a.shape[-2], change.b.shape[-1]) != (rank, rank):
                shapes = f"the shapes {list(parts['lora_a'].shape)} and {list(parts['lora_b'].shape)}"
                raise broken(path, f"lora_a and lora_b of rank {rank}, according to lora_parameters", shapes)
    return adapter


def _by_module(tensors: dict[str, mx.array], names: dict[str, str]) -> dict[str, dict[str, mx.array]]:
    modules: dict[str, dict[str, mx.array]] = {}
    for name, array in tensors.items():
        match = _TENSOR.fullmatch(name)
        path = host_path(match[1]) if match else None
        if match is None or not path:
            remedy = "Is the adapter of another model type, or of full training?"
            raise CheckpointError(name, "lora_a, lora_b or m of a layer", "another tensor", remedy)
        module = modules.setdefault(path, {})
        if match[2] in module:
            where = f"{names[path]}.{match[2]}", name
            raise CheckpointError(where, "one of these, as they are the same tensor", "both", "Remove one of them.")
        names[path] = match[1]
        module[match[2]] = array
    return modules


def _module(path: str, parts: dict[str, mx.array], scale: float, dora: bool) -> Lora:
    expected = {"lora_a", "lora_b"} | ({"m"} if dora else set())
    if parts.keys() != expected:
        raise broken(path, series(sorted(expected), "and"), series(sorted(parts), "and"))
    a, b = parts["lora_a"], parts["lora_b"]
    if is_expert(path):
        if a.ndim == 2 and b.ndim == 3 and a.shape[0] % b.shape[0] == 0:
            a = a.reshape(b.shape[0], -1, a.shape[1])
    elif a.ndim == b.ndim == 2:
        a, b = a.T, b.T
    return Lora(a, b, scale, parts.get("m"))


def write(adapter: Adapter) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """The tensors, in float32 as the host trains them, and the config. The adapter is left without its modules."""
    rank, scale = in_common(adapter.modules.values())
    tensors: dict[str, mx.array] = {}
    for path, lora in adapter.modules.items():
        a, b, _, magnitude = lora.with_scale(scale).with_rank(rank)
        if not is_expert(path):
            a, b = a.T, b.T
        parts = {"lora_a": a, "lora_b": b} | ({} if magnitude is None else {"m": magnitude})
        tensors |= {f"{path}.{kind}": part.astype(mx.float32) for kind, part in parts.items()}
    config = {
        "fine_tune_type": "dora" if adapter.dora else "lora",
        "lora_parameters": {
            "dropout": adapter.dropout,
            "keys": list(adapter.modules),
            "rank": rank,
            "scale": scale,
        },
        "num_layers": -1,
    }
    adapter.modules.clear()
    return tensors, config | ({"model": adapter.base} if adapter.base else {})
