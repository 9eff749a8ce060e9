"""Names the parameters of a loaded model, for the recipes of programs that run on a GPU only."""

from __future__ import annotations

import hashlib

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten


def digest(model: nn.Module) -> str:
    """Their names and values in one number."""
    found = hashlib.sha256()
    for name, array in sorted(tree_flatten(model.parameters())):
        found.update(f"{name} {array.shape} {array.dtype}".encode())
        found.update(np.array(array.reshape(-1).view(mx.uint8)).tobytes())
    return found.hexdigest()
