"""Checkpoints in memory, and what loading one gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from mlx_lm_qwen3vlmoe import CheckpointError

from . import FIXTURES, QUANTIZED, TINY

TOLERANCE = 1e-4  # of the largest logit, in float32
TYPES = {"F16": "f2", "F32": "f4", "I8": "i1", "I32": "i4", "I64": "i8", "U8": "u1", "U32": "u4"}
TYPES |= {"I16": "i2", "BF16": "u2", "F8_E4M3": "u1", "F8_E8M0": "u1"}  # numpy has neither: their bits
Array = tuple[str, np.ndarray]  # a safetensors dtype, and the bits


class Checkpoint:
    """A checkpoint in memory, as plain data that can be broken in any way."""

    def __init__(self, name: str):
        self.source = next(path for path in (FIXTURES / name, QUANTIZED / name) if path.exists())
        self.config = json.loads((self.source / "config.json").read_text())
        self.tensors: dict[str, Array] = {}
        for file in sorted(self.source.glob("model*.safetensors")):
            header, data = split(file.read_bytes())
            for key, entry in header.items():
                if key != "__metadata__":
                    begin, end = entry["data_offsets"]
                    array = np.frombuffer(data[begin:end], TYPES[entry["dtype"]]).reshape(entry["shape"])
                    self.tensors[key] = (entry["dtype"], array)

    @property
    def text(self) -> dict:
        return self.config["text_config"]

    def change(self, key: str, function: Callable[[np.ndarray], np.ndarray]) -> None:
        dtype, array = self.tensors[key]
        self.tensors[key] = (dtype, function(array))

    def save(self, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        header, data = {"__metadata__": {"format": "mlx"}}, b""
        for key, (dtype, array) in self.tensors.items():
            content = array.tobytes()
            header[key] = {
                "dtype": dtype,
                "shape": array.shape,
                "data_offsets": [len(data), len(data) + len(content)],
            }
            data += content
        (folder / "model.safetensors").write_bytes(joined(header, data))
        return folder


def split(file: bytes) -> tuple[dict, bytes]:
    size = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:size]), file[size:]


def joined(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def bfloat16(array: np.ndarray) -> Array:
    return "BF16", (array.astype("f4").view("u4") >> 16).astype("u2")


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in [folder, *folder.rglob("*")]}


def refusal(folder: Path, kind: type[Exception] = CheckpointError) -> str:
    """The message of the one error that loading a folder gives: without a chain, and nothing is written."""
    before = state(folder)
    with pytest.raises(kind) as caught:
        load_model(folder)
    assert state(folder) == before
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return str(caught.value)


def logits_error(folder: Path, golden: Path) -> float:
    """The largest difference from torch's logits, relative to the largest of them, in float32."""
    model, _ = load_model(folder, lazy=True, model_config=float32_config(folder))
    model.set_dtype(mx.float32)
    expected = mx.load(str(golden / "golden.safetensors"))
    found = model(expected["ids"]).astype(mx.float32)
    return (mx.abs(found - expected["logits"]).max() / mx.abs(expected["logits"]).max()).item()


def float32_config(checkpoint: Path) -> dict[str, object]:
    """What `load_model` takes as ``model_config``, to decode what becomes float to float32, as the goldens are.

    A checkpoint of 16 bits would otherwise be decoded to these.
    """
    text = json.loads((checkpoint / "config.json").read_text()).get("text_config")
    return {"dtype": "float32"} | ({"text_config": text | {"dtype": "float32"}} if isinstance(text, dict) else {})


def thinking_model(path: Path) -> Path:
    """The tiny model as a Thinking checkpoint: its chat template begins every answer with a thought."""
    path.mkdir(parents=True)
    for file in TINY.iterdir():
        (path / file.name).symlink_to(file)
    template = path / "chat_template.jinja"
    text = template.read_text()
    template.unlink()
    assert text.count("default(false)") == 1
    template.write_text(text.replace("default(false)", "default(true)"))
    return path
