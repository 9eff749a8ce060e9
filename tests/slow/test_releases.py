"""From release to release, and the tests that a source distribution brings. These tests need PyPI.

`tests/releases` has the wheel of the release before, as `python -m build` makes it of its commit: see CHANGELOG.md.
"""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
from support import OURS, ROOT, TINY
from support.commands import run
from support.environments import Environment, build
from support.installing import MLX_LM, NAME, VERSION, files, files_of_wheel, served_by, version

(OLD,) = (ROOT / "tests" / "releases").glob("*.whl")
CONVERT = """
import sys, mlx_lm, mlx_lm_qwen3vlmoe
mlx_lm.convert(sys.argv[1], sys.argv[2], quantize=True, q_bits=4)
print(mlx_lm_qwen3vlmoe.__version__)
"""
ANSWER = """
import sys, mlx_lm
model, tokenizer = mlx_lm.load(sys.argv[1])
prompt = tokenizer.apply_chat_template([{"role": "user", "content": sys.argv[2]}], add_generation_prompt=True)
print(type(model).__module__, mlx_lm.generate(model, tokenizer, prompt, max_tokens=64))
"""


def environment_with(path: Path, wheel: Path) -> Environment:
    environment = Environment(path)
    environment.pip("install", "--no-deps", wheel)
    return environment


@pytest.fixture(params=["pip", "uv"])
def install(request, wheel, tmp_path):
    """Run `install` of docs/hosts.md in an environment of its own, from an index with both releases."""
    index = tmp_path / "index"
    index.mkdir()
    for each in (OLD, wheel):
        shutil.copy(each, index)
    environment = Environment(tmp_path / "venv")
    source = ("--no-index", "--find-links", index, "--no-deps")

    def pip(*arguments: object) -> Environment:
        if request.param == "pip":
            environment.pip("install", *source, *arguments)
        else:
            request.getfixturevalue("uv")("pip", "install", "--python", environment.python, *source, *arguments)
        return environment

    return pip


def test_from_the_old_release_to_this_one_and_back(install, wheel):
    for arguments, release in (
        ([f"{NAME}=={version(OLD)}"], OLD),
        (["--upgrade", NAME], wheel),
        ([f"{NAME}=={version(OLD)}"], OLD),
        ([f"{NAME}=={version(wheel)}"], wheel),
    ):
        environment = install(*arguments)
        assert served_by(environment) == OURS
        assert environment.run(VERSION).stdout.strip() == version(release)
        assert files(environment) == files_of_wheel(release)


def test_both_side_by_side_load_what_the_other_converted_and_answer_alike(wheel, tmp_path, tiny_questions):
    pair = tiny_questions[0]
    sides = {version(each): environment_with(tmp_path / version(each), each) for each in (OLD, wheel)}
    for name, environment in sides.items():
        done = environment.run(CONVERT, TINY, tmp_path / f"converted-{name}")
        assert done.stdout.split()[-1] == name
    for environment in sides.values():
        for name in sides:
            found = environment.run(ANSWER, tmp_path / f"converted-{name}", pair["question"]).stdout
            assert found.strip() == f"{OURS} {pair['answer']}"


def test_a_tool_of_uv_goes_back_to_the_old_release(uv, wheel):
    for release in (wheel, OLD):
        uv("tool", "install", MLX_LM, "--with-executables-from", f"{NAME} @ {release.as_uri()}")
        assert run(uv.home / "tools" / "mlx-lm" / "bin" / "python", "-c", VERSION).stdout.strip() == version(release)
        assert "qwen3_vl_moe" in run(uv.home / "bin" / NAME, "doctor", check=False).stdout


def test_a_tool_of_pipx_goes_back_to_the_old_release(pipx, wheel):
    pipx("install", MLX_LM)
    for release in (wheel, OLD):
        pipx("inject", "--include-apps", "--force", "mlx-lm", release)
        python = pipx.home / "home" / "venvs" / "mlx-lm" / "bin" / "python"
        assert run(python, "-c", VERSION).stdout.strip() == version(release)
        assert "qwen3_vl_moe" in run(pipx.home / "bin" / NAME, "doctor", check=False).stdout


# --- the source distribution ----------------------------------------------------------------------------------------


def files_below(root: Path) -> set[Path]:
    """The files that tests consist of, below the root of the project."""
    found = [path.relative_to(root) for folder in ("tests", "examples", "docs") for path in (root / folder).rglob("*")]
    return {path for path in found if (root / path).is_file() and not {"__pycache__", ".hypothesis"} & set(path.parts)}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """The source distribution in an empty place, set up by its own Makefile."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", folder / "dist")) as archive:
        archive.extractall(folder, filter="data")
    (root,) = folder.glob("mlx_lm_qwen3vlmoe-*")
    run("make", "-C", root, ".venv/test.stamp", f"PYTHON={sys.executable}", timeout=900)
    return root


def collected(root: Path, python: Path) -> list[str]:
    output = run(python, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", cwd=root).stdout
    return sorted(line for line in output.splitlines() if "::" in line)


def test_the_sdist_has_every_test_and_all_that_tests_read(unpacked):
    assert files_below(unpacked) == files_below(ROOT)
    found = collected(unpacked, unpacked / ".venv" / "bin" / "python")
    assert len(found) > 500
    assert found == collected(ROOT, Path(sys.executable))
    assert os.access(unpacked / ".ci" / "run", os.X_OK)


@pytest.mark.parametrize("subject", ["layouts", "packaging", "quantized_tools"])
def test_tests_of_the_sdist_pass_where_nothing_else_is(unpacked, subject):
    """A part of `make test`, which runs them all."""
    python = unpacked / ".venv" / "bin" / "python"
    output = run(python, "-m", "pytest", "-q", f"tests/test_{subject}.py", cwd=unpacked, timeout=1200).stdout
    assert " passed" in output.splitlines()[-1]
