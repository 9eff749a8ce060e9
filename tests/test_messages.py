"""What docs/troubleshooting.md quotes, held against the sources of this package and of its host, or brought about."""

from __future__ import annotations

import ast
import re
import shutil
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import mlx
import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model
from support import ROOT, TINY
from support.commands import run
from support.documents import DOCUMENTS

import mlx_lm_qwen3vlmoe
from mlx_lm_qwen3vlmoe.runtime import backend

TROUBLES = DOCUMENTS["troubleshooting.md"].read_text()
ERRORS = {"CheckpointError", "MissingTensorError", "HostError", "PluginError"}
REAL = {  # messages that no single text in a source holds: they are brought about below
    "ModelArgs.__init__() missing 1 required positional argument: 'tie_word_embeddings'",
    "invalid data offsets … exceeding the size of the file. Perhaps an incomplete download or corrupt file?",
    "[GatherMM::eval] Currently only supports float32.",
    "[safetensor] unsupported dtype F64",
    "'types.SimpleNamespace' object has no attribute 'num_layers'",
}


def normalized(text: str) -> str:
    """A message with one … for whatever is filled in."""
    text = re.sub(r"%\.?\d*[a-z]", "…", re.sub(r"\s+", " ", text))
    return re.sub(r"…(?:[.= ]?…)+", "…", text).strip("… ")


def template(node: ast.AST, known: dict[str, str]) -> str | None:
    """The text of a node, with … for what is filled in; the four parts of an error make one.

    Args:
        known: texts by the names of the variables that have them.
    """
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS:
        where, *parts = (template(part, known) or "…" for part in node.args)
        return "{}: expected {}, found {}. {}".format(where, *parts) if len(parts) == 3 else where
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.Name):
        return known.get(node.id)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


@cache
def errors_and_texts(files: tuple[Path, ...]) -> tuple[list[str], list[str]]:
    """The messages of errors in these sources, and every other text that a message can be made of."""
    trees = [ast.parse(file.read_text()) for file in files]
    known = _assigned(node for tree in trees for node in tree.body)
    errors, texts = [], []
    for tree in trees:
        for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)] + [tree]:
            here: dict[str, str] = {}
            for node in sorted(ast.walk(function), key=lambda node: getattr(node, "lineno", 0)):
                here |= _assigned([node])
                if text := template(node, known | here):
                    (texts if function is tree or not isinstance(node, ast.Call) else errors).append(normalized(text))
    return errors, texts


def _assigned(nodes: Iterable[ast.AST]) -> dict[str, str]:
    pairs = [(node.targets[0], node.value) for node in nodes if isinstance(node, ast.Assign)]
    return {one.id: text for one, value in pairs if isinstance(one, ast.Name) and (text := template(value, {}))}


OURS = tuple(sorted(Path(mlx_lm_qwen3vlmoe.__file__).parent.rglob("*.py")))
HOSTS = (
    *sorted(Path(next(iter(mlx_lm.__path__))).glob("*.py")),
    *sorted(Path(next(iter(mlx.__path__))).glob("nn/layers/base.py")),
)
HEADINGS = dict(re.findall(r"(?m)^### `(.+)`\n\n(.+)$", TROUBLES))
ELSEWHERE = re.findall(r"(?m)^\| `([^`|]+ [^`|]+)` \|", TROUBLES)  # the reasons that doctor gives


def is_the_hosts(message: str) -> bool:
    return HEADINGS.get(message, "").startswith(("From mlx-lm", "From `mlx_lm", "From MLX"))


def test_every_heading_that_quotes_a_message_was_read():
    assert len(HEADINGS) == TROUBLES.count("\n### `")
    assert HEADINGS
    assert len(ELSEWHERE) >= 5


@pytest.mark.parametrize("message", [m for m in [*HEADINGS, *ELSEWHERE] if not is_the_hosts(m)])
def test_a_message_of_this_package_is_in_its_sources(message):
    assert any(normalized(message) in text for texts in errors_and_texts(OURS) for text in texts)


@pytest.mark.parametrize("message", [m for m in HEADINGS if is_the_hosts(m) and m not in REAL])
def test_a_message_of_the_host_is_in_its_sources(message):
    _, texts = errors_and_texts(HOSTS)
    assert any(normalized(message.replace("qwen3_vl_moe", "…")) in text for text in texts)


def test_without_the_plug_in_an_official_config_gives_the_message():
    if not (Path(next(iter(mlx_lm.__path__))) / "models" / "qwen3_vl_moe.py").exists():
        pytest.skip("this mlx-lm has no such type of its own")
    code = f"from pathlib import Path; from mlx_lm.utils import load_model; load_model(Path({str(TINY)!r}))"
    error = run(sys.executable, "-c", code, check=False, env={"MLX_LM_PLUGINS": "0"}).stderr
    (message,) = [m for m in REAL if m.startswith("ModelArgs")]
    assert message in HEADINGS
    assert message in error


def test_a_truncated_file_gives_the_message(tmp_path):
    shutil.copytree(TINY, tmp_path / "cut")
    with (tmp_path / "cut" / "model.safetensors").open("r+b") as file:
        file.truncate(1_000_000)
    (message,) = [m for m in REAL if m.startswith("invalid")]
    assert message in HEADINGS
    with pytest.raises(RuntimeError, match=re.escape(message).replace("…", ".*")):
        load_model(tmp_path / "cut")


def test_an_adapter_of_peft_given_to_the_host_gives_the_message():
    adapter = ROOT / "tests" / "adapters" / "fixtures" / "tiny_answer"
    (message,) = [m for m in REAL if "num_layers" in m]
    assert message in HEADINGS
    with pytest.raises(AttributeError, match=re.escape(message)):
        load_adapters(load_model(TINY, lazy=True)[0], str(adapter))


def test_a_tensor_in_64_bits_gives_the_message(tmp_path):
    header = b'{"x":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    (message,) = [m for m in REAL if "F64" in m]
    assert message in HEADINGS
    with pytest.raises(RuntimeError, match=re.escape(message)):
        mx.load(str(tmp_path / "model.safetensors"))


def test_experts_in_16_bits_on_the_cpu_give_the_message():
    if mx.default_device() != mx.cpu:
        pytest.skip("this is about the CPU")
    with backend.planned(mx.Device(mx.gpu)):
        model, _ = load_model(TINY)
    (message,) = [m for m in REAL if "GatherMM" in m]
    assert message in HEADINGS
    with pytest.raises(RuntimeError, match=re.escape(message)):
        mx.eval(model(mx.array([[1, 2]])))
