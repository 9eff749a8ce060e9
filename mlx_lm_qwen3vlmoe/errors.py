"""The exceptions for a checkpoint or a host that this package cannot work with, and the checks of single fields."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .terminal import printable

LARGEST = 2**31 - 1  # an axis of an MLX array, which holds nothing before it is loaded
USE_ITS_MODELS = "use the config.json of the model that this checkpoint was made from."
CORRECT = f"Correct it, or {USE_ITS_MODELS}"
UNSUPPORTED = "mlx-lm's qwen3_moe cannot run such a model, and so this package cannot either."
DAMAGED = "If so, this tensor is damaged: download its file again."
MISSING_FILE = "Is a file of the checkpoint missing? Download it again."
_WORDS = {int: "a positive integer", dict: "an object", list: "a list", str: "a string", bool: "true or false"}


class CheckpointError(ValueError):
    """A config field or a tensor is missing, ambiguous or unsupported.

    ``args`` hold the parts of the message: where it is wrong (a tensor or several, a field, a file), what was expected,
    what was found, and what the user can do. A message that has no such parts is the first of them.

    Inside the package a tensor goes by the host's name. `layouts.names.as_stored` puts the name in the file there,
    which is the one to print.
    """

    def __init__(self, where: object, expected: str = "", found: object = "", remedy: str = ""):
        super().__init__(where if isinstance(where, tuple) else str(where), expected, str(found), remedy)

    def __str__(self) -> str:
        where, expected, found, remedy = self.args
        if not expected:
            return printable(where)
        where = ", ".join(map(shortened, where if isinstance(where, tuple) else [where]))
        text = f"expected {expected}, found {found}".replace("mlx.core.", "")
        return printable(f"{where}: {text}. {remedy}")

    def rename(self, new: Callable[[str], str]) -> None:
        """Put other names in place of those where it is wrong."""
        where, *rest = self.args
        names = where if isinstance(where, tuple) else (where,)
        self.args = (tuple(dict.fromkeys(map(new, names))), *rest)


class MissingTensorError(CheckpointError):
    """A tensor lacks the others of its layer, which is no error in a part of a checkpoint."""


class HostError(RuntimeError):
    """The installed mlx-lm lacks something that this package builds on."""


def shortened(name: str) -> str:
    """A name for a line of text: a file can have any, of any length."""
    return printable(name, 250)


def shown(value: object) -> str:
    """A value of a config, as JSON has it."""
    if value is None:
        return "nothing"
    text = json.dumps(value, default=repr, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:80]}…"


def series(values: Any, word: str = "or") -> str:
    """``a, b or c``."""
    *others, last = map(str, values)
    return f"{', '.join(others)} {word} {last}" if others else last


def shape_error(name: str, expected: str, found: object, fields: Iterable[str] = ()) -> CheckpointError:
    """The error for a tensor of another shape than the config gives.

    Args:
        fields: of the config, which may be wrong instead: sizes, or products of them.
    """
    sizes = series(dict.fromkeys(size for field in fields for size in field.split(" * ")) or [""], "and")
    remedy = "This tensor is damaged, or was reshaped: download its file again."
    if sizes:
        verb = "Are" if " and " in sizes else "Is"
        remedy = f"{verb} {sizes} in config.json right for this checkpoint? {DAMAGED}"
    return CheckpointError(name, expected, found, remedy)


def beyond(name: str, what: str, number: int, count: int, field: str) -> CheckpointError:
    """The error for a layer or an expert whose number is too high."""
    remedy = f"Correct {field} in config.json, or remove the file that came from another checkpoint."
    return CheckpointError(name, f"no {what} after {count - 1}, as {field} is {count}", f"{what} {number}", remedy)


def differing(fields: Sequence[str], shape: Sequence[int], found: Sequence[int]) -> list[str]:
    """The fields of the axes in which two shapes differ; none if a shape has the other's axes in another order."""
    if not len(fields) == len(shape) == len(found) or sorted(shape) == sorted(found):
        return []
    return [field for field, one, other in zip(fields, shape, found, strict=True) if one != other]


def check_positive(
    field: str, value: Any, kind: type[int] | type[float] = float, most: int = LARGEST, remedy: str = CORRECT
) -> None:
    if not isinstance(value, (int, kind)) or isinstance(value, bool) or not value > 1e-30:
        raise config_error(field, "a positive integer" if kind is int else "a positive number", value, remedy)
    if value > most:
        raise config_error(field, f"at most {most}", value)


def config_error(field: str, expected: str, found: object, remedy: str = CORRECT) -> CheckpointError:
    return CheckpointError(f"config.json: {field}", expected, shown(found), remedy)


def check_kinds(where: str, fields: dict[str, Any], **kinds: Any) -> None:
    """Raise `CheckpointError` for a field that is not of its type; a number is one that an axis can have, or -1."""
    for field, kind in kinds.items():
        value: Any = fields.get(field)
        if value is not None and (
            type(value) is not kind or (kind is int and not (value == -1 or 0 < value <= LARGEST))
        ):
            raise description_error(where + field, _WORDS[kind], value)


def check_block(where: str, fields: dict[str, Any], field: str) -> None:
    """Raise `CheckpointError` for a block that is not two positive sizes."""
    block = fields.get(field)
    if block is None or (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        check_kinds(where, {field: max(block or [1])}, **{field: int})
    else:
        raise description_error(where + field, "two positive integers", block)


def description_error(field: str, expected: str, found: object) -> CheckpointError:
    return CheckpointError(
        f"quantization_config: {field}",
        expected,
        shown(found),
        "Correct it, or copy quantization_config from the folder that the quantization tool wrote.",
    )
