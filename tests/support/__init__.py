"""What tests share: where things are, and how long anything may take."""

from __future__ import annotations

import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
QUANTIZED = ROOT / "tests" / "quantized" / "fixtures"  # by other tools
TINY = ROOT / "examples" / "tiny-qwen3-vl-moe"
OURS = "mlx_lm_qwen3vlmoe.model"  # where a model class lives that this package serves
LIMIT = 300  # seconds that anything may take: no busy machine decides a test
BIN = Path(sys.executable).parent
HOST = tuple(map(int, version("mlx-lm").split(".")[:3]))
HOST_HAS_THE_TYPE = HOST >= (0, 28, 3)  # by itself, before this package


# MLX keeps what it compiles for the CPU in the folder for temporary files. Of two processes that compile the same at a
# time, one may load half a file ("file too short"): so each worker of pytest-xdist, and its commands, have their own.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    temporary = Path(tempfile.gettempdir(), f"mlx-lm-qwen3vlmoe-{os.getuid()}-{worker}")
    temporary.mkdir(exist_ok=True)
    os.environ["TMPDIR"] = str(temporary)

quick = False  # for `make test`, which leaves thorough tests out: set before any test is collected


def examples(number: int) -> int:
    """How many examples hypothesis draws."""
    return number // 16 if quick else number


def thorough(*values: object) -> list:
    """Parameters that `make test` leaves out, as the others cover their feature."""
    return [pytest.param(value, marks=pytest.mark.thorough) for value in values]
