"""Fused experts that a tool quantized: what is packed keeps all its tensors when it is cut or turned.

The numbers are worked out in numpy, not by this package.
"""

from __future__ import annotations

from collections import defaultdict

import mlx.core as mx
import numpy as np
import pytest

from mlx_lm_qwen3vlmoe import ModelArgs, quantization
from mlx_lm_qwen3vlmoe.layouts.stacking import cut
from mlx_lm_qwen3vlmoe.quantization import Decoded
from mlx_lm_qwen3vlmoe.quantization.numbers import has_mode, loaded_e4m3
from mlx_lm_qwen3vlmoe.sanitize import sanitize

PACKS = has_mode("mxfp8") and loaded_e4m3() == mx.uint8  # an older MLX reads e4m3 as its values
E8M0 = {"quant_method": "fp8", "scale_fmt": "ue8m0"}


def e4m3(codes: np.ndarray) -> np.ndarray:
    """By the definition: a sign, four bits of exponent with bias 7, three of mantissa."""
    sign, exponent, mantissa = codes >> 7, (codes >> 3) & 15, codes & 7
    value = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10.0), mantissa * 2.0**-9)
    return np.where(sign, -value, value)


def repeated(scales: np.ndarray, shape: tuple[int, ...], block: tuple[int, int]) -> np.ndarray:
    """One scale a block → one a weight; the last blocks may be cut short."""
    rows, columns = (np.arange(size) // step for size, step in zip(shape[-2:], block, strict=True))
    return scales[..., rows[:, None], columns]


def in_blocks(shape: tuple[int, ...], block: tuple[int, int], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes of e4m3, exponents of E8M0 and the weight, all different from expert to expert and block to block."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    codes[codes & 127 == 127] = 0  # NaN
    grid = (shape[0], *(-(-size // step) for size, step in zip(shape[1:], block, strict=True)))
    scales = rng.integers(120, 134, grid).astype(np.uint8)
    return codes, scales, e4m3(codes) * repeated(2.0 ** (scales.astype(float) - 127), shape, block)


def as_read(codes: np.ndarray) -> mx.array:
    """What MLX makes of e4m3 in a file."""
    return mx.array(codes) if loaded_e4m3() == mx.uint8 else mx.array(e4m3(codes)).astype(loaded_e4m3())


def arguments(sizes: tuple[int, int, int], description: dict, dtype: str = "bfloat16") -> ModelArgs:
    e, h, i = sizes
    text = {"num_experts": e, "hidden_size": h, "moe_intermediate_size": i, "num_hidden_layers": 2, "dtype": dtype}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "num_experts_per_tok": 2}
    text |= {"vocab_size": 11, "rope_theta": 5000000, "intermediate_size": 7}
    return ModelArgs.from_dict({"model_type": "qwen3_vl_moe", "text_config": text, "quantization_config": description})


def loaded(gate_up: dict, down: dict, args: ModelArgs) -> tuple[dict[str, np.ndarray], set[str]]:
    """Gate, up and down in floats as they are used, and those of them that are packed."""
    experts = "model.language_model.layers.1.mlp.experts"
    weights = {f"{experts}.gate_up_proj{suffix}": mx.array(array) for suffix, array in gate_up.items()}
    weights |= {f"{experts}.down_proj{suffix}": mx.array(array) for suffix, array in down.items()}
    tensors = defaultdict(dict)
    for name, array in sanitize(weights, args).items():
        path, _, suffix = name.rpartition(".")
        tensors[path.rpartition(".")[2]][suffix] = array
    found = {}
    for projection, layer in tensors.items():
        described = args.config.get("quantization", {})
        parameters = described.get(f"language_model.model.layers.1.mlp.switch_mlp.{projection}", described)
        parameters = {name: parameters[name] for name in ("group_size", "bits", "mode") if name in parameters}
        packed = "scales" in layer
        weight = quantization.dequantize(layer, parameters, mx.float32) if packed else layer["weight"]
        found[projection] = np.array(weight.astype(mx.float32))
    return found, {projection for projection, layer in tensors.items() if "scales" in layer}


def halves_of(gate_up: np.ndarray, down: np.ndarray, in_out: bool) -> dict[str, np.ndarray]:
    """What the host wants, ``[E, out, in]``."""
    if in_out:
        gate_up, down = gate_up.swapaxes(-1, -2), down.swapaxes(-1, -2)
    gate, up = np.split(gate_up, 2, axis=-2)
    return {"gate_proj": gate, "up_proj": up, "down_proj": down}


@pytest.mark.parametrize("in_out", [False, True], ids=["out_in", "in_out"])
@pytest.mark.parametrize(
    ("h", "i", "block"),
    [
        pytest.param(64, 96, (32, 32), id="blocks end at the border"),
        pytest.param(160, 96, (128, 128), id="blocks lie over the border"),
        pytest.param(96, 160, (64, 32), id="blocks lie over the border in one orientation"),
        pytest.param(56, 36, (24, 40), id="blocks that MLX lacks"),
    ],
)
def test_fused_fp8_with_power_of_two_scales_has_the_right_numbers(h, i, block, in_out, caplog):
    """Of every size and orientation, cut anywhere; packed where no axis has to be turned and 32 divides the blocks."""
    e = 3
    shapes = ((e, h, 2 * i), (e, i, h)) if in_out else ((e, 2 * i, h), (e, h, i))
    gate_up, down = (in_blocks(shape, block, seed) for seed, shape in enumerate(shapes))
    args = arguments((e, h, i), E8M0 | {"weight_block_size": list(block)})
    found, packed = loaded(*({"": as_read(codes), "_scale_inv": scales} for codes, scales, _ in (gate_up, down)), args)
    for projection, weight in halves_of(gate_up[2], down[2], in_out).items():
        assert np.array_equal(found[projection], weight), projection
    whole = block[1] % 32 == 0 and not in_out and PACKS
    assert packed == (set(found) if whole else set())
    assert ("They are dequantized" in caplog.text) != whole
    if in_out and block[1] % 32 == 0 and PACKS:
        assert "experts stored as [in, out]" in caplog.text


def test_fused_mxfp8_is_cut_with_its_scales():
    """A scale for 32 neighbors, as compressed-tensors has it."""
    e, h, i = 3, 64, 96
    description = {"quant_method": "compressed-tensors", "format": "mxfp8-quantized"}
    gate_up, down = (in_blocks(shape, (1, 32), seed) for seed, shape in enumerate(((e, 2 * i, h), (e, h, i))))
    args = arguments((e, h, i), description)
    found, packed = loaded(*({"": as_read(codes), "_scale": scales} for codes, scales, _ in (gate_up, down)), args)
    for projection, weight in halves_of(gate_up[2], down[2], False).items():
        assert np.array_equal(found[projection], weight), projection
    assert packed == (set(found) if PACKS else set())


@pytest.mark.parametrize("in_out", [False, True], ids=["out_in", "in_out"])
def test_fused_integers_are_cut_with_their_scales_and_biases(in_out):
    """One scale for each row as it is stored."""
    e, h, i = 3, 64, 96
    rng = np.random.default_rng(0)
    shapes = ((e, h, 2 * i), (e, i, h)) if in_out else ((e, 2 * i, h), (e, h, i))
    codes = [rng.integers(-128, 128, shape).astype(np.int8) for shape in shapes]
    scales = [2.0 ** rng.integers(-9, 0, (*shape[:2], 1)).astype(np.float32) for shape in shapes]
    args = arguments((e, h, i), {"quant_method": "compressed-tensors", "format": "int-quantized"}, "float32")
    found, packed = loaded(*({"": q, "_scale": s} for q, s in zip(codes, scales, strict=True)), args)
    for projection, weight in halves_of(*(q * s for q, s in zip(codes, scales, strict=True)), in_out).items():
        assert np.array_equal(found[projection], weight), projection
    assert packed == (set() if in_out else set(found))


def test_halves_of_nvfp4_share_the_second_scale():
    """Which is one number for all outputs of an expert."""
    tensors = {"weight": mx.arange(48).reshape(2, 6, 4), "scales": mx.arange(24).reshape(2, 6, 2)}
    first, second = cut(Decoded(tensors | {"global_scale": mx.array([5.0, 7.0])}), -2)
    for suffix, array in tensors.items():
        assert mx.array_equal(first.tensors[suffix], array[:, :3])
        assert mx.array_equal(second.tensors[suffix], array[:, 3:])
    assert first.tensors["global_scale"].tolist() == second.tensors["global_scale"].tolist() == [5.0, 7.0]
