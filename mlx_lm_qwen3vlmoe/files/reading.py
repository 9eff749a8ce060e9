"""Small files that anybody may have written: opened only if they are files, and JSON only if it can be walked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

_LARGEST = 100_000_000  # bytes; the header of a safetensors file has the same limit
_DEEPEST = 100  # levels; whatever reads them next goes down by calls


def check_file(path: Path) -> None:
    """Raise `CheckpointError` for what is there and no file: a pipe would be waited for, and a device has no end."""
    if path.exists() and not path.is_file():
        raise CheckpointError(path, "a file", "a folder" if path.is_dir() else "a pipe or a device", "Remove it.")


def read_json(path: Path) -> Any:
    """What a file has, of at most 100 levels; raises `OSError`, `ValueError` or `CheckpointError`."""
    check_file(path)
    if (size := path.stat().st_size) > _LARGEST:
        raise ValueError(f"{size} bytes, which is too large for {path.name}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise _too_deep() from None
    level = [value]
    for _ in range(_DEEPEST):
        level = [inner for each in level if isinstance(each, (list, dict)) for inner in _inner(each)]
    if level:
        raise _too_deep()
    return value


def _too_deep() -> ValueError:
    return ValueError(f"lists or objects nested more than {_DEEPEST} levels deep")


def _inner(value: list[Any] | dict[str, Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value
