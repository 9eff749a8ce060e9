"""What a checkpoint is, whether it loads, and what it takes in memory: from its config and safetensors headers alone.

Nothing is estimated. The host's own loader runs, lazily, on files that have the headers of the checkpoint and a hole in
place of the data, and the sizes are those of the arrays that it would evaluate. A safetensors file begins with eight
bytes, little-endian: the length of the JSON object that follows (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_map_with_path
from mlx_lm.models import qwen3_moe
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model, quantize_model

from . import config as configs
from . import parallel, quantization
from .backend import device, narrow, planned
from .config import ModelArgs
from .errors import CheckpointError
from .model import Model
from .names import host_name, layer_and_suffix

Header = dict[str, dict[str, Any]]  # tensor → dtype, shape and data_offsets, as the format has them
# Quantization method → the field that tells its format.
_DETAIL = {
    "awq": "version",
    "compressed-tensors": "format",
    "fp8": "fmt",
    "gptq": "checkpoint_format",
    "modelopt": "quant_algo",
}
_LAYER = re.compile(r"language_model\.model\.layers\.(\d+)\.")


class Rank(NamedTuple):
    """A rank without a group: what the host asks of `mlx.core.distributed.Group` to cut a model."""

    number: int
    ranks: int

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return self.ranks


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
    folder, headers = (folder, _local_headers(folder, notes)) if folder.is_dir() else _hub_headers(checkpoint)
    tensors = {name: entry for header in headers.values() for name, entry in header.items()}
    config = _config(folder)
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
        try:
            report["device"] = "CPU" if device() == mx.cpu else "GPU"
            report["quantization"] = _quantization(config)
            with _noting(notes if bits is None else []), tempfile.TemporaryDirectory() as hollow:
                _write_hollow(folder, headers, Path(hollow))
                model, config = load_model(Path(hollow), lazy=True, get_model_classes=lambda config: (Model, ModelArgs))
            if bits is not None:
                model = _quantized(model, config, bits)
            cache = _cache(model, context)
            report |= _memory(model) | {"context": context, "cache_bytes": sum(cache)}
            if cast := sum(experts.weight.nbytes for experts in narrow(model)):
                notes.append(f"on the CPU, experts are cast to float32 when first used: {cast / 1e9:.3f} GB more")
            report |= _spread(model, ranks, cache)
        # of the package, or of the host where it stops first
        except (ValueError, KeyError, TypeError, RuntimeError) as e:
            report["error"] = f"{type(e).__name__}: {e}"
    return report


def _local_headers(folder: Path, notes: list[str]) -> dict[str, Header]:
    """The headers of the files that the host would load; a file that is cut short is worth a note."""
    headers = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(min(length, 100_000_000))  # the format's own limit
        try:
            header = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
            end = 8 + length + _data_size(header)
            complete = all(isinstance(entry["shape"], list) and entry["dtype"] for entry in header.values())
        except (ValueError, AttributeError, KeyError, TypeError, IndexError):
            complete = False
        if not complete:
            raise CheckpointError(
                f"{path}: expected the header of a safetensors file, found none. Download the file again."
            )
        headers[path.name] = header
        if (size := path.stat().st_size) < end:
            notes.append(f"{path.name}: {end - size} of its {end} bytes are missing: it will not load as it is")
    if not headers:
        raise CheckpointError(f"{folder}: expected model*.safetensors, found none. Is the download complete?")
    return headers


def _data_size(header: Header) -> int:
    """The bytes of a file that follow its header."""
    return max((entry["data_offsets"][1] for entry in header.values()), default=0)


def _hub_headers(repository: str) -> tuple[Path, dict[str, Header]]:
    """The small files of a repository, and the headers of its large ones, by range requests."""
    from huggingface_hub import get_safetensors_metadata, snapshot_download

    try:
        folder = Path(snapshot_download(repository, allow_patterns=["config.json", "hf_quant_config.json"]))
        files = get_safetensors_metadata(repository).files_metadata
    except Exception as e:  # its own kinds, by version, and those of its transport
        reason = str(e).partition("\n")[0]
        raise CheckpointError(
            f"{repository}: expected a folder or a reachable repository, found {type(e).__name__}: {reason}"
        ) from e
    return folder, {
        name: {
            tensor: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
            for tensor, info in file.tensors.items()
        }
        for name, file in files.items()
    }


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
        if "quantization_config" not in config and (folder / "hf_quant_config.json").exists():  # as the host does
            config["quantization_config"] = json.loads((folder / "hf_quant_config.json").read_text())
    except (OSError, ValueError, TypeError) as e:
        raise CheckpointError(f"{folder}: expected config.json, found {e}. Take it from the original model.") from e
    if (found := config.get("model_type") if isinstance(config, dict) else config) != "qwen3_vl_moe":
        raise CheckpointError(f"{folder}: model_type: expected 'qwen3_vl_moe', found {found!r}.")
    return config


def _write_hollow(folder: Path, headers: dict[str, Header], target: Path) -> None:
    """The checkpoint with holes in place of its tensors' data, which take no space on a disk."""
    for name in ("config.json", "hf_quant_config.json"):
        if (folder / name).exists():
            shutil.copy(folder / name, target)
    for name, header in headers.items():
        text = json.dumps(header).encode()
        with (target / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + _data_size(header))


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
    if (foreign := configs.take_quantization(config)) is not None:
        described = quantization.describe(foreign)
        method = described["quant_method"]
        return f"{method} {described.get(_DETAIL[method], '')}".strip()
    return f"MLX {_format(found)}" if (found := config.get("quantization")) else "none"


def _format(parameters: dict[str, Any]) -> str:
    return "{} {} bits, groups of {}".format(
        parameters.get("mode", "affine"), parameters.get("bits"), parameters.get("group_size")
    )


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


def _quantized(model: Any, config: dict[str, Any], bits: int) -> Any:
    """What `mlx_lm.convert` does to a model with ``-q --q-bits``."""
    if isinstance(dtype := getattr(mx, str(config.get("torch_dtype")), None), mx.Dtype):
        takes = model.cast_predicate

        def cast(path: str, array: mx.array) -> mx.array:
            return array.astype(dtype) if takes(path) and mx.issubdtype(array.dtype, mx.floating) else array

        model.update(tree_map_with_path(cast, model.parameters()))
    with contextlib.redirect_stdout(io.StringIO()):  # the host's report
        model, _ = quantize_model(model, config, 64, bits, quant_predicate=model.quant_predicate)
    return model


def _memory(model: Any) -> dict[str, Any]:
    """The weights, and by their formats."""
    formats: dict[str, int] = defaultdict(int)
    for _, array, packed in _arrays(model):
        formats[_format(packed) if packed else str(array.dtype).rpartition(".")[2]] += array.nbytes
    return {
        "weights_bytes": sum(formats.values()),
        "formats": dict(sorted(formats.items(), key=lambda item: -item[1])),
    }


def _arrays(model: Any) -> list[tuple[str, mx.array, dict[str, Any] | None]]:
    """The path of a layer, an array of it, and how it is packed; an array that a tied head shares comes once."""
    found: dict[int, tuple[str, mx.array, dict[str, Any] | None]] = {}
    for path, module in model.named_modules():
        packed = vars(module) if hasattr(module, "bits") else None
        for array in module.values():
            if isinstance(array, mx.array):
                found.setdefault(id(array), (path, array, packed))
    return list(found.values())


def _cache(model: Any, context: int) -> list[int]:
    """The size of every layer's cache after a prompt, which is never computed."""
    cache = make_prompt_cache(model)
    model(mx.zeros((1, context), mx.int32), cache=cache)
    return [layer.keys.nbytes + layer.values.nbytes for layer in cache]


def _spread(model: Any, ranks: int, cache: list[int]) -> dict[str, Any]:
    """What each of ``ranks`` machines holds, in both modes, or why it cannot. Cuts the model."""
    text = model.args.text_config
    plan: dict[str, Any] = {"ranks": ranks}
    for mode, sizes, share in (
        ("pipeline", {"num_hidden_layers": text["num_hidden_layers"]}, _stages),
        ("tensor", parallel.pieces(text, model.named_modules()), _parts),
    ):
        try:
            if not hasattr(model, "shard"):
                raise CheckpointError("this needs mlx-lm 0.32.0 or newer")
            parallel.check(ranks, mode, sizes)
            plan[mode] = {"error": None, "ranks": share(model, ranks, cache)}
        except CheckpointError as e:
            plan[mode] = {"error": str(e), "ranks": []}
        plan[mode]["allowed"] = parallel.allowed(mode, sizes)
    return plan


def _stages(model: Any, ranks: int, cache: list[int]) -> list[dict[str, int]]:
    """Some of the layers each, and on every rank what is outside of layers."""
    layers = [0] * len(cache)
    others = 0
    for path, array, _ in _arrays(model):
        if match := _LAYER.match(path + "."):
            layers[int(match[1])] += array.nbytes
        else:
            others += array.nbytes
    stages = []
    for number in range(ranks):
        decoder = SimpleNamespace(layers=list(range(len(layers))))
        qwen3_moe.Qwen3MoeModel.pipeline(decoder, Rank(number, ranks))
        own = slice(decoder.start_idx, decoder.end_idx)
        stages.append(
            {"layers": len(layers[own]), "weights_bytes": others + sum(layers[own]), "cache_bytes": sum(cache[own])}
        )
    return stages


def _parts(model: Any, ranks: int, cache: list[int]) -> list[dict[str, int]]:
    """A part of every layer each, which are all of one size."""
    parallel.cut(model.language_model, Rank(0, ranks))
    weights = sum(array.nbytes for _, array, _ in _arrays(model))
    return [{"layers": len(cache), "weights_bytes": weights, "cache_bytes": sum(cache) // ranks}] * ranks


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
