"""Folders and files that the host is first to read: its own error names what is wrong."""

from __future__ import annotations

import json
import shutil
import sys

import mlx.core as mx
import pytest
from mlx_lm import load
from mlx_lm.utils import load_model
from support import FIXTURES, TINY
from support.checkpoints import TOLERANCE, Checkpoint, logits_error, refusal
from support.commands import run


def test_an_empty_folder(tmp_path):
    assert str(tmp_path / "config.json") in refusal(tmp_path, FileNotFoundError)


def test_a_folder_without_weights(tmp_path):
    (Checkpoint("official").save(tmp_path) / "model.safetensors").rename(tmp_path / "pytorch_model.safetensors")
    assert "No safetensors found" in refusal(tmp_path, FileNotFoundError)


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        ("", json.JSONDecodeError, "Expecting value"),
        ("{", json.JSONDecodeError, "line 1"),
        ("[1]", AttributeError, "'list' object"),
        ("{}", KeyError, "model_type"),
        ('{"model_type": "no_such_model"}', ValueError, "Model type no_such_model not supported"),
        ('{"model_type": "qwen3_vl_moe", "text_config": null}', TypeError, "NoneType"),
        ('{"model_type": "qwen3_vl_moe", "text_config": 3}', TypeError, "int"),
    ],
)
def test_a_config_that_is_no_config(content, kind, message, tmp_path):
    (Checkpoint("official").save(tmp_path) / "config.json").write_text(content)
    with pytest.raises(kind, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda file: file[:-100], "exceeding the size of the file", id="cut-in-the-data"),
        pytest.param(lambda file: file[: len(file) // 2], "exceeding the size of the file", id="cut-in-half"),
        pytest.param(lambda file: file[:100], "incomplete download", id="cut-in-the-header"),
        pytest.param(lambda file: b"", "Unable to read", id="empty"),
        pytest.param(lambda file: b"version https://git-lfs.github.com/spec/v1\n", "Invalid json", id="lfs-pointer"),
        pytest.param(lambda file: file.replace(b'"BF16"', b'"BF17"', 1), "unsupported dtype", id="unknown-type"),
    ],
)
def test_a_damaged_file(change, message, tmp_path):
    file = Checkpoint("official").save(tmp_path) / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    assert message in refusal(tmp_path, RuntimeError)


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (2, "embed_tokens"),
        (3, "layers.0."),
        (4, "layers.1"),
        (5, "layers.2.mlp"),
        (6, "layers.2.mlp"),
    ],
)
def test_a_shard_that_is_missing_shows_as_tensors_that_are_missing(number, name, tmp_path):
    shutil.copytree(FIXTURES / "official_sharded", tmp_path, dirs_exist_ok=True)
    (tmp_path / f"model-0000{number}-of-00006.safetensors").unlink()
    assert name in refusal(tmp_path, ValueError)


def test_a_shard_of_vision_alone_is_not_missed(tmp_path):
    shutil.copytree(FIXTURES / "official_sharded", tmp_path, dirs_exist_ok=True)
    (tmp_path / "model-00001-of-00006.safetensors").unlink()
    assert logits_error(tmp_path, tmp_path) < TOLERANCE


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_may_not_be_read(name, tmp_path):
    """In a process that gives up root, which may read anything."""
    folder = Checkpoint("official").save(tmp_path)
    folder.chmod(0o755)
    (folder / name).chmod(0)
    code = (
        "import os, pathlib, sys\n"
        "from mlx_lm.utils import load_model\n"
        "import mlx_lm.models.qwen3_vl_moe\n"
        "os.chdir(sys.argv[1])\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "load_model(pathlib.Path())"
    )
    done = run(sys.executable, "-c", code, folder, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        ("PermissionError", "RuntimeError: [load_safetensors] Failed to open")
    )
    assert name in done.stderr.splitlines()[-1]


LORA = {"rank": 2, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.1.self_attn.q_proj.lora_a", (192, 2), "not an adapter parameter"),
        ("language_model.model.layers.3.self_attn.q_proj.lora_a", (48, 2), "(48, 2)"),
        ("language_model.model.layers.9.self_attn.q_proj.lora_a", (192, 2), "not an adapter parameter"),
    ],
)
def test_an_adapter_of_another_model(name, shape, expected, tmp_path):
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": LORA}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), {name: mx.ones(shape)})
    with pytest.raises(ValueError, match=name) as caught:
        load(str(TINY), adapter_path=str(tmp_path))
    assert expected in str(caught.value)


def test_an_adapter_in_place_of_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), {"lora_a": mx.ones(1)})
    assert "config.json" in refusal(tmp_path, FileNotFoundError)
