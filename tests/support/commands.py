"""Commands as a user types them, and what comes of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from . import BIN, HOST, HOST_HAS_THE_TYPE, LIMIT
from .warm import Warm

# No test goes to a hub, and none sees the developer's own setting.
CLEAN = {name: value for name, value in os.environ.items() if name not in ("MLX_LM_PLUGINS", "PYTHONPATH")}
CLEAN |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
WARM = Warm(CLEAN)


def started(*command: object, env: dict[str, str] | None = None, fresh: bool = False, **options):
    """A running command, as of `subprocess.Popen`, with files for its streams."""
    line, variables = list(map(str, command)), CLEAN | (env or {})
    start = subprocess.Popen if fresh or not WARM.serves(line, variables) else WARM.start
    return start(line, env=variables, **options)


def run(*command: object, check: bool = True, timeout: float = LIMIT, **options) -> subprocess.CompletedProcess:
    """Run a command to its end, with both outputs captured; a failure shows them.

    Options: ``input``, a text; ``env``, variables beside the usual ones; ``cwd``; and ``fresh``, for a test that is
    about the start of Python itself.
    """
    with (
        tempfile.TemporaryFile("w+") as stdin,
        tempfile.TemporaryFile("w+") as stdout,
        tempfile.TemporaryFile("w+") as stderr,
    ):
        stdin.write(options.pop("input", ""))
        stdin.seek(0)
        process = started(*command, stdin=stdin, stdout=stdout, stderr=stderr, **options)
        try:
            process.wait(timeout)
        except BaseException:
            process.kill()
            process.wait()
            raise
        for stream in (stdout, stderr):
            stream.seek(0)
        done = subprocess.CompletedProcess(command, process.returncode, stdout.read(), stderr.read())
    assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


UNCHANGED = {"MLX_LM_PLUGINS": "0"}


def mlx_lm(command: str, *arguments: object, **options) -> str:
    done = run(BIN / f"mlx_lm.{command}", *arguments, **options)
    assert "Traceback" not in done.stderr
    return done.stdout


def answer(model: Path, question: str, *arguments: object, **options) -> str:
    """What `mlx_lm.generate` says, without its frame and figures."""
    output = mlx_lm(
        "generate", "--model", model, "--prompt", question, "--temp", 0, "--max-tokens", 64, *arguments, **options
    )
    return output.split("==========")[1].strip()


LOGITS = """
import json, sys, mlx.core as mx
from mlx_lm import load
model, tokenizer = load(sys.argv[1], lazy=True)
model.set_dtype(mx.float32)
ids = mx.array([tokenizer.encode("What is a mixture of experts?")])
mx.save_safetensors(sys.argv[2], {"logits": model(ids).astype(mx.float32)})
print(type(model).__module__)
"""


def logits(model: Path, tmp_path: Path, who: str, **options) -> mx.array:
    out = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
    assert run(sys.executable, "-c", LOGITS, model, out, **options).stdout.strip().startswith(who)
    return mx.load(str(out))["logits"]


def assert_same_in_unchanged_host(model: Path, tmp_path: Path) -> None:
    if not HOST_HAS_THE_TYPE:
        return
    ours = logits(model, tmp_path, "mlx_lm_qwen3vlmoe.")
    theirs = logits(model, tmp_path, "mlx_lm.models.", env=UNCHANGED)
    assert (mx.abs(ours - theirs).max() / mx.abs(ours).max()).item() < 1e-5


@contextmanager
def serving(
    model: Path,
    log: Path,
    *arguments: str,
    command: tuple[object, ...] = (BIN / "mlx_lm.server",),
    env: dict[str, str] | None = None,
):
    """An `mlx_lm.server` on a free port, as the base URL of its API."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ("--model", model, "--port", port, "--temp", 0, "--max-tokens", 64, *arguments)
    with log.open("w") as out, Path(os.devnull).open() as empty:
        server = started(*command, *options, stdin=empty, stdout=out, stderr=out, env=env)
        try:
            for _ in range(10 * LIMIT):
                assert server.poll() is None, log.read_text()
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait(LIMIT)


def ended(text: str) -> str:
    """The servers of mlx-lm before 0.30 leave the end token in what they answer, for any model."""
    return text.removesuffix("<|im_end|>") if HOST < (0, 30) else text


def write_chats(path: Path, pairs: list[dict[str, str]]) -> Path:
    """A data set of chats as `mlx_lm.lora` and `mlx_lm.dwq` read it."""
    path.mkdir()
    chats = [
        [{"role": "user", "content": pair["question"]}, {"role": "assistant", "content": pair["answer"]}]
        for pair in pairs
    ]
    for name in ("train", "valid", "test"):
        (path / f"{name}.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return path
