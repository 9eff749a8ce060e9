"""Installers, each with folders of its own; and a new interpreter for every command."""

from __future__ import annotations

import sys
import venv
from pathlib import Path

import pytest
from support.commands import WARM, run
from support.installing import make_tool

WARM.off = True  # some environments here have another transformers, or torch beside it


@pytest.fixture(scope="module")
def uv(tmp_path_factory):
    """Run uv, with a cache and a folder of tools of its own."""
    home = tmp_path_factory.mktemp("uv")
    executable = make_tool(home / "venv", "uv")
    places = {"UV_CACHE_DIR": "cache", "UV_TOOL_DIR": "tools", "UV_TOOL_BIN_DIR": "bin"}
    env = {name: str(home / place) for name, place in places.items()} | {"UV_PYTHON": sys.executable}

    def run_uv(*arguments: object, **options):
        return run(executable, *arguments, env=env, **options)

    run_uv.home = home
    return run_uv


@pytest.fixture(scope="module")
def pipx(tmp_path_factory):
    """Run pipx, with a folder of environments of its own."""
    home = tmp_path_factory.mktemp("pipx")
    executable = make_tool(home / "venv", "pipx")
    places = {"PIPX_HOME": "home", "PIPX_BIN_DIR": "bin", "PIPX_MAN_DIR": "man"}
    env = {name: str(home / place) for name, place in places.items()}
    env |= {"PIPX_DEFAULT_PYTHON": sys.executable, "PIPX_DEFAULT_BACKEND": "pip"}

    def run_pipx(*arguments: object, **options):
        return run(executable, *arguments, env=env, **options)

    run_pipx.home = home
    return run_pipx


@pytest.fixture(scope="session")
def torch(tmp_path_factory) -> dict[str, tuple[Path, dict[str, str]]]:
    """Version of transformers → a Python with torch, and the setting that brings this version."""
    home = tmp_path_factory.mktemp("torch")
    venv.create(home / "venv", symlinks=True, with_pip=True)
    python = home / "venv" / "bin" / "python"
    run(python, "-m", "pip", "-q", "install", "torch==2.13.0", "numpy", timeout=900)
    found = {}
    for version in ("4.57.6", "5.23.0"):
        target = home / version
        packages = (f"transformers=={version}", "safetensors")
        run(python, "-m", "pip", "-q", "install", "--target", target, *packages, timeout=900)
        found[version] = python, {"PYTHONPATH": str(target)}
    return found
