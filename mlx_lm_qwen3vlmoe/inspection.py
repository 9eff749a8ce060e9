"""What a checkpoint is, whether it loads, and what it takes in memory: from its config and safetensors headers alone.

Nothing is estimated. The host's own loader runs, lazily, on files that have the headers of the checkpoint and a hole in
place of the data, and the sizes are those of the arrays that it would evaluate.
"""

from __future__ import annotations

import contextlib
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import load_model

from . import parallel, planning, quantization
from .backend import device, narrow, planned
from .config import ModelArgs
from .description import take_quantization
from .errors import CheckpointError
from .headers import Header, hub_headers, local_headers, read_config, write_hollow
from .model import Model
from .names import host_name, layer_and_suffix


def inspect(
    checkpoint: str, ranks: int = 1, context: int = 4096, bits: int | None = None, on: str | None = None
) -> dict[str, Any]:
    """Describe a checkpoint and plan its memory; all sizes are bytes.

    Args:
        checkpoint: a folder, or the name of a repository on the hub, of which only headers are fetched.
        ranks: over how many machines to spread it.
        context: tokens in the key-value cache.
        bits: plan for what ``mlx_lm.convert -q --q-bits`` makes of it.
        on: ``cpu`` or ``gpu``, if not as MLX chooses here.

    Raises:
        CheckpointError: there is no such checkpoint, or a file of it cannot be read. That it does not load is no error:
            ``report["error"]`` tells why.
    """
    folder = Path(checkpoint)
    notes: list[str] = []
    folder, headers = (folder, local_headers(folder, notes)) if folder.is_dir() else hub_headers(checkpoint)
    tensors = {name: entry for header in headers.values() for name, entry in header.items()}
    config = read_config(folder)
    report: dict[str, Any] = {
        "checkpoint": checkpoint,
        "layout": _layout(tensors),
        "quantization": "unknown",
        "tensors": _sorted_out(tensors),
        "complete": not notes,
        "error": None,
        "notes": notes,
    }
    with planned(mx.Device(getattr(mx, on)) if on else None):
        report["device"] = "CPU" if device() == mx.cpu else "GPU"
        try:
            report["quantization"] = _quantization(config)
            with _noting(notes if bits is None else []):
                model, config = hollow_model(folder, headers)
            report |= _plan(model if bits is None else planning.quantized(model, config, bits), ranks, context, notes)
        # of the package, or of the host where it stops first
        except (ValueError, KeyError, TypeError, RuntimeError) as e:
            report["error"] = f"{type(e).__name__}: {e}"
    return report


def hollow_model(folder: Path, headers: dict[str, Header]) -> tuple[Any, dict[str, Any]]:
    """The model and its config as the host's own loader has them, of arrays that have no data."""
    with tempfile.TemporaryDirectory() as hollow:
        write_hollow(folder, headers, Path(hollow))
        return load_model(Path(hollow), lazy=True, get_model_classes=lambda config: (Model, ModelArgs))


def _plan(model: Any, ranks: int, context: int, notes: list[str]) -> dict[str, Any]:
    cache = planning.cache_sizes(model, context)
    plan = planning.memory(model) | {"context": context, "cache_bytes": sum(cache)}
    if cast := sum(experts.weight.nbytes for experts in narrow(model)):
        notes.append(f"on the CPU, experts are cast to float32 when first used: {cast / 1e9:.3f} GB more")
    return plan | planning.shares(model, ranks, cache)


@contextlib.contextmanager
def _noting(notes: list[str]) -> Iterator[None]:
    """Collect what the package logs meanwhile, for the report and not for the terminal."""
    logger = logging.getLogger(__package__)
    handler = logging.Handler()
    handler.emit = lambda record: notes.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def _layout(tensors: Header) -> str:
    """How the experts are stored; see the table in `mlx_lm_qwen3vlmoe.sanitize`."""
    for name, entry in tensors.items():
        if ".switch_mlp." in name:
            return "stacked experts (mlx-lm, mlx-vlm)"
        if ".experts.gate_up_projs." in name:
            return "one tensor an expert, gate and up in one (AutoRound)"
        if not (match := re.fullmatch(r"(.+\.experts\.)(gate_up_proj|(?:0\.)?gate_proj(?:\.0)?\.\w+)", name)):
            continue
        gate = entry["shape"]
        down = tensors.get(match[1] + re.sub("gate_up|gate", "down", match[2]), {"shape": []})["shape"]
        if match[2] != "gate_up_proj":
            miscut = match[2].endswith(".weight") and [2 * n for n in gate] == [*down[1:], 4 * down[0]]
            return "one tensor an expert" + ", cut along the wrong axis (transformers 5.0, 5.1)" * miscut
        if gate[1:2] == down[2:]:
            return "fused experts, [experts, in, out] (official release, transformers 4.57)"
        return "fused experts, [experts, out, in] (transformers 5.2 or newer)"
    return "no experts"


def _quantization(config: dict[str, Any]) -> str:
    """The method in the checkpoint's own terms."""
    if (foreign := take_quantization(config)) is not None:
        return quantization.title(quantization.describe(foreign))
    return f"MLX {planning.format_name(found)}" if (found := config.get("quantization")) else "none"


def _sorted_out(names: Iterable[str]) -> dict[str, Any]:
    """How many tensors the model takes and leaves, and the names of those that are no model's of this type."""
    counts = {"kept": 0, "dropped": 0}
    unknown = []
    for name in names:
        try:
            taken = host_name(name)
        except CheckpointError:
            unknown.append(name)
            continue
        if taken is not None and layer_and_suffix(name)[1] in quantization.IGNORED:
            taken = None
        counts["kept" if taken else "dropped"] += 1
    return {**counts, "unknown": unknown}


def render(report: dict[str, Any]) -> str:
    """A report in lines for a reader."""
    tensors = report["tensors"]
    unknown = len(tensors["unknown"])
    lines = [
        ("checkpoint", report["checkpoint"]),
        ("layout", report["layout"]),
        ("quantization", report["quantization"]),
        ("tensors", f"{tensors['kept']} kept, {tensors['dropped']} dropped, {unknown} unknown"),
        *(("", name) for name in tensors["unknown"][:5]),
    ]
    if report["error"]:
        return _aligned([*lines, ("loads", f"no: {report['error']}")])
    lines += [
        ("loads", f"yes, for the {report['device']}" + ", once it is complete" * (not report["complete"])),
        ("weights", _gb(report["weights_bytes"])),
    ]
    lines += [("", f"{_gb(size)} {name}") for name, size in report["formats"].items()]
    lines += [("cache", f"{_gb(report['cache_bytes'])} at {report['context']} tokens")]
    for mode in ("tensor", "pipeline"):
        plan = report[mode]
        lines.append((mode, plan["error"] or f"{report['ranks']} of {parallel.listed(plan['allowed'])} ranks"))
        for number, rank in enumerate(plan["ranks"] if report["ranks"] > 1 else []):
            part = (
                f"{rank['layers']} layers, {_gb(rank['weights_bytes'])} of weights, {_gb(rank['cache_bytes'])} of cache"
            )
            lines.append(("", f"rank {number}: {part}"))
    return _aligned([*lines, *(("note", note) for note in report["notes"])])


def _aligned(lines: list[tuple[str, str]]) -> str:
    return "\n".join(f"{name:<13} {text}" for name, text in lines)


def _gb(size: int) -> str:
    return f"{size / 1e9:8.3f} GB"
