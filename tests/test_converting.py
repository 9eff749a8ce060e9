"""What `mlx_lm.convert -q` writes: with mixed recipes, and on a disk that is full."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm import convert as convert_by_python
from mlx_lm.convert import QUANT_RECIPES
from mlx_lm.utils import load_model
from support import HOST_HAS_THE_TYPE, LIMIT, TINY, thorough
from support.commands import CLEAN, mlx_lm

from mlx_lm_qwen3vlmoe import CheckpointError, Model
from mlx_lm_qwen3vlmoe.inspection.report import inspect

CONVERT = """
import resource, runpy, sys
size = int(sys.argv.pop(1))
if size:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
runpy.run_module("mlx_lm", run_name="__main__", alter_sys=True)
"""


def convert(target: Path, most: int = 0) -> subprocess.CompletedProcess:
    """`mlx_lm.convert -q`, where no file can have more than so many bytes: the error is that of a full disk."""
    command = ("convert", "--hf-path", TINY, "--mlx-path", target, "-q", "--q-group-size", 32)
    command = [sys.executable, "-c", CONVERT, most, *command]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=CLEAN, timeout=LIMIT)


def test_out_of_disk_is_the_hosts_error_and_leaves_nothing_that_looks_finished(tmp_path):
    done = convert(tmp_path / "out", 300_000)
    assert done.returncode == 1
    assert "Unable to write" in done.stderr
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert not left & {"config.json", "model.safetensors.index.json", "tokenizer.json"}


def test_the_same_command_writes_the_same_files_again(tmp_path):
    for name in ("one", "two"):
        assert convert(tmp_path / name).returncode == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    assert {"config.json", "model.safetensors"} <= files.keys()


def bits_alone(path: str, module: object) -> bool | dict:
    """A predicate of a user's own, of the least that the host takes."""
    return {"bits": 6} if "down_proj" in path else True


def checked(folder: Path, error_in_the_unchanged_host) -> dict[str, float]:
    """A conversion loads, is inspected, and has the logits of the host's own class. Its entries, for what follows."""
    model, config = load_model(folder)
    assert isinstance(model, Model)
    assert inspect(str(folder))["error"] is None
    if HOST_HAS_THE_TYPE:
        model.set_dtype(mx.float32)
        golden = folder / "golden.npz"
        ids = mx.array([[1, 5, 9, 40, 200, 7]])
        mx.savez(str(golden), ids=ids, logits=model(ids))
        assert error_in_the_unchanged_host(folder, golden) < 1e-4
    return config["quantization"]


@pytest.mark.parametrize("recipe", [*QUANT_RECIPES[:1], *thorough(*QUANT_RECIPES[1:])])
def test_what_a_mixed_recipe_writes_loads_and_has_the_logits_of_the_host(recipe, tmp_path, error_in_the_unchanged_host):
    """mlx-lm 0.30.7 to 0.32.2 write ``"group_size": null`` for every layer."""
    folder = tmp_path / recipe
    mlx_lm("convert", "--hf-path", TINY, "--mlx-path", folder, "-q", "--quant-predicate", recipe)
    described = checked(folder, error_in_the_unchanged_host)
    assert {entry["group_size"] for entry in described.values() if isinstance(entry, dict)} == {64}


def test_what_a_predicate_that_names_the_bits_alone_writes_loads_and_has_the_logits_of_the_host(
    tmp_path, error_in_the_unchanged_host
):
    folder = tmp_path / "own"
    convert_by_python(str(TINY), str(folder), quantize=True, quant_predicate=bits_alone)
    assert checked(folder, error_in_the_unchanged_host)["bits"] == 4


def test_a_null_is_refused_where_the_default_of_the_mode_does_not_fit_the_tensors(tmp_path):
    """It is no wildcard: the words of another group size are not read as those of the default."""
    folder = tmp_path / "out"
    mlx_lm("convert", "--hf-path", TINY, "--mlx-path", folder, "-q", "--q-group-size", 32)
    config = json.loads((folder / "config.json").read_text())
    config["quantization"]["group_size"] = None
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="in groups of 64"):
        load_model(folder)
