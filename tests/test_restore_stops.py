"""What is left of a `restore` that is stopped, killed or out of room: nothing that looks finished."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from support import LIMIT
from support.stops import halfway, on_a_full_disk
from support.tuned import pair_in, refusal

THOROUGH = pytest.mark.thorough


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    return pair_in(tmp_path)


def begun(*arguments: object) -> subprocess.Popen:
    return halfway("restoring.restore:_write", 30, "restore", *arguments)


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=THOROUGH),
        pytest.param(signal.SIGHUP, 129, marks=THOROUGH),
    ],
)
def test_a_stop_leaves_nothing(number, status, pair, tmp_path):
    process = begun(pair[0], "--original", pair[1], "--save-path", tmp_path / "out")
    assert (tmp_path / "out.unfinished" / "model.safetensors").exists()
    process.send_signal(number)
    _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == status
    assert "Traceback" not in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["original", "tuned"]


def test_a_kill_leaves_nothing_that_looks_finished_and_the_next_run_names_it(pair, tmp_path):
    process = begun(pair[0], "--original", pair[1], "--save-path", tmp_path / "out")
    process.kill()
    process.communicate(timeout=LIMIT)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.unfinished" / "config.json").exists()  # without which nothing loads it
    message = refusal(*pair, tmp_path / "out")
    assert "out.unfinished: expected no such folder, found one that another run is writing or has left" in message


def test_two_runs_at_a_time_do_not_mix(pair, tmp_path):
    process = begun(pair[0], "--original", pair[1], "--save-path", tmp_path / "out")
    try:
        assert "another run is writing" in refusal(*pair, tmp_path / "out")
    finally:
        process.kill()
        process.communicate(timeout=LIMIT)


def test_a_disk_without_room_is_said_before_anything_is_written(pair, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "MB of free space, found 1 kB" in refusal(*pair, tmp_path / "out")


def test_a_disk_that_becomes_full_leaves_nothing(pair, tmp_path):
    arguments = (pair[0], "--original", pair[1], "--save-path", tmp_path / "out")
    assert "File too large" in on_a_full_disk("restore", *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["original", "tuned"]
