"""Programs of others that build on mlx-lm, with this package and with MLX_LM_PLUGINS=0: the table of docs/commands.md.

Each is installed from PyPI, as a user would, into an environment of its own.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from support import LIMIT, TINY
from support.commands import CLEAN, UNCHANGED, mlx_lm, run, write_chats
from support.installing import MLX_LM, make_tool

BOTH = pytest.mark.parametrize("setting", [{}, UNCHANGED], ids=["with", "without"])


@pytest.fixture(scope="module")
def install(wheel, tmp_path_factory):
    """Make an environment with programs of PyPI, this package and a backend; return its folder of commands."""
    home = tmp_path_factory.mktemp("programs")
    uv = make_tool(home / "uv", "uv")

    def make(*names: str) -> Path:
        path = home / names[0]
        run(uv, "venv", "-q", "--python", sys.executable, path)
        run(uv, "pip", "install", "-q", "--python", path / "bin" / "python", MLX_LM, wheel, *names)
        return path / "bin"

    return make


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> dict[str, Path]:
    """The tiny model in two dtypes, as mlx-lm loads it without this package too."""
    folder = tmp_path_factory.mktemp("converted")
    for dtype in ("float32", "bfloat16"):
        mlx_lm("convert", "--hf-path", TINY, "--mlx-path", folder / dtype, "--dtype", dtype)
    return {dtype: folder / dtype for dtype in ("float32", "bfloat16")}


def dtypes(model: Path) -> dict[str, str]:
    """Of every tensor, from the header of its file."""
    with (model / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return {name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"}


# --- gptq -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gptq(install):
    return install("mlx-lm") / "mlx_lm.gptq"


@BOTH
def test_gptq_treats_every_linear_layer(gptq, setting, converted, tmp_path, tiny_questions):
    """33: of four layers, 4 of attention, the router and 3 of experts; and the head. It passes over other types."""
    calibration = tmp_path / ".cache" / "mlx-lm" / "calibration_v5.txt"  # downloaded if missing
    calibration.parent.mkdir(parents=True)
    calibration.write_text("\n".join(f"{pair['question']} {pair['answer']}" for pair in tiny_questions))
    arguments = ("--model", converted["float32"], "--mlx-path", tmp_path / "gptq", "--sequence-length", 64)
    done = run(gptq, *arguments, env=setting | {"HOME": str(tmp_path)})
    assert re.findall(r"Quantizing: 100%\S* (\d+)/(\d+)", done.stderr)[-1] == ("33", "33")
    quantization = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization"]
    assert {*quantization} == {"group_size", "bits", "language_model.model.embed_tokens"}


# --- mlx-lm-lora ----------------------------------------------------------------------------------------------------

# Its trainer asks for a figure that MLX knows on a GPU only.
TRAIN = """
import mlx.core as mx
info = mx.device_info
mx.device_info = lambda *device: {"max_recommended_working_set_size": 0, **info(*device)}
from mlx_lm_lora.train import main
main()
"""


def test_mlx_lm_lora_trains_and_fuses_in_one_process_and_keeps_the_dtypes(install, converted, tmp_path, tiny_questions):
    """Without this package the CPU has no products of bfloat16 experts."""
    python = install("mlx-lm-lora") / "python"
    data = write_chats(tmp_path / "data", tiny_questions[:4])
    options = ("--train-mode", "sft", "--iters", 2, "--batch-size", 1, "--num-layers", 2, "--max-seq-length", 128)
    files = ("--model", converted["bfloat16"], "--data", data, "--adapter-path", tmp_path / "fused")
    run(python, "-c", TRAIN, "--train", "--fuse", *files, *options)
    assert dtypes(tmp_path / "fused") == dtypes(converted["bfloat16"])


# --- llm ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(install, converted, tmp_path_factory):
    """Ask a model with llm and llm-mlx."""
    bin_ = install("llm", "llm-mlx")
    user = tmp_path_factory.mktemp("llm")
    (user / "llm-mlx.json").write_text(json.dumps({str(path): {"aliases": []} for path in [*converted.values(), TINY]}))

    def ask(model: Path, question: str, **options) -> subprocess.CompletedProcess:
        arguments = ("-m", model, "-o", "temperature", 0, "-o", "max_tokens", 64, "--no-stream", question)
        env = {"LLM_USER_PATH": str(user)} | options.pop("env", {})
        return run(bin_ / "llm", *arguments, env=env, **options)

    return ask


@BOTH
def test_llm_answers_word_for_word(llm, setting, converted, tiny_questions):
    pair = tiny_questions[0]
    assert llm(converted["float32"], pair["question"], env=setting).stdout.strip() == pair["answer"]


def test_llm_answers_from_an_official_checkpoint_with_this_package_only(llm, tiny_questions):
    pair = tiny_questions[0]
    assert llm(TINY, pair["question"]).stdout.strip() == pair["answer"]
    assert "'tie_word_embeddings'" in llm(TINY, pair["question"], env=UNCHANGED, check=False).stderr


# --- a server -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mlxk(install):
    return install("mlx-knife") / "python"


@pytest.fixture(scope="module")
def cache(converted, tmp_path_factory) -> dict[str, str]:
    """A cache of the hub as a download leaves it: the server takes models from there."""
    home = tmp_path_factory.mktemp("hub")
    repository = home / "hub" / "models--mlx-community--tiny"
    shutil.copytree(converted["float32"], repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return {"HF_HOME": str(home)}


@BOTH
def test_the_server_of_mlx_knife_answers_word_for_word(mlxk, setting, cache, tmp_path, tiny_questions):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `mlxk serve` starts, in a session of its own that may outlive it.
    command = [mlxk, "-m", "uvicorn", "mlxk2.core.server_base:app", "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, env=CLEAN | setting | cache, stdout=log, stderr=log)
        try:
            for pair in tiny_questions[:3]:
                message = {"role": "user", "content": pair["question"]}
                body = {"model": "mlx-community/tiny", "messages": [message], "temperature": 0, "max_tokens": 64}
                assert answer(f"http://127.0.0.1:{port}/v1/chat/completions", body, server) == pair["answer"]
        finally:
            server.terminate()
            server.wait(LIMIT)
            print((tmp_path / "log").read_text())


def answer(url: str, body: dict, server: subprocess.Popen) -> str:
    """Of a server that may still be starting."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    for _ in range(LIMIT):
        assert server.poll() is None
        try:
            with urllib.request.urlopen(request, timeout=LIMIT) as reply:
                return json.load(reply)["choices"][0]["message"]["content"].strip()
        except urllib.error.URLError as e:
            if isinstance(e, urllib.error.HTTPError):
                raise
            time.sleep(1)
    raise TimeoutError(url)
