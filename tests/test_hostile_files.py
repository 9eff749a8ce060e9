"""Files that no tool writes, for every command that reads them: one line, and no traceback, no hang and no output."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from support import BIN, FIXTURES, TINY, thorough
from support.adapters import ADAPTERS
from support.checkpoints import joined, split
from support.commands import run
from support.tuned import converted, files, pair_in, refusal

from mlx_lm_qwen3vlmoe import CheckpointError
from mlx_lm_qwen3vlmoe.files.reading import read_json
from mlx_lm_qwen3vlmoe.inspection.report import inspect
from mlx_lm_qwen3vlmoe.restoring.restore import restore

COMMAND = BIN / "mlx-lm-qwen3vlmoe"
OFFICIAL = FIXTURES / "official"
INSPECT = (TINY, lambda folder, made: (COMMAND, "inspect", folder))
RESTORE = (OFFICIAL, lambda folder, made: (COMMAND, "restore", made, "--original", folder, "--save-path", "out"))
TUNED = (TINY, lambda folder, made: (COMMAND, "restore", folder, "--original", OFFICIAL, "--save-path", "out"))
ADAPT = (ADAPTERS / "attention", lambda folder, made: (COMMAND, "adapters", folder, "--save-path", "out"))
BASED = (TINY, lambda folder, made: (*ADAPT[1](ADAPT[0], made), "--model", folder))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """What `mlx_lm.convert` makes of the official fixture."""
    return converted(OFFICIAL, tmp_path_factory.mktemp("made") / "tuned")


def refused(what: tuple, folder: Path, made: Path) -> str:
    """The line that a command ends with, after which nothing is there."""
    _, command = what
    before = sorted(folder.parent.iterdir())
    done = run(*command(folder, made), check=False, cwd=folder.parent)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(folder.parent.iterdir()) == before
    return done.stderr.splitlines()[-1]


def copied(what: tuple, tmp_path: Path) -> Path:
    source, _ = what
    return Path(shutil.copytree(source, tmp_path / "folder"))


PLACES = [
    (INSPECT, "config.json"),
    (INSPECT, "model.safetensors"),
    (RESTORE, "model.safetensors"),
    (ADAPT, "adapter_config.json"),
    *thorough(
        (INSPECT, "hf_quant_config.json"),
        (RESTORE, "config.json"),
        (RESTORE, "model.safetensors.index.json"),
        (TUNED, "config.json"),
        (TUNED, "model.safetensors"),
        (ADAPT, "adapter_model.safetensors"),
        (BASED, "config.json"),
    ),
]


@pytest.mark.parametrize("place", PLACES)
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(place, made, tmp_path):
    what, name = place
    folder = copied(what, tmp_path)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert f"{name}: expected a file, found a pipe or a device. Remove it." in refused(what, folder, made)


@pytest.mark.parametrize("place", [PLACES[0], PLACES[3], *thorough(PLACES[2])])
def test_a_device_in_the_place_of_a_file_is_not_read(place, made, tmp_path):
    what, name = place
    folder = copied(what, tmp_path)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    assert "found a pipe or a device" in refused(what, folder, made)


DEEP = "[" * 50_000 + "]" * 50_000
NESTED = '{"a":' * 300 + "1" + "}" * 300  # which json reads


@pytest.mark.parametrize("text", [NESTED, *thorough(DEEP)])
@pytest.mark.parametrize(
    "place",
    [
        (INSPECT, "config.json"),
        (ADAPT, "adapter_config.json"),
        *thorough(
            (RESTORE, "config.json"),
            (RESTORE, "model.safetensors.index.json"),
            (TUNED, "config.json"),
            (BASED, "config.json"),
        ),
    ],
)
def test_json_of_any_depth_is_one_line(place, text, made, tmp_path):
    what, name = place
    folder = copied(what, tmp_path)
    (folder / name).write_text(text)
    assert "lists or objects nested more than 100 levels deep" in refused(what, folder, made)


def test_json_of_the_greatest_depth_is_read(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100 + "]" * 100)
    read_json(tmp_path / "deep.json")
    (tmp_path / "deep.json").write_text("[" * 101 + "]" * 101)
    with pytest.raises(ValueError, match="more than 100 levels deep"):
        read_json(tmp_path / "deep.json")


@pytest.mark.parametrize("field", ["text_config", "quantization_config", "vision_config", "rope_scaling"])
def test_a_field_of_any_depth_is_one_error(field, tmp_path):
    shutil.copy(TINY / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(json.loads((TINY / "config.json").read_text()) | {field: 1}))
    text = (tmp_path / "config.json").read_text().replace(f'"{field}": 1', f'"{field}": {NESTED}')
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="more than 100 levels deep"):
        inspect(str(tmp_path))


ENTRIES = {
    "data_offsets": [
        *([0, 2**63], [0, 2**64], [2**63, 2**63 + 8], [0, 10**400], [0, 10**15], [-8, 0], [8, 0]),
        *([0], [0, 1, 2], "01", None, {}, [0.0, 8.0], [True, True], ["0", "8"], [[0], [8]]),
    ],
    "shape": [[2**31], [2**63], [10**400], [-1], [1.0], ["1"], [True], [[1]], None, "1", 1, {}],
    "dtype": [None, 1, [], {}, ["F32"]],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in ENTRIES.items() for value in values])
def test_a_description_of_a_tensor_that_no_file_has_is_one_error(field, value, tmp_path):
    """Of any tensor, one of the vision tower too."""
    folder = Path(shutil.copytree(FIXTURES / "official", tmp_path / "checkpoint"))
    header, data = split((folder / "model.safetensors").read_bytes())
    name = next(name for name in header if ".visual." in name)
    header[name][field] = value
    (folder / "model.safetensors").write_bytes(joined(header, data))
    with pytest.raises(CheckpointError, match=rf"model.safetensors: {name}: {field}: expected ") as caught:
        inspect(str(folder))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("entry", [None, [], 1, "F32"])
def test_a_tensor_without_a_description_is_one_error(entry, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(joined({"x": entry}, b""))
    with pytest.raises(CheckpointError, match=r"model.safetensors: x: dtype: expected a string, found nothing"):
        inspect(str(tmp_path))


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [2**31 - 1, *thorough(2_000_000_000)])
def test_a_context_of_any_length_is_planned(context):
    report = json.loads(run(COMMAND, "inspect", TINY, "--context", context, "--json").stdout)
    assert report["error"] is None
    assert report["cache_bytes"] == inspect(str(TINY), context=256)["cache_bytes"] * -(-context // 256)


@pytest.mark.parametrize("option", ["--context", "--ranks"])
@pytest.mark.parametrize("number", [2**31, 10**21, "9" * 5000, 0, -1, "many", "1.5", ""])
def test_a_number_that_no_array_can_have_is_a_wrong_command_line(option, number):
    done = run(COMMAND, "inspect", TINY, option, number, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"argument {option}: expected " in done.stderr
    assert len(done.stderr) < 2000


def test_a_home_is_found_in_every_path(tmp_path):
    pair_in(tmp_path)
    home = {"HOME": str(tmp_path)}
    run(COMMAND, "restore", "~/tuned", "--original", "~/original", "--save-path", "~/out", env=home)
    assert (tmp_path / "out" / "config.json").exists()
    shutil.copytree(ADAPTERS / "gate_up_alone", tmp_path / "adapter")
    run(COMMAND, "adapters", "~/adapter", "--save-path", "~/converted", "--model", "~/original", env=home)
    assert (tmp_path / "converted" / "adapters.safetensors").exists()


# --- folders of an original -----------------------------------------------------------------------------------------


def test_a_linked_folder_of_the_original_is_copied(tmp_path):
    made, original = pair_in(tmp_path)
    (tmp_path / "elsewhere" / "more").mkdir(parents=True)
    (tmp_path / "elsewhere" / "template.jinja").write_text("x")
    (tmp_path / "elsewhere" / "more" / "file").write_text("y")
    (original / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    (original / ".git").symlink_to(tmp_path / "elsewhere")
    restore(str(made), str(original), str(tmp_path / "out"))
    written = files(tmp_path / "out")
    assert written["additional_chat_templates/template.jinja"] == b"x"
    assert written["additional_chat_templates/more/file"] == b"y"
    assert not any(name.startswith(".git") for name in written)
    assert not (tmp_path / "out" / "additional_chat_templates").is_symlink()


def test_a_folder_that_leads_back_to_itself_is_named(tmp_path):
    made, original = pair_in(tmp_path)
    (original / "a").mkdir()
    (original / "a" / "loop").symlink_to(original)
    assert "a/loop: expected a folder of its own, found a link back to" in refusal(made, original, tmp_path / "out")


def test_folders_that_multiply_are_an_error(tmp_path):
    """Twice forty links lead to 2 to the power of forty files."""
    made, original = pair_in(tmp_path)
    for level in range(40):
        (original / f"d{level}").mkdir()
        for name in "ab" if level < 39 else ():
            (original / f"d{level}" / name).symlink_to(original / f"d{level + 1}")
    assert "expected at most 10000 files and folders, found more" in refusal(made, original, tmp_path / "out")


def test_a_folder_that_cannot_be_read_is_no_success(tmp_path, monkeypatch):
    made, original = pair_in(tmp_path)
    (original / "secret").mkdir()
    (original / "secret" / "file").touch()
    listdir = os.listdir

    def refusing(path="."):
        if Path(path).name == "secret":  # as root, whom no permission keeps out
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refusing)
    with pytest.raises(PermissionError, match="secret"):
        restore(str(made), str(original), str(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_both_files_of_an_adapter_are_on_the_disk_before_their_folder_has_its_name(tmp_path, monkeypatch):
    from mlx_lm_qwen3vlmoe.adapters import convert

    synced, fsync = set(), os.fsync

    def watched(descriptor: int) -> None:
        assert not (tmp_path / "out").exists() or synced >= {"adapters.safetensors", "adapter_config.json"}
        synced.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", watched)
    convert(str(ADAPTERS / "attention"), str(tmp_path / "out"))
    assert synced >= {"adapters.safetensors", "adapter_config.json", "out.unfinished"}
