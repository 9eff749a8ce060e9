"""Virtual environments to install this package in."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from . import ROOT
from .commands import run


class Environment:
    """A virtual environment of its own with all that mlx-lm needs in it, and without this package until installed.

    mlx, mlx-lm and the rest are links to the packages that these tests run with, so that an environment takes seconds.
    """

    def __init__(self, path: Path):
        venv.create(path, symlinks=True)
        self.bin = path / "bin"
        self.python = self.bin / "python"
        self.site = Path(
            run(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
        )
        shared = path / "shared"
        shared.mkdir()
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if "qwen3vlmoe" not in entry.name and entry.suffix != ".pth" and not entry.name.startswith(("pip", "_")):
                (shared / entry.name).symlink_to(entry)
        (self.site / "shared.pth").write_text(f"{shared}\n")

    def pip(self, *arguments: object) -> None:
        run(sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "--python", self.python, *arguments)

    def run(self, code: str, *arguments: object, **options) -> subprocess.CompletedProcess:
        return run(self.python, "-c", code, *arguments, **options)

    def add_distribution(self, name: str, entry_points: str, modules: dict[str, str]) -> None:
        """Install a made-up distribution: its metadata and its modules."""
        info = self.site / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(entry_points)
        for module, source in modules.items():
            (self.site / f"{module}.py").write_text(source)


def build(kind: str, out: Path, tree: Path = ROOT) -> Path:
    """Build the ``wheel`` or the ``sdist`` of a tree."""
    run(sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", out, tree)
    (built,) = out.glob({"wheel": "*.whl", "sdist": "*.tar.gz"}[kind])
    return built
