"""Several ranks on this machine, as `mlx.launch` starts them."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.utils import load_config

from . import BIN, LIMIT, TINY
from .checkpoints import float32_config
from .commands import CLEAN

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja")


def free_port(ranks: int) -> int:
    """The first of as many free ports, below those that systems give to clients."""
    while True:
        first = random.randrange(20000, 32000)
        try:
            for port in range(first, first + ranks):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first


class Launch:
    """A running `mlx.launch` and the files that its outputs go to."""

    def __init__(self, process: subprocess.Popen, outputs: tuple[Path, Path]):
        self.process = process
        self.outputs = outputs

    @property
    def stdout(self) -> str:
        return self.outputs[0].read_text()

    @property
    def stderr(self) -> str:
        return self.outputs[1].read_text()

    def types(self, text: str) -> None:
        """Give all ranks an input."""
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def reaches(self, what: str, happened: Callable[[], bool], seconds: float = LIMIT) -> None:
        """Wait until something has happened."""
        end = time.monotonic() + seconds
        while not happened():
            assert self.process.poll() is None, f"{self.stdout}\n{self.stderr}"
            assert time.monotonic() < end, f"not within {seconds} s: {what}\n{self.stdout}\n{self.stderr}"
            time.sleep(0.05)

    def ends(self, seconds: float = LIMIT) -> str:
        """Wait for the end of all ranks; returns what is on stderr."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds} s\n{self.stdout}\n{self.stderr}")
        return self.stderr

    def leaves_nothing(self) -> bool:
        """Whether no process remains of the launcher and its ranks, which are one process group."""
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return True
        return False


@contextmanager
def launched(folder: Path, ranks: int, *command: object, text: str | None = None):
    """Start a command on ranks of this machine, with a text as the input of all; kills what remains in the end."""
    folder.mkdir(exist_ok=True)
    outputs = folder / "stdout", folder / "stderr"
    options = ["-n", ranks, "--backend", "ring", "--starting-port", free_port(ranks)]
    with outputs[0].open("wb") as stdout, outputs[1].open("wb") as stderr:
        process = subprocess.Popen(
            list(map(str, [BIN / "mlx.launch", *options, "--", *command])),
            stdin=subprocess.PIPE,  # left open: at the end of its input, the launcher never sleeps
            stdout=stdout,
            stderr=stderr,
            env=CLEAN | {"TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    launch = Launch(process, outputs)
    try:
        # The launcher never sleeps either while a rank would take input: one that reads none gets its pipe filled.
        launch.types("\n" * 200_000 if text is None else text)
        yield launch
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdin.close()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def indexed(source: Path, folder: Path, in_float32: bool = False) -> Path:
    """A checkpoint with what the host's `sharded_load` opens: an index and a tokenizer. The tensors are links.

    What is decoded becomes float32, if asked for.
    """
    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    for file in source.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    for name in TOKENIZER:
        if not (folder / name).exists():
            (folder / name).symlink_to(TINY / name)
    if in_float32:
        config = load_config(source) | float32_config(source)
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(config))
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(folder.glob("model*.safetensors"))
        weight_map = {tensor: file.name for file in files for tensor in mx.load(str(file))}
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
