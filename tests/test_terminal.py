"""What commands say on a terminal, whoever wrote the files, and how they end: stopped, or with nobody to write to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import LIMIT, TINY, thorough
from support.checkpoints import joined, split
from support.commands import CLEAN, run, started

from mlx_lm_qwen3vlmoe import CheckpointError
from mlx_lm_qwen3vlmoe.terminal import printable

OURS = (sys.executable, "-m", "mlx_lm_qwen3vlmoe")
FORGED = "x\nloads         yes, for the CPU"


# --- text -----------------------------------------------------------------------------------------------------------


@given(st.text())
def test_what_is_printable_is_one_line_of_visible_characters(text):
    assert printable(text).isprintable()
    assert printable(printable(text)) == printable(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model.layers.0.weight", "model.layers.0.weight"),
        ("ein Café, 模型", "ein Café, 模型"),
        ("\x1b[2J", r"\x1b[2J"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x9b31m", r"\x9b31m"),
        ("\u202eevil", r"\u202eevil"),
        ("\ud800", r"\ud800"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text, shown):
    assert printable(text) == shown


def test_of_a_long_text_the_beginning_and_the_end_are_left():
    text = printable("a" + "x" * 5_000_000 + "z")
    assert len(text) < 3000
    assert (text[0], text[-1]) == ("a", "z")


def test_an_error_is_one_line_whatever_it_names():
    error = CheckpointError(f"{FORGED}\x1b[2J", "this", "that\ud800\n", "Do.")
    assert str(error).isprintable()
    assert str(CheckpointError(f"{FORGED}\x1b[2J")).isprintable()


def hostile(folder: Path, name: str | None = None, text: dict | None = None, **fields: object) -> Path:
    """The tiny model with another tensor, or other fields."""
    folder.mkdir(parents=True)
    config = json.loads((TINY / "config.json").read_text()) | fields
    config["text_config"] |= text or {}
    (folder / "config.json").write_text(json.dumps(config))
    header, data = split((TINY / "model.safetensors").read_bytes())
    if name is not None:
        header[name] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    (folder / "model.safetensors").write_bytes(joined(header, data))
    return folder


def is_clean(done: subprocess.CompletedProcess) -> bool:
    said = done.stdout + done.stderr
    lines = said.split("\n")
    return all(line.isprintable() for line in lines) and "Traceback" not in said and len(said) < 10_000


HOSTILE = {
    "escape": {"name": "evil\x1b]0;title\x07\x1b[2J"},
    "escape in a layer": {"name": "model.language_model.layers.0.\x1b[31mx.weight"},
    "line": {"name": FORGED},
    "long": {"name": "x" * 2_000_000},
    "surrogate": {"name": "evil\ud800"},
    "direction": {"name": "evil\u202e"},
    "field": {"text": {"hidden_act": "\x1b[2J"}},
    "surrogate in a field": {"text": {"hidden_act": "\ud800"}},
    "long field": {"text": {"hidden_act": "x" * 2_000_000}},
    "name of a field": {"text": {"scale\x1b[2J\n" + "x" * 2_000_000: 3}},
    "description": {"quantization": {"group_size": 64, "bits": 4, "mode": "\x1b[2J"}},
    "method": {"quantization_config": {"quant_method": "\x1b[2J"}},
    "type": {"model_type": "\x1b[2J"},
}


@pytest.mark.parametrize("how", [*list(HOSTILE)[:4], *thorough(*list(HOSTILE)[4:])])
def test_nothing_that_a_checkpoint_is_named_with_reaches_the_terminal(how, tmp_path):
    folder = hostile(tmp_path / "checkpoint", **HOSTILE[how])
    done = run(*OURS, "inspect", folder, check=False)
    assert is_clean(done)
    assert done.stdout.count("\nloads ") <= 1
    for options in (("inspect", folder, "--json"), ("restore", folder, "--original", TINY, "--save-path", "out")):
        assert is_clean(run(*OURS, *options, check=False, cwd=tmp_path))


@pytest.mark.parametrize(
    "how",
    [
        {"name": "self_attn.\x1b[2J"},
        {"peft_type": "\x1b[2J\n"},
        *thorough({"name": f"q_proj\n{'x' * 500_000}"}, {"peft_type": "\ud800"}),
    ],
)
def test_nothing_that_an_adapter_is_named_with_reaches_the_terminal(how, tmp_path):
    module = f"base_model.model.model.language_model.layers.0.{how.pop('name', 'self_attn.q_proj')}"
    header = {
        f"{module}.lora_{kind}.weight": {"dtype": "F32", "shape": shape, "data_offsets": [64 * n, 64 * n + 64]}
        for n, (kind, shape) in enumerate((("A", [2, 8]), ("B", [8, 2])))
    }
    (tmp_path / "adapter_model.safetensors").write_bytes(joined(header, bytes(128)))
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **how}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    done = run(*OURS, "adapters", tmp_path, "--save-path", tmp_path / "out", check=False)
    assert is_clean(done)
    assert done.returncode == 1


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems have no such names")
def test_a_path_that_is_no_utf8_is_printed_where_the_locale_is_strict(tmp_path):
    folder = hostile(tmp_path / os.fsdecode(b"caf\xe9"))
    done = run(*OURS, "inspect", folder, check=False, env={"PYTHONIOENCODING": "ascii:strict"}, fresh=True)
    assert r"caf\udce9: expected a path in UTF-8" in done.stdout
    assert is_clean(done)


# --- the end --------------------------------------------------------------------------------------------------------

STOPPED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever runs the tests may ignore them
class Stop:
    def find_spec(self, name, *_):
        if name == "mlx_lm":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Stop())
from mlx_lm_qwen3vlmoe.__main__ import main
main(sys.argv[1:])
"""
COMMANDS = {
    "inspect": ["inspect", TINY],
    "doctor": ["doctor"],
    "run": ["run", "generate"],
    "restore": ["restore", TINY, "--original", TINY, "--save-path", "out"],
    "adapters": ["adapters", TINY, "--save-path", "out"],
}


@pytest.mark.parametrize("command", ["inspect", "run", *thorough("doctor", "restore", "adapters")])
def test_ctrl_c_while_modules_are_imported_is_a_line_and_130(command, tmp_path):
    done = run(sys.executable, "-c", STOPPED, *COMMANDS[command], check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Stopped.\n")


def ended(command: list[object], stdout: object, folder: Path) -> tuple[int, str]:
    """The status, and what a command said of itself, with another output."""
    with (folder / "errors").open("w+") as errors, Path(os.devnull).open() as empty:
        process = started(*OURS, *command, stdin=empty, stdout=stdout, stderr=errors, cwd=folder)
        status = process.wait(LIMIT)
        errors.seek(0)
        return status, errors.read()


@pytest.mark.parametrize("command", [["doctor"], ["--help"], *thorough(["inspect", TINY], ["inspect", TINY, "--json"])])
def test_a_reader_who_has_gone_changes_nothing(command, tmp_path):
    end, begin = os.pipe()
    os.close(end)
    with os.fdopen(begin, "w") as output:
        assert ended(command, output, tmp_path) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("command", [["doctor"], *thorough(["inspect", TINY])])
def test_an_output_that_is_full_is_an_error_in_a_line(command, tmp_path):
    with Path("/dev/full").open("w") as output:
        status, said = ended(command, output, tmp_path)
    assert (status, said) == (1, "The output cannot be written: No space left on device.\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_are_left_alone(closed, tmp_path):
    """Nothing that is printed goes into a file that was opened in their place."""
    code = (
        "import sys, os\n"
        "from mlx_lm_qwen3vlmoe.terminal import say, session\n"
        "with session(), open('file', 'w') as file:\n"
        "    assert file.fileno() > 2\n"
        "    say('said'); print('said', file=sys.stderr); os.write(1, b'said'); os.write(2, b'said')\n"
        "    sys.exit(7)"
    )
    script = f'"$0" -c "$1" {closed}'
    assert run("sh", "-c", script, sys.executable, code, check=False, cwd=tmp_path).returncode == 7
    assert (tmp_path / "file").read_text() == ""


def test_ctrl_c_in_a_command_that_runs_is_a_line_and_130():
    code = (
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from mlx_lm_qwen3vlmoe.terminal import session\n"
        "with session():\n    print('here', flush=True); signal.pause()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=CLEAN
    )
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=LIMIT) == ("", "Stopped.\n")
    assert process.returncode == 130
