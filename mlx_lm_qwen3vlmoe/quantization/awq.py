"""AWQ: ``w = (q - z) * s``; 4 bits, eight outputs a word, in the order 0, 2, 4, 6, 1, 3, 5, 7.

``qweight [in, out / 8]`` int32, ``qzeros [in / g, out / 8]`` int32, ``scales [in / g, out]``. Source:
``awq/modules/linear/gemm.py`` and ``awq/utils/packing_utils.py`` of AutoAWQ 0.2.9.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..fields import check_kinds
from .affine import affine
from .layer import Decoded, Format, Layer
from .packing import transpose_nibbles, transpose_stream, unpack_outputs

METHODS = ("awq",)
DETAIL = "version"
TENSORS = {"qweight", "qzeros"}
FORMATS = (Format("AWQ, 4 bits, version `gemm`", "`qweight` with `quant_method` `awq`", "affine, 4 bits", "packed"),)


def check(config: dict[str, Any]) -> None:
    check_kinds("", config, group_size=int)


def decode(layer: Layer) -> Decoded:
    version = str(layer.settings.get("version", "gemm")).lower()
    if layer.settings.get("bits", 4) != 4 or version != "gemm":
        found = f"{layer.settings.get('bits')} bits, version {version!r}"
        raise layer.error("qweight", "AWQ with 4 bits and version 'gemm'", found)
    return words_along_outputs(layer)


def words_along_outputs(layer: Layer) -> Decoded:
    """The layout of ``gemm``; with other bits than 4 the outputs are in the same order over a dense stream."""
    qweight, qzeros, scales = layer.words("qweight", 2), layer.words("qzeros", 2), layer.floats("scales", 2)
    (inputs, words), (groups, outputs) = layer.shape(qweight), layer.shape(scales)
    bits, rest = divmod(words * 32, outputs)
    if rest or not 4 <= bits <= 7 or outputs % 8:
        raise layer.error("qweight", f"4 to 7 bits for each of {outputs} outputs", list(layer.shape(qweight)))
    layer.check("qzeros", qzeros, (groups, words))
    if inputs % (8 if bits == 4 else 32):
        raise layer.error("qweight", "a multiple of 8 inputs, or 32 of other bits than 4", inputs)
    zeros = unpack_outputs(qzeros, bits).swapaxes(-1, -2)
    packed = transpose_nibbles(qweight) if bits == 4 else transpose_stream(qweight, bits)
    scales = mx.contiguous(scales.swapaxes(-1, -2))
    return affine(layer, packed, scales, zeros, bits, layer.settings.get("group_size"))
