"""Commands that are stopped while they write, and what they write to."""

from __future__ import annotations

import subprocess
import sys

from .commands import CLEAN, run

HALFWAY = """
import importlib, signal, sys, time
from mlx_lm_qwen3vlmoe import __main__
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever runs the tests may ignore them
signal.signal(signal.SIGHUP, signal.SIG_DFL)
where, name, number, *arguments = sys.argv[1:]
module = importlib.import_module(f"mlx_lm_qwen3vlmoe.{where}")
write = getattr(module, name)
def slowly(*arguments):
    for step, done in enumerate(write(*arguments)):
        if step == int(number):
            print("half", flush=True)
            time.sleep(300)
        yield done
setattr(module, name, slowly)
__main__.main(arguments)
"""
FULL = (
    "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    "from mlx_lm_qwen3vlmoe import __main__\n"
    "__main__.main(sys.argv[1:])"
)


def halfway(writer: str, number: int, *arguments: object) -> subprocess.Popen:
    """A command that waits after so many steps of a function that writes, ``module:name``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HALFWAY, *writer.split(":"), str(number), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=CLEAN,
    )
    assert process.stdout.readline() == "half\n"
    return process


def on_a_full_disk(*arguments: object) -> str:
    """What a command says. The limit on the size of files stands for the disk: the same error of the same call."""
    done = run(sys.executable, "-c", FULL, *arguments, check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    return done.stderr
