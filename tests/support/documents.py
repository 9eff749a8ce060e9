"""What the documents tell a reader to run, and a folder in which it runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from . import BIN, LIMIT, ROOT, TINY
from .checkpoints import thinking_model
from .commands import CLEAN, run, started

DOCUMENTS = {file.name: file for folder in (ROOT, ROOT / "docs") for file in sorted(folder.glob("*.md"))}
QUESTION = "What is this package?"
# What is not run from here, and why: the beginning of a command → who does it.
LISTED = {
    "pip ": "tests/slow/test_install.py",  # needs PyPI, and environments of its own; in plugins.md: test_plugins.py
    "uv ": "tests/slow/test_install.py",
    "pipx ": "tests/slow/test_install.py",
    "make ": ".ci/run",
    "REPOSITORY=": "tests/test_packaging.py",
    "pypi-attestations ": ".github/workflows/release.yml",  # which publishes what this asks PyPI for
    "python -m venv ": "tests/slow/test_releases.py",
    "python make_tiny.py": "tests/test_plugins.py",
    "mlx_lm.generate --model tiny-random": "tests/test_plugins.py",
    "mlx_lm.convert --hf-path tiny-random": "tests/test_plugins.py",
    ".venv/bin/python -m pytest ": "Makefile",  # the tests themselves
    ".venv/bin/python benchmarks/run.py ": "Makefile",  # make bench runs it with other options
    "mlx.distributed_config ": "docs/distributed.md",  # needs two real Macs
    "mlx_vlm.generate --model tuned ": "tests/slow/test_restore_slow.py",  # needs mlx-vlm
    "python llama.cpp/convert_hf_to_gguf.py ": "tests/slow/test_export_slow.py",  # needs llama.cpp and torch
    'python -c "import mlx_lm.models.example_llama': "tests/test_plugins.py",
    'MLX_LM_PLUGINS=0 python -c "import mlx_lm.models.example_llama': "tests/test_plugins.py",
}
PYTHON_LISTED = {
    "plugins.md": "tests/test_plugins.py",
    "serving.md": "tests/test_serving.py",
    "fine-tuning.md": "tests/slow/test_restore_slow.py",
    "other-tools.md": "tests/slow/test_export_slow.py",
}
SLOW = {  # documents, and the beginnings of their commands that slow/test_docs_slow.py runs
    "commands.md": ("mlx_lm.",),
    "distributed.md": ("mlx.launch ", "launch"),
}
# What is added where a command would take long, or take a port that is in use.
SHORTER = {
    "mlx_lm.lora": "--iters 2 --batch-size 1 --num-layers 1 --val-batches 1",
    "mlx_lm.generate": "--max-tokens 12 --temp 0",
    "run generate": "--max-tokens 12 --temp 0",
    "mlx_lm.chat": "--max-tokens 12 --temp 0",
}
LEFT_OUT = f"--model qwen3-vl-30b-4bit --prompt '{QUESTION}'"  # what a … in a command stands for


def blocks(document: str) -> list[tuple[str, str]]:
    """The language and the content of every fenced block, in order."""
    found = re.findall(r"(?ms)^( *)```(\w+)\n(.*?)^\1```$", DOCUMENTS[document].read_text())
    return [(language, re.sub(f"(?m)^{indent}", "", content)) for indent, language, content in found]


def commands(block: str) -> list[str]:
    """The commands of a shell block, without comments; one may go on over lines, in quotes or after a backslash."""
    found, open_command = [], ""
    for line in block.splitlines():
        if not open_command.count('"') % 2:
            line = re.sub(r"(^|\s+)#( .*)?$", "", line)
        open_command += line
        if open_command.endswith("\\") or open_command.count('"') % 2:
            open_command += "\n"
        elif open_command:
            found.append(open_command)
            open_command = ""
    assert not open_command
    return found


def is_slow(document: str, command: str) -> bool:
    return document in SLOW and command.startswith(SLOW[document])


def is_definition(command: str) -> bool:
    """A variable or function for the commands after it."""
    return re.match(r"\w+\(\) *\{|\w+=\S*$", command) is not None


def steps(document: str) -> list[tuple[str, str]]:
    """What is run of a document, in order: its shell commands one by one, and its blocks of Python."""
    found = []
    for language, content in blocks(document):
        if language == "shell":
            found += [(language, command) for command in commands(content)]
        elif language == "python" and document not in PYTHON_LISTED:
            found.append((language, content))
    return [(language, text) for language, text in found if not text.startswith(tuple(LISTED))]


def folder_for(path: Path, questions: list[dict[str, str]]) -> Path:
    """A folder in which the names that documents use for models and data exist."""
    path.mkdir()
    (path / "examples").symlink_to(ROOT / "examples")
    for name in ("Qwen", "mlx-community"):
        (path / name).mkdir()
    for name in ("model", "MODEL", "Qwen/Qwen3-VL-30B-A3B-Instruct", "mlx-community/Qwen3-VL-30B-A3B-Instruct-4bit"):
        (path / name).symlink_to(TINY)
    (path / "peft-adapter").symlink_to(ROOT / "tests" / "adapters" / "fixtures" / "tiny_answer")
    thinking_model(path / "Qwen" / "Qwen3-VL-30B-A3B-Thinking")
    for name in ("data", "my-data"):
        (path / name).mkdir()
        chats = [
            [{"role": "user", "content": pair["question"]}, {"role": "assistant", "content": pair["answer"]}]
            for pair in questions
        ]
        for part in ("train", "valid", "test"):
            text = "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)
            (path / name / f"{part}.jsonl").write_text(text)
    return path


def settings(folder: Path) -> dict[str, str]:
    return {"PATH": f"{BIN}:{CLEAN['PATH']}", "HOME": str(folder)}


def run_step(language: str, text: str, folder: Path, questions: list[dict[str, str]], definitions: str = "") -> str:
    """Run a command or a block of Python; it ends well, or this fails. Returns what it prints."""
    options = {"cwd": folder, "env": settings(folder)}
    if language == "python":
        asked = [pair["question"] for pair in questions]
        return run(sys.executable, "-c", f"questions = {asked!r}\n{text}", **options).stdout
    text = text.replace("…", LEFT_OUT)
    for name, added in SHORTER.items():
        if name in text and added.split()[0] not in text:
            text += f" {added}"
    if "mlx_lm.server" in text:
        return asked_server(text, folder)
    if "mlx_lm.chat" in text:
        options["input"] = f"{QUESTION}\nq\n"
    words = shlex.split(text)
    plain = not definitions and (BIN / words[0]).exists() and not re.search(r"[|<>$;&*~\\]", text)
    line = (BIN / words[0], *words[1:]) if plain else ("bash", "-c", f"set -eu\n{definitions}\n{text}")
    done = run(*line, **options)
    assert "Traceback" not in done.stderr
    return done.stdout


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def ask(port: int, still_runs: Callable[[], bool], seconds: float = LIMIT) -> str:
    """What a server answers, once it listens."""
    end = time.monotonic() + seconds
    while not listens(port):
        assert still_runs()
        assert time.monotonic() < end
        time.sleep(0.1)
    body = json.dumps({"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 12}).encode()
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=seconds) as reply:
        message = json.load(reply)["choices"][0]["message"]
    return message.get("content") or message["reasoning"]


def asked_server(command: str, folder: Path) -> str:
    """Start a server, ask it a question, and stop it."""
    port = free_port()
    words = shlex.split(command)
    line = (BIN / words[0], *words[1:]) if (BIN / words[0]).exists() else ("bash", "-c", f'exec {command} "$@"', "bash")
    with (folder / "server.log").open("w+") as log, Path(os.devnull).open() as empty:
        options = {"cwd": folder, "env": settings(folder), "stdin": empty, "stdout": log, "stderr": log}
        server = started(*line, "--port", port, **options)
        try:
            answer = ask(port, lambda: server.poll() is None)
        finally:
            server.terminate()
            server.wait(LIMIT)
    assert answer
    return answer
