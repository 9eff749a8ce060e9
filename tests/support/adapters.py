"""Adapters as PEFT and mlx_lm wrote them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_lm_qwen3vlmoe import CheckpointError
from mlx_lm_qwen3vlmoe.adapters import convert

from . import FIXTURES, ROOT

ADAPTERS = ROOT / "tests" / "adapters" / "fixtures"
PEFT = sorted(
    path.parent.name for path in ADAPTERS.glob("*/adapter_model.safetensors") if path.parent.name != "tiny_answer"
)
TRAINED = sorted(path.name for path in ADAPTERS.iterdir() if (path / "mlx").exists())
BASE = FIXTURES / "official"
LAYER = "base_model.model.model.language_model.layers.{}."


def tensors(folder: Path) -> dict[str, mx.array]:
    (file,) = folder.glob("adapter*.safetensors")
    return mx.load(str(file))


def config(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def equal(one: dict[str, mx.array], other: dict[str, mx.array]) -> bool:
    return one.keys() == other.keys() and all(mx.array_equal(one[name], other[name]).item() for name in one)


def copied(tmp_path: Path, name: str = "experts", change=None, **fields) -> Path:
    """A fixture with other tensors, or other fields of its config."""
    folder = tmp_path / "adapter"
    shutil.copytree(ADAPTERS / name, folder)
    found = config(folder) | fields
    (folder / "adapter_config.json").write_text(json.dumps(found))
    if change:
        file = next(folder.glob("adapter*.safetensors"))
        changed = dict(mx.load(str(file)))
        mx.eval(changed)
        changed = change(changed) or changed
        mx.save_safetensors(str(file), changed)
    return folder


def converted(folder: Path, tmp_path: Path, model: Path | None = BASE) -> Path:
    out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
    convert(str(folder), str(out), model and str(model))
    return out


def refusal(folder: Path, tmp_path: Path, model: Path | None = BASE) -> str:
    """The message, after which there is nothing new on the disk."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError) as raised:
        convert(str(folder), str(tmp_path / "out"), model and str(model))
    assert sorted(tmp_path.iterdir()) == before
    return str(raised.value)
