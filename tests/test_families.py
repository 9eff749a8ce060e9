"""Packed experts keep all tensors when they are cut or turned, and what each family of formats declares is true."""

from __future__ import annotations

import json
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from support import QUANTIZED

from mlx_lm_qwen3vlmoe import CheckpointError, ModelArgs, quantization
from mlx_lm_qwen3vlmoe.config import linear_shape
from mlx_lm_qwen3vlmoe.layouts.names import host_name, layer_and_suffix, module_name
from mlx_lm_qwen3vlmoe.quantization import FAMILIES, Layer
from mlx_lm_qwen3vlmoe.quantization.family import Family
from mlx_lm_qwen3vlmoe.quantization.numbers import has_mode
from mlx_lm_qwen3vlmoe.sanitize import sanitize

E8M0 = {"quant_method": "fp8", "scale_fmt": "ue8m0"}


# --- fused experts whose numbers are worked out in numpy ------------------------------------------------------------


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
    found, packed = loaded(*({"": codes, "_scale_inv": scales} for codes, scales, _ in (gate_up, down)), args)
    for projection, weight in halves_of(gate_up[2], down[2], in_out).items():
        assert np.array_equal(found[projection], weight), projection
    whole = block[1] % 32 == 0 and not in_out and has_mode("mxfp8")
    assert packed == (set(found) if whole else set())
    assert ("they are dequantized" in caplog.text) != whole
    if in_out and block[1] % 32 == 0 and has_mode("mxfp8"):
        assert "experts stored as [in, out]" in caplog.text


def test_fused_mxfp8_is_cut_with_its_scales():
    """A scale for 32 neighbors, as compressed-tensors has it."""
    e, h, i = 3, 64, 96
    description = {"quant_method": "compressed-tensors", "format": "mxfp8-quantized"}
    gate_up, down = (in_blocks(shape, (1, 32), seed) for seed, shape in enumerate(((e, 2 * i, h), (e, h, i))))
    args = arguments((e, h, i), description)
    found, packed = loaded(*({"": codes, "_scale": scales} for codes, scales, _ in (gate_up, down)), args)
    for projection, weight in halves_of(gate_up[2], down[2], False).items():
        assert np.array_equal(found[projection], weight), projection
    assert packed == (set(found) if has_mode("mxfp8") else set())


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


# --- what families declare ------------------------------------------------------------------------------------------

MLX_NAMES = {"weight", "scales"}  # which mark nothing: MLX's own layers have them, too
FUSED = ("experts.gate_up_proj", "experts.down_proj")
REFUSED = {"quark-amdfp4-g32"}
UNSEEN = {("fp8", "weight_scale"), ("auto-round", "weight_scale_inv")}  # marks without a fixture: see the last test
BY_NAME = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.methods[0])
UNDESCRIBED = {
    "weight_scale_2": "modelopt-nvfp4",
    "weight_global_scale": "ct-nvfp4",
    "weight_scale_inv": "fp8-perexpert",
}


def described(family: Family) -> dict[Path, dict]:
    """The fixtures of a family, and their descriptions."""
    found = {}
    for file in sorted(QUANTIZED.glob("*/config.json")):
        config = json.loads(file.read_text())
        description = config.get("quantization_config") or config["text_config"].get("quantization_config") or {}
        if description.get("quant_method") in family.methods:
            found[file.parent] = description
    return found


def layers_of(folder: Path) -> dict[str, dict[str, mx.array]]:
    """Layers that a tool quantized, linear ones and fused experts, by the host's names."""
    layers: dict[str, dict[str, mx.array]] = defaultdict(dict)
    for file in folder.glob("model*.safetensors"):
        for name, array in mx.load(str(file)).items():
            if target := host_name(name):
                path, suffix = layer_and_suffix(target)
                layers[path][suffix] = array
    ignored = quantization.IGNORED
    return {path: found for path, found in layers.items() if quantization.is_foreign(found) and found.keys() - ignored}


def decoded(path: str, tensors: dict[str, mx.array], description: dict, shape=None) -> mx.array:
    """A layer, or fused experts, in float32."""
    settings = quantization.layer_settings(description, module_name(path))
    stack_shape: tuple[int, ...] = ()
    if path.endswith(FUSED):
        stack_shape = tensors["weight"].shape[:1]
        ones = {s: a.reshape(-1, 1, 1) for s, a in tensors.items() if a.size == 1}  # one number for all experts
        tensors = tensors | {suffix: mx.broadcast_to(array, (*stack_shape, 1, 1)) for suffix, array in ones.items()}
    found = quantization.decode(Layer(path, tensors, settings, mx.float32, stack_shape, host_shape=shape))
    if found.parameters is None:
        return found.tensors["weight"]
    return quantization.dequantize(found.tensors, found.parameters, mx.float32)


@BY_NAME
def test_a_family_has_fixtures_with_its_detail_and_all_of_its_marks(family):
    fixtures = described(family)
    assert fixtures
    assert any(family.detail in description for description in fixtures.values()) == bool(family.detail)
    seen = {suffix for folder in fixtures for tensors in layers_of(folder).values() for suffix in tensors}
    assert seen
    assert seen - quantization.IGNORED - MLX_NAMES == {m for m in family.marks if (family.methods[0], m) not in UNSEEN}


@BY_NAME
def test_a_family_turns_what_it_declares(family, monkeypatch):
    """The codes of a layer that decoding copies with its last two axes swapped: stacked that way, it copies nothing."""
    copied, contiguous = [], mx.contiguous
    monkeypatch.setattr(mx, "contiguous", lambda array, *options: copied.append(array) or contiguous(array, *options))
    turned = set()
    for folder, description in described(family).items():
        text = ModelArgs.from_dict(json.loads((folder / "config.json").read_text())).text_config
        for path, tensors in layers_of(folder).items():
            copied.clear()
            with suppress(*[CheckpointError] * (folder.name in REFUSED)):
                decoded(path, tensors, description, shape=linear_shape(path, text))
            largest = max(tensors, key=lambda suffix: tensors[suffix].nbytes)
            codes = tensors[largest]
            for array in copied:
                if array.shape == codes.T.shape and array.dtype.size == codes.dtype.size:
                    same = mx.array_equal(array.T.astype(mx.int64), codes.view(array.dtype).astype(mx.int64))
                    turned |= {largest} if same.item() else set()
    assert turned == set(family.turned)


@BY_NAME
def test_halves_of_fused_experts_decode_by_themselves(family):
    """So that two of them wait in bytes, and not in floats."""
    pairs = []
    for folder, description in described(family).items():
        fused = {path: tensors for path, tensors in layers_of(folder).items() if path.endswith(FUSED[0])}
        for path, tensors in fused.items():
            for axis in (-1, -2):
                whole = mx.split(decoded(path, tensors, description), 2, axis)
                if pair := quantization.halves(tensors, axis, description):
                    for half, expected in zip(pair, whole, strict=True):
                        assert mx.array_equal(decoded(path, half, description), expected)
                pairs.append(pair)
    assert any(pairs) == (type(family).halves is not Family.halves)
    assert any(pairs) or "fp8" not in family.methods


def test_marks_tell_the_family_where_there_is_no_description():
    assert {suffix for family in FAMILIES for suffix in family.undescribed} == UNDESCRIBED.keys()
    for suffix, name in UNDESCRIBED.items():
        folder = QUANTIZED / name
        (description,) = (found[folder] for family in FAMILIES if folder in (found := described(family)))
        path, tensors = next(item for item in layers_of(folder).items() if suffix in item[1])
        assert mx.array_equal(decoded(path, tensors, {}), decoded(path, tensors, description))


@pytest.mark.parametrize(("method", "suffix"), sorted(UNSEEN))
def test_scales_of_fp8_may_have_either_name(method, suffix):
    codes, *_ = (array[0] for array in in_blocks((1, 32, 64), (32, 64), 0))
    tensors = {"weight": mx.array(codes), suffix: mx.array([[2.0]])}
    found = decoded("layer", tensors, {"quant_method": method, "group_size": 0, "weight_block_size": None})
    assert np.array_equal(found, 2 * e4m3(codes))


class Partial(Family):
    methods, detail, marks, formats = ("x",), "", (), ()


def test_a_family_without_a_part_fails_at_import():
    with pytest.raises(TypeError, match="decode"):
        Partial()
    with pytest.raises(TypeError, match="Lacking: expected formats, marks, found nothing"):
        type("Lacking", (Family,), {"methods": ("x",), "detail": ""})


@BY_NAME
def test_a_field_of_another_type_is_one_error_or_none(family):
    """Every field of a description, and of what it says of single layers."""
    fields: dict[str, tuple[Path, dict]] = {}
    for folder, old in described(family).items():
        fields |= {field: (folder, old) for field in old if field not in fields}
    layers = {folder: layers_of(folder) for folder, _ in fields.values()}
    for field, (folder, old) in fields.items():
        kinds = [{field: value} for value in ([], ["x"], {"x": 1}, "x", 1.5, 10**12)]
        if isinstance(old[field], dict):
            kinds += [{field: {key: value}} for key in old[field] for value in ([], ["x"], "x", 1.5)]
        text = ModelArgs.from_dict(json.loads((folder / "config.json").read_text())).text_config
        for changed in kinds if field != "quant_method" else []:
            with suppress(CheckpointError):
                description = quantization.read_description(old | changed)
                for path, tensors in layers[folder].items():
                    decoded(path, tensors, description, shape=linear_shape(path, text))


@pytest.mark.parametrize("key", ["model.language_model.layers.0.self_attn.q_proj", r".*\.q_proj"])
def test_autorounds_extra_config_is_of_the_layers_that_it_names(key):
    description = {"quant_method": "auto-round", "bits": 4, "extra_config": {key: {"bits": 8}}}
    name = "model.language_model.layers.0.self_attn.q_proj"
    assert quantization.layer_settings(description, name)["bits"] == 8
    assert quantization.layer_settings(description, name.replace("q_proj", "k_proj"))["bits"] == 4
