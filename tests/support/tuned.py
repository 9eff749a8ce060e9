"""Tuned models, and their originals."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_map
from mlx_lm.utils import load_model, save_config, save_model

from mlx_lm_qwen3vlmoe import CheckpointError
from mlx_lm_qwen3vlmoe.restoring.restore import restore

from . import FIXTURES


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def converted(original: Path, folder: Path, change: Callable[[mx.array], mx.array] | None = None) -> Path:
    """What `mlx_lm.convert` makes of a checkpoint, with changed weights."""
    model, config = load_model(original, lazy=True)
    if change:
        model.update(tree_map(change, model.parameters()))
    folder.mkdir(parents=True)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    return folder


def weights_of(folder: Path) -> dict[str, mx.array]:
    """Evaluated, as the file may be written anew."""
    weights = mx.load(str(folder / "model.safetensors"))
    mx.eval(weights)
    return weights


def tuned(original: Path, folder: Path) -> Path:
    mx.random.seed(7)
    return converted(original, folder, lambda w: w + (0.1 * mx.random.normal(w.shape)).astype(w.dtype))


def pair_in(folder: Path) -> tuple[Path, Path]:
    """A tuned model, and its original, in sibling folders that a test may change."""
    shutil.copytree(FIXTURES / "official", folder / "original")
    return tuned(folder / "original", folder / "tuned"), folder / "original"


def refusal(tuned: Path, original: Path | str, out: Path) -> str:
    before = sorted(path.name for path in out.parent.iterdir())
    with pytest.raises(CheckpointError) as caught:
        restore(str(tuned), str(original), str(out))
    assert sorted(path.name for path in out.parent.iterdir()) == before  # nothing is left of it
    return str(caught.value)
