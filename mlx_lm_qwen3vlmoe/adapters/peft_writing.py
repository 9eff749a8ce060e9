"""LoRA for PEFT, written: the tensors and the config that `peft` reads, with the experts of a layer fused."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import mlx.core as mx

from ..layouts.names import EMBEDDINGS, module_name
from . import fused
from .fused import DOWN, GATE_UP
from .lora import Adapter, Lora, is_expert
from .peft import PREFIX
from .peft_config import write_config

logger = logging.getLogger(__name__)


class Target(NamedTuple):
    """What PEFT adapts: a module or a parameter of the model.

    Attributes:
        name: by which the config names it.
        is_parameter: whether it is one, as the experts and the router of transformers 5 are.
        change: of its weight.
        tensors: what the file has of the change, by names without PEFT's prefix.
    """

    name: str
    is_parameter: bool
    change: Lora
    tensors: dict[str, mx.array]


def write(adapter: Adapter, probe: Adapter) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """The tensors and the config of an adapter, for the PEFT and the transformers of today.

    Args:
        adapter: is left without its modules.
        probe: the same, read again, to look at values: what is looked at stays in memory for as long as its array does.
    """
    targets = [*_layers(adapter, probe), *_experts(adapter, probe)]
    adapter.modules.clear()
    modules = [target.name for target in targets if not target.is_parameter]
    parameters = [target.name for target in targets if target.is_parameter]
    dora = any(target.change.magnitude is not None for target in targets)
    if dora and any(name.endswith(".mlp.gate") for name in modules):
        logger.warning("transformers 5 has no DoRA of the router (mlp.gate): load this adapter with transformers 4.57.")
    tensors = {f"{PREFIX}{name}": array for target in targets for name, array in target.tensors.items()}
    return tensors, write_config(
        adapter.base,
        0.0 if parameters else adapter.dropout,  # which PEFT has for modules only
        dora,
        **_ranks_and_alphas({target.name: target.change for target in targets}),
        target_modules=modules,
        target_parameters=parameters or None,
    )


def _layers(adapter: Adapter, probe: Adapter) -> Iterator[Target]:
    """Attention, dense MLPs, routers, embeddings and head."""
    for path, lora in adapter.modules.items():
        if is_expert(path):
            continue
        lora, name = lora.cut(probe.modules.pop(path).used_rank()), module_name(path)
        kinds = ("embedding_A", "embedding_B") if path == EMBEDDINGS else ("A.weight", "B.weight")
        tensors = {f"{name}.lora_{kind}": part for kind, part in zip(kinds, (lora.a, lora.b), strict=True)}
        if lora.magnitude is not None:
            tensors[f"{name}.lora_magnitude_vector"] = lora.magnitude
        is_parameter = path.endswith(".mlp.gate") and not adapter.dora
        yield Target(f"{name}.weight" if is_parameter else name, is_parameter, lora, tensors)


def _experts(adapter: Adapter, probe: Adapter) -> Iterator[Target]:
    """``gate_up_proj``, ``down_proj`` or both, of every layer with experts."""
    layers: dict[str, dict[str, Lora]] = {}
    for path, lora in adapter.modules.items():
        if is_expert(path):
            mlp, _, projection = path.partition(".switch_mlp.")
            layers.setdefault(mlp, {})[projection] = lora
    for mlp, projections in layers.items():
        joined = _joined(projections, {name: probe.modules.pop(f"{mlp}.switch_mlp.{name}") for name in projections})
        for parameter, lora in joined.items():
            experts = f"{module_name(mlp)}.experts"
            where = f"{experts}.base_layer" if len(joined) == 2 and parameter == GATE_UP else experts
            a, b = fused.flat(lora.a, lora.b)
            tensors = {f"{where}.lora_A.weight": a, f"{where}.lora_B.weight": b}
            yield Target(f"{experts}.{parameter}", True, lora, tensors)


def _joined(projections: dict[str, Lora], probe: dict[str, Lora]) -> dict[str, Lora]:
    """``gate_up_proj``, ``down_proj`` or both, of a layer's projections."""
    joined: dict[str, Lora] = {}
    if halves := [name for name in ("gate_proj", "up_proj") if name in projections]:
        rank = max(probe[name].used_rank() for name in halves)
        gate, up = (projections[name].cut(rank) if name in projections else None for name in ("gate_proj", "up_proj"))
        shared = len(halves) == 2 and bool(mx.array_equal(probe["gate_proj"].a, probe["up_proj"].a).item())
        joined[GATE_UP] = fused.join(gate, up, shared)
    if DOWN in projections:
        joined[DOWN] = projections[DOWN].cut(probe[DOWN].used_rank())
    return joined


def _ranks_and_alphas(changes: dict[str, Lora]) -> dict[str, Any]:
    """``r`` and ``lora_alpha``, which most have, and those of the others by their names."""
    ranks = {name: lora.rank for name, lora in changes.items()}
    alphas = {name: lora.scale * lora.rank for name, lora in changes.items()}
    ((rank, _),) = Counter(ranks.values()).most_common(1)
    ((alpha, _),) = Counter(alphas.values()).most_common(1)
    return {
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {re.escape(name): other for name, other in ranks.items() if other != rank},
        "alpha_pattern": {re.escape(name): _plain(other) for name, other in alphas.items() if other != alpha},
    }


def _plain(number: float) -> float:
    return int(number) if number.is_integer() else number
