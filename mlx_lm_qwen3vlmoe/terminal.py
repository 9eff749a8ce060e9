"""What a command says and how it ends: text that no terminal obeys, and no traceback for Ctrl-C or a full disk."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator

_MOST = 2000  # characters of a line


def printable(text: object, most: int = _MOST) -> str:
    """Text from a file, a path or a registry as one line that a terminal shows and does not obey.

    Whatever is no visible character (escape sequences, line breaks, marks of direction, lone surrogates) becomes what
    Python's source has for it, such as ``\\x1b``. Of a longer text, the middle is left out.
    """
    line = str(text)
    if len(line) > most:
        head = most * 3 // 5
        line = f"{line[:head]}…{line[head - most :]}"
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)


def in_bytes(size: int) -> str:
    """Three figures and a unit: GB of 10⁹ bytes, MB below 0.1 GB, or kB below 0.1 MB."""
    scale, unit = (1e9, "GB") if size >= 1e8 else (1e6, "MB") if size >= 1e5 else (1e3, "kB")
    amount = size / scale
    return f"{amount:.3g} {unit}" if amount < 999.5 else f"{amount:.0f} {unit}"


def say(text: str) -> None:
    """Print, and be sure that it is written, as far as anybody reads it."""
    try:
        print(text)
    except OSError as e:
        _let_go(e)
    _flush()


@contextlib.contextmanager
def session() -> Iterator[None]:
    """What a command runs in, from the reading of its arguments on.

    A reader who has gone (``| head``) changes nothing but for a command that is cut short by it. Output that cannot be
    written is an error, and Ctrl-C ends with status 130.
    """
    _open_streams()
    try:
        yield
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError as e:
        _let_go(e)
        sys.exit(141)  # as after SIGPIPE
    finally:
        _flush()


def _open_streams() -> None:
    """Have the three streams, and none that fails for a character that its encoding lacks.

    A closed one would leave its number to the next file that is opened, and what is printed would go into that.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _flush() -> None:
    try:
        sys.stdout.flush()
    except OSError as e:
        _let_go(e)


def _let_go(error: OSError) -> None:
    """Drop what is not written yet, which Python would try to write once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if not isinstance(error, BrokenPipeError):
        sys.exit(f"The output cannot be written: {error.strerror}.")
