"""Commands in children of one process that has imported transformers already, which is most of what a start costs.

A child does what Python does at a start: it takes the variables, the folder and the virtual environment of its command,
and runs the start-up files there. Of this package, mlx and mlx_lm, nothing is imported before. ``pytest --fresh`` gives
every command an interpreter of its own instead.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

FIXED = ("HF_", "TRANSFORMERS_", "PYTHON")  # variables that are read while modules are imported, or Python starts


class Warm:
    """The process, which starts with the first command and ends with the tests."""

    def __init__(self, variables: dict[str, str]):
        self.variables = variables
        self.off = sys.platform != "linux"  # elsewhere, what has threads should not fork
        self.address: str | None = None
        self.process: subprocess.Popen | None = None

    def serves(self, command: list[str], variables: dict[str, str]) -> bool:
        """Whether a command is one of Python's that needs nothing that is settled before it is asked for."""
        return not self.off and _fixed(variables) == _fixed(self.variables) and _task(command) is not None

    def start(
        self, command: list[str], env: dict[str, str], stdin: Any, stdout: Any, stderr: Any, cwd: Any = None
    ) -> Child:
        """As `subprocess.Popen`, with files for the streams."""
        if self.process is None:
            self.address = tempfile.mkdtemp(prefix="warm-") + "/socket"
            self.process = subprocess.Popen(
                [sys.executable, __file__, self.address],
                stdin=subprocess.PIPE,  # which ends when this process does
                stdout=subprocess.PIPE,
                env=self.variables,
            )
            self.process.stdout.readline()
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.address)
        with tempfile.TemporaryFile() as work:
            work.write(json.dumps([*_task(command), env, str(cwd or Path.cwd())]).encode())
            work.seek(0)
            socket.send_fds(connection, [b"."], [file.fileno() for file in (work, stdin, stdout, stderr)])
            return Child(command, connection)


class Child:
    """A running command, with what tests use of `subprocess.Popen`."""

    def __init__(self, command: list[str], connection: socket.socket):
        self.command, self.connection = command, connection
        self.pid = int(connection.recv(32))
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.connection.settimeout(timeout)
            try:
                self.returncode = os.waitstatus_to_exitcode(int(self.connection.recv(32)))
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.command, timeout) from None
            self.connection.close()
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def _fixed(variables: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name.startswith(FIXED) and name != "PYTHONPATH"}


def _task(command: list[str]) -> tuple[str, list[str]] | None:
    """The Python of a virtual environment that runs a command, and code, a module or a script; None for all others."""
    first, *others = command
    home = Path(first).parent.parent
    if not (home / "pyvenv.cfg").exists() or not (home == Path(sys.prefix) or (home / "shared").exists()):
        return None  # another environment may have another transformers; `Environment` links to the one here
    if Path(first).name.startswith("python"):
        runs = others and (not others[0].startswith("-") or others[0] in ("-c", "-m"))
        return (first, others) if runs else None
    with Path(first).open("rb") as script:
        line = script.readline()
    return (line[2:].decode().strip(), command) if line.startswith(b"#!") and b"python" in line else None


# --- in that process ------------------------------------------------------------------------------------------------


def _fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: numpy's, which have nothing to do yet
        return os.fork()


def _serve(address: str) -> tuple[str, list[str], dict[str, str], str]:
    """Fork for each request; returns in the child, with what it is to do."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    os.write(1, b"ready\n")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those that wait for a child, below, are waited for by nobody
    while True:
        ready, _, _ = select.select([listening, 0], [], [])
        if 0 in ready:
            shutil.rmtree(Path(address).parent)
            os._exit(0)
        connection, _ = listening.accept()
        if _fork():
            connection.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        listening.close()
        _, files, _, _ = socket.recv_fds(connection, 1, 4)
        if child := _fork():
            for file in (*files, 0, 1, 2):
                os.close(file)
            connection.send(str(child).encode())
            _, status = os.waitpid(child, 0)
            with contextlib.suppress(OSError):
                connection.send(str(status).encode())
            os._exit(0)
        connection.close()
        with open(files[0], "rb") as work:
            task = json.load(work)
        for stream, file in enumerate(files[1:]):
            os.dup2(file, stream)
            os.close(file)
        return tuple(task)


def _enter(python: str, variables: dict[str, str], folder: str, first: str) -> None:
    """Make this the Python of an environment, as after its start."""
    import sysconfig

    library = sysconfig.get_path("stdlib")
    standard = [path for path in sys.path if path == library or path.startswith(f"{library}/lib-")]
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("mlx_lm")]
    for name in [name for name in sys.modules if name.startswith(("mlx_lm", "sitecustomize", "site", "sysconfig"))]:
        del sys.modules[name]
    sys.executable = python
    sys.prefix = sys.exec_prefix = str(Path(python).parents[1])
    sys.path[:] = [*filter(None, variables.get("PYTHONPATH", "").split(":")), *standard]
    sys.path_importer_cache.clear()
    import site

    site.main()
    sys.path.insert(0, first)


def _main() -> None:
    import gc
    import runpy
    from types import ModuleType

    import huggingface_hub.hf_api  # noqa: F401
    import jinja2  # noqa: F401
    import tqdm  # noqa: F401
    import yaml  # noqa: F401
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

    gc.freeze()
    python, arguments, variables, folder = _serve(sys.argv[1])
    if arguments[0] == "-c":
        _enter(python, variables, folder, "")
        sys.argv = ["-c", *arguments[2:]]
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(arguments[1], "<string>", "exec"), vars(main))
    elif arguments[0] == "-m":
        _enter(python, variables, folder, folder)
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        _enter(python, variables, folder, str(Path(folder, arguments[0]).parent))
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    _main()
