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
# How each command in the documents is checked. One that is in neither table is run as it is printed: here in the order
# of its document or, if it is in SLOW, by slow/test_docs_slow.py.
# 1. Done by another file: the beginning of a command → who does it.
LISTED = {
    "pip ": "tests/slow/test_install.py",  # needs PyPI, and environments of its own; in plugins.md: test_plugins.py
    "uv ": "tests/slow/test_install.py",
    "pipx ": "tests/slow/test_install.py",
    "make ": ".ci/run",
    "REPOSITORY=": "tests/test_packaging.py",
    "pypi-attestations ": ".github/workflows/release.yml",  # which publishes what this asks PyPI for
    "python make_tiny.py": "tests/test_plugins.py",
    "mlx_lm.generate --model tiny-random": "tests/test_plugins.py",
    "mlx_lm.convert --hf-path tiny-random": "tests/test_plugins.py",
    "mlx_vlm.generate --model tuned ": "tests/slow/test_restore_slow.py",  # needs mlx-vlm
    "python llama.cpp/convert_hf_to_gguf.py ": "tests/slow/test_export_slow.py",  # needs llama.cpp and torch
    'python -c "import mlx_lm.models.example_llama': "tests/test_plugins.py",
    'MLX_LM_PLUGINS=0 python -c "import mlx_lm.models.example_llama': "tests/test_plugins.py",
}
# 2. Not run as printed: only its options are looked up in the --help of its program. Document and program → why.
PARSED = {
    ("README.md", "mlx_lm.lora"): "its defaults train 16 layers 1000 times; fine-tuning.md has commands that run",
    ("README.md", "mlx_lm.fuse"): "needs what the commands before it would have written",
    ("CONTRIBUTING.md", ".venv/bin/python -m pytest"): "these are the tests themselves",
    ("benchmarks.md", ".venv/bin/python benchmarks/run.py"): "takes long; `make bench` runs it with other options",
    ("distributed.md", "mlx.distributed_config"): "needs two Macs",
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
# The names of models and paths that are replaced. Nothing else of a command is changed or added, but that a server gets
# a free port, and that the launches in distributed.md get the folder, port and address of this machine.
NAMES = {
    **dict.fromkeys(("model", "MODEL", "Qwen/Qwen3-VL-30B-A3B-Instruct"), TINY),
    "mlx-community/Qwen3-VL-30B-A3B-Instruct-4bit": TINY,
    "peft-adapter": ROOT / "tests" / "adapters" / "fixtures" / "tiny_answer",
    "examples": ROOT / "examples",
}
THINKING = "Qwen/Qwen3-VL-30B-A3B-Thinking"
DATA = ("data", "my-data")  # folders of chats
LEFT_OUT = f"--model converted --prompt '{QUESTION}'"  # what a … in a command stands for; mlx-lm alone loads it, too


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


def is_listed(command: str) -> bool:
    return command.startswith(tuple(LISTED))


def parsed_by(document: str, command: str) -> str | None:
    """The program of a command that is not run as it is printed."""
    words = " ".join(command.split())
    return next((program for name, program in PARSED if name == document and words.startswith(f"{program} ")), None)


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
    return [(language, text) for language, text in found if not is_listed(text) and not parsed_by(document, text)]


def folder_for(path: Path, questions: list[dict[str, str]]) -> Path:
    """A folder in which the names that documents use for models and data exist."""
    path.mkdir()
    for name, target in NAMES.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).symlink_to(target)
    thinking_model(path / THINKING)
    for name in DATA:
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
    if "…" in text and not (folder / "converted").exists():
        run(BIN / "mlx_lm.convert", "--hf-path", TINY, "--mlx-path", folder / "converted", "-q")
    text = text.replace("…", LEFT_OUT)
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
