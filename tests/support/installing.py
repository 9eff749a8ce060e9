"""Ways to install this package, each in a clean environment: they need PyPI."""

from __future__ import annotations

import sys
import venv
import zipfile
from pathlib import Path

from .commands import run
from .environments import Environment

NAME = "mlx-lm-qwen3vlmoe"
MLX_LM = "mlx-lm" if sys.platform == "darwin" else "mlx-lm[cpu]"
WHO = """
import importlib, mlx_lm
print(importlib.import_module("mlx_lm.models.qwen3_vl_moe").Model.__module__)
print(mlx_lm.__file__)
"""
VERSION = f"import importlib.metadata; print(importlib.metadata.version({NAME!r}))"


def served_by(environment: Environment, **options) -> str:
    """The module that serves the model type, through the mlx_lm of this environment and no other."""
    module, host = environment.run(WHO, **options).stdout.split()
    assert Path(host).is_relative_to(environment.bin.parent)
    return module


def make_tool(path: Path, name: str) -> Path:
    """Install a tool of PyPI by itself; return its executable."""
    venv.create(path, symlinks=True, with_pip=True)
    run(path / "bin" / "python", "-m", "pip", "-q", "install", name)
    return path / "bin" / name


def version(wheel: Path) -> str:
    return wheel.name.split("-")[1]


def summary(path: Path) -> str:
    if path.parts[0].endswith(".dist-info"):
        return path.parts[0]
    if path.suffix == ".pyc":  # the name of its source, so that a forgotten one shows
        return str(path.parents[1] / f"{path.name.split('.')[0]}.py")
    return str(path)


def files(environment: Environment) -> set[str]:
    """What is of this package in an environment: its files, and the folder of its metadata."""
    found = (path.relative_to(environment.site) for path in environment.site.rglob("*") if path.is_file())
    return {summary(path) for path in found if "qwen3vlmoe" in path.parts[0]}


def files_of_wheel(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {summary(Path(name)) for name in archive.namelist()}
