"""Formats that differ from a fixture's by names, by a field, or by how the same numbers are put together."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model
from support import QUANTIZED
from support.changes import check_refusal
from support.checkpoints import TOLERANCE, Checkpoint, logits_error

from mlx_lm_qwen3vlmoe import CheckpointError, ModelArgs, quantization
from mlx_lm_qwen3vlmoe.sanitize import sanitize

Change = Callable[[Checkpoint], None]
MX = {"_type": "MXDynamicActivationMXWeightConfig", "_data": {"block_size": 32}}


def renamed(names: dict[str, str], description: dict | None = None, **fields: object) -> Change:
    """Other ends of names, and another description, or other fields of it."""

    def change(c: Checkpoint) -> None:
        for old, new in names.items():
            c.tensors = {re.sub(rf"{old}$", new, key): array for key, array in c.tensors.items()}
        c.config["quantization_config"] = (description or c.config["quantization_config"]) | fields

    return change


def torchao(names: dict[str, str], config: dict) -> Change:
    return renamed(
        {r"\.weight_scale": "._weight_scale", **names}, {"quant_method": "torchao", "quant_type": {"default": config}}
    )


def without(c: Checkpoint, end: str) -> None:
    c.tensors = {key: array for key, array in c.tensors.items() if not key.endswith(end)}


def gptqmodel_int8(c: Checkpoint) -> None:
    renamed({r"\.SCB": ".weight_scb"})(c)
    without(c, ".weight_format")


def gptqmodel_nf4(c: Checkpoint) -> None:
    ends = {rf"\.weight\.{name}": f".weight_{name}" for name in ("absmax", "quant_map")}
    ends |= {rf"\.weight\.nested_{name}": f".weight_nested_{name}" for name in ("absmax", "quant_map")}
    renamed({**ends, r"\.weight\.quant_state\.bitsandbytes__nf4": ".weight_quant_state"})(c)


def inverse(c: Checkpoint) -> None:
    for key, (dtype, array) in c.tensors.items():
        if key.endswith("weight_scale_inv"):
            c.tensors[key] = (dtype, 1 / array)
    c.config["quantization_config"] |= {"weight_scale_semantics": "inverse", "weight_scale_method": "block"}


def inverse_by_a_rule(c: Checkpoint) -> None:
    inverse(c)
    fields = {"weight_scale_semantics": c.config["quantization_config"].pop("weight_scale_semantics")}
    c.config["quantization_config"]["dynamic"] = {"-:.*lm_head": {}, r"+:.*layers\.\d+\..*": fields}


KINDS: dict[str, tuple[str, Change]] = {
    "llm-awq": ("awq-gemv-fast", renamed({r"\.qzeros": ".scaled_zeros"}, version="gemv", backend="llm-awq")),
    "llm-awq by GPTQModel": ("awq-gemv-fast", renamed({r"\.qzeros": ".scaled_zeros"}, version="llm-awq")),
    "GPTQModel's int8 of bitsandbytes": ("bnb-int8", gptqmodel_int8),
    "GPTQModel's nf4 of bitsandbytes": ("bnb-nf4", gptqmodel_nf4),
    "the same, double quantized": ("bnb-nf4-double", gptqmodel_nf4),
    "GPTQModel's inverse scales": ("fp8-perexpert", inverse),
    "the same in a rule": ("fp8-perexpert", inverse_by_a_rule),
    "MXFP4 of torchao": ("modelopt-mxfp4", torchao({r"_proj\.weight": "_proj._weight_qdata"}, MX)),
    "MXFP8 of torchao": ("ct-mxfp8", torchao({r"_proj\.weight": "_proj._weight_qdata"}, MX)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_names_change_no_number(kind, tmp_path):
    name, change = KINDS[kind]
    checkpoint = Checkpoint(name)
    change(checkpoint)
    assert logits_error(checkpoint.save(tmp_path), checkpoint.source) < TOLERANCE


BROKEN: list[tuple[str, Change, list[str]]] = [
    ("fp8-perexpert", renamed({}, weight_scale_semantics="square"), ["weight_scale_semantics", '"square"']),
    ("fp8-perexpert", renamed({}, weight_scale_method="column"), ["weight_scale_method", '"column"']),
    ("autoround-mxfp4", renamed({}, rotation_config={"algorithm": "quarot"}), ["rotation_config", "quarot"]),
    ("autoround-mxfp4", renamed({}, rotation_config="hadamard"), ["rotation_config", "hadamard"]),
    (
        "autoround-mxfp4",
        renamed({}, rotation_config={"algorithm": "hadamard", "hadamard_type": "hadamard", "block_size": 64}),
        ["blocks of 64 inputs", "found 96"],
    ),
    ("gptqmodel-gguf-q4", renamed({}, checkpoint_format="q_k_m"), ["checkpoint_format", '"q_k_m"']),
    ("gptqmodel-gguf-q4", renamed({}, bits=8), ["bits", "found 8"]),
    ("gptq-w4-sym", renamed({}, rotation="hadamard"), ["quantization_config: rotation", "no unknown field"]),
    ("gptq-w4-sym", renamed({}, dynamic={"+:.*": {"codebook": 1}}), ["dynamic.+:.*.codebook", "no unknown field"]),
    ("ct-w4a16-g32", lambda c: scheme(c)["weights"].update(zero_shift=1), ["weights.zero_shift", "no unknown field"]),
]


def scheme(c: Checkpoint) -> dict:
    return c.config["quantization_config"]["config_groups"]["group_0"]


@pytest.mark.parametrize(("name", "change", "expected"), BROKEN)
def test_what_changes_the_numbers_in_another_way_is_one_error(name, change, expected, tmp_path):
    check_refusal(name, change, expected, tmp_path)


def test_another_unknown_field_is_one_warning(tmp_path, caplog):
    checkpoint = Checkpoint("gptq-w4-sym")
    checkpoint.config["quantization_config"] |= {"kernel": "machete", "colors": ["red"], "nothing": None}
    assert logits_error(checkpoint.save(tmp_path), checkpoint.source) < TOLERANCE
    (warning,) = [
        record.getMessage() for record in caplog.records if "does not know, and ignores" in record.getMessage()
    ]
    assert 'colors (["red"]), kernel ("machete")' in warning


def test_no_field_of_a_fixture_is_unknown(caplog):
    for file in QUANTIZED.glob("*/config.json"):
        with_name = json.loads(file.read_text())
        ModelArgs.from_dict(with_name)
    for file in QUANTIZED.glob("*/hf_quant_config.json"):
        quantization.read_description(json.loads(file.read_text()))
    assert [
        record.getMessage() for record in caplog.records if "does not know, and ignores" in record.getMessage()
    ] == []


def decoded(tensors: dict[str, mx.array], description: dict, **options) -> mx.array:
    settings = quantization.layer_settings(description, "model.language_model.layers.0.self_attn.q_proj")
    layer = quantization.Layer("q_proj", tensors, settings, mx.float32, **options)
    found = quantization.decode(layer)
    return quantization.dequantize(*found[:2], mx.float32) if found.parameters else found.tensors["weight"]


def test_a_rotation_of_the_inputs_is_undone():
    """Each block of a row times the transpose of the normalized Hadamard matrix."""
    tensors = {"weight_packed": mx.random.randint(0, 255, (6, 32)).astype(mx.uint8)}
    tensors["weight_scale"] = mx.random.randint(120, 130, (6, 2)).astype(mx.uint8)
    description = {"quant_method": "auto-round", "packing_format": "auto_round:llm_compressor", "data_type": "mx_fp"}
    hadamard = np.ones((1, 1))
    for _ in range(4):
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    plain = np.array(decoded(dict(tensors), description)).reshape(6, 4, 16)
    expected = (plain @ hadamard.T / 4).reshape(6, 64)
    rotation = {"algorithm": "hadamard", "hadamard_type": "hadamard", "block_size": 16}
    found = decoded(dict(tensors), description | {"rotation_config": rotation})
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("group", [8, 16, 32])
def test_torchaos_scales_in_the_order_of_a_gpu_are_refused(group):
    tensors = {"_weight_qdata": mx.zeros((160, 128), mx.uint8), "_weight_scale": mx.zeros((64, 16), mx.uint8)}
    tensors["_weight_qdata"] = mx.zeros((160, 4 * group), mx.uint8)
    with pytest.raises(CheckpointError, match="is_swizzled_scales"):
        decoded(tensors, {"quant_method": "torchao"})


def test_torchaos_config_is_that_of_the_layer():
    """``fqn_to_config`` by a name, a pattern or for all others, as torchao looks them up."""
    path = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    configs = {"_default": {"_type": "A"}, r"re:.*\.experts\..*": {"_type": "B"}, path: {"_type": "C"}}
    description = {"quant_method": "torchao", "quant_type": {"default": {"_data": {"fqn_to_config": configs}}}}
    settings = [quantization.layer_settings(description, name)["config"] for name in (path, f"{path}x", "lm_head")]
    assert [each["_type"] for each in settings] == ["C", "B", "A"]


@pytest.mark.parametrize(("name", "bits"), [("embed_tokens", 8), ("layers.0.self_attn.q_proj", 4)])
def test_compressed_tensors_may_name_the_class_of_a_layer(name, bits):
    groups = {
        str(number): {"targets": [kind], "weights": {"num_bits": number}}
        for kind, number in (("Embedding", 8), ("Linear", 4))
    }
    description = {"quant_method": "compressed-tensors", "config_groups": groups}
    found = quantization.layer_settings(description, f"model.language_model.{name}")["schemes"]
    assert [scheme["num_bits"] for scheme in found] == [bits]


def four_bits(weight: np.ndarray, note: str) -> tuple[dict[str, mx.array], np.ndarray]:
    """A layer in bitsandbytes' nf4, one block of 64 after the other, and the values that it stands for."""
    table = np.linspace(-1, 1, 16, dtype="f4")
    blocks = weight.reshape(-1, 64)
    scales = np.abs(blocks).max(1)
    codes = np.abs(blocks[..., None] / scales[:, None, None] - table).argmin(-1).astype("u1")
    pairs = codes.reshape(-1, 2)
    state = json.dumps({"blocksize": 64, "shape": list(weight.shape), "quant_type": "nf4", "note": note})
    tensors = {
        "weight": mx.array((pairs[:, 0] << 4 | pairs[:, 1])[:, None]),
        "weight.absmax": mx.array(scales),
        "weight.quant_map": mx.array(table),
        "weight.quant_state.bitsandbytes__nf4": mx.array(np.frombuffer(state.encode(), "u1")),
    }
    return tensors, (table[codes] * scales[:, None]).reshape(weight.shape)


def test_experts_one_by_one_in_four_bits_may_have_states_of_any_length():
    """Their JSON in bytes has nothing of the others': they are never stacked as bytes."""
    for notes in ("xx", "x", ""):
        config = json.loads((QUANTIZED / "bnb-nf4" / "config.json").read_text())
        args = ModelArgs.from_dict(config)
        text = args.text_config
        width, hidden = text["moe_intermediate_size"], text["hidden_size"]
        weights, expected = {}, []
        for expert in range(text["num_experts"]):
            for projection, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
                tensors, values = four_bits(np.random.default_rng(expert).normal(size=shape), notes[:expert])
                name = f"model.language_model.layers.0.mlp.experts.{expert}.{projection}_proj"
                weights |= {f"{name}.{suffix}": array for suffix, array in tensors.items()}
                expected += [values] * (projection == "gate")
        found = sanitize(weights, args)["language_model.model.layers.0.mlp.switch_mlp.gate_proj.weight"]
        assert mx.array_equal(found, mx.array(np.stack(expected)).astype(found.dtype))


@pytest.mark.parametrize("name", ["bnb-experts-nf4", "torchao-experts-int8"])
def test_a_tensor_of_fused_experts_that_is_not_there_is_named(name, tmp_path):
    for key in [key for key in Checkpoint(name).tensors if "layers.0.mlp.experts" in key and "zero" not in key]:
        checkpoint = Checkpoint(name)
        del checkpoint.tensors[key]
        with pytest.raises(CheckpointError) as caught:
            load_model(checkpoint.save(tmp_path), lazy=True)
        assert "layers.0.mlp.experts." in str(caught.value), key


def test_flat_experts_may_be_stored_in_either_order(tmp_path):
    """The JSON beside them has the shape: here ``[E, in, out]``, of the same bytes, which are other experts then."""
    checkpoint = Checkpoint("bnb-experts-nf4")
    for key, (dtype, array) in checkpoint.tensors.items():
        if ".experts." in key and "quant_state" in key:
            state = json.loads(array.tobytes())
            state["shape"][1:] = state["shape"][:0:-1]
            checkpoint.tensors[key] = (dtype, np.frombuffer(json.dumps(state).encode(), "u1"))
    turned, _ = load_model(checkpoint.save(tmp_path))
    stored, _ = load_model(checkpoint.source)
    down, other = (model.layers[0].mlp.switch_mlp.down_proj.weight for model in (turned, stored))
    assert mx.array_equal(down, other.reshape(len(other), *other.shape[:0:-1]).swapaxes(1, 2))
