"""optimum-quanto: int8 with a scale an output, which transformers writes without a description in config.json.

``weight._data [out, in]`` int8 and ``weight._scale [out, 1]`` or ``[]``: ``w = q * s``. Its 2 and 4 bits, which are
packed and have other names, and its float8 are not known here. Source: ``tensor/weights/qbytes.py`` of optimum-quanto
0.2.7.
"""

from __future__ import annotations

import mlx.core as mx

from .affine import signed
from .family import Family
from .layer import Decoded, Layer


class Quanto(Family):
    methods = ("quanto",)
    detail = "weights"
    marks = ("weight._data", "weight._scale")
    fields = ("weights", "activations")
    formats = ("optimum-quanto int8 | `weight._data` in int8 | affine, 8 bits | packed",)
    undescribed = ("weight._data",)

    def decode(self, layer: Layer) -> Decoded:
        codes, scales = layer.take("weight._data", 2), layer.floats("weight._scale", 0, 1, 2)
        if codes.dtype != mx.int8:
            raise layer.unsupported("weight._data", "8-bit integers", codes.dtype)
        outputs = layer.shape(codes)[0]
        layer.check("weight._scale", scales, (outputs, 1), (), (1,), (1, 1))
        scales = mx.broadcast_to(scales.reshape(*layer.stack_shape, -1, 1), (*layer.stack_shape, outputs, 1))
        return signed(layer, codes, scales)
