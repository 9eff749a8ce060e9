"""The checkpoint to export, as the layers of the host's: of floats in files, or of arrays that the host loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import CheckpointError
from ..files.headers import Header, local_headers
from ..files.tensors import FLOATS, FileTensor, find_tensors
from ..inspection.report import lazy_model, noting
from ..inspection.surroundings import check_dtypes, check_place, check_rotation
from ..layouts.decoder import ROUTER_BIAS, Decoder
from ..layouts.experts import Experts, gather, host_paths
from ..layouts.merged import cut_merged, parts_of
from ..layouts.names import EMBEDDINGS, HEAD, as_stored
from ..layouts.stacking import PROJECTIONS, Part, float_shape, unstack
from ..quantization import IGNORED, Decoded, Tensors
from ..restoring.checkpoints import Checkpoint, check_fused
from ..sanitize import by_layer, rename

Stored = dict[str, dict[str, Any]]  # path → suffix → tensor of a file


class Source(Checkpoint):
    """A checkpoint of any layout.

    Attributes:
        layers: path, as the file has them → what the layer consists of.
        weights: path of the host's → its arrays.
        tied: whether the head is the embeddings, and not stored.
    """

    def __init__(self, folder: Path):
        super().__init__(folder)
        arrays: Any = tree_flatten(self.model.parameters())
        self.weights: dict[str, Tensors] = by_layer(dict(arrays))
        del self.model.language_model  # so that what is written can be let go
        self.tied = HEAD not in self.layers
        if self.tied:
            del self.weights[HEAD]

    def refuse(self) -> None:
        check_rotation(self.folder)
        check_fused(self.folder, self.tensors)
        self.layers: Stored = by_layer(rename(self.tensors))

    def parts(self) -> dict[str, Part]:
        """The layers of a text model, an expert each, by their paths: what of the host's they are made of."""
        sizes = self.text_config
        parts: dict[str, Part] = {}
        for path in self.weights:
            mlp, stacked, projection = path.partition(".switch_mlp.")
            if not stacked:
                parts[path] = Part((path,))
            elif projection == PROJECTIONS[0]:
                shapes = {each: self.shape(f"{mlp}.switch_mlp.{each}") for each in PROJECTIONS}
                parts |= sorted(unstack(mlp, shapes, sizes).items(), key=self.order)
        return parts

    def order(self, part: tuple[str, Part]) -> int:
        """What parts of the experts of a layer are written in the order of: one projection after the other."""
        return 0

    def shape(self, path: str) -> tuple[int, ...]:
        """The shape of a layer's weight as floats."""
        return float_shape(Decoded(self.weights[path], self.packed.get(path)))

    def dtype(self, path: str) -> mx.Dtype:
        """The dtype of a layer's weight as floats; of what is packed, that of the embeddings or else the last norm."""
        norm = EMBEDDINGS.replace("embed_tokens", "norm")
        return next(self.weights[each]["weight"].dtype for each in (path, EMBEDDINGS, norm) if each not in self.packed)


class Floats(Source):
    """Floats of any layout, read from the files an expert, or some rows, at a time."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        others, found = gather(self.layers)
        self._others: Stored = others
        self._experts: dict[str, Any] = {experts.mlp: experts for experts in found}
        self._merged = {part: path for path in self._others for part in parts_of(path)}
        self._last: tuple[tuple[str, int, int], dict[str, mx.array]] = (("", 0, 0), {})

    def order(self, part: tuple[str, Part]) -> int:
        """One expert after the other, as files may have its projections in one tensor."""
        return part[1].row or 0

    def rows(self, path: str, first: int, last: int) -> mx.array:
        mlp, stacked, projection = path.partition(".switch_mlp.")
        if stacked and mlp in self._experts:
            if self._last[0] != (mlp, first, last):
                self._last = (mlp, first, last), self._of_experts(self._experts[mlp], first, last)
            return self._last[1][projection]
        if merged := self._merged.get(path):
            return cut_merged({merged: _whole(self._others[merged])}, self.text_config)[path]["weight"][first:last]
        tensors = self._others[path]
        if ROUTER_BIAS in tensors:
            with as_stored(self.tensors):
                return Decoder({}, {}, self.text_config)(path, _whole(tensors)).tensors["weight"][first:last]
        return tensors["weight"].rows(first, last)

    def _of_experts(self, stored: Any, first: int, last: int) -> dict[str, mx.array]:
        """gate, up and down of some experts, as if a layer had no others."""
        some, sizes = Experts(stored.mlp), self.text_config | {"num_experts": last - first}
        for name, tensors in stored.fused.items():
            some.fused[name] = {"weight": tensors["weight"].rows(first, last)}
        for name, experts in stored.single.items():
            some.single[name] = {number - first: _whole(experts[number]) for number in range(first, last)}
        some.unfold(last - first)
        decoded = some.decoded(sizes, Decoder({}, {}, sizes))
        return {name: each.tensors["weight"] for name, each in decoded.items()}


class Loaded(Source):
    """What MLX or another tool quantized, as the host loads it: a layer is evaluated when it is asked for."""

    def __init__(self, folder: Path):
        self._last = ""
        super().__init__(folder)

    def load(self, headers: dict[str, Header]) -> tuple[Any, dict[str, Any]]:
        check_dtypes(headers)
        check_place(self.folder, headers)
        self.notes: list[str] = []
        with noting(self.notes):
            return lazy_model(self.folder)

    def take(self, path: str) -> Tensors:
        """The arrays of a layer, and never again once another is asked for."""
        if path != self._last:
            self.weights.pop(self._last, None)
            self._last = path
            mx.eval(self.weights[path])
        return self.weights[path]

    def rows(self, path: str, first: int, last: int) -> mx.array:
        tensors = self.take(path)
        return self.as_float(path, {suffix: a[first:last] if a.ndim else a for suffix, a in tensors.items()})

    def check_packed(self) -> None:
        """Raise `CheckpointError` where MLX has no packed format for the experts, or for nothing that is quantized."""
        for path, tensors in self.layers.items():
            lost = not _is_float(tensors) and any(each not in self.packed for each in host_paths(path))
            if lost and (".mlp.experts." in path or not self.packed):
                with as_stored(self.tensors):
                    raise CheckpointError(
                        f"{path}.weight",
                        "floats, or a quantization that MLX has a format for",
                        "another one, which loads as floats here",
                        "Run mlx_lm.convert -q first and export what it wrote, or export with --dequantize.",
                    )


def open_source(folder: Path) -> Floats | Loaded:
    layers: Stored = by_layer(rename(find_tensors(folder, local_headers(folder, []))))
    return Floats(folder) if all(map(_is_float, layers.values())) else Loaded(folder)


def _is_float(tensors: dict[str, FileTensor]) -> bool:
    found = tensors.keys() - IGNORED - {ROUTER_BIAS}
    return not found or (found == {"weight"} and tensors["weight"].dtype in FLOATS)


def _whole(tensors: dict[str, Any]) -> Tensors:
    return {suffix: tensor.rows(0, tensor.shape[0]) for suffix, tensor in tensors.items()}
