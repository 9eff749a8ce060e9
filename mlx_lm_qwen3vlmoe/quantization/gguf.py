"""GGUF's Q4_0 in safetensors, as GPTQModel writes it: ``w = d * (q - 8)``, 32 neighbors along *in* with one ``d``.

``qweight [out, 18 * in / 32]`` bytes: of each block first ``d`` in float16, then 16 bytes, whose low nibbles are the
first 16 values and whose high ones the others. GGUF's other types are not known here. Source:
``nn_modules/qlinear/gguf.py`` of GPTQModel 7.7, and ``block_q4_0`` of ggml.
"""

from __future__ import annotations

import mlx.core as mx

from .affine import affine
from .family import Family
from .layer import Decoded, Layer
from .packing import pack


class Gguf(Family):
    methods = ("gguf",)
    detail = "checkpoint_format"
    marks = ("qweight",)
    fields = ("bits", "checkpoint_format", "format", "desc_act", "group_size", "sym")
    formats = ("GGUF's Q4_0 by GPTQModel | `qweight` in uint8, by `quant_method` | affine, 4 bits | packed",)

    def decode(self, layer: Layer) -> Decoded:
        named = layer.settings.get("format", "q_0")
        layer.setting("checkpoint_format", "q_0 (Q4_0)", "q_0", "q4_0", default=named)
        layer.setting("bits", "4 bits", 4, default=4)
        blocks = layer.take("qweight", 2)
        outputs, size = layer.shape(blocks)
        if blocks.dtype != mx.uint8 or size % 18:
            raise layer.error("qweight", "blocks of 18 bytes (uint8)", f"{blocks.dtype} {[outputs, size]}")
        blocks = blocks.reshape(*blocks.shape[:-1], -1, 18)
        scales = mx.contiguous(blocks[..., :2]).view(mx.float16).squeeze(-1)
        pairs = blocks[..., 2:]
        values = mx.concatenate([pairs & 15, pairs >> 4], -1).flatten(-2)
        return affine(layer, pack(values, 4), scales, None, 4, 32)
