"""The exceptions for a checkpoint or a host that this package cannot work with, and the checks of single fields."""

from __future__ import annotations

import reprlib
from typing import Any

LARGEST = 2**31 - 1  # an axis of an MLX array, which holds nothing before it is loaded


class CheckpointError(ValueError):
    """A config field or a tensor is missing, ambiguous or unsupported.

    The message names the field or tensor, what was expected, what was found, and what the user can do.
    """


class MissingTensorError(CheckpointError):
    """A tensor lacks the others of its layer, which is no error in a part of a checkpoint."""


class HostError(RuntimeError):
    """The installed mlx-lm lacks something that this package builds on."""


def check_positive(field: str, value: Any, kind: type[int] | type[float] = float, most: int = LARGEST) -> None:
    if not isinstance(value, (int, kind)) or isinstance(value, bool) or not value > 1e-30:
        raise config_error(field, "a positive integer" if kind is int else "a positive number", value)
    if value > most:
        raise config_error(field, f"at most {most}", value)


def config_error(field: str, expected: str, found: object) -> CheckpointError:
    what = "nothing" if found is None else found if isinstance(found, str) else reprlib.repr(found)
    return CheckpointError(
        f"config.json: {field}: expected {expected}, found {what}. Correct it, or take config.json from the original "
        "model."
    )


def check_kinds(where: str, fields: dict[str, Any], **kinds: Any) -> None:
    """Raise `CheckpointError` for a field that is not of its type; a number is one that an axis can have, or -1."""
    for field, kind in kinds.items():
        value: Any = fields.get(field)
        if value is not None and (
            type(value) is not kind or (kind is int and not (value == -1 or 0 < value <= LARGEST))
        ):
            raise description_error(where + field, kind.__name__, value)


def check_block(where: str, fields: dict[str, Any], field: str) -> None:
    """Raise `CheckpointError` for a block that is not two positive sizes."""
    block = fields.get(field)
    if block is None or (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        check_kinds(where, {field: max(block or [1])}, **{field: int})
    else:
        raise description_error(where + field, "two positive integers", block)


def description_error(field: str, expected: str, found: object) -> CheckpointError:
    return CheckpointError(
        f"quantization_config: {field}: expected {expected}, found {found!r}. "
        "Take config.json from the original checkpoint."
    )
