"""Layers as they are stored → layers as MLX has them, whoever quantized them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from .. import quantization
from ..config import linear_shape
from ..errors import MISSING_FILE, CheckpointError, MissingTensorError
from ..quantization import ACT_ORDER, Decoded, Layer, Tensors
from ..quantization.checks import check_packed
from ..runtime.backend import planning, takes_global_scale
from ..runtime.lazy import in_pieces
from ..terminal import in_bytes
from .names import module_name, stranger

logger = logging.getLogger(__name__)

ROUTER_BIAS = "e_score_correction_bias"  # [experts], which cosmos-rl writes for a model that has none


class Decoder:
    """Decodes the layers of one checkpoint, and keeps account of those that become float.

    Args:
        description: how another tool quantized the checkpoint, see `mlx_lm_qwen3vlmoe.quantization.read_description`.
        own: MLX's own description, ``config["quantization"]``.
        text: the text config, for the sizes of the layers and the checkpoint's dtype.
    """

    def __init__(self, description: dict[str, Any], own: dict[str, Any], text: dict[str, Any]):
        self.description, self.own, self.text = description, own, text
        self.dtype: mx.Dtype = getattr(mx, text.get("dtype") or "bfloat16")
        self._reasons: dict[str, None] = {}
        self._before = self._after = 0

    def __call__(self, path: str, tensors: Tensors) -> Decoded:
        """One layer; raises `CheckpointError`."""
        if ROUTER_BIAS in tensors:
            tensors = _without_bias(path, tensors)
        if not quantization.is_foreign(tensors):
            return self._mlx(path, tensors)
        return self._count(tensors, self._foreign(path, tensors, ()))

    def stacked(self, path: str, experts: int, stored: Callable[[slice], Tensors]) -> Decoded:
        """A stack of alike layers.

        Args:
            stored: a range of experts → their tensors, with an axis for the experts in front.
        """
        tensors = stored(slice(0, experts))
        if not quantization.is_foreign(tensors):
            return self._mlx(path, tensors)
        whole = self._count(tensors, self._foreign(path, tensors, (experts,)))
        if not whole.tensors or whole.why_float == ACT_ORDER:  # what a piece of that becomes, its values decide
            return whole

        def some(part: slice) -> Tensors:
            return self._foreign(path, stored(part), (part.stop - part.start,)).tensors

        return whole._replace(tensors=in_pieces(whole.tensors, some, spared=1 if whole.parameters else 0))

    def fused(self, path: str, tensors: Tensors, experts: int) -> tuple[Tensors, tuple[int, ...] | None]:
        """The tensors of fused experts with an axis for the experts in front, and the shape of the floats, if known."""
        return quantization.fused(self._layer(path, tensors, ()), experts)

    def stacks(self, path: str, tensors: Tensors) -> bool:
        """Whether alike layers with such tensors can be stacked before they are decoded."""
        return quantization.stacks(tensors, self.settings(path))

    def _foreign(self, path: str, tensors: Tensors, stack_shape: tuple[int, ...]) -> Decoded:
        """A layer that another tool quantized."""
        return quantization.decode(self._layer(path, tensors, stack_shape))

    def _layer(self, path: str, tensors: Tensors, stack_shape: tuple[int, ...]) -> Layer:
        return Layer(
            path,
            tensors,
            self.settings(path),
            self.dtype,
            stack_shape,
            takes_global_scale() and ".mlp.experts." in path,
            planning(),
            linear_shape(path, self.text),
        )

    def _mlx(self, path: str, tensors: Tensors) -> Decoded:
        """A float layer, or one that MLX packed; the parameters only where the host would not find them."""
        separate = ".mlp.experts." in path
        if separate and (unknown := sorted(tensors.keys() - {"weight", "scales", "biases"})):
            raise stranger(f"{path}.{unknown[0]}")
        for suffix, array in tensors.items():  # the host's own tests pass None
            if array is not None and "scales" not in tensors and not mx.issubdtype(array.dtype, mx.floating):
                if array.dtype == mx.uint32:
                    raise MissingTensorError(
                        f"{path}.scales", f"this tensor beside the packed {suffix}", "none", MISSING_FILE
                    )
                remedy = (
                    "config.json does not say how to read them. Use the config.json that was saved with this tensor."
                )
                raise CheckpointError(f"{path}.{suffix}", "floats", array.dtype, remedy)
        entry = self.own.get(module_name(path))
        if "scales" not in tensors or (entry is None and not separate):
            return Decoded(tensors)
        parameters = entry if isinstance(entry, dict) else self.own
        parameters = {field: parameters[field] for field in ("group_size", "bits", "mode") if parameters.get(field)}
        if separate:  # all others are held against the host's shapes later
            words = tensors.get("weight", tensors["scales"])
            inputs = words.shape[-1] * 32 // parameters.get("bits", 32) if words.ndim else 0
            check_packed(path, tensors, (*words.shape[:-1], inputs), (), parameters)
        return Decoded(tensors, parameters)

    def stack(self, suffix: str, tensors: list[mx.array]) -> mx.array:
        """Tensors of alike layers in one; those whose axes change places later are copied that way, and only once."""
        if suffix in quantization.turned(self.description) and tensors[0].ndim == 2:
            return mx.stack([tensor.swapaxes(-1, -2) for tensor in tensors]).swapaxes(-1, -2)
        return mx.stack(tensors)

    def describes_alike(self, paths: list[str]) -> bool:
        """Whether the description says the same of these layers."""
        first, *others = ((self.settings(path), self.own.get(module_name(path))) for path in paths)
        return all(other == first for other in others)

    def settings(self, path: str) -> dict[str, Any]:
        """What the description says of a layer."""
        return quantization.layer_settings(self.description, module_name(path))

    def in_common(self, layers: list[Decoded]) -> list[Decoded]:
        """Layers of one shape, to be stacked, in one format."""
        if (common := quantization.common(layers)) is not None:
            return common
        stored = {layer.tensors["weight"].dtype for layer in layers if layer.parameters is None}
        dtype = self.dtype if stored <= {self.dtype} else mx.float32  # which has the values of all
        weights = [self.as_float(layer, "experts of one layer in different formats", dtype) for layer in layers]
        return [Decoded({"weight": weight.astype(dtype)}) for weight in weights]

    def as_float(self, layer: Decoded, why: str, dtype: mx.Dtype | None = None) -> mx.array:
        """The weight of a layer that cannot stay packed."""
        if layer.parameters is None:
            return layer.tensors["weight"]
        weight = quantization.dequantize(layer.tensors, layer.parameters, dtype or self.dtype)
        return self._count(layer.tensors, Decoded({"weight": weight}, None, why)).tensors["weight"]

    def _count(self, stored: Tensors, decoded: Decoded) -> Decoded:
        if decoded.why_float:
            self._reasons[decoded.why_float] = None
            self._before += sum(array.nbytes for array in stored.values())
            self._after += decoded.tensors["weight"].nbytes
        return decoded

    def report(self) -> None:
        """Log once what became float, and what that costs."""
        if self._reasons:
            logger.warning(
                "MLX cannot keep some layers of this checkpoint quantized (%s). They are dequantized: %s in memory "
                "for %s in the file. mlx_lm.convert -q writes a smaller copy.",
                ", ".join(self._reasons),
                in_bytes(self._after),
                in_bytes(self._before),
            )


def _without_bias(path: str, tensors: Tensors) -> Tensors:
    """A router without a bias of zeros, one number an expert, which is looked at; another would change the choice."""
    bias = tensors[ROUTER_BIAS]
    if not planning() and mx.any(bias != 0).item():
        raise CheckpointError(
            f"{path}.{ROUTER_BIAS}",
            "zeros, as the router of this model type has no bias",
            "other numbers",
            "Is config.json from this checkpoint? If so, the model was changed, and this package cannot load it.",
        )
    return {suffix: array for suffix, array in tensors.items() if suffix != ROUTER_BIAS}
