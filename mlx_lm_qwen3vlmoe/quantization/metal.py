"""``metal`` of transformers: MLX's own packing, ``w = s * q + b``, with ``biases`` under the name ``qbiases``.

``weight [out, in * bits / 32]`` uint32, ``scales`` and ``qbiases [out, in / g]``. It also has groups of 16, which MLX
lacks. Source: ``integrations/metal_quantization.py`` of transformers 5.23.
"""

from __future__ import annotations

import mlx.core as mx

from ..errors import check_kinds
from .family import Description, Family
from .layer import Decoded, Layer
from .packing import unpack


class Metal(Family):
    methods = ("metal",)
    detail = "bits"
    marks = ("qbiases",)
    fields = ("bits", "group_size")
    formats = (
        "metal of transformers, 2, 4 or 8 bits | `qbiases` | affine | packed",
        "metal, groups of 16 | the same, with `group_size` 16 | float | 16 bits",
    )

    def check(self, description: Description) -> None:
        check_kinds("", description, group_size=int)

    def decode(self, layer: Layer) -> Decoded:
        bits = layer.setting("bits", "2, 4 or 8 bits", 2, 4, 8, default=4)
        size = layer.setting("group_size", "groups of 16, 32, 64 or 128", 16, 32, 64, 128, default=64)
        words, scales, biases = layer.take("weight", 2), layer.floats("scales", 2), layer.floats("qbiases", 2)
        if words.dtype != mx.uint32:
            raise layer.error("weight", "packed integers (uint32)", words.dtype)
        outputs, inputs = layer.shape(words)[0], layer.shape(words)[1] * 32 // bits
        if inputs % size:
            raise layer.error("weight", f"a multiple of {size} inputs of {bits} bits", inputs)
        shape = (outputs, inputs // size)
        layer.check("scales", scales, shape)
        layer.check("qbiases", biases, shape)
        if size > 16:
            tensors = {"weight": words, "scales": scales, "biases": biases}
            return Decoded(tensors, {"group_size": size, "bits": bits})
        wide, shift = (mx.expand_dims(array.astype(mx.float32), -1) for array in (scales, biases))
        weight = unpack(words, bits).reshape(*scales.shape, size) * wide + shift
        return Decoded({"weight": weight.flatten(-2).astype(layer.dtype)}, None, "groups of 16")
