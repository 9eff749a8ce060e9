"""Checkpoints in memory, as plain data that can be changed in any way, and their files."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
# What safetensors calls a type, and numpy's type for it; numpy has no BF16 and no FP8: their bits.
TYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": "u2", "F8_E4M3": "u1", "F8_E8M0": "u1", "BOOL": "?"}
TYPES |= {"I8": "i1", "U8": "u1", "I16": "i2", "U16": "u2", "I32": "i4", "U32": "u4", "I64": "i8", "U64": "u8"}

Array = tuple[str, np.ndarray]  # a safetensors dtype, and the bits


@dataclass
class Checkpoint:
    """The files of a checkpoint. Arrays and documents are shared with the fixture: replaced, never written to.

    Attributes:
        documents: file name → JSON, of ``config.json`` and ``hf_quant_config.json``.
        tensors: name → array, of all files.
        second: the tensors of one more file.
        damage: what happens to the files (name → bytes) in the end.
    """

    documents: dict[str, Any]
    tensors: dict[str, Array]
    second: dict[str, Array] = field(default_factory=dict)
    damage: list[Callable[[dict[str, bytes]], None]] = field(default_factory=list)

    @property
    def text(self) -> dict[str, Any]:
        config = self.documents["config.json"]
        text = config.get("text_config")
        return text if isinstance(text, dict) else config

    def save(self, folder: Path) -> None:
        files = {name: json.dumps(document).encode() for name, document in self.documents.items()}
        files["model.safetensors"] = safetensors(self.tensors)
        if self.second:
            files["model-00002-of-00002.safetensors"] = safetensors(self.second)
        for damage in self.damage:
            damage(files)
        for name, content in files.items():
            (folder / name).write_bytes(content)


def safetensors(tensors: dict[str, Array]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    parts, end = [], 0
    for name, (dtype, array) in tensors.items():
        parts.append(array.tobytes())
        begin, end = end, end + len(parts[-1])
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(parts)


def read(file: Path) -> dict[str, Array]:
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    found: dict[str, Array] = {}
    for name, entry in sorted(header.items()):
        begin, end = (start + offset for offset in entry["data_offsets"])
        array = np.frombuffer(content[begin:end], TYPES[entry["dtype"]])
        found[name] = entry["dtype"], array.reshape(entry["shape"])
    return found


@functools.cache
def fixtures() -> dict[str, Path]:
    """Name → folder of everything that has golden logits beside it."""
    found = [*ROOT.glob("tests/fixtures/*/golden.safetensors"), *ROOT.glob("tests/quantized/fixtures/*/golden.*")]
    return {file.parent.name: file.parent for file in sorted(found, key=lambda file: file.parent.name)}


@functools.cache
def documents(name: str) -> dict[str, Any]:
    """The JSON files, with a dtype that rounds nothing of what becomes float."""
    files = ("config.json", "hf_quant_config.json")
    found = {f: json.loads((fixtures()[name] / f).read_text()) for f in files if (fixtures()[name] / f).exists()}
    config = found["config.json"]
    config.get("text_config", config)["dtype"] = "float32"
    return found


@functools.cache
def tensors(name: str) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for file in sorted(fixtures()[name].glob("model*.safetensors")):
        found |= read(file)
    return found


def original(name: str) -> Checkpoint:
    return Checkpoint(copy.deepcopy(documents(name)), dict(tensors(name)))


def family(name: str) -> str:
    """The first word of a quantized fixture; ``mlx`` and ``float`` of the others."""
    if "quantized" in fixtures()[name].parts:
        return name.split("-")[0]
    return "mlx" if "quantization" in documents(name)["config.json"] else "float"


def floats(array: Array) -> np.ndarray:
    """The values of an array, as numpy can hold them."""
    dtype, bits = array
    if dtype == "BF16":
        return (bits.astype("u4") << 16).view("f4")
    if dtype == "F8_E4M3":
        exponent, mantissa = (bits >> 3 & 15).astype("i4"), (bits & 7).astype("f4")
        values = np.where(exponent, np.ldexp(8 + mantissa, exponent - 10), np.ldexp(mantissa, -9))
        return np.where(bits & 128, -values, values).astype("f4")
    return bits


def cast(array: Array, dtype: str) -> Array:
    """The same values in another type, rounded down where they do not fit."""
    values = floats(array)
    with np.errstate(all="ignore"):
        if dtype == "BF16":
            return dtype, (np.ascontiguousarray(values.astype("f4")).view("u4") >> 16).astype("u2")
        return dtype, values.astype(TYPES[dtype])
