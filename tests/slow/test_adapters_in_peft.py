"""Every adapter of the tests, as this package writes it for PEFT, in the real one with the whole model."""

from __future__ import annotations

import json
import subprocess
import venv
from pathlib import Path

import pytest
from support import ROOT
from support.adapters import ADAPTERS, BASE, PEFT, TRAINED
from support.commands import CLEAN

from mlx_lm_qwen3vlmoe.adapters import convert

LOAD = """
import json, sys, warnings
from pathlib import Path
from base import base
from peft import PeftModel
from safetensors.torch import load_file
from torch_common import logits_and_margin

warnings.filterwarnings("error", message="(?i).*(missing|unexpected).*keys")
for folder, golden in json.loads(sys.stdin.read()):
    model, ids = base()
    model = PeftModel.from_pretrained(model, folder).merge_and_unload().eval()
    print((logits_and_margin(model, ids)[0] - load_file(golden)["logits"]).abs().max().item())
"""
NOT_IN_5 = "dora_transformers4"  # DoRA of the router, which is a parameter there


@pytest.fixture(scope="module")
def torch(tmp_path_factory) -> Path:
    """The Python of an environment with PEFT, and without MLX."""
    path = tmp_path_factory.mktemp("torch") / "environment"
    venv.create(path, with_pip=True, symlinks=True)
    packages = ("torch==2.13.0", "transformers==5.23.0", "peft==0.21.2")
    subprocess.run([path / "bin" / "python", "-m", "pip", "install", "-q", *packages], check=True, timeout=1800)
    return path / "bin" / "python"


def test_real_peft_loads_every_adapter_and_gives_the_same_logits(torch, tmp_path):
    """Those of PEFT there and back, and those that mlx_lm.lora trained."""
    names = [name for name in (*PEFT, *TRAINED) if name != NOT_IN_5]
    for name in names:
        source = ADAPTERS / name / "mlx"
        if name in PEFT:
            source = tmp_path / "there" / name
            convert(str(ADAPTERS / name), str(source), str(BASE))
        convert(str(source), str(tmp_path / "back" / name), str(BASE))
    pairs = [[str(tmp_path / "back" / name), str(ADAPTERS / name / "golden.safetensors")] for name in names]
    done = subprocess.run(
        [torch, "-c", LOAD],
        input=json.dumps(pairs),
        env=CLEAN | {"PYTHONPATH": str(ROOT / "tests" / "adapters" / "make")},
        check=True,
        capture_output=True,
        text=True,
        timeout=900,
    )
    errors = dict(zip(names, map(float, done.stdout.split()), strict=True))
    assert max(errors.values()) < 1e-4, errors
