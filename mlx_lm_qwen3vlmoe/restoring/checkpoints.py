"""The two checkpoints of a restoration, in files: a tuned model's text, and the original that it came from."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import quantization
from ..errors import CheckpointError
from ..files.headers import Header, local_headers, read_config
from ..files.tensors import FLOATS, find_tensors, row_ranges, unsigned
from ..inspection.report import FAILURES, described, hollow_model
from ..inspection.surroundings import check_rotation
from ..layouts.names import EMBEDDINGS, HEAD
from ..layouts.stacking import Part
from ..quantization import Parameters, Tensors
from ..quantization.description import foreign_quantization, own_quantization
from ..runtime.backend import planned
from ..sanitize import by_layer, rename, unsanitize

_ADAPTERS = ("adapters.safetensors", "adapter_config.json", "adapter_model.safetensors")
_MOST = 10_000  # files and folders; links can make any number of a few
_OFFICIAL = re.compile(r"Qwen3-VL-\d+B-A\d+B-(?:Instruct|Thinking)")


class Checkpoint:
    """A checkpoint that loads.

    Attributes:
        config: as it is stored.
        tensors: by their names in the files.
        model: of arrays that have no data, unless `load` is another.
        loaded_config: as the host has it then.
        packed: path of the host's → how it is packed.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = read_config(folder, str(folder))
        headers = local_headers(folder, [])
        self.files = [folder / name for name in headers]
        self.tensors = find_tensors(folder, headers)
        self.refuse()
        try:
            self.model, self.loaded_config = self.load(headers)
        except FAILURES as e:
            raise CheckpointError(f"{folder} does not load: {described(e)}") from e
        self.packed: dict[str, Parameters] = {
            path: {name: getattr(module, name) for name in ("group_size", "bits", "mode") if hasattr(module, name)}
            for path, module in self.model.named_modules()
            if "scales" in module
        }

    def refuse(self) -> None:
        """Raise `CheckpointError` for what is of no use here, before it is loaded."""

    def load(self, headers: dict[str, Header]) -> tuple[Any, dict[str, Any]]:
        """The model and its config."""
        with planned():
            return hollow_model(self.folder, headers)

    def rows(self, path: str, first: int, last: int) -> mx.array:
        """Rows of the weight of a layer of the host's, ``[last - first, …]``; what is packed, in float32."""
        raise NotImplementedError

    def as_float(self, path: str, tensors: Tensors) -> mx.array:
        """The weight of a layer, or of some rows of it."""
        if path in self.packed:
            return quantization.dequantize(tensors, self.packed[path], mx.float32)
        return tensors["weight"]

    def pieces(self, part: Part, dtype: mx.Dtype, shape: tuple[int, ...]) -> Iterator[tuple[int, int, mx.array]]:
        """A tensor made of the host's layers, some rows at a time: the first and the last, and their bits.

        As they are moved only, and never computed with, what is stored stays, whatever it is.
        """
        bits = unsigned(dtype)
        size = math.prod(shape) * dtype.size
        for first, last in row_ranges(shape[0], size) if part.row is None else [(part.row, part.row + 1)]:
            weights = [self.rows(path, first, last).astype(dtype).view(bits) for path in part.layers]
            yield first, last, mx.contiguous(part.form(*weights))

    @property
    def text_config(self) -> dict[str, Any]:
        return self.model.args.text_config


class Tuned(Checkpoint):
    """The text of a tuned model, in floats, or packed by MLX.

    Attributes:
        layers: path of the host's → what the layer consists of.
    """

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.layers = by_layer(rename(self.tensors))
        if stored_apart := next((name for name in self.tensors if ".mlp.experts." in name), None):
            raise _not_by_mlx(folder, stored_apart)

    def refuse(self) -> None:
        check_rotation(self.folder)
        check_fused(self.folder, self.tensors)
        if foreign_quantization(self.config) is not None:
            raise _not_by_mlx(self.folder, "quantization_config of another tool")

    def rows(self, path: str, first: int, last: int) -> mx.array:
        return self.as_float(path, {suffix: tensor.rows(first, last) for suffix, tensor in self.layers[path].items()})

    def check_tied(self) -> None:
        """The head is the embeddings, as a tied original has no place for another."""
        rows = self.text_config["vocab_size"]
        for first, last in row_ranges(rows, 4 * rows * self.text_config["hidden_size"]):
            head, embeddings = (self.rows(path, first, last) for path in (HEAD, EMBEDDINGS))
            if not mx.array_equal(head, embeddings, equal_nan=True).item():
                raise CheckpointError(
                    f"{HEAD}.weight",
                    "the embeddings, as the original is tied and has no head of its own",
                    f"other numbers in rows {first} to {last - 1}",
                    "Tune neither the head nor the embeddings (adapters leave both alone).",
                )


class Original(Checkpoint):
    """The checkpoint that a tuned model came from.

    Attributes:
        name: as the user gave it, a folder or a repository.
        parts: of which of the host's tensors each text tensor is made.
    """

    def __init__(self, folder: Path, name: str):
        self.name = name
        super().__init__(folder)
        self.parts = unsanitize(self.tensors, self.model.args)
        for tensor in self.parts:
            if (dtype := self.tensors[tensor].dtype) not in FLOATS:
                raise _quantized(name, f"{tensor} in {dtype}")

    def refuse(self) -> None:
        check_unquantized(self.folder, self.name)

    def others(self) -> list[Path]:
        """All other files: config, processor, tokenizer, chat template, index. Not what tools hide (.git, .cache)."""
        found = []
        for number, (path, is_folder) in enumerate(_walk(self.folder, (self.folder.resolve(),))):
            if number > _MOST:
                remedy = "Are there links to folders? Remove them."
                raise CheckpointError(self.folder, f"at most {_MOST} files and folders", "more", remedy)
            if is_folder or path in self.files:
                continue
            check_is_file(path)
            found.append(path)
        return sorted(found)


def _walk(folder: Path, inside: tuple[Path, ...]) -> Iterator[tuple[Path, bool]]:
    """All that is below a folder, in linked folders too, but for folders that are hidden; and whether it is a folder.

    Args:
        folder: by the name that what is in it gets.
        inside: the folders that lead to this one, and this one, without links.
    """
    for name in sorted(os.listdir(inside[-1])):  # raises `OSError` for what cannot be read
        path, place = folder / name, inside[-1] / name
        if not place.is_dir():
            yield path, False
        elif not name.startswith("."):
            yield path, True
            real = place.resolve() if place.is_symlink() else place
            if real in inside:
                raise CheckpointError(path, "a folder of its own", f"a link back to {real}", "Remove the link.")
            yield from _walk(path, (*inside, real))


def check_unquantized(folder: Path, name: str) -> None:
    config = read_config(folder, name)
    if foreign_quantization(config) or own_quantization(config):
        raise _quantized(name, "quantization in config.json")


def _quantized(name: str, what: str) -> CheckpointError:
    official = _OFFICIAL.search(name)
    which = f": Qwen/{official[0]}" if official else ""
    remedy = f"Use the original that it was made from{which}."
    return CheckpointError(name, "an unquantized original", what, remedy)


def check_is_file(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(path, "a file", "a broken link", "Download it again.")


def check_fused(folder: Path, tensors: Iterable[str]) -> None:
    """Raise `CheckpointError` for adapters, in files of their own or in those of the model."""
    if adapter := next((name for name in _ADAPTERS if (folder / name).exists()), None):
        raise _not_fused(folder / adapter)
    if adapter := next((name for name in tensors if "lora_" in name), None):
        raise _not_fused(f"{folder}: {adapter}")


def _not_fused(what: object) -> CheckpointError:
    return CheckpointError(what, "a model without adapters", "adapters that are not fused", "Run mlx_lm.fuse first.")


def _not_by_mlx(folder: Path, what: str) -> CheckpointError:
    remedy = "If this is the original, swap the two: the tuned model comes first."
    return CheckpointError(folder, "a model that mlx_lm.fuse or mlx_lm.convert wrote", what, remedy)
