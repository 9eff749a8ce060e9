"""What `export` refuses, and what is left of one that is stopped, killed or out of room."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from support import FIXTURES, LIMIT
from support.checkpoints import Checkpoint, bfloat16
from support.commands import run
from support.stops import halfway, on_a_full_disk
from support.tuned import files, weights_of

from mlx_lm_qwen3vlmoe import CheckpointError
from mlx_lm_qwen3vlmoe.exporting.export import export


@pytest.fixture
def source(tmp_path) -> Path:
    return shutil.copytree(FIXTURES / "official_sharded", tmp_path / "source")


def refusal(source: Path | str, out: Path) -> str:
    before = sorted(path.name for path in out.parent.iterdir())
    with pytest.raises(CheckpointError) as caught:
        export(str(source), str(out))
    assert sorted(path.name for path in out.parent.iterdir()) == before  # nothing is left of it
    return str(caught.value)


def test_an_export_of_an_export_is_refused(source, tmp_path):
    export(str(source), str(tmp_path / "out"))
    assert refusal(tmp_path / "out", tmp_path / "more") == (
        f"{tmp_path / 'out'}: this is already a plain text model (model_type qwen3_moe): use it as it is."
    )


def test_another_model_type_is_named(source, tmp_path):
    for model_type in ("qwen3_vl", "llama", None):
        config = json.loads((source / "config.json").read_text()) | {"model_type": model_type}
        (source / "config.json").write_text(json.dumps(config))
        message = refusal(source, tmp_path / "out")
        assert str(source) in message
        assert "mlx-lm has its own model for" in message or "config.json: model_type: expected qwen3_vl_moe" in message


def test_places_that_are_in_each_others_way_are_refused(source, tmp_path):
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    for out, text in (
        (source, "expected a new or empty folder, found a folder with files"),
        (tmp_path / "full", "expected a new or empty folder, found a folder with files"),
        (source / "out", "expected a folder outside of"),
        (tmp_path / "link" / "out", "expected a folder outside of"),
    ):
        assert text in refusal(source, out)
    assert files(tmp_path / "full") == {"mine": b"mine"}
    assert "no such folder" in refusal(tmp_path / "none", tmp_path / "out")


@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_model.safetensors"])
def test_adapters_that_are_not_fused_are_refused(name, source, tmp_path):
    (source / name).write_text("{}")
    assert f"{name}: expected a model without adapters, found adapters that are not fused. Run mlx_lm.fuse" in refusal(
        source, tmp_path / "out"
    )


def test_tensors_of_adapters_are_refused(tmp_path):
    shutil.copytree(FIXTURES / "mlx_lm_float", tmp_path / "source")
    weights = weights_of(tmp_path / "source")
    weights["language_model.model.layers.0.self_attn.q_proj.lora_a"] = mx.zeros((2, 2))
    mx.save_safetensors(str(tmp_path / "source" / "model.safetensors"), weights)
    assert "q_proj.lora_a: expected a model without adapters" in refusal(tmp_path / "source", tmp_path / "out")


def test_a_shard_that_is_missing_or_cut_short_is_named(source, tmp_path):
    shard = source / "model-00002-of-00006.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    assert f"{shard}: " in refusal(source, tmp_path / "out")
    shard.unlink()
    assert 'expected in "model-00002-of-00006.safetensors", as the index says, found nowhere' in refusal(
        source, tmp_path / "out"
    )
    (source / "model.safetensors.index.json").unlink()
    assert "does not load: model.language_model." in refusal(source, tmp_path / "out")


def test_a_tensor_that_is_unknown_or_of_another_shape_is_named(tmp_path):
    checkpoint = Checkpoint("official")
    checkpoint.tensors["audio.weight"] = bfloat16(np.zeros((2, 2)))
    assert "audio.weight: expected a tensor of a Qwen3-VL-MoE model" in refusal(
        checkpoint.save(tmp_path / "one"), tmp_path / "out"
    )
    checkpoint = Checkpoint("official")
    checkpoint.change("model.language_model.layers.0.mlp.experts.down_proj", lambda array: array[:, :-1])
    assert "layers.0.mlp.experts.down_proj: expected the shape" in refusal(
        checkpoint.save(tmp_path / "two"), tmp_path / "out"
    )


def test_files_beside_it_that_cannot_be_read_are_named(source, tmp_path):
    """As a download leaves them that was broken off, or somebody who wants a reader to wait."""
    os.mkfifo(source / "vocab.json")
    assert "vocab.json: expected a file, found a broken link" in refusal(source, tmp_path / "out")
    (source / "vocab.json").unlink()
    (source / "vocab.json").symlink_to(tmp_path / "gone")
    assert "vocab.json: expected a file, found a broken link" in refusal(source, tmp_path / "out")
    (source / "vocab.json").unlink()
    for content in ("{", "[1]", "3"):
        (source / "tokenizer_config.json").write_text(content)
        message = refusal(source, tmp_path / "out")
        assert message.startswith(f"{source / 'tokenizer_config.json'}: expected a JSON object, found what cannot be")


def test_an_error_is_one_line_and_status_1(source, tmp_path):
    done = run(sys.executable, "-m", "mlx_lm_qwen3vlmoe", "export", source, "--save-path", source / "out", check=False)
    assert done.returncode == 1
    assert not done.stdout
    assert len(done.stderr.splitlines()) == 1


# --- stops ----------------------------------------------------------------------------------------------------------


def begun(source: Path, out: Path) -> subprocess.Popen:
    return halfway("exporting.export:save_shards", 30, "export", source, "--save-path", out)


def test_a_stop_leaves_nothing(source, tmp_path):
    process = begun(source, tmp_path / "out")
    assert (tmp_path / "out.unfinished" / "model.safetensors").exists()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.thorough
def test_a_kill_leaves_nothing_that_looks_finished_and_the_next_run_names_it(source, tmp_path):
    process = begun(source, tmp_path / "out")
    process.kill()
    process.communicate(timeout=LIMIT)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.unfinished" / "config.json").exists()  # without which nothing loads it
    assert "expected no such folder, found one that another run is writing or has left" in refusal(
        source, tmp_path / "out"
    )


def test_a_full_disk_leaves_nothing(source, tmp_path, monkeypatch):
    assert "File too large" in on_a_full_disk("export", source, "--save-path", tmp_path / "out")
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "MB of free space, found 1 kB" in refusal(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
