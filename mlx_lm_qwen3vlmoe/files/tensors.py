"""Tensors where they lie: in the safetensors files of a folder, read in rows, so that none is whole in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import mlx.core as mx

from ..errors import CheckpointError, shown
from .headers import AGAIN, INDEX, Header, read_index

# The format's names for what MLX has (https://github.com/huggingface/safetensors#format).
DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32, "U8": mx.uint8}
FLOATS = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}  # and the bits of infinity
_AT_ONCE = 32_000_000  # bytes


class FileTensor(NamedTuple):
    """A tensor of a file.

    Attributes:
        begin, end: where its data lie in the file, in bytes from its start.
        dtype: as the format names it.
    """

    file: Path
    begin: int
    end: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def mlx_dtype(self) -> mx.Dtype:
        return DTYPES[self.dtype]

    def rows(self, first: int, last: int) -> mx.array:
        """Rows of the first axis, ``[last - first, …]``."""
        width = (self.end - self.begin) // self.shape[0]
        with self.file.open("rb") as file:
            file.seek(self.begin + first * width)
            data = file.read((last - first) * width)
        if len(data) != (last - first) * width:
            raise OSError(f"{self.file}: it has become shorter while it was read")
        content: Any = memoryview(data)
        return mx.array(content).view(self.mlx_dtype).reshape(last - first, *self.shape[1:])


def unsigned(dtype: mx.Dtype) -> mx.Dtype:
    """The unsigned integers of a dtype's size, to move what it holds without a change."""
    return mx.uint32 if dtype.size == 4 else mx.uint16


def all_finite(bits: mx.array, dtype: str) -> bool:
    """Whether floats, given as their bits, have neither infinities nor NaN: eight times as fast as `mx.isfinite`."""
    without_sign: Any = (bits & ((1 << 8 * bits.dtype.size - 1) - 1)).max().item()
    return without_sign < FLOATS[dtype]


def row_ranges(rows: int, size: int) -> Iterator[tuple[int, int]]:
    """First and last rows of pieces of about 32 MB, of so many rows that have ``size`` bytes in all."""
    step = max(1, rows * _AT_ONCE // max(size, 1))
    return ((first, min(first + step, rows)) for first in range(0, rows, step))


def copy_bytes(source: BinaryIO, target: BinaryIO, size: int) -> Iterator[int]:
    """Copy so many bytes from where both files stand; yields how many at a time."""
    while size:
        data = source.read(min(size, _AT_ONCE))
        if not data:
            raise OSError(f"{source.name}: it has become shorter while it was read")
        target.write(data)
        size -= len(data)
        yield len(data)


def find_tensors(folder: Path, headers: dict[str, Header]) -> dict[str, FileTensor]:
    """Every tensor of a folder's files, by name.

    Raises:
        CheckpointError: a file is cut short or contradicts its header, two files have the same tensor, or the index
            names what is not there.
    """
    found: dict[str, FileTensor] = {}
    for name, header in headers.items():
        path = folder / name
        size = path.stat().st_size
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
        last = start
        for tensor, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = (start + offset for offset in entry["data_offsets"])
            if begin < last or end > size:
                raise CheckpointError(
                    f"{path}: {tensor}",
                    f"data within the {size} bytes of the file that no other tensor uses",
                    f"bytes {begin} to {end}, where others go up to {last}",
                    AGAIN,
                )
            if tensor in found:
                raise CheckpointError(
                    tensor,
                    "in one file",
                    f"in {found[tensor].file.name} and {name}",
                    "Remove the file that a second tool left in the folder.",
                )
            last = end
            found[tensor] = FileTensor(path, begin, end, entry["dtype"], _shape(path, tensor, entry, end - begin))
    _check_index(folder, found)
    return found


def _shape(path: Path, tensor: str, entry: dict[str, Any], size: int) -> tuple[int, ...]:
    shape, dtype = entry["shape"], entry["dtype"]
    if dtype not in DTYPES or math.prod(shape) * DTYPES[dtype].size == size:
        return tuple(shape)
    found = f"the shape {shown(shape)} of {shown(dtype)}"
    raise CheckpointError(f"{path}: {tensor}", f"a shape that takes {size} bytes", found, AGAIN)


def _check_index(folder: Path, found: dict[str, FileTensor]) -> None:
    if not (folder / INDEX).exists():
        return
    for tensor, file in read_index(folder).items():
        where = found[tensor].file.name if tensor in found else None
        if file != where:
            remedy = "Download the file that is missing."
            if where:
                remedy = "Is the index from another checkpoint? Download it again, or remove it."
            expected = f"in {shown(file)}, as the index says"
            raise CheckpointError(f"{INDEX}: {tensor}", expected, f"in {where}" if where else "nowhere", remedy)
