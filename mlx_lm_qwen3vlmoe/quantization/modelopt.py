"""NVIDIA ModelOpt 0.47: FP8, NVFP4, MXFP4 and MXFP8.

| algorithm | ``weight``                | ``weight_scale``                                       | ``weight_scale_2``  |
|-----------|---------------------------|--------------------------------------------------------|---------------------|
| FP8       | e4m3 ``[out, in]``        | float ``[]``, ``[out]`` or ``[out/128, 1, in/128, 1]`` |                     |
| NVFP4     | uint8 ``[out, in / 2]``   | e4m3 ``[out, in / 16]``                                | float32 ``[]``      |
| MXFP4     | uint8 ``[out, in / 2]``   | e8m0 ``[out, in / 32]``                                |                     |
| MXFP8     | e4m3 ``[out, in]``        | e8m0 ``[out, in / 32]``                                |                     |

Source: ``modelopt/torch/export/quant_utils.py`` and ``modelopt/torch/quantization/qtensor``.
"""

from __future__ import annotations

import mlx.core as mx

from . import fp8
from .layer import Decoded, Format, Layer
from .microscaling import mxfp4, mxfp8, nvfp4

METHODS = ("modelopt",)
DETAIL = "quant_algo"
TENSORS = {"weight_scale", "weight_scale_2", "pre_quant_scale"}
FORMATS = (
    Format(
        "NVFP4 of compressed-tensors and ModelOpt",
        "`weight_global_scale`, or `weight_scale_2`",
        "experts: `nvfp4` on a GPU with mlx-lm 0.32.1 or newer; else float",
        "packed; 16 bits",
    ),
)


def decode(layer: Layer) -> Decoded:
    algorithm = str(layer.settings.get("quant_algo")).upper()
    if layer.has("weight_scale_2"):
        return nvfp4(layer, layer.take("weight", 2), layer.take("weight_scale"), layer.number("weight_scale_2"))
    if layer.has("weight_scale", mx.uint8) and layer.has("weight"):
        return microscaled(layer, layer.take("weight", 2), layer.take("weight_scale", 2), algorithm)
    blocks = (128, 128) if algorithm == "FP8_PB_WO" else (0, 0) if algorithm.startswith("FP8") else None
    return fp8.scaled(layer, layer.take("weight", 2), "weight_scale", blocks)


def microscaled(layer: Layer, codes: mx.array, scales: mx.array, algorithm: str) -> Decoded:
    """MXFP4 or MXFP8: two codes a byte, or one."""
    if "MXFP4" in algorithm:
        return mxfp4(layer, codes, scales)
    if "MXFP8" in algorithm:
        return mxfp8(layer, codes, scales)
    raise layer.error("weight", "MXFP4 or MXFP8 in quantization_config (quant_algo)", repr(algorithm))
