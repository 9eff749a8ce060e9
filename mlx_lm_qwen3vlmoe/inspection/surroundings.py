"""What lies beside a checkpoint's tensors, and what of it mlx-lm reads otherwise than its author meant."""

from __future__ import annotations

import glob
import json
import tempfile
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

import mlx.core as mx

from ..errors import CheckpointError, series, shortened
from ..files.headers import LOADED, Header
from ..files.reading import read_json

_ADAPTERS = ("adapters.safetensors", "adapter_model.safetensors", "adapter_config.json")
_READ = ("BF16", "F16", "F32", "I32", "I64", "U8", "U32")  # by every MLX


def surroundings(names: list[str], headers: dict[str, Header]) -> list[str]:
    """Notes on what a load does not look at, or looks at twice.

    Args:
        names: of all files of the checkpoint's folder.
        headers: file → its header, of those that are loaded.
    """
    notes = _second_set(headers)
    if adapters := [name for name in _ADAPTERS if name in names]:
        notes.append(
            f"{adapters[0]}: an adapter is in this folder, but loading the model does not apply it. Pass it to mlx_lm "
            "with --adapter-path, and convert one that PEFT saved with mlx-lm-qwen3vlmoe adapters first."
        )
    stray = [name for name in names if name.endswith(".safetensors") and not fnmatchcase(name, LOADED)]
    if stray := [name for name in stray if name not in _ADAPTERS and "/" not in name]:
        notes.append(
            f"{_listed(stray)}: mlx-lm reads only files that are named {LOADED}. Rename what belongs to the model."
        )
    if "quanto_qmap.json" in names:
        notes.append(
            "quanto_qmap.json: optimum-quanto quantized this checkpoint, but config.json does not say so. If it does "
            "not load, use the unquantized checkpoint."
        )
    return notes


def _second_set(headers: dict[str, Header]) -> list[str]:
    """The same tensors in two files: what the host loads is left to the file system's order."""
    where: dict[str, str] = {}
    twice: dict[tuple[str, str], list[str]] = {}
    for file, header in headers.items():
        for tensor in header:
            if where.setdefault(tensor, file) != file:
                twice.setdefault((where[tensor], file), []).append(tensor)
    if not twice:
        return []
    files = sorted({file for pair in twice for file in pair})
    first, count = next(iter(twice.values()))[0], sum(map(len, twice.values()))
    others = f" and {count - 1} others" if count > 1 else ""
    twice_there = f"{shortened(first)}{others}: in more than one file ({_listed(files)})"
    which = "mlx-lm loads whichever the file system lists last, and transformers model.safetensors"
    return [f"{twice_there}. {which}. Remove the files of one save."]


def _listed(names: list[str]) -> str:
    shown = [shortened(name) for name in names[:4]]
    return series([*shown, f"{len(names) - 4} more"] if len(names) > 4 else shown, "and")


def check_rotation(folder: Path) -> None:
    """Raise `CheckpointError` for weights that JANG rotated: they are MLX's own in all but their values."""
    file = folder / "jang_config.json"
    if not file.exists():
        return
    try:
        found = read_json(file)["quantization"].get("hadamard_rotation")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # it says nothing of a rotation
    if found not in (None, False):
        raise CheckpointError(
            f"{file.name}: quantization.hadamard_rotation",
            "false",
            json.dumps(found),
            "mlx-lm loads such weights as if they were not rotated, and answers with nonsense. Use JANG's own loader, "
            "or another checkpoint.",
        )


def check_place(folder: Path, names: Iterable[str]) -> None:
    """Raise `CheckpointError` for a folder in which the host does not find its files, or MLX cannot open them."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        remedy = "MLX cannot open it. Rename the folder."
        raise CheckpointError(folder, "a path in UTF-8", "other bytes", remedy) from None
    if any((folder / name).exists() for name in names) and not glob.glob(str(folder / LOADED)):
        remedy = "mlx-lm reads these as a pattern and finds no file. Rename the folder."
        raise CheckpointError(folder, "a path without [ and ]", "one with them", remedy)


def check_dtypes(headers: dict[str, Header]) -> None:
    """Raise `CheckpointError` for a tensor of a type that MLX does not read: it then reads nothing of the file."""
    known = dict.fromkeys(_READ, True)
    for file, header in headers.items():
        for tensor, entry in header.items():
            dtype = entry["dtype"]
            if dtype not in known:
                known[dtype] = _reads(dtype)
            if not known[dtype]:
                raise CheckpointError(
                    f"{file}: {tensor}",
                    "a dtype that MLX reads",
                    dtype,
                    "It cannot read any file with such a tensor. Use a checkpoint in bfloat16 or another format.",
                )


def _reads(dtype: str) -> bool:
    """Whether this MLX reads a type of tensors."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "one.safetensors"
        text = json.dumps({"x": {"dtype": dtype, "shape": [0], "data_offsets": [0, 0]}}).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text)
        try:
            mx.load(str(file))
        except RuntimeError:
            return False
    return True
