"""Fixtures by llm-compressor 0.14.0.1 with compressed-tensors 0.20.0.

Blocks of integers, MXFP6, quantized attention, and experts of one layer in different formats. Runs and
dequantizes as llm_compressor.py does, whose own fixtures were made with compressed-tensors 0.19.0.
"""

import importlib
import sys

import torch
from common import save_dequantized
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llm_compressor import IGNORE, ONESHOT, decode_in_float32, integer, preset, run_oneshot, schemes

INT8 = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
ATTENTION = {"num_bits": 8, "type": "int", "strategy": "attn_head", "symmetric": False}


def weights(activations=None, **options):
    return QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**{"type": "int"} | options),
        input_activations=activations and QuantizationArgs(**activations),
    )


def blocks(bits, rows, columns, activations=None, **options):
    """As many scales as rows where rows * columns of a block is the width of the matrix."""
    return weights(activations, num_bits=bits, strategy="block", block_structure=[rows, columns], **options)


def attention():
    return QuantizationScheme(targets=["re:.*self_attn$"], input_activations=QuantizationArgs(**ATTENTION))


ATTENTION_LAYERS = "re:.*self_attn.*_proj$"
EXPERT = r"re:.*experts\.{}\..*"
ONESHOT.clear()
ONESHOT |= {
    "ct-int8-block": ("tiny", lambda: schemes(blocks(8, 2, 32, INT8)), False),
    "ct-int8-block-narrow": ("tiny", lambda: schemes(blocks(8, 8, 8, INT8)), False),
    "ct-w4a16-asym-block": ("tiny", lambda: schemes(blocks(4, 48, 32, symmetric=False)), False),
    "ct-w4a8-g32": ("tiny", lambda: schemes(weights(INT8, num_bits=4, group_size=32)), False),
    "ct-w4afp8-asym-g32": (
        "tiny",
        lambda: schemes(weights(FP8, num_bits=4, group_size=32, symmetric=False)),
        False,
    ),
    "ct-mxfp6": ("tiny", lambda: preset("MXFP6A16"), False),
    "ct-fp8-g32": ("tiny", lambda: schemes(weights(FP8, num_bits=8, type="float", group_size=32)), False),
    "ct-attention": ("tiny", lambda: schemes(attention(), integer(4, "re:.*_proj$", group_size=32)), True),
    "ct-experts-bits": (
        "tiny",
        lambda: schemes(
            integer(4, EXPERT.format(0), ATTENTION_LAYERS, group_size=32),
            integer(8, EXPERT.format(1), strategy="channel"),
            integer(4, EXPERT.format(2), group_size=32, symmetric=False),
        ),
        False,
    ),
    "ct-experts-groups": (
        "wide",
        lambda: schemes(
            integer(4, EXPERT.format(0), ATTENTION_LAYERS, group_size=128),
            integer(4, EXPERT.format(1), group_size=64),
            integer(4, EXPERT.format(2), group_size=32),
        ),
        False,
    ),
    "ct-experts-float": (
        "tiny",
        lambda: schemes(integer(4, group_size=32), ignore=[*IGNORE, EXPERT.format(2)]),
        False,
    ),
}


def decode_fp6_in_float32():
    module = importlib.import_module("compressed_tensors.compressors.mxfp6.base")
    unpack = module.unpack_fp6_from_uint8
    module.unpack_fp6_from_uint8 = lambda packed, rows, columns: unpack(packed, rows, columns, torch.float32)


if __name__ == "__main__":
    decode_in_float32()
    decode_fp6_in_float32()
    for name in sys.argv[1:] or ONESHOT:
        base, decoded = run_oneshot(name)
        save_dequantized(name, base, decoded)
        print("made", name, flush=True)
