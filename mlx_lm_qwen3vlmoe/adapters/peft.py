"""LoRA of PEFT, read: ``adapter_model.safetensors`` and an ``adapter_config.json`` of its own.

| tensors                                                  | of                                                       |
|----------------------------------------------------------|----------------------------------------------------------|
| ``lora_A.weight [r, in]``, ``lora_B.weight [out, r]``    | a linear layer, also of one expert                       |
| ``lora_magnitude_vector [out]``                          | the same, with DoRA                                      |
| ``lora_embedding_A [r, V]``, ``lora_embedding_B [H, r]`` | the embeddings                                           |
| ``mlp.experts.lora_A.weight``, ``….lora_B.weight``       | a fused parameter: see `fused`                           |
| ``mlp.experts.base_layer.lora_A.weight``, …              | ``gate_up_proj``, where ``down_proj`` is adapted as well |
| ``mlp.experts.gate_up_proj.lora_A.weight [E, r, in]``, … | gate, up or down of all experts: see `fused.by_expert`   |
| ``mlp.gate.lora_A.weight``, ``….lora_B.weight``          | the router: a module in transformers 4.57, or a parameter|

Names begin as those of checkpoints do, after PEFT's ``base_model.model.``, which ms-swift's own format leaves out; a
file of a training state has the adapter's name in them (``lora_A.default.weight``).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from ..errors import CheckpointError, series, shortened, shown
from ..files.headers import read_header
from ..layouts.names import EMBEDDINGS, NUMBER
from ..layouts.stacking import PROJECTIONS
from . import fused
from .base import Base
from .files import as_in_file, broken, read_tensors
from .fused import DOWN, GATE_UP, Pair
from .lora import MERGE, Adapter, Lora, check_shapes, host_path, sizes, stack, unlike_base
from .peft_config import PeftConfig

logger = logging.getLogger(__name__)

FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_TENSOR = re.compile(r"(.+)\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)((?:\.[^.]+)*)")
_COPY = re.compile(r"(?:.+\.)?(?:embed_tokens|lm_head)\.base_layer\.weight")
_SINGLE = re.compile(rf"(.+\.mlp)\.experts\.({NUMBER})\.((?:gate|up|down)_proj)")
_FUSED = re.compile(r"(.+\.mlp)\.experts(\.base_layer)?")
_STACKED = re.compile(r"(.+\.mlp)\.experts\.((?:gate_up|gate|up|down)_proj)")
_TINKER = re.compile(r"\.experts\.w[123]\.lora_|(?:^|\.)unembed_tokens\.lora_")

Parts = dict[str, mx.array]  # A, B or magnitude_vector → array


class Module(NamedTuple):
    """What a file has for a module.

    Attributes:
        stored: its name in the file.
        name: of the module in the model that was trained.
        parts: its tensors.
    """

    stored: str
    name: str
    parts: Parts


def read(folder: Path, base: Base) -> Adapter:
    """Read an adapter that PEFT, or a trainer that builds on it, saved; raises `CheckpointError`."""
    _refuse_tinker(read_header(folder / FILE)[0])
    config = PeftConfig(folder)
    tensors = read_tensors(folder / FILE)
    modules = _by_module(tensors)
    _announce_left_out(tensors)
    adapter = Adapter(dropout=config.dropout, base=base.name)
    adapter.names = _names(modules)
    with as_in_file(adapter.names):
        _fill(adapter, modules, config, base, folder)
    return adapter


def _refuse_tinker(tensors: Iterable[str]) -> None:
    if tensor := next((name for name in tensors if _TINKER.search(name)), None):
        remedy = "Convert it with tinker_cookbook.weights.build_lora_adapter first, and then convert the result here."
        raise CheckpointError(tensor, "an adapter that PEFT saved", "one that Tinker saved", remedy)


def _names(modules: dict[str, Module]) -> dict[str, str]:
    """Path in the host's model → the module's name in the file, of stacked experts that of the first."""
    names = {path: module.stored for path, module in modules.items()}
    for path, module in modules.items():
        single, several = _SINGLE.fullmatch(path), _FUSED.fullmatch(path) or _STACKED.fullmatch(path)
        for projection in [single[3]] if single else PROJECTIONS if several else []:
            names.setdefault(f"{path.partition('.experts')[0]}.switch_mlp.{projection}", module.stored)
    return names


def _fill(adapter: Adapter, modules: dict[str, Module], config: PeftConfig, base: Base, folder: Path) -> None:
    single: dict[str, dict[int, Lora]] = {}
    for path, module in modules.items():
        if match := _SINGLE.fullmatch(path):
            experts = single.setdefault(f"{match[1]}.switch_mlp.{match[3]}", {})
            experts[int(match[2])] = _change(path, module, config)
        elif match := _STACKED.fullmatch(path):
            adapter.modules |= _with_axis(match[1], match[2], module, config)
        elif not _FUSED.fullmatch(path):
            adapter.modules[path] = _change(path, module, config)
    known = sizes(adapter.modules)
    if single:
        adapter.modules |= _stacked(single, known.get("num_experts"), base)
    if layers := _parameters(modules, config):
        over_in = fused.over_inputs(layers, known.get("hidden_size"), base.hidden_size)
        blocks = _in_blocks(config)
        # Read again, to look at values: what is looked at stays in memory for as long as its array does.
        probes = _parameters(_by_module(read_tensors(folder / FILE)), config)
        for mlp, pairs in layers.items():
            probe = probes.pop(mlp)
            for name, pair in pairs.items():
                in_two = name == GATE_UP and fused.is_in_two(probe[name], over_in, blocks)
                adapter.modules |= fused.separate(mlp, name, pair, over_in, blocks, in_two)


def _by_module(tensors: dict[str, mx.array]) -> dict[str, Module]:
    """The modules of the one adapter in a file, by their paths in the host's model."""
    modules: dict[str, Module] = {}
    adapters = set()
    for tensor, array in tensors.items():
        name = _module_of(tensor)
        path = host_path(name)
        if path is None or _COPY.fullmatch(name):
            continue
        part, adapter = _part_of(tensor, path)
        adapters.add(adapter)
        if len(adapters) > 1:
            found = series([each.strip(".") or "one without a name" for each in sorted(adapters)], "and")
            raise CheckpointError(tensor, "one adapter in the file", f"two, {found}", "Save one of them with PEFT.")
        stored = tensor.partition(".lora_")[0]
        module = modules.setdefault(path, Module(stored, name.removesuffix(".base_layer"), {}))
        if part in module.parts:
            where = f"{module.stored}{tensor.removeprefix(stored)}", tensor
            raise CheckpointError(where, "one of these, as they are the same tensor", "both", "Remove one of them.")
        module.parts[part] = array
    return modules


def _module_of(tensor: str) -> str:
    """The name of the module that a tensor is of, in the model that was trained."""
    match = _TENSOR.fullmatch(tensor)
    name = match[1] if match else tensor
    while name.startswith(PREFIX):
        name = name.removeprefix(PREFIX)
    return name


def _part_of(tensor: str, path: str) -> tuple[str, str]:
    """Which part of its module a tensor is, and the name of its adapter, which may be empty."""
    match = _TENSOR.fullmatch(tensor)
    adapter = match[3].removesuffix(".weight") if match else ""
    if not match or not path or adapter.count(".") > 1 or adapter.endswith(".bias"):
        expected = "lora_A, lora_B or lora_magnitude_vector of a Qwen3-VL-MoE model"
        raise CheckpointError(tensor, expected, "a tensor that no adapter of mlx_lm can hold", MERGE)
    return match[2], adapter


def _announce_left_out(tensors: dict[str, mx.array]) -> None:
    names = {tensor: _module_of(tensor) for tensor in tensors}
    if vision := {name for name in names.values() if host_path(name) is None}:
        logger.warning("Left out: the adapters of %d vision layers, which a text model has no use for.", len(vision))
    if copies := [tensor for tensor, name in names.items() if name not in vision and _COPY.fullmatch(name)]:
        logger.warning("Left out: %s, which PEFT copies from the base model.", ", ".join(map(shortened, copies[:5])))


def _change(path: str, module: Module, config: PeftConfig) -> Lora:
    """The change of a module that has a weight of its own."""
    parts = module.parts
    kinds = ("embedding_A", "embedding_B") if path == EMBEDDINGS else ("A", "B")
    expected = {*kinds, *(["magnitude_vector"] if config.dora else [])}
    if parts.keys() != expected:
        raise broken(module.stored, _listed(expected), _listed(parts))
    parameter = f"{module.name}.weight"
    rank, scale = config.rank_and_scale(parameter if config.targets(parameter) else module.name)
    a, b = (parts[kind] for kind in kinds)
    if a.ndim != 2 or b.ndim != 2 or (a.shape[0], b.shape[1]) != (rank, rank):
        shapes = f"lora_A [{rank}, …] and lora_B […, {rank}], according to r and rank_pattern"
        raise broken(module.stored, shapes, f"{list(a.shape)} and {list(b.shape)}")
    lora = Lora(a, b, scale, parts.get("magnitude_vector"))
    if not _SINGLE.fullmatch(path):
        check_shapes(path, lora)
    return lora


def _with_axis(mlp: str, projection: str, module: Module, config: PeftConfig) -> dict[str, Lora]:
    """The changes of all experts of a layer, which have an axis of their own in both matrices."""
    rank, scale = config.rank_and_scale(module.name)
    a, b = fused.by_expert(module.stored, *_both(module, projection), rank)
    if projection != GATE_UP:
        return {f"{mlp}.switch_mlp.{projection}": Lora(a, b, scale)}
    if b.shape[1] % 2:
        raise broken(module.stored, "an even number of outputs, half for gate and half for up", b.shape[1])
    halves = zip(("gate_proj", "up_proj"), mx.split(b, 2, axis=1), strict=True)
    return {f"{mlp}.switch_mlp.{half}": Lora(a, part, scale) for half, part in halves}


def _both(module: Module, what: str) -> tuple[mx.array, mx.array]:
    """The two matrices of a module that has no other tensors."""
    if module.parts.keys() != {"A", "B"}:
        raise broken(module.stored, f"lora_A and lora_B of {what}", _listed(module.parts))
    return module.parts["A"], module.parts["B"]


def _listed(kinds: Iterable[str]) -> str:
    return series([f"lora_{kind}" for kind in sorted(kinds)], "and")


def _stacked(single: dict[str, dict[int, Lora]], count: int | None, base: Base) -> dict[str, Lora]:
    """Separate experts, stacked; those without an adapter are not changed."""
    path = next(iter(single))
    last = max(map(max, single.values()))
    if (shapes := base.shapes()) is None and count is None and any(len(e) <= last for e in single.values()):
        shapes = base.shapes(f"{path}: an adapter of some of the experts")
    if shapes is not None:
        count = shapes.get(path, (last + 1,))[0]
    if count is None:
        count = last + 1
        logger.warning("The base model is not at hand: it is taken to have the %d experts of the adapter.", count)
    stacked = {}
    for path, experts in single.items():
        if max(experts) >= count:
            odd = path.replace("switch_mlp", f"experts.{max(experts)}")
            raise unlike_base(odd, f"no expert after {count - 1}, as in the base model", f"expert {max(experts)}")
        stacked[path] = stack(path, [experts.get(n) for n in range(count)])
    return stacked


def _parameters(modules: dict[str, Module], config: PeftConfig) -> dict[str, dict[str, Pair]]:
    """Path of an MLP → ``gate_up_proj``, ``down_proj`` or both, of layers whose fused experts are adapted."""
    layers: dict[str, dict[str, Pair]] = {}
    for path, module in modules.items():
        if not (match := _FUSED.fullmatch(path)):
            continue
        targeted = [name for name in (GATE_UP, DOWN) if config.targets(f"{module.name}.{name}")]
        if match[2] and f"{match[1]}.experts" in modules:
            name = GATE_UP  # is wrapped first, and then down_proj around it
        elif f"{path}.base_layer" in modules:
            name = DOWN
        elif len(targeted) == 1 and not match[2]:
            (name,) = targeted
        else:
            targets = "as many adapters of experts as target_parameters names gate_up_proj and down_proj"
            raise broken(module.stored, targets, f"target_parameters {shown(config.parameters)}")
        rank, scale = config.rank_and_scale(f"{module.name}.{name}")
        a, b = _both(module, name)
        if 3 in (a.ndim, b.ndim) and not config.in_blocks:
            a, b = fused.flat(*fused.by_expert(module.stored, a, b, rank))
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] % rank:
            shapes = f"lora_A [{rank} · experts, …] and lora_B […, {rank} · experts] of {name}"
            raise broken(
                module.stored, f"{shapes}, according to r and rank_pattern", f"{list(a.shape)} and {list(b.shape)}"
            )
        layers.setdefault(match[1], {})[name] = Pair(a, b, rank, scale)
    return layers


def _in_blocks(config: PeftConfig) -> bool:
    if (blocks := config.in_blocks) is None:
        logger.warning(
            "adapter_config.json has no lora_B_layout: the experts' lora_B is read as PEFT reads it. If Unsloth "
            'trained them from February to September 2026, add "lora_B_layout": "grouped_by_expert" and convert again.'
        )
    return bool(blocks)
