"""What is left of a conversion that is out of disk, and what the next one writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support import LIMIT, TINY
from support.commands import CLEAN

CONVERT = """
import resource, runpy, sys
size = int(sys.argv.pop(1))
if size:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
runpy.run_module("mlx_lm", run_name="__main__", alter_sys=True)
"""


def convert(target: Path, most: int = 0) -> subprocess.CompletedProcess:
    """`mlx_lm.convert -q`, where no file can have more than so many bytes: the error is that of a full disk."""
    command = ("convert", "--hf-path", TINY, "--mlx-path", target, "-q", "--q-group-size", 32)
    command = [sys.executable, "-c", CONVERT, most, *command]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=CLEAN, timeout=LIMIT)


def test_out_of_disk_is_the_hosts_error_and_leaves_nothing_that_looks_finished(tmp_path):
    done = convert(tmp_path / "out", 300_000)
    assert done.returncode == 1
    assert "Unable to write" in done.stderr
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert not left & {"config.json", "model.safetensors.index.json", "tokenizer.json"}


def test_the_same_command_writes_the_same_files_again(tmp_path):
    for name in ("one", "two"):
        assert convert(tmp_path / name).returncode == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    assert {"config.json", "model.safetensors"} <= files.keys()
