"""What each family of formats declares, against its fixtures."""

from __future__ import annotations

import json
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import pytest
from support import QUANTIZED

from mlx_lm_qwen3vlmoe import CheckpointError, ModelArgs, quantization
from mlx_lm_qwen3vlmoe.config import linear_shape
from mlx_lm_qwen3vlmoe.layouts.names import host_name, layer_and_suffix, module_name
from mlx_lm_qwen3vlmoe.quantization import FAMILIES, Layer
from mlx_lm_qwen3vlmoe.quantization.family import Family
from mlx_lm_qwen3vlmoe.quantization.numbers import loaded_e4m3

MLX_NAMES = {"weight", "scales"}  # which mark nothing: MLX's own layers have them, too
FUSED = ("experts.gate_up_proj", "experts.down_proj")
REFUSED = {"quark-amdfp4-g32"}
IN_HALVES = "angelslim-fp8-static"  # has a scale for each half of fused experts: the whole cannot be decoded
# Marks without a fixture: see the last test, and test_renamed.py.
UNSEEN = {("fp8", "scale_weight"), ("auto-round", "weight_scale_inv")}
RENAMED = {("w8a8_int8", "weight_scale")}
RENAMED |= {("awq", "scaled_zeros"), ("bitsandbytes", "weight.quant_state")}  # see test_tools.py
WITHOUT_WORDS = {"quanto-int8": {"quant_method": "quanto", "weights": "int8"}}  # fixtures that describe nothing
BY_NAME = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.methods[0])
UNDESCRIBED = {
    "weight_scale_2": "modelopt-nvfp4",
    "weight_global_scale": "ct-nvfp4",
    "weight_scale_inv": "fp8-perexpert",
    "weight._data": "quanto-int8",
}


def described(family: Family) -> dict[Path, dict]:
    """The fixtures of a family, and their descriptions."""
    found = {}
    for file in sorted(QUANTIZED.glob("*/config.json")):
        config = json.loads(file.read_text())
        description = config.get("quantization_config") or config["text_config"].get("quantization_config")
        description = description or WITHOUT_WORDS.get(file.parent.name, {})
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


def text_config(folder: Path) -> dict:
    return ModelArgs.from_dict(json.loads((folder / "config.json").read_text())).text_config


def stacked(path: str, tensors: dict[str, mx.array], description: dict, text: dict) -> dict[str, mx.array]:
    """Fused experts with an axis for the experts in front of each tensor; other layers as they are."""
    if not path.endswith(FUSED):
        return tensors
    experts = text["num_experts"]
    layer = Layer(path, tensors, settings_of(path, description), mx.float32, host_shape=linear_shape(path, text))
    found, _ = quantization.fused(layer, experts)
    ones = {s: a.reshape(-1, 1, 1) for s, a in found.items() if a.size == 1}  # one number for all experts
    return found | {suffix: mx.broadcast_to(array, (experts, 1, 1)) for suffix, array in ones.items()}


def settings_of(path: str, description: dict) -> dict:
    return quantization.layer_settings(description, module_name(path))


def decoded(path: str, tensors: dict[str, mx.array], description: dict, text: dict | None = None) -> mx.array:
    """A layer, or stacked experts, in float32."""
    stack_shape: tuple[int, ...] = ()
    if path.endswith(FUSED):
        assert text
        stack_shape = (text["num_experts"],)
    shape = linear_shape(path, text) if text else None
    found = quantization.decode(
        Layer(path, tensors, settings_of(path, description), mx.float32, stack_shape, host_shape=shape)
    )
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
    assert seen - quantization.IGNORED - MLX_NAMES == {
        mark for mark in family.marks if (family.methods[0], mark) not in UNSEEN | RENAMED
    }


@BY_NAME
def test_a_family_turns_what_it_declares(family, monkeypatch):
    """The codes of a layer that decoding copies with its last two axes swapped: stacked that way, it copies nothing."""
    copied, contiguous = [], mx.contiguous
    monkeypatch.setattr(mx, "contiguous", lambda array, *options: copied.append(array) or contiguous(array, *options))
    turned = set()
    for folder, description in described(family).items():
        text = text_config(folder)
        for path, tensors in layers_of(folder).items():
            copied.clear()
            with suppress(*[CheckpointError] * (folder.name in {*REFUSED, IN_HALVES})):
                tensors = stacked(path, tensors, description, text)
                decoded(path, tensors, description, text)
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
        if folder.name == IN_HALVES:
            continue
        fused = {path: tensors for path, tensors in layers_of(folder).items() if path.endswith(FUSED[0])}
        text = text_config(folder)
        for path, stored in fused.items():
            tensors = stacked(path, stored, description, text)
            for axis in (-1, -2):
                whole = mx.split(decoded(path, tensors, description, text), 2, axis)
                if pair := quantization.halves(tensors, axis, description):
                    for half, expected in zip(pair, whole, strict=True):
                        assert mx.array_equal(decoded(path, half, description, text), expected)
                pairs.append(pair)
    assert any(pairs) == (type(family).halves is not Family.halves)
    assert any(pairs) or "fp8" not in family.methods


def test_marks_tell_the_family_where_there_is_no_description():
    undescribed = {suffix for family in FAMILIES for suffix in family.undescribed}
    assert undescribed == UNDESCRIBED.keys() | {"scale_weight"}  # the latter: see test_renamed.py
    for suffix, name in UNDESCRIBED.items():
        folder = QUANTIZED / name
        (description,) = (found[folder] for family in FAMILIES if folder in (found := described(family)))
        path, tensors = next(item for item in layers_of(folder).items() if suffix in item[1])
        assert mx.array_equal(decoded(path, tensors, {}), decoded(path, tensors, description))


@pytest.mark.parametrize(("method", "suffix"), sorted(UNSEEN))
def test_scales_of_fp8_may_have_either_name(method, suffix):
    tensors = {"weight": mx.full((8, 32), 0x38, loaded_e4m3()), suffix: mx.array([[2.5]])}  # 1.0 in e4m3
    if tensors["weight"].dtype != mx.uint8:  # an older MLX reads the values
        tensors["weight"] = mx.ones((8, 32), loaded_e4m3())
    found = decoded("layer", tensors, {"quant_method": method, "group_size": 0, "weight_block_size": None})
    assert mx.array_equal(found, mx.full((8, 32), 2.5))


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
        text = text_config(folder)
        for changed in kinds if field != "quant_method" else []:
            with suppress(CheckpointError):
                description = quantization.read_description(old | changed)
                for path, tensors in layers[folder].items():
                    decoded(path, stacked(path, tensors, description, text), description, text)


@pytest.mark.parametrize("key", ["model.language_model.layers.0.self_attn.q_proj", r".*\.q_proj"])
def test_autorounds_extra_config_is_of_the_layers_that_it_names(key):
    description = {"quant_method": "auto-round", "bits": 4, "extra_config": {key: {"bits": 8}}}
    name = "model.language_model.layers.0.self_attn.q_proj"
    assert quantization.layer_settings(description, name)["bits"] == 8
    assert quantization.layer_settings(description, name.replace("q_proj", "k_proj"))["bits"] == 4
