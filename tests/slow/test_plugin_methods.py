"""What mlx-lm needs of a plug-in's `Model`, as docs/plugins.md has it, tried with a model that has no more."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import openai
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from support import TINY
from support.commands import run, serving
from support.environments import Environment

SOURCE = """
import mlx.nn as nn
from mlx_lm.models import llama

class ModelArgs:
    @classmethod
    def from_dict(cls, config):
        args = cls()
        args.inner = llama.ModelArgs.from_dict(config | {"model_type": "llama"})
        return args

class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.blocks = llama.LlamaModel(args.inner)
        self.head = nn.Linear(args.inner.hidden_size, args.inner.vocab_size, bias=False)

    def __call__(self, inputs, cache=None):
        return self.head(self.blocks(inputs, cache))

    @property
    def layers(self):
        return self.blocks.layers
"""
REQUIRED = {"from_dict", "__init__", "__call__", "layers"}
CONFIG = {
    "model_type": "bare",
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "vocab_size": 384,
}


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory) -> Environment:
    """This package beside a plug-in with the required methods alone, and mlx-lm's commands as modules."""
    environment = Environment(tmp_path_factory.mktemp("bare") / "venv")
    environment.pip("install", "--no-deps", wheel)
    without_layers = SOURCE[: SOURCE.index("    @property")]
    environment.add_distribution(
        "bare", "[mlx_lm.models]\nbare = bare\nlacking = lacking\n", {"bare": SOURCE, "lacking": without_layers}
    )
    return environment


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "bare"
    shutil.copytree(TINY, path, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    (path / "config.json").write_text(json.dumps(CONFIG))
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(CONFIG | {"model_type": "llama", "tie_word_embeddings": False}))
    names = {"model.": "blocks.", "lm_head.": "head."}
    weights = dict(tree_flatten(model.parameters()))
    for old, new in names.items():
        weights = {re.sub(f"^{re.escape(old)}", new, name): array for name, array in weights.items()}
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    return path


def mlx_lm(environment: Environment, command: str, *arguments: object, **options):
    return run(environment.python, "-m", "mlx_lm", command, *arguments, **options)


def generates(environment: Environment, model: Path, *arguments: object) -> bool:
    done = mlx_lm(environment, "generate", "--model", model, "--prompt", "Hi", "--max-tokens", 4, *arguments)
    return "Generation: 4 tokens" in done.stdout


def test_generate_and_convert_need_no_other_method(bare, checkpoint, tmp_path):
    assert set(re.findall(r"def (\w+)", SOURCE)) == REQUIRED
    assert generates(bare, checkpoint)
    mlx_lm(bare, "convert", "--hf-path", checkpoint, "--mlx-path", tmp_path / "4bit", "-q", "--dtype", "bfloat16")
    assert generates(bare, tmp_path / "4bit")


def test_chat_and_server_need_no_other_method(bare, checkpoint, tmp_path):
    done = mlx_lm(bare, "chat", "--model", checkpoint, "--max-tokens", 4, input="Hi\nq\n")
    assert "Traceback" not in done.stderr
    with serving(checkpoint, tmp_path / "log", command=(bare.python, "-m", "mlx_lm", "server")) as url:
        client = openai.OpenAI(base_url=url, api_key="none", timeout=300, max_retries=0)
        chat = [{"role": "user", "content": "Hi"}]
        reply = client.chat.completions.create(model="default_model", messages=chat, max_tokens=4)
    assert reply.usage.completion_tokens == 4


def test_lora_and_fuse_need_no_other_method(bare, checkpoint, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for part in ("train", "valid"):
        (data / f"{part}.jsonl").write_text(json.dumps({"text": "What is a plug-in? It adds to a host."}) + "\n")
    adapters, fused = tmp_path / "adapters", tmp_path / "fused"
    training = ("--iters", 2, "--batch-size", 1, "--num-layers", 1, "--val-batches", 1)
    mlx_lm(bare, "lora", "--model", checkpoint, "--train", "--data", data, "--adapter-path", adapters, *training)
    assert generates(bare, checkpoint, "--adapter-path", adapters)
    mlx_lm(bare, "fuse", "--model", checkpoint, "--adapter-path", adapters, "--save-path", fused)
    assert generates(bare, fused)


def test_without_layers_a_model_loads_and_does_not_generate(bare, checkpoint, tmp_path):
    lacking = tmp_path / "lacking"
    shutil.copytree(checkpoint, lacking)
    (lacking / "config.json").write_text(json.dumps(CONFIG | {"model_type": "lacking"}))
    load = "import sys; from mlx_lm import load; print(type(load(sys.argv[1])[0]).__module__)"
    assert bare.run(load, lacking).stdout.strip() == "lacking"
    failed = mlx_lm(bare, "generate", "--model", lacking, "--prompt", "Hi", check=False)
    assert "has no attribute 'layers'" in failed.stderr


def test_without_shard_and_pipeline_it_cannot_be_spread(bare, checkpoint):
    code = "import sys; from mlx_lm.utils import sharded_load; sharded_load(sys.argv[1])"
    assert "The model does not support any sharding" in bare.run(code, checkpoint, check=False).stderr
