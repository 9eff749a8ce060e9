"""Programs of others that build on mlx-lm: with this package and with MLX_LM_PLUGINS=0, the same answer.

A recipe is a script beside this file that names its program's release as scripts do (PEP 723). Those named ``ask_…``
print what the program answers, and those named ``load_…`` what it has loaded. Each is installed from PyPI, as a user
would, into an environment of its own, and run there, in a new interpreter, with a checkpoint and a question.
"""

from __future__ import annotations

import json
import os
import platform
import re
import struct
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from support import TINY, thorough
from support.commands import UNCHANGED, mlx_lm, run
from support.installing import MLX_LM, make_tool

BOTH = pytest.mark.parametrize("setting", [{}, UNCHANGED], ids=["with", "without"])
QUICK = {"ask_llm", "ask_mlx_knife", "ask_mlx_lm_lora"}  # the others bring gigabytes, or are one more of a kind
# What a program says that looks for parts where mlx-lm's own class, which wraps another, does not have them.
ONLY_WITH_THIS_PACKAGE = {"ask_mlx_lm_lens": "Could not identify embedding layer"}
HERE = Path(__file__).parent


def recipes(kind: str) -> pytest.MarkDecorator:
    found = sorted(path.stem for path in HERE.glob(f"{kind}_*.py"))
    return pytest.mark.parametrize("recipe", [name if name in QUICK else thorough(name)[0] for name in found])


@pytest.fixture(scope="module")
def install(wheel, tmp_path_factory):
    """Make an environment with programs of PyPI, this package and a backend; return its folder of commands."""
    home = tmp_path_factory.mktemp("programs")
    uv = make_tool(home / "uv", "uv")
    quiet = ("-q", "--no-python-downloads")

    @cache
    def make(name: str, python: str = sys.executable, *packages: object) -> Path:
        path = home / name
        if run(uv, "python", "find", *quiet, python, check=False).returncode:
            pytest.skip(f"{name} needs Python {python}")
        run(uv, "venv", *quiet, "--python", python, path)
        run(uv, "pip", "install", *quiet, "--python", path / "bin" / "python", MLX_LM, wheel, *packages, timeout=1200)
        return path / "bin"

    return make


@pytest.fixture
def follow(install, tmp_path):
    """Follow a recipe, in a folder of its own."""

    def to_the_end(recipe: str, model: Path, question: str, **options) -> subprocess.CompletedProcess:
        path = HERE / f"{recipe}.py"
        needed = re.search('^# requires-python = "(.*)"', path.read_text(), re.M)[1]
        fits = SpecifierSet(needed).contains(platform.python_version())
        bin_ = install(recipe, sys.executable if fits else needed, "-r", path)
        options = {"cwd": tmp_path} | options
        options["env"] = {"PATH": f"{bin_}:{os.environ['PATH']}"} | options.get("env", {})
        return run(bin_ / "python", path, model, question, fresh=True, **options)

    return to_the_end


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> dict[str, Path]:
    """The tiny model in two dtypes, as mlx-lm loads it without this package too."""
    folder = tmp_path_factory.mktemp("converted")
    for dtype in ("float32", "bfloat16"):
        mlx_lm("convert", "--hf-path", TINY, "--mlx-path", folder / dtype, "--dtype", dtype)
    return {dtype: folder / dtype for dtype in ("float32", "bfloat16")}


@BOTH
@recipes("ask")
def test_a_program_answers_word_for_word(recipe, setting, follow, converted, tiny_questions):
    pair = tiny_questions[0]
    refused = ONLY_WITH_THIS_PACKAGE.get(recipe) if setting else None
    done = follow(recipe, converted["float32"], pair["question"], env=setting, check=not refused)
    assert done.stdout.strip() == ("" if refused else pair["answer"])
    assert (refused or "") in done.stderr


@recipes("load")
def test_a_program_loads_the_same_numbers(recipe, follow, converted, tmp_path):
    found = []
    for name, setting in (("with", {}), ("without", UNCHANGED)):
        (tmp_path / name).mkdir()
        found.append(follow(recipe, converted["bfloat16"], "", env=setting, cwd=tmp_path / name).stdout)
    assert found[0] == found[1] != ""


OFFICIAL = ["ask_llm", *thorough("ask_mlx_openai_server", "ask_outlines", "ask_rapid_mlx", "ask_smolagents")]


@pytest.mark.parametrize("recipe", OFFICIAL)
def test_an_official_checkpoint_answers_with_this_package_only(recipe, follow, tiny_questions):
    pair = tiny_questions[0]
    assert follow(recipe, TINY, pair["question"]).stdout.strip() == pair["answer"]
    assert "'tie_word_embeddings'" in follow(recipe, TINY, pair["question"], env=UNCHANGED, check=False).stderr


def test_mlx_lm_lora_keeps_the_dtypes(follow, converted, tmp_path, tiny_questions):
    """Without this package the CPU has no products of bfloat16 experts."""
    follow("ask_mlx_lm_lora", converted["bfloat16"], tiny_questions[0]["question"])
    assert dtypes(tmp_path / "fused") == dtypes(converted["bfloat16"])


def dtypes(model: Path) -> dict[str, str]:
    """Of every tensor, from the header of its file."""
    with (model / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return {name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"}


@BOTH
def test_gptq_treats_every_linear_layer(install, setting, converted, tmp_path, tiny_questions):
    """33: of four layers, 4 of attention, the router and 3 of experts; and the head. It passes over other types."""
    calibration = tmp_path / ".cache" / "mlx-lm" / "calibration_v5.txt"  # downloaded if missing
    calibration.parent.mkdir(parents=True)
    calibration.write_text("\n".join(f"{pair['question']} {pair['answer']}" for pair in tiny_questions))
    arguments = ("--model", converted["float32"], "--mlx-path", tmp_path / "gptq", "--sequence-length", 64)
    done = run(install("mlx-lm") / "mlx_lm.gptq", *arguments, env=setting | {"HOME": str(tmp_path)}, fresh=True)
    assert re.findall(r"Quantizing: 100%\S* (\d+)/(\d+)", done.stderr)[-1] == ("33", "33")
    quantization = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization"]
    assert {*quantization} == {"group_size", "bits", "language_model.model.embed_tokens"}
