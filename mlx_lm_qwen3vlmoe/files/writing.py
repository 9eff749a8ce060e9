"""A folder that is there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ..errors import CheckpointError
from ..terminal import in_bytes


def check_empty(out: Path) -> None:
    """Raise `CheckpointError` where there is anything but an empty folder."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        found = "a folder with files" if out.is_dir() else "a file"
        raise CheckpointError(out, "a new or empty folder", found, "Choose another --save-path.")


def check_outside(inner: Path, outer: Path) -> None:
    """Raise `CheckpointError` for a folder that is, or is in, another one."""
    if outer.resolve() in (inner.resolve(), *inner.resolve().parents):
        raise CheckpointError(inner, f"a folder outside of {outer}", "one inside it", "Move it, or choose another.")


def check_space(folder: Path, size: int, out: Path) -> None:
    """Raise `CheckpointError` about ``out`` where the disk of a folder has no room for so many bytes."""
    if (free := shutil.disk_usage(folder).free) < size:
        remedy = "Free some, or choose another --save-path."
        raise CheckpointError(out, f"{in_bytes(size)} of free space", in_bytes(free), remedy)


@contextlib.contextmanager
def new_folder(out: Path, size: int) -> Iterator[Path]:
    """A folder to write to, beside ``out``, that becomes ``out`` at the end, or is removed with whatever went wrong.

    SIGTERM and SIGHUP count as that. After SIGKILL it stays, under its own name.

    Args:
        size: the bytes that will be written.

    Raises:
        CheckpointError: ``out`` is there and not empty, the disk has no room, or another run writes or was killed.
    """
    check_empty(out)
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    check_space(out.parent, size, out)
    partial = out.with_name(f"{out.name}.unfinished")
    with _signals_as_exceptions():
        try:
            partial.mkdir()
        except FileExistsError:
            remedy = "If no other run is active, remove it."
            found = "one that another run is writing or has left behind"
            raise CheckpointError(partial, "no such folder", found, remedy) from None
        try:
            yield partial
            _sync(partial)
            partial.rename(out)
            _sync(out.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextlib.contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # no other may set handlers
        yield
        return
    # One that is ignored (nohup) or handled stays so.
    ours = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) == signal.SIG_DFL]
    for each in ours:
        signal.signal(each, leave)
    try:
        yield
    finally:
        for each in ours:
            signal.signal(each, signal.SIG_DFL)


def sync(file: IO[bytes]) -> None:
    """Have the disk keep what is written to a file, so that its name never stands for less."""
    file.flush()
    os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Have the disk keep the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
