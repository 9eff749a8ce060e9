"""The two files of an adapter: a JSON object and a safetensors file, read lazily and written one tensor at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import CheckpointError, shown
from ..files.headers import read_header
from ..files.reading import read_json
from ..files.saving import Saved, save, save_json
from ..files.writing import check_space

CONFIG = "adapter_config.json"
_DTYPES = (mx.float32, mx.float16, mx.bfloat16)


def broken(where: object, expected: str, found: object) -> CheckpointError:
    """The error for tensors that do not belong together, or to the config."""
    remedy = f"Is {CONFIG} from this adapter? If so, download or save the adapter again."
    return CheckpointError(where, expected, found, remedy)


@contextlib.contextmanager
def as_in_file(names: dict[str, str]) -> Iterator[None]:
    """Have errors name modules as the file does; ``names`` are by the host's."""
    try:
        yield
    except CheckpointError as error:
        error.rename(lambda name: names.get(name, name))
        raise


def read_config(folder: Path) -> dict[str, Any]:
    found: str
    try:
        config = read_json(folder / CONFIG)
        if isinstance(config, dict):
            return config
        found = f"{shown(config)}, which is not an object"
    except FileNotFoundError:
        found = "no such file"
    except CheckpointError:
        raise
    except (OSError, ValueError) as e:
        found = f"a file that cannot be read ({e})"
    raise CheckpointError(folder, CONFIG, found, "Download or save the adapter again.")


def read_tensors(file: Path) -> dict[str, mx.array]:
    """The tensors of a file; none is in memory before it is evaluated."""
    header, end = read_header(file)
    try:
        str(file).encode()
    except UnicodeEncodeError:
        remedy = "MLX cannot open it. Rename the folder."
        raise CheckpointError(file, "a path in UTF-8", "other bytes", remedy) from None
    try:
        if (size := file.stat().st_size) < end:  # Until: MLX 0.31.2. Older ones do not look.
            raise ValueError(f"{size} of its {end} bytes")
        tensors: Any = mx.load(str(file))
    except (RuntimeError, ValueError) as e:
        found = f"a file that cannot be read ({str(e).rstrip('.')})"
        raise CheckpointError(file, "a safetensors file", found, "Download it again.") from e
    for name, array in tensors.items():
        offsets = header[name]["data_offsets"]
        if array.dtype not in _DTYPES or array.size == 0 or offsets[1] - offsets[0] != array.nbytes:
            found = f"{array.dtype} of the shape {list(array.shape)} at bytes {offsets}"
            raise CheckpointError(name, "floats", found, "Download or save the adapter again.")
    return dict(sorted(tensors.items()))


def write(folder: Path, name: str, tensors: dict[str, mx.array], config: dict[str, Any]) -> None:
    """Write both files of an adapter, and empty ``tensors`` meanwhile: one is in memory at a time."""
    saved = {path: Saved(array.dtype, array.shape, partial(_taken, tensors, path)) for path, array in tensors.items()}
    size = sum(tensor.size for tensor in saved.values())
    check_space(folder, size, folder.parent)
    for _ in save(folder / name, saved, "pt"):
        pass
    save_json(folder / CONFIG, config)


def _taken(tensors: dict[str, mx.array], path: str) -> list[mx.array]:
    return [tensors.pop(path)]
