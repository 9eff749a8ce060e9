"""What a checkpoint is, whether it loads, and what it takes in memory: from its config and safetensors headers alone.

The host's own loader runs, lazily, on files that have the headers of the checkpoint and a hole in place of the data.
The sizes are those of the arrays that it would evaluate. Only the peak of a conversion is estimated: see `planning`.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx_lm.utils import load_model

from .. import quantization
from ..config import ModelArgs
from ..discovery.claims import PACKAGE, check_classes
from ..errors import CheckpointError, shortened
from ..files.headers import Header, find, read_config, write_hollow
from ..layouts.experts import ONE_BY_ONE, layout_of
from ..layouts.names import host_name, layer_and_suffix
from ..model import Model
from ..quantization.description import foreign_quantization, own_quantization
from ..runtime import cpu, parallel
from ..runtime.backend import device, planned
from ..terminal import in_bytes, printable
from . import planning
from .surroundings import check_dtypes, check_place, check_rotation, surroundings

# What a load raises for a checkpoint that is broken: this package, or the host where it stops first.
FAILURES = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

_CAST = (
    "On the CPU, MLX multiplies unquantized experts in float32 only: each use casts them, which takes time. A "
    "quantized copy (mlx_lm.convert -q) is smaller and faster."
)


def inspect(
    checkpoint: str, ranks: int | None = None, context: int = 4096, bits: int | None = None, on: str | None = None
) -> dict[str, Any]:
    """Describe a checkpoint and plan its memory; all sizes are bytes.

    Args:
        checkpoint: a folder, or the name of a repository on the hub, of which only headers are fetched, and nothing if
            it is in the hub's cache.
        ranks: over how many machines to spread it, if over any.
        context: tokens in the key-value cache.
        bits: plan for what ``mlx_lm.convert -q --q-bits`` makes of it.
        on: ``cpu`` or ``gpu``, if not as MLX chooses here.

    Raises:
        CheckpointError: there is no such checkpoint, or a file of it cannot be read. That it does not load is no error:
            ``report["error"]`` tells why.
    """
    notes: list[str] = []
    folder, headers, names = find(checkpoint, notes)
    tensors = {name: entry for header in headers.values() for name, entry in header.items()}
    config = read_config(folder, checkpoint)
    counts, layers = _sorted_out(tensors)
    report: dict[str, Any] = {
        "checkpoint": checkpoint,
        "layout": "unknown",
        "quantization": "unknown",
        "tensors": counts,
        "complete": not notes,
        "error": None,
        "notes": notes,
    }
    notes += surroundings(names, headers)
    with planned(mx.Device(getattr(mx, on)) if on else None):
        report |= {"device": "CPU" if device() == mx.cpu else "GPU", **planning.machine(device())}
        try:
            text = config.get("text_config")
            layout = layout_of(layers, text if isinstance(text, dict) else config)
            report["layout"] = layout.name if layout else "no experts"
            report["quantization"] = _quantization(config, layers)
            check_place(folder, headers)
            check_rotation(folder)
            with noting(notes if bits is None else []):
                model, config = hollow_model(folder, headers)
            if bits is not None:
                scattered = report["quantization"] != "none" and layout in ONE_BY_ONE
                model, report["convert_bytes"] = _converted(model, config, bits, scattered)
            if cpu.casts(model):
                notes.append(_CAST)
            report |= _plan(model, ranks, context)
        except FAILURES as e:
            report["error"] = described(e)
    return report


def hollow_model(folder: Path, headers: dict[str, Header]) -> tuple[Any, dict[str, Any]]:
    """The model and its config as the host's own loader has them, of arrays that have no data."""
    check_dtypes(headers)
    with tempfile.TemporaryDirectory() as hollow:
        write_hollow(folder, headers, Path(hollow))
        return lazy_model(Path(hollow))


def lazy_model(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The model and its config as the host's own loader has them, of arrays that are not evaluated."""
    return load_model(folder, lazy=True, get_model_classes=_classes)


def _classes(config: dict[str, Any]) -> tuple[type, type]:
    """This package's, where the host would come to ask for them."""
    check_classes(config)
    return Model, ModelArgs


def described(error: Exception) -> str:
    """An error in a sentence: the package's errors are sentences, the host's need their type."""
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def _converted(model: Any, config: dict[str, Any], bits: int, scattered: bool) -> tuple[Any, int | None]:
    """What ``mlx_lm.convert -q`` makes of a model, and what it takes for that; None where it was not measured."""
    floats = device() == mx.cpu and not any(hasattr(module, "bits") for module in model.modules())
    before = planning.by_layer(model)
    model = planning.quantized(model, config, bits)
    peak = planning.conversion_peak(before, planning.memory(model)["weights_bytes"], scattered)
    return model, peak if floats else None


def _plan(model: Any, ranks: int | None, context: int) -> dict[str, Any]:
    cache = planning.cache_sizes(model, context)
    plan = planning.memory(model) | {"context": context, "cache_bytes": sum(cache)}
    plan["needs_bytes"] = plan["weights_bytes"] + plan["cache_bytes"]
    return plan | (planning.shares(model, ranks, cache) if ranks else {})


@contextlib.contextmanager
def noting(notes: list[str]) -> Iterator[None]:
    """Collect what the package logs meanwhile, for the report and not for the terminal."""
    logger = logging.getLogger(PACKAGE)
    handler = logging.Handler()
    handler.emit = lambda record: notes.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def _quantization(config: dict[str, Any], layers: dict[str, dict[str, Any]]) -> str:
    """The method in the checkpoint's own terms."""
    if (foreign := foreign_quantization(config)) is not None:
        return quantization.title(quantization.read_description(foreign))
    if own := own_quantization(config):
        return f"MLX {planning.format_name(own)}"
    suffixes = {suffix for tensors in layers.values() for suffix in tensors}
    return next((f.methods[0] for f in quantization.FAMILIES if suffixes.intersection(f.undescribed)), "none")


def _sorted_out(tensors: Header) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """How many tensors the model takes and leaves, and the names of those that are no model's of this type.

    Also the layers that it takes: path → suffix → what has the shape of the tensor.
    """
    counts = {"kept": 0, "dropped": 0}
    unknown = []
    layers: dict[str, dict[str, Any]] = {}
    for name, entry in tensors.items():
        try:
            target = host_name(name)
        except CheckpointError:
            unknown.append(shortened(name))
            continue
        path, suffix = layer_and_suffix(target or name)
        taken = target is not None and suffix not in quantization.IGNORED
        counts["kept" if taken else "dropped"] += 1
        if taken:
            layers.setdefault(path, {})[suffix] = SimpleNamespace(shape=tuple(entry["shape"]))
    return {**counts, "unknown": unknown}, layers


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
        return _aligned([*lines, ("loads", f"no: {report['error']}"), *(("note", note) for note in report["notes"])])
    lines.append(("loads", f"yes, for the {report['device']}" + ", once it is complete" * (not report["complete"])))
    lines.append(("weights", in_bytes(report["weights_bytes"])))
    lines += [("", f"{in_bytes(size)} {name}") for name, size in report["formats"].items()]
    if "convert_bytes" in report:
        peak = report["convert_bytes"]
        known = f"{in_bytes(peak)} at most" if peak else "unknown: measured for floats and FP8 on a CPU only"
        lines.append(("convert -q", known))
    lines.append(("cache", f"{in_bytes(report['cache_bytes'])} at {report['context']} tokens"))
    for mode in ("tensor", "pipeline") if "ranks" in report else ():
        plan = report[mode]
        fits = f"on {parallel.counted([report['ranks']])} (possible: {parallel.listed(plan['allowed'])})"
        lines.append((mode, f"no: {plan['error']}" if plan["error"] else fits))
        for number, rank in enumerate(plan["ranks"] if report["ranks"] > 1 else []):
            part = f"{rank['layers']} layers, {in_bytes(rank['weights_bytes'])} of weights"
            lines.append(("", f"rank {number}: {part}, {in_bytes(rank['cache_bytes'])} of cache"))
    lines += [("note", note) for note in report["notes"]]
    return f"{_needs(report)}\n\n{_aligned(lines)}"


def _needs(report: dict[str, Any]) -> str:
    """The verdict: what the checkpoint takes, and what there is."""
    needs, has, gpu = (report[key] for key in ("needs_bytes", "machine_bytes", "gpu_bytes"))
    line = f"needs {in_bytes(needs)}" + (f"; this machine has {in_bytes(has)}" if has else "")
    if has and needs > has:
        return f"{line}, which is not enough"
    if gpu and needs > gpu and report["device"] == "GPU":
        return f"{line}, but its GPU can use {in_bytes(gpu)}: mlx-lm's README says how to raise that (Large Models)"
    return line


def _aligned(lines: list[tuple[str, str]]) -> str:
    return "\n".join(f"{name:<13} {printable(text)}" for name, text in lines)
