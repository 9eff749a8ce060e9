"""Fields of an adapter's config, each of its type or one error."""

from __future__ import annotations

from typing import Any

from ..errors import LARGEST, CheckpointError, shown

CORRECT = "Correct it, or use the adapter_config.json that the trainer wrote."


class Fields:
    """An object of ``adapter_config.json``: every method raises `CheckpointError`. What is null is missing."""

    def __init__(self, values: dict[str, Any], where: str = ""):
        self.values = values
        self.where = where

    def error(self, field: str, expected: str, found: object, remedy: str = CORRECT) -> CheckpointError:
        return CheckpointError(f"adapter_config.json: {self.where}{field}", expected, shown(found), remedy)

    def _get(self, field: str, kinds: tuple[type, ...], expected: str, default: Any) -> Any:
        value = self.values.get(field)
        if value is None and default is not None:
            return default
        if type(value) not in kinds:
            raise self.error(field, expected, value)
        return value

    def text(self, field: str, default: str | None = None) -> str:
        return self._get(field, (str,), "a string", default)

    def flag(self, field: str) -> bool:
        return self._get(field, (bool,), "true or false", False)

    def integer(self, field: str) -> int:
        value = self._get(field, (int,), "a positive integer", None)
        if not 0 < value <= LARGEST:
            raise self.error(field, "a positive integer", value)
        return value

    def number(self, field: str, default: float | None = None) -> float:
        value = self._get(field, (int, float), "a number", default)
        if not abs(value) <= 1e30:  # nor is NaN
            raise self.error(field, "a number", value)
        return float(value)

    def object(self, field: str, default: dict[str, Any] | None = None) -> dict[str, Any]:
        return self._get(field, (dict,), "an object", default)

    def texts(self, field: str) -> list[str]:
        values = self._get(field, (list,), "a list of strings", [])
        if not all(isinstance(value, str) for value in values):
            raise self.error(field, "a list of strings", values)
        return values
