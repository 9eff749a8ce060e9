"""What pytest hands to tests: things that take long to make, once for all of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
import support
from hypothesis import settings
from support import LIMIT, ROOT
from support.commands import CLEAN, WARM
from support.environments import build

settings.register_profile("any machine", deadline=None)  # no test is decided by a clock
settings.load_profile("any machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fresh", action="store_true", help="start every interpreter anew")


def pytest_configure(config: pytest.Config) -> None:
    WARM.off |= config.getoption("--fresh")
    support.quick = "not thorough" in config.getoption("-m")


@pytest.fixture(autouse=True)
def the_same_numbers_in_any_order_of_tests() -> None:
    mx.random.seed(0)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The wheel as a release would build it."""
    return build("wheel", tmp_path_factory.mktemp("wheel"))


UNCHANGED_HOST = """
import json, pathlib, sys, mlx.core as mx
from mlx_lm.utils import load_model
for line in sys.stdin:
    checkpoint, golden = json.loads(line)
    try:
        model, _ = load_model(pathlib.Path(checkpoint), lazy=True)
        assert type(model).__module__ == "mlx_lm.models.qwen3_vl_moe", type(model)
        model.set_dtype(mx.float32)
        golden = mx.load(golden)
        error = mx.abs(model(golden["ids"]) - golden["logits"]).max() / mx.abs(golden["logits"]).max()
        print(json.dumps(error.item()), flush=True)
    except Exception as e:
        print(json.dumps(repr(e)), flush=True)
"""


@pytest.fixture(scope="session")
def error_in_the_unchanged_host():
    """A checkpoint and a golden → the relative error of the logits, in one process without plug-ins for all tests."""
    process = subprocess.Popen(
        [sys.executable, "-c", UNCHANGED_HOST],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=CLEAN | {"MLX_LM_PLUGINS": "0"},
    )

    def error(checkpoint: Path, golden: Path) -> float:
        process.stdin.write(json.dumps([str(checkpoint), str(golden)]) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        assert isinstance(answer, float), answer
        return answer

    yield error
    process.stdin.close()
    assert process.wait(LIMIT) == 0


@pytest.fixture(scope="session")
def tiny_questions() -> list[dict[str, str]]:
    """What the tiny model was trained to answer word for word."""
    return json.loads((ROOT / "examples" / "tiny_questions.json").read_text())
