"""Tensors → safetensors files, in pieces that are made when they are written, so that no tensor is whole in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from .headers import INDEX
from .tensors import DTYPES, copy_bytes
from .writing import sync

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SHARD = 5_000_000_000  # bytes of tensors in a file, as transformers and mlx-lm have them


class Saved(NamedTuple):
    """A tensor to write.

    Attributes:
        pieces: its content from the first row on, in arrays of any shape whose items have its size.
    """

    dtype: mx.Dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[mx.array]]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.size


def save(file: Path, tensors: dict[str, Saved], made_with: str) -> Iterator[int]:
    """Write a file; yields the bytes written at a time.

    Args:
        made_with: the framework that the file is for, ``pt`` or ``mlx``.
    """
    header: dict[str, Any] = {"__metadata__": {"format": made_with}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.size
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that numbers are aligned
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for piece in tensor.pieces():
                plain: Any = mx.contiguous(piece.flatten()).view(mx.uint8)  # bfloat16 is no type of Python's
                out.write(memoryview(plain))
                yield piece.nbytes
        sync(out)


def save_shards(folder: Path, tensors: dict[str, Saved], made_with: str) -> Iterator[int]:
    """Write a checkpoint's tensors: one file, or several of up to 5 GB and their index; yields as `save`."""
    shards: list[dict[str, Saved]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size and size + tensor.size > _SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.size
    if len(shards) == 1:
        yield from save(folder / "model.safetensors", tensors, made_with)
        return
    files = {f"model-{number:05}-of-{len(shards):05}.safetensors": shard for number, shard in enumerate(shards, 1)}
    for file, shard in files.items():
        yield from save(folder / file, shard, made_with)
    total = sum(tensor.size for tensor in tensors.values())
    places = {name: file for file, shard in files.items() for name in shard}
    save_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def copy_file(file: Path, target: Path) -> Iterator[int]:
    """Copy a file; yields the bytes copied at a time."""
    with file.open("rb") as source, target.open("wb") as copied:
        yield from copy_bytes(source, copied, file.stat().st_size)
        sync(copied)


def save_json(file: Path, value: dict[str, Any]) -> None:
    with file.open("wb") as out:
        out.write(json.dumps(value, indent=2).encode() + b"\n")
        sync(out)
