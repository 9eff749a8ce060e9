"""AWQ: ``w = (q - z) * s``; 4 bits, eight outputs a word, in the order 0, 2, 4, 6, 1, 3, 5, 7.

``qweight [in, out / 8]`` int32, ``qzeros [in / g, out / 8]`` int32, ``scales [in / g, out]``. Source:
``awq/modules/linear/gemm.py`` and ``awq/utils/packing_utils.py`` of AutoAWQ 0.2.9.
"""

from __future__ import annotations

import mlx.core as mx

from .affine import affine
from .layer import Decoded, Format, Layer
from .packing import transpose_nibbles, unpack_outputs

METHODS = ("awq",)
DETAIL = "version"
TENSORS = {"qweight", "qzeros"}
FORMATS = (Format("AWQ, 4 bits, version `gemm`", "`qweight` with `quant_method` `awq`", "affine, 4 bits", "packed"),)


def decode(layer: Layer) -> Decoded:
    version = str(layer.settings.get("version", "gemm")).lower()
    if layer.settings.get("bits", 4) != 4 or version != "gemm":
        found = f"{layer.settings.get('bits')} bits, version {version!r}"
        raise layer.error("qweight", "AWQ with 4 bits and version 'gemm'", found)
    return words_along_outputs(layer)


def words_along_outputs(layer: Layer) -> Decoded:
    """The layout of ``gemm``."""
    qweight, qzeros, scales = layer.words("qweight", 2), layer.words("qzeros", 2), layer.floats("scales", 2)
    inputs, words = layer.shape(qweight)
    groups = layer.shape(scales)[0]
    layer.check("scales", scales, (groups, words * 8))
    layer.check("qzeros", qzeros, (groups, words))
    if inputs % 8:
        raise layer.error("qweight", "a multiple of 8 inputs", inputs)
    zeros = unpack_outputs(qzeros).swapaxes(-1, -2)
    scales = mx.contiguous(scales.swapaxes(-1, -2))
    return affine(layer, transpose_nibbles(qweight), scales, zeros, 4, layer.settings.get("group_size"))
