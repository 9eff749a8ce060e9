"""Other shapes for an array: each function returns one, with random choices, or None where there is none."""

from __future__ import annotations

import random

import numpy as np


def _axis(rng: random.Random, array: np.ndarray, least: int = 2) -> int | None:
    axes = [axis for axis, size in enumerate(array.shape) if size >= least]
    return rng.choice(axes) if axes else None


def halved(rng: random.Random, array: np.ndarray) -> np.ndarray | None:
    return None if (axis := _axis(rng, array)) is None else array.take(range(array.shape[axis] // 2), axis)


def cut(rng: random.Random, array: np.ndarray) -> np.ndarray | None:
    return None if (axis := _axis(rng, array)) is None else array.take(range(array.shape[axis] - 1), axis)


def doubled(rng: random.Random, array: np.ndarray) -> np.ndarray | None:
    return None if (axis := _axis(rng, array, 1)) is None else np.concatenate([array, array], axis)


def transposed(rng: random.Random, array: np.ndarray) -> np.ndarray | None:
    return array.swapaxes(-1, rng.choice([-2, 0])) if array.ndim > 1 else None


def with_an_axis(rng: random.Random, array: np.ndarray) -> np.ndarray:
    return np.expand_dims(array, rng.randint(0, array.ndim))


def without_an_axis(rng: random.Random, array: np.ndarray) -> np.ndarray | None:
    return None if (axis := _axis(rng, array, 1)) is None else array.take(0, axis)


def emptied(rng: random.Random, array: np.ndarray) -> np.ndarray | None:
    return None if (axis := _axis(rng, array, 1)) is None else array.take([], axis)


def one(rng: random.Random, array: np.ndarray) -> np.ndarray | None:
    """One number where there were many, in as many axes, or one, or none."""
    return array.ravel()[:1].reshape(rng.choice([(), (1,), (1,) * array.ndim])) if array.size else None


def reshaped(rng: random.Random, array: np.ndarray) -> np.ndarray | None:
    """Another shape of as many numbers, in the order of rows or of columns."""
    shapes = [(array.size,), (1, array.size), (array.size, 1), array.shape[::-1]]
    if array.ndim > 1:
        shapes += [(*array.shape[:-2], array.shape[-1], array.shape[-2])] * 2
    shapes += [(array.size // n, n) for n in (2, 4, 8, 16, 64) if array.size % n == 0]
    shape = rng.choice(shapes)
    return array.reshape(shape, order=rng.choice("CF")) if shape != array.shape else None
