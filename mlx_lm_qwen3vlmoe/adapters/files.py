"""The two files of an adapter: a JSON object and a safetensors file, read lazily and written one tensor at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import CheckpointError
from ..files.headers import read_header
from ..layouts.names import shortened

CONFIG = "adapter_config.json"
_DTYPES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}


def broken(where: str, expected: str, found: object) -> CheckpointError:
    """The error for tensors that do not belong together."""
    return CheckpointError(f"{shortened(where)}: expected {expected}, found {found}. Take the original adapter.")


def read_config(folder: Path) -> dict[str, Any]:
    found: object
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if isinstance(config, dict):
            return config
        found = f"no object, but a {type(config).__name__}"
    except (OSError, ValueError, RecursionError) as e:
        found = e
    raise CheckpointError(f"{folder}: expected {CONFIG}, found {found}. Take it from where the adapter is from.")


def read_tensors(file: Path) -> dict[str, mx.array]:
    """The tensors of a file; none is in memory before it is evaluated."""
    header, end = read_header(file)
    try:
        if (size := file.stat().st_size) < end:  # which older MLX does not look at
            raise ValueError(f"{size} of its {end} bytes")
        tensors: Any = mx.load(str(file))
    except (RuntimeError, ValueError) as e:
        raise CheckpointError(f"{file}: expected a safetensors file, found {e}. Download it again.") from e
    for name, array in tensors.items():
        offsets = header[name]["data_offsets"]
        if array.dtype not in _DTYPES or array.size == 0 or offsets[1] - offsets[0] != array.nbytes:
            raise broken(name, "floats", f"{array.dtype} of the shape {list(array.shape)} at {offsets} of the file")
    return dict(sorted(tensors.items()))


def write(folder: Path, name: str, tensors: dict[str, mx.array], config: dict[str, Any]) -> None:
    """Write both files of an adapter, and empty ``tensors`` meanwhile: one is in memory at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for path, array in tensors.items():
        start, end = end, end + array.nbytes
        header[path] = {"dtype": _DTYPES[array.dtype], "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that numbers are aligned
    if (free := shutil.disk_usage(folder).free) < end:
        raise CheckpointError(f"{folder.parent}: expected {end / 1e9:.3f} GB of free disk, found {free / 1e9:.3f}.")
    with (folder / name).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for path in list(tensors):
            plain: Any = mx.contiguous(tensors.pop(path).flatten()).view(mx.uint8)  # bfloat16 is no type of Python's
            file.write(memoryview(plain))
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
