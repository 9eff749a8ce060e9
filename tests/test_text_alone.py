"""The text model alone, `qwen3_vl_moe_text`: as transformers saves it, with a head that people add, and without one."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model
from support import FIXTURES, OURS, TINY
from support.checkpoints import Checkpoint, refusal
from support.commands import run

from mlx_lm_qwen3vlmoe import CheckpointError
from mlx_lm_qwen3vlmoe.inspection.report import inspect
from mlx_lm_qwen3vlmoe.restoring.restore import restore

TEXTS = ["text_4_57_6", "text_5_23_0"]  # their logits are tested in test_layouts.py
BACKBONES = ["backbone_4_57_6", "backbone_5_23_0"]
BIN = Path(sys.executable).parent


def error(folder: Path, golden: Path) -> float:
    model, _ = load_model(folder, lazy=True)
    model.set_dtype(mx.float32)
    expected = mx.load(str(golden / "golden.safetensors"))
    return (mx.abs(model(expected["ids"]) - expected["logits"]).max() / mx.abs(expected["logits"]).max()).item()


def test_both_types_are_one_module():
    modules = [importlib.import_module(f"mlx_lm.models.{name}") for name in ("qwen3_vl_moe", "qwen3_vl_moe_text")]
    assert modules[0] is modules[1]
    assert modules[0].__name__ == OURS


@pytest.mark.parametrize("name", TEXTS)
def test_the_type_becomes_one_that_the_host_has(name):
    stored = json.loads((FIXTURES / name / "config.json").read_text())
    assert stored["model_type"] == "qwen3_vl_moe_text"
    assert "text_config" not in stored
    model, config = load_model(FIXTURES / name, lazy=True)
    assert model.model_type == config["model_type"] == "qwen3_vl_moe"
    assert config["text_config"]["model_type"] == "qwen3_vl_moe_text"
    assert config["eos_token_id"] == stored["eos_token_id"]


def tiny_text(folder: Path) -> Path:
    """The text of the tiny model with its tokenizer, as somebody saves it alone."""
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    flat = config["text_config"] | {"architectures": ["MyTextModel"], "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(flat | {"transformers_version": config["transformers_version"]}))
    weights = mx.load(str(TINY / "model.safetensors"))
    text = {name.replace(".language_model", ""): w for name, w in weights.items() if ".visual." not in name}
    assert {"lm_head.weight", "model.layers.0.mlp.gate.weight"} <= text.keys()
    mx.save_safetensors(str(folder / "model.safetensors"), text, metadata={"format": "pt"})
    return folder


def test_the_commands_take_it_and_what_they_save_loads_in_the_unchanged_host(tmp_path):
    text = tiny_text(tmp_path / "text")
    question = ("--prompt", "What is this package?", "--temp", 0, "--max-tokens", 64)
    answer = run(BIN / "mlx_lm.generate", "--model", text, *question).stdout
    assert "A plug-in for MLX LM" in answer
    run(BIN / "mlx_lm.convert", "--hf-path", text, "--mlx-path", tmp_path / "4bit", "-q")
    config = json.loads((tmp_path / "4bit" / "config.json").read_text())
    assert config["model_type"] == "qwen3_vl_moe"
    alone = run(BIN / "mlx_lm.generate", "--model", tmp_path / "4bit", *question, env={"MLX_LM_PLUGINS": "0"}).stdout
    assert "A plug-in for MLX LM" in alone


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_lacks_a_head_and_says_so(name):
    """That of 5.23 says `tie_word_embeddings: true`, as every one does: the model that it is of is not tied."""
    message = refusal(FIXTURES / name)
    assert message.startswith("lm_head.weight: expected a head, as config.json has ")
    assert "is this a backbone without a head? Take lm_head.weight from the whole model." in message


@pytest.mark.parametrize("name", BACKBONES)
def test_with_the_head_of_the_whole_model_a_backbone_gives_torchs_logits(name, tmp_path):
    shutil.copytree(FIXTURES / name, tmp_path / "whole")
    head = mx.load(str(FIXTURES / "official" / "model.safetensors"))["lm_head.weight"]
    mx.save_safetensors(str(tmp_path / "whole" / "model-head.safetensors"), {"lm_head.weight": head})
    assert error(tmp_path / "whole", FIXTURES / "official") < 1e-4


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_is_tied_where_a_flag_means_it(name, tmp_path):
    checkpoint = Checkpoint(name)
    checkpoint.config["tie_word_embeddings"] = True
    if name == "backbone_5_23_0":
        del checkpoint.config["architectures"]  # the remedy of the message
    assert error(checkpoint.save(tmp_path), FIXTURES / "tied") < 1e-4


@pytest.mark.parametrize("name", TEXTS)
def test_inspect_takes_it(name):
    report = inspect(str(FIXTURES / name))
    assert report["error"] is None
    assert report["tensors"] == {"kept": 36, "dropped": 0, "unknown": []}


@pytest.mark.parametrize("name", BACKBONES)
def test_inspect_says_what_a_backbone_lacks(name):
    assert "lm_head.weight: expected" in inspect(str(FIXTURES / name))["error"]


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_is_no_original(name, tmp_path):
    with pytest.raises(CheckpointError, match=f"{name} does not load: lm_head.weight: expected a head"):
        restore(str(FIXTURES / "mlx_vlm"), str(FIXTURES / name), str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []
