"""What a release installs."""

from __future__ import annotations

import zipfile
from email.parser import Parser

import mlx_lm_qwen3vlmoe

STARTUP = "import mlx_lm_qwen3vlmoe.registry; mlx_lm_qwen3vlmoe.registry.install()\n"


def test_the_wheel_holds_the_package_the_start_up_files_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        startup = archive.read("mlx_lm_qwen3vlmoe_startup.pth").decode()
        callable_ = archive.read("mlx_lm_qwen3vlmoe_startup.start").decode()
    modules = {
        f"mlx_lm_qwen3vlmoe/{name}.py"
        for name in ("__init__", "__main__", "config", "errors", "model", "quantization", "registry", "sanitize")
    }
    assert files == {
        *modules,
        "mlx_lm_qwen3vlmoe/py.typed",
        "mlx_lm_qwen3vlmoe_startup.pth",
        "mlx_lm_qwen3vlmoe_startup.start",
    }
    assert startup == STARTUP
    assert callable_ == "mlx_lm_qwen3vlmoe.registry:install\n"


def test_the_readme_quotes_the_start_up_file():
    from conftest import ROOT

    assert STARTUP in (ROOT / "README.md").read_text()


def test_the_metadata_says_what_is_needed(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
        points = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert metadata["Version"] == mlx_lm_qwen3vlmoe.__version__
    assert metadata["License-Expression"] == "MIT"
    needed = {line.split(";")[0].split(">")[0].strip() for line in metadata.get_all("Requires-Dist") if ";" not in line}
    assert needed == {"mlx", "mlx-lm", "importlib-metadata"}
    assert set(metadata.get_all("Provides-Extra")) == {"cpu", "cuda12", "cuda13", "test", "bench", "dev"}
    assert "[mlx_lm.models]\nqwen3_vl_moe = mlx_lm_qwen3vlmoe.model\n" in points
