"""Environments to test the installed package in, and the checkpoints to test it with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

import pytest
from warm import Warm

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
QUANTIZED = ROOT / "tests" / "quantized" / "fixtures"  # by other tools
TINY = ROOT / "examples" / "tiny-qwen3-vl-moe"
OURS = "mlx_lm_qwen3vlmoe.model"  # where a model class lives that this package serves

LIMIT = 300  # seconds that anything may take: no busy machine decides a test


def thorough(*values: object) -> list:
    """Parameters that `make test` leaves out, as the others cover their feature."""
    return [pytest.param(value, marks=pytest.mark.thorough) for value in values]


# No test goes to a hub, and none sees the developer's own setting.
CLEAN = {name: value for name, value in os.environ.items() if name not in ("MLX_LM_PLUGINS", "PYTHONPATH")}
CLEAN |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


WARM = Warm(CLEAN)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fresh", action="store_true", help="start every interpreter anew")


def pytest_configure(config: pytest.Config) -> None:
    WARM.off |= config.getoption("--fresh")


def run(*command: object, check: bool = True, timeout: float = LIMIT, **options) -> subprocess.CompletedProcess:
    """Run a command to its end, with both outputs captured; a failure shows them.

    Options: ``input``, a text; ``env``, variables beside the usual ones; ``cwd``; and ``fresh``, for a test that is
    about the start of Python itself.
    """
    line, variables = list(map(str, command)), CLEAN | options.pop("env", {})
    fresh = options.pop("fresh", False) or not WARM.serves(line, variables)
    start = subprocess.Popen if fresh else WARM.start
    with (
        tempfile.TemporaryFile("w+") as stdin,
        tempfile.TemporaryFile("w+") as stdout,
        tempfile.TemporaryFile("w+") as stderr,
    ):
        stdin.write(options.pop("input", ""))
        stdin.seek(0)
        process = start(line, env=variables, stdin=stdin, stdout=stdout, stderr=stderr, **options)
        try:
            process.wait(timeout)
        except BaseException:
            process.kill()
            process.wait()
            raise
        for stream in (stdout, stderr):
            stream.seek(0)
        done = subprocess.CompletedProcess(line, process.returncode, stdout.read(), stderr.read())
    assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def float32_config(checkpoint: Path) -> dict[str, object]:
    """What `load_model` takes as ``model_config``, to decode what becomes float to float32, as the goldens are.

    A checkpoint of 16 bits would otherwise be decoded to these.
    """
    text = json.loads((checkpoint / "config.json").read_text()).get("text_config")
    return {"dtype": "float32"} | ({"text_config": text | {"dtype": "float32"}} if isinstance(text, dict) else {})


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


def thinking_model(path: Path) -> Path:
    """The tiny model as a Thinking checkpoint: its chat template begins every answer with a thought."""
    path.mkdir(parents=True)
    for file in TINY.iterdir():
        (path / file.name).symlink_to(file)
    template = path / "chat_template.jinja"
    text = template.read_text()
    template.unlink()
    assert text.count("default(false)") == 1
    template.write_text(text.replace("default(false)", "default(true)"))
    return path


@pytest.fixture(scope="session")
def tiny_questions() -> list[dict[str, str]]:
    """What the tiny model was trained to answer word for word."""
    return json.loads((ROOT / "examples" / "tiny_questions.json").read_text())
