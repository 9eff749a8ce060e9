"""Placeholders of images in training data, from which a text-only model learns nothing: told of once for a model.

The host's trainer compiles its step, in which token ids have no values. What is found there goes into an array of the
model's state, as a batch normalization's statistics do: the step returns it with its value. That is read when the model
goes to evaluation or back, and when its adapter is saved, so that no step waits for it.
"""

from __future__ import annotations

import logging
from typing import Any

import mlx.core as mx

logger = logging.getLogger(__name__)

_FOUND = "_placeholders"  # in the state, and no parameter, as of its first letter
_TOLD = "_told_of_placeholders"


def watch(model: Any) -> None:
    """Make room for what steps find. Called before a trainer compiles one: the state keeps its structure then."""
    if _FOUND not in model:
        model[_FOUND] = mx.array(False)


def note(model: Any, marks: mx.array, tokens: str) -> None:
    """Say at once that a batch has placeholders or, while a step is compiled, have the state say so.

    Args:
        marks: where they are.
        tokens: which they are.
    """
    if _TOLD in model.__dict__:
        return
    model.__dict__["_tokens_of_placeholders"] = tokens
    found = marks.any()
    try:
        seen = found.item()
    except ValueError:  # traced by mx.compile: there are no values
        if _FOUND in model:
            model[_FOUND] = model[_FOUND] | found
        return
    if seen:
        _warn(model)


def tell(model: Any) -> None:
    """Say that steps have found placeholders, if they have."""
    if _FOUND not in model or _TOLD in model.__dict__:
        return
    try:
        seen = model[_FOUND].item()
    except (ValueError, RuntimeError):  # while a step is compiled, or of one that did not return the state
        return
    if seen:
        _warn(model)


def _warn(model: Any) -> None:
    model.__dict__[_TOLD] = True
    logger.warning(
        "The training data has placeholders of images (token %s), but this is a text-only model: it learns the text "
        "around them, and nothing about the images. Leave such rows out, or train with mlx-vlm "
        "(https://github.com/Blaizzy/mlx-vlm).",
        model.__dict__["_tokens_of_placeholders"],
    )
