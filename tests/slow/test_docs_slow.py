"""The commands of docs that take long: all of docs/commands.md, and two ranks for docs/distributed.md."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

import pytest
from support import BIN, ROOT, TINY
from support.commands import run
from support.documents import DOCUMENTS, QUESTION, SLOW, ask, folder_for, is_definition, is_slow, run_step, steps
from support.ranks import free_port, indexed, launched

KEYS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.switch_mlp.down_proj")


@pytest.fixture
def folder(tmp_path, tiny_questions) -> Path:
    """What the names in docs/commands.md stand for, and the calibration text that the host would download."""
    folder = folder_for(tmp_path / "folder", tiny_questions)
    (folder / "layers.yaml").write_text(
        f"lora_parameters: {{rank: 8, scale: 20.0, dropout: 0.0, keys: [{', '.join(KEYS)}]}}\n"
    )
    cache = folder / ".cache" / "mlx-lm"
    cache.mkdir(parents=True)
    (cache / "calibration_v5.txt").write_text("\n".join(pair["answer"] for pair in tiny_questions) * 3)
    return folder


def test_every_slow_document_exists_and_has_such_commands():
    for document in SLOW:
        assert any(is_slow(document, text) for _, text in steps(document))
    assert SLOW.keys() <= DOCUMENTS.keys()


def test_the_commands_of_commands_run_in_their_order(folder, tiny_questions):
    run(BIN / "mlx_lm.convert", "--hf-path", TINY, "--mlx-path", folder / "draft", "-q")
    for language, text in steps("commands.md"):
        if is_slow("commands.md", text):
            run_step(language, text, folder, tiny_questions)


# The two Macs are two processes here. The rest of a command is as in the document.
LAUNCHES = [text for _, text in steps("distributed.md") if is_slow("distributed.md", text) and not is_definition(text)]


def test_the_launches_are_those_that_are_known():
    """And the function of the document calls what is called here."""
    defined = {text for _, text in steps("distributed.md") if is_definition(text)}
    assert any(text.startswith("launch() { mlx.launch --hostfile hosts.json --backend ring -- ") for text in defined)
    assert any(text.startswith("MODEL=/Users/me/") for text in defined)
    programs = [next(word for word in shlex.split(text) if word.startswith("mlx_lm.")) for text in LAUNCHES]
    assert sorted(programs) == ["mlx_lm.benchmark", "mlx_lm.chat", "mlx_lm.chat", "mlx_lm.server"]


@pytest.mark.parametrize("text", LAUNCHES)
def test_a_launch_of_the_document_runs_on_two_ranks_of_this_machine(text, tmp_path):
    model = indexed(TINY, tmp_path / "model")
    words = shlex.split(text.replace("$MODEL", str(model)))
    program, *arguments = words[next(n for n, word in enumerate(words) if word.startswith("mlx_lm.")) :]
    arguments = [str(ROOT / word) if word.startswith("examples/") else word for word in arguments]
    port = free_port(1)
    arguments = [str(port) if word == "8080" else word.replace("0.0.0.0", "127.0.0.1") for word in arguments]
    chats = program == "mlx_lm.chat"
    command = [BIN / program, *arguments]
    with launched(tmp_path / "launch", 2, *command, text=f"{QUESTION}\n" if chats else None) as launch:
        if chats:
            launch.reaches("an answer", lambda: "A plug-in for MLX LM" in launch.stdout and "mlx_lm" in launch.stdout)
            time.sleep(2)
            launch.types("q\n")
            launch.ends()
        elif program == "mlx_lm.server":
            assert ask(port, lambda: launch.process.poll() is None)
        else:
            launch.ends()
            assert "Averages: prompt_tps=" in launch.stdout
        assert "Traceback" not in launch.stderr
