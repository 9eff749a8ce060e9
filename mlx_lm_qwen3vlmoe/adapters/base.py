"""What an adapter's base model tells of its sizes, where it is at hand."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from ..errors import CheckpointError
from ..files.headers import read_config
from ..layouts.names import EMBEDDINGS

logger = logging.getLogger(__name__)

Shapes = dict[str, tuple[int, ...]]  # path → of the weight


class Base:
    """The base model, by the name that the user or else the adapter gives.

    Args:
        name: a folder, or a repository on the hub, of which the config alone is fetched, and only where it has to be.
    """

    def __init__(self, name: str | None):
        self.name = name
        self._shapes: Shapes | None = None

    def shapes(self, needed: str | None = None) -> Shapes | None:
        """Path → shape of the weight, as the host has it; None where the base model is not on this machine.

        Args:
            needed: what cannot do without. Raises `CheckpointError`.
        """
        if self._shapes is None and (folder := self._folder(download=needed is not None)):
            self._shapes = _shapes(folder)
        if self._shapes is None and needed is not None:
            raise CheckpointError(
                needed,
                "the base model's config.json, which has the sizes",
                f"none for {self.name}" if self.name else "no base model named in the adapter",
                "Name its folder or a reachable repository with --model.",
            )
        return self._shapes

    def hidden_size(self, needed: str) -> int:
        """Raises `CheckpointError` as `shapes` does."""
        shapes = self.shapes(needed) or {}
        return shapes[EMBEDDINGS][1]

    def _folder(self, download: bool) -> Path | None:
        if self.name is None:
            return None
        if (Path(self.name) / "config.json").exists():
            return Path(self.name)
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        try:
            file = try_to_load_from_cache(self.name, "config.json")
            if not isinstance(file, str):
                file = hf_hub_download(self.name, "config.json") if download else None
        except Exception as e:  # its own kinds, by version, and those of its transport
            logger.debug("%s: %s", self.name, e)
            return None
        return Path(file).parent if file else None


def _shapes(folder: Path) -> Shapes:
    from ..config import ModelArgs
    from ..model import Model

    config = read_config(folder, str(folder))
    for field in ("quantization", "quantization_config"):
        config.pop(field, None)  # the shapes are those of the weights, not of how they are stored
    parameters: Any = tree_flatten(Model(ModelArgs.from_dict(config)).parameters())
    return {name.removesuffix(".weight"): tuple(array.shape) for name, array in parameters}
