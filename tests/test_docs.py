"""What README.md, SECURITY.md and docs say, tried out: commands in their order, links, and the messages they quote.

Commands run as they stand, in a folder where the names that they use are the tiny model and what earlier ones wrote.
Those that take long are run by slow/test_docs_slow.py.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from functools import cache
from pathlib import Path

import mlx
import mlx.core as mx
import mlx_lm
import pytest
from conftest import CLEAN, LIMIT, ROOT, TINY, run, thinking_model, thorough
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

import mlx_lm_qwen3vlmoe
from mlx_lm_qwen3vlmoe import quantization
from mlx_lm_qwen3vlmoe.layouts.experts import LAYOUTS
from mlx_lm_qwen3vlmoe.runtime import backend

BIN = Path(sys.executable).parent
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
    ".venv/bin/python benchmarks/run.py ": "Makefile",  # make bench runs it with other options
    "mlx.distributed_config ": "docs/distributed.md",  # needs two real Macs
    "mlx_vlm.generate --model tuned ": "tests/slow/test_restore_slow.py",  # needs mlx-vlm
    'python -c "import mlx_lm.models.example_llama': "tests/test_plugins.py",
    'MLX_LM_PLUGINS=0 python -c "import mlx_lm.models.example_llama': "tests/test_plugins.py",
}
PYTHON_LISTED = {
    "plugins.md": "tests/test_plugins.py",
    "serving.md": "tests/test_serving.py",
    "fine-tuning.md": "tests/slow/test_restore_slow.py",
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


# --- what is in the documents ---------------------------------------------------------------------------------------


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


# --- the commands ---------------------------------------------------------------------------------------------------


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
    done = run("bash", "-c", f"set -eu\n{definitions}\n{text}", **options)
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
    with (folder / "server.log").open("w+") as log:
        server = subprocess.Popen(
            ["bash", "-c", f"exec {command} --port {port}"],
            cwd=folder,
            env=CLEAN | settings(folder),
            stdout=log,
            stderr=log,
        )
        try:
            answer = ask(port, lambda: server.poll() is None)
        finally:
            server.terminate()
            server.wait(LIMIT)
    assert answer
    return answer


RUN = [name for name in DOCUMENTS if any(not is_slow(name, text) for _, text in steps(name))]


LONG = [
    "README.md",
    "fine-tuning.md",
    "adapters.md",
]  # they train, as do test_commands.py and test_adapters_commands.py


@pytest.mark.parametrize("document", [name for name in RUN if name not in LONG] + thorough(*LONG))
def test_the_commands_of_a_document_run_in_its_order(document, tmp_path, tiny_questions):
    folder = folder_for(tmp_path / "folder", tiny_questions)
    if document == "commands.md":  # its commands are slow, and its Python is not
        assert {language for language, text in steps(document) if not is_slow(document, text)} == {"python"}
    for language, text in steps(document):
        if not is_slow(document, text) and not is_definition(text):
            run_step(language, text, folder, tiny_questions)


@pytest.mark.parametrize("beginning", LISTED)
def test_a_listed_command_is_in_a_document_and_done_elsewhere(beginning):
    found = [
        text
        for name in DOCUMENTS
        for language, block in blocks(name)
        if language == "shell"
        for text in commands(block)
    ]
    assert any(text.startswith(beginning) for text in found)
    assert (ROOT / LISTED[beginning]).exists()


def test_no_block_of_commands_goes_by_another_name():
    """A block in a language that is not run is none that a reader would run."""
    languages = {language for name in DOCUMENTS for language, _ in blocks(name)}
    assert languages <= {"shell", "python", "toml", "json", "text"}
    fences = {name: len(re.findall(r"(?m)^ *```", file.read_text())) for name, file in DOCUMENTS.items()}
    assert fences == {name: 2 * len(blocks(name)) for name in DOCUMENTS}  # none without a language


def test_the_report_in_the_document_is_what_inspect_prints(tmp_path, tiny_questions):
    folder = folder_for(tmp_path / "folder", tiny_questions)
    shown = blocks("checkpoints.md")
    assert [language for language, _ in shown[:2]] == ["shell", "text"]
    (command,) = commands(shown[0][1])
    printed = run_step("shell", command, folder, tiny_questions)
    shown_here, printed = (re.sub(r"(?<=this machine has )[\d.]+", "…", text) for text in (shown[1][1], printed))
    assert printed == shown_here


# --- links ----------------------------------------------------------------------------------------------------------


def anchors(file: Path) -> set[str]:
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r"(?m)^#+ (.*)$", re.sub(r"(?ms)^```.*?^```$", "", file.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_relative_link_leads_somewhere(document):
    file = DOCUMENTS[document]
    for target in re.findall(r"\]\(([^)\s]+)\)", file.read_text()):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (file.parent / path).resolve() if path else file
        if path.endswith("benchmarks.svg"):  # written by `make bench`
            continue
        assert linked.exists(), target
        assert linked.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_and_tests_that_are_named_exist(document):
    text = DOCUMENTS[document].read_text()
    for path in re.findall(r"`((?:tests|docs|examples|benchmarks)/[\w./-]+)`", text):
        assert (ROOT / path).exists() or path.startswith("benchmarks/results"), path


# --- messages -------------------------------------------------------------------------------------------------------

TROUBLES = DOCUMENTS["troubleshooting.md"].read_text()
ERRORS = {"CheckpointError", "MissingTensorError", "HostError", "PluginError"}
REAL = {  # messages that no single text in a source holds: they are brought about below
    "ModelArgs.__init__() missing 1 required positional argument: 'tie_word_embeddings'",
    "invalid data offsets … exceeding the size of the file. Perhaps an incomplete download or corrupt file?",
    "[GatherMM::eval] Currently only supports float32.",
    "[safetensor] unsupported dtype F64",
    "'types.SimpleNamespace' object has no attribute 'num_layers'",
}


def normalized(text: str) -> str:
    """A message with one … for whatever is filled in."""
    text = re.sub(r"%\.?\d*[a-z]", "…", re.sub(r"\s+", " ", text))
    return re.sub(r"…(?:[.= ]?…)+", "…", text).strip("… ")


def template(node: ast.AST) -> str | None:
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


@cache
def templates(files: tuple[Path, ...]) -> list[str]:
    """Every text in these sources that a message can be made of."""
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    return [normalized(text) for node in nodes if (text := template(node))]


OURS = tuple(sorted(Path(mlx_lm_qwen3vlmoe.__file__).parent.rglob("*.py")))
HOSTS = (
    *sorted(Path(next(iter(mlx_lm.__path__))).glob("*.py")),
    *sorted(Path(next(iter(mlx.__path__))).glob("nn/layers/base.py")),
)
HEADINGS = dict(re.findall(r"(?m)^### `(.+)`\n\n(.+)$", TROUBLES))
ELSEWHERE = re.findall(r"(?m)^\| `([^`|]+ [^`|]+)` \|", TROUBLES)  # the reasons that doctor gives


def is_the_hosts(message: str) -> bool:
    return HEADINGS.get(message, "").startswith(("From mlx-lm", "From `mlx_lm", "From MLX"))


def test_every_heading_that_quotes_a_message_was_read():
    assert len(HEADINGS) == TROUBLES.count("\n### ")
    assert len(HEADINGS) > 30
    assert len(ELSEWHERE) >= 5


@pytest.mark.parametrize("message", [m for m in [*HEADINGS, *ELSEWHERE] if not is_the_hosts(m)])
def test_a_message_of_this_package_is_in_its_sources(message):
    assert any(normalized(message) in text for text in templates(OURS))


@pytest.mark.parametrize("message", [m for m in HEADINGS if is_the_hosts(m) and m not in REAL])
def test_a_message_of_the_host_is_in_its_sources(message):
    texts = templates(HOSTS)
    assert any(normalized(message.replace("qwen3_vl_moe", "…")) in text for text in texts)


def test_every_error_of_this_package_has_an_entry():
    quoted = [normalized(message) for message in HEADINGS]
    calls = [node for file in OURS for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    raised = [node.args[0] for node in calls if isinstance(node.func, ast.Name) and node.func.id in ERRORS]
    texts = [normalized(template(message) or "") for message in raised]
    assert [text for text in texts if not any(quote in text for quote in quoted)] == []


def test_the_table_of_formats_is_that_of_the_code():
    """Each family of `quantization` has its rows, in order."""
    text = DOCUMENTS["checkpoints.md"].read_text().partition("| format | recognized by |")[2]
    found = re.findall(r"(?m)^\| (.+?) \|$", text.partition("\n\n")[0])
    assert found == [row for family in quantization.FAMILIES for row in family.formats]


def test_the_table_of_layouts_is_that_of_the_code():
    """By the names that `inspect` prints."""
    text = DOCUMENTS["checkpoints.md"].read_text().partition("| `inspect` says | tensors |")[2]
    found = re.findall(r"(?m)^\| (.+?) \| (.+?) \| .+? \| .+? \|$", text.partition("\n\n")[0])
    assert [tuple(row) for row in found] == list(LAYOUTS)


def test_without_the_plug_in_an_official_config_gives_the_message():
    if not (Path(next(iter(mlx_lm.__path__))) / "models" / "qwen3_vl_moe.py").exists():
        pytest.skip("this mlx-lm has no such type of its own")
    code = f"from pathlib import Path; from mlx_lm.utils import load_model; load_model(Path({str(TINY)!r}))"
    error = run(sys.executable, "-c", code, check=False, env={"MLX_LM_PLUGINS": "0"}).stderr
    (message,) = [m for m in REAL if m.startswith("ModelArgs")]
    assert message in HEADINGS
    assert message in error


def test_a_truncated_file_gives_the_message(tmp_path):
    shutil.copytree(TINY, tmp_path / "cut")
    with (tmp_path / "cut" / "model.safetensors").open("r+b") as file:
        file.truncate(1_000_000)
    (message,) = [m for m in REAL if m.startswith("invalid")]
    assert message in HEADINGS
    with pytest.raises(RuntimeError, match=re.escape(message).replace("…", ".*")):
        load_model(tmp_path / "cut")


def test_an_adapter_of_peft_given_to_the_host_gives_the_message():
    adapter = ROOT / "tests" / "adapters" / "fixtures" / "tiny_answer"
    (message,) = [m for m in REAL if "num_layers" in m]
    assert message in HEADINGS
    with pytest.raises(AttributeError, match=re.escape(message)):
        load_adapters(load_model(TINY, lazy=True)[0], str(adapter))


def test_a_tensor_in_64_bits_gives_the_message(tmp_path):
    header = b'{"x":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    (message,) = [m for m in REAL if "F64" in m]
    assert message in HEADINGS
    with pytest.raises(RuntimeError, match=re.escape(message)):
        mx.load(str(tmp_path / "model.safetensors"))


def test_experts_in_16_bits_on_the_cpu_give_the_message():
    if mx.default_device() != mx.cpu:
        pytest.skip("this is about the CPU")
    with backend.planned(mx.Device(mx.gpu)):
        model, _ = load_model(TINY)
    (message,) = [m for m in REAL if "GatherMM" in m]
    assert message in HEADINGS
    with pytest.raises(RuntimeError, match=re.escape(message)):
        mx.eval(model(mx.array([[1, 2]])))
