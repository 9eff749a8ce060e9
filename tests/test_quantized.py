"""Checkpoints that other tools quantized (see quantized/make/README.md), against torch on the tools' own weights."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx import nn, optimizers
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import dequantize_model, load_config, load_model
from support import OURS, QUANTIZED, ROOT
from support.checkpoints import float32_config
from support.commands import run

from mlx_lm_qwen3vlmoe import CheckpointError, Model, ModelArgs, quantization
from mlx_lm_qwen3vlmoe.quantization import numbers, packing

NAMES = sorted(path.parent.name for path in QUANTIZED.glob("*/golden.safetensors"))
# Formats that MLX can only express in float, in all or some layers: FP8, NVFP4 (on the CPU), act-order, scales of
# inputs or of blocks narrower than MLX's, tables of values.
FLOAT = {
    *("angelslim-fp8-static", "angelslim-w4a8", "fp8-cast"),
    *("autoround-export-mlx", "autoround-mixed-experts", "autoround-modelfree-mxfp4", "autoround-modelfree-w4"),
    *("autoround-fp8-block", "autoround-fp8-static", "autoround-fp8-tensor", "autoround-nvfp4", "autoround-nvfp4-e5m3"),
    *("bnb-experts-nf4", "bnb-fp4", "bnb-nf4", "bnb-nf4-double"),
    *("ct-experts-float", "ct-fp8-block", "ct-fp8-dynamic", "ct-fp8-g32", "ct-fp8-static", "ct-int8-block-narrow"),
    *("ct-modelfree-fp8-block", "ct-modelfree-nvfp4a16", "ct-nvfp4", "ct-nvfp4a16", "ct08-w4a16-actorder"),
    *("fp8-fused-official", "fp8-fused-v5", "fp8-fused-v5-bf16", "fp8-perexpert"),
    *("fp8-tensor-official", "fp8-tensor-perexpert", "fp8-tensor-v5-static"),
    *("gptq-w4-actorder", "gptqmodel-w4-actorder", "hqq-4bit-axis0", "metal-q4-g16"),
    *("modelopt-fp8", "modelopt-fp8-attention", "modelopt-fp8-block", "modelopt-fp8-block-projfirst"),
    *("modelopt-fp8-channel", "modelopt-int4-awq", "modelopt-nvfp4", "modelopt-nvfp4-awq", "modelopt-nvfp4-experts"),
    *("modelopt-nvfp4-g32", "modelopt-nvfp4-projfirst", "modelopt-w4a16-nvfp4"),
    *("quark-fp8", "quark-mixed", "quark-nvfp4", "quark-ptpc-fp8", "torchao-float8", "torchao-nvfp4"),
}
PACKED = [name for name in NAMES if name not in FLOAT]
# Packed in more bits than in the file: 7 and 6 in 8, and experts in the most that one of their layer has.
WIDENED = {"ct-experts-bits", "ct-mxfp6", "gptq-experts-mixed", "gptq-p-w7-asym", "quark-mxfp6"}


def golden(name: str) -> dict[str, mx.array]:
    return mx.load(str(QUANTIZED / name / "golden.safetensors"))


def load(path: Path, in_float32: bool = False, **options):
    options |= {"model_config": float32_config(path)} if in_float32 else {}
    model, config = load_model(path, lazy=True, **options)
    assert type(model).__module__ == OURS
    return model, config


def relative_error(model, expected: dict[str, mx.array]) -> float:
    found = model(expected["ids"]).astype(mx.float32)
    return (mx.abs(found - expected["logits"]).max() / mx.abs(expected["logits"]).max()).item()


def quantized_layers(model) -> dict[str, object]:
    return {path: layer for path, layer in model.named_modules() if hasattr(layer, "bits")}


def test_every_format_has_a_fixture():
    methods = Counter(name.split("-")[0] for name in NAMES)
    assert methods.keys() >= {"awq", "ct", "fp8", "gptq", "modelopt"}
    assert len(NAMES) >= 40


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_torchs_on_the_tools_own_dequantized_weights(name):
    """In float32. The values are the same, packed or not, and no rounding is to be excused."""
    model, config = load(QUANTIZED / name, in_float32=True)
    model.set_dtype(mx.float32)
    assert relative_error(model, golden(name)) < 1e-4
    assert "quant_method" not in config.get("quantization_config", {})  # MLX's own description has none
    assert "quantization_config" not in config["text_config"]


@pytest.mark.parametrize("name", PACKED)
def test_what_mlx_can_express_stays_packed(name):
    model, config = load(QUANTIZED / name)
    layers = quantized_layers(model)
    kinds = {type(layer).__name__ for layer in layers.values()}
    assert "QuantizedSwitchLinear" in kinds or "QuantizedLinear" in kinds
    assert config["quantization"]["bits"] in (3, 4, 5, 6, 8)
    for path, array in tree_flatten(model.parameters()):
        if path.rpartition(".")[0] in layers and path.endswith(".weight"):
            assert array.dtype == mx.uint32


@pytest.mark.parametrize("name", [name for name in PACKED if name not in WIDENED])
def test_packed_layers_take_the_memory_of_the_file(name):
    """Within the scales and biases, which MLX keeps in up to 8 bytes for 32 to 128 weights."""
    model, _ = load(QUANTIZED / name)
    stored = mx.load(str(next((QUANTIZED / name).glob("model*.safetensors"))))
    file_bytes = sum(array.nbytes for key, array in stored.items() if ".visual." not in key)
    scales = sum(
        array.nbytes for path, array in tree_flatten(model.parameters()) if path.endswith((".scales", ".biases"))
    )
    memory = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    casts = sum(  # experts that the file leaves float take float32 on the CPU
        array.nbytes // 2
        for path, array in tree_flatten(model.parameters())
        if "switch_mlp" in path and array.dtype == mx.float32 and path.endswith("weight")
    )
    assert memory - scales - casts <= file_bytes


@pytest.mark.parametrize("name", sorted(FLOAT))
def test_floats_are_the_values_in_float32_rounded_once(name):
    """To the dtype of the checkpoint, on every device: no more memory than that of 16 bits."""
    model, config = load(QUANTIZED / name)
    exact = dict(tree_flatten(load(QUANTIZED / name, in_float32=True)[0].parameters()))
    dtype = getattr(mx, config["text_config"]["dtype"])
    for path, array in tree_flatten(model.parameters()):
        if path.endswith("_proj.weight") and exact[path].dtype == mx.float32:
            assert array.dtype == dtype, path
            assert mx.array_equal(array, exact[path].astype(dtype)), path


@pytest.mark.parametrize("name", sorted(FLOAT))
def test_what_mlx_cannot_express_is_float_with_one_notice(name, caplog):
    model, config = load(QUANTIZED / name)
    notices = [record.getMessage() for record in caplog.records if "They are dequantized" in record.getMessage()]
    assert len(notices) == 1
    assert "mlx_lm.convert -q" in notices[0]
    assert ("quantization" in config) == bool(quantized_layers(model))


def test_nothing_is_evaluated_while_loading_lazily():
    """A file with the right headers and no data behind them would be read only by an evaluation."""
    for name in NAMES:
        config = load_config(QUANTIZED / name)
        model = Model(ModelArgs.from_dict(config))
        weights = {}
        for file in (QUANTIZED / name).glob("model*.safetensors"):
            weights |= mx.load(str(file))
        before = mx.get_active_memory()
        found = model.sanitize(weights)
        assert mx.get_active_memory() - before < 50_000, name  # the tables of small floats
        assert found


VECTORS, METADATA = mx.load(str(QUANTIZED.parent / "vectors.safetensors"), return_metadata=True)
CASES = json.loads(METADATA["cases"])


def decode(tensors: dict[str, mx.array], config: dict[str, object], **options) -> quantization.Decoded:
    settings = quantization.layer_settings(config, "layer")
    return quantization.decode(quantization.Layer("layer", tensors, settings, mx.float32, **options))


def layer(case: str) -> dict[str, mx.array]:
    return {name.rpartition(".")[2]: array for name, array in VECTORS.items() if name.startswith(f"{case}.")}


@pytest.mark.parametrize("case", list(CASES))
def test_every_packing_decodes_to_the_tools_own_values(case):
    """Random weights, packed and dequantized by the tools, one layer each."""
    tensors = layer(case)
    weight = tensors.pop("weight")
    decoded, parameters, _ = decode(tensors, CASES[case])
    if parameters is not None:
        decoded = {"weight": quantization.dequantize(decoded, parameters, mx.float32)}
    assert (parameters is None) == ("actorder" in case)
    assert mx.allclose(decoded["weight"], weight, rtol=1e-6, atol=1e-7)


@given(bits=st.sampled_from([2, 3, 4, 5, 6, 8]), rows=st.integers(1, 4), words=st.integers(1, 3), data=st.data())
def test_bit_streams_are_mlxs_own(bits, rows, words, data):
    """Unpacking agrees with MLX, for every width and any content."""
    drawn = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=rows * words * bits, max_size=rows * words * bits))
    packed = mx.array(drawn, mx.uint32).reshape(rows, words * bits)
    expected = mx.dequantize(packed, mx.ones((rows, words)), mx.zeros((rows, words)), 32, bits)
    assert mx.array_equal(packing.unpack(packed, bits), expected.astype(mx.int32))


def test_small_floats_are_what_mlx_has():
    """All 256 codes of e4m3 and all 16 of e2m1, against MLX's own decoding."""
    codes = mx.arange(256).astype(mx.uint8)
    assert mx.array_equal(numbers.e4m3(codes), mx.from_fp8(codes, mx.float32), equal_nan=True)
    packed, ones = codes.reshape(8, 32).view(mx.uint32), mx.full((8, 2), 127, mx.uint8)
    expected = mx.dequantize(packed, ones, None, 32, 4, mode="mxfp4", dtype=mx.float32)
    assert mx.array_equal(numbers.e2m1(codes.reshape(8, 32)), expected)


@pytest.mark.parametrize("name", ["modelopt-nvfp4", "ct-nvfp4"])
def test_nvfp4_experts_stay_packed_where_a_layer_can_hold_the_second_scale(name):
    """mlx-lm 0.32.1 and newer on a GPU; the values are checked with MLX's own decoder, which also runs here."""
    stored = mx.load(str(QUANTIZED / name / "model.safetensors"))
    prefix = "model.language_model.layers.0.mlp.experts.1.down_proj."
    tensors = {key.removeprefix(prefix): array for key, array in stored.items() if key.startswith(prefix)}
    packed, parameters, _ = decode(tensors, {}, takes_global_scale=True)
    assert parameters == {"group_size": 16, "bits": 4, "mode": "nvfp4", "global_scale": True}
    assert packed["global_scale"].shape == ()
    decoded, *_ = decode(tensors, {})
    found = quantization.dequantize(packed, parameters, mx.float32)
    assert mx.allclose(found, decoded["weight"], rtol=1e-5, atol=0)


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}


@pytest.mark.parametrize(
    ("case", "change", "config", "message"),
    [
        ("awq-w4-gemm", {}, {"quant_method": "fp8"}, r"layer\.qweight: expected the quant_method .*awq"),
        ("awq-w4-gemm", {}, AWQ | {"version": "gemv"}, r"layer\.scales: expected the shape \[96, 32\]"),
        (
            "awq-w4-gemm",
            {},
            AWQ | {"version": "gemx"},
            r"layer\.qweight: expected AWQ with 4 bits and version gemm, exl",
        ),
        ("awq-w4-gemm", {}, AWQ | {"zero_point": False}, r"layer\.qweight: expected zero_point true"),
        ("awq-w4-gemm", {}, AWQ | {"bits": 3}, r"found 3 bits"),
        ("awq-w4-gemm", {"scales": None}, AWQ, r"layer\.scales: expected this tensor beside the others"),
        ("awq-w4-gemm", {"scales": mx.ones((3, 63))}, AWQ, r"layer\.scales: expected the shape \[3, 64\], found"),
        ("awq-w4-gemm", {"qzeros": mx.ones((3, 4), mx.int32)}, AWQ, r"layer\.qzeros: expected the shape \[3, 8\]"),
        (
            "awq-w4-gemm",
            {"pre_quant_scale": mx.ones(96)},
            AWQ,
            r"layer\.pre_quant_scale: expected only the tensors of awq",
        ),
        ("gptq-w4-sym", {"qzeros": None}, None, r"layer\.qzeros"),
        ("gptq-w4-sym", {"qweight": mx.ones((12, 63), mx.int32)}, None, r"layer\.qweight: expected the shape"),
        ("gptq-w4-sym", {"g_idx": mx.ones(50, mx.int32)}, None, r"layer\.g_idx: expected the shape"),
        (
            "gptq-w4-sym",
            {},
            GPTQ | {"checkpoint_format": "marlin"},
            r'expected gptq, gptq_v2 or gptq_p .*found "marlin"',
        ),
        ("gptq-p-w3-sym", {"qweight": mx.ones((9, 48), mx.int32)}, None, r"layer\.qweight: expected the shape"),
    ],
)
def test_a_layer_that_cannot_be_decoded_is_one_error_that_names_it(case, change, config, message):
    tensors = layer(case) | change
    del tensors["weight"]
    tensors = {suffix: array for suffix, array in tensors.items() if array is not None}
    with pytest.raises(CheckpointError, match=message):
        decode(tensors, config or CASES[case])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "fp8-perexpert",
            {"q_proj.weight_scale_inv": None},
            r"q_proj\.weight_scale_inv: expected",
        ),
        (
            "fp8-perexpert",
            {"q_proj.weight_scale_inv": mx.ones((3, 3))},
            r"q_proj\.weight_scale_inv: expected",
        ),
        (
            "modelopt-nvfp4",
            {"q_proj.weight_scale": None},
            r"q_proj\.weight_scale: expected this tensor beside the others",
        ),
        ("modelopt-nvfp4", {"q_proj.weight_scale_2": mx.ones(3)}, r"q_proj\.weight_scale_2: expected one number"),
        (
            "modelopt-nvfp4",
            {"q_proj.pre_quant_scale": mx.ones(95)},
            r"q_proj\.pre_quant_scale: expected the shape \[96\]",
        ),
        ("ct-w4a16-g32", {"q_proj.weight_scale": mx.ones((128, 5))}, r"q_proj\.weight_(scale|packed): expected"),
        ("ct-w8a8-int8", {"q_proj.weight_scale": mx.ones((5, 1))}, r"q_proj\.weight_scale: expected the shape"),
        ("ct-mxfp4", {"q_proj.weight_scale": mx.ones((128, 7), mx.uint8)}, r"q_proj\.weight_scale: expected the shape"),
        ("ct-nvfp4", {"experts.1.up_proj.weight_global_scale": None}, r"experts\.1\.up_proj"),
    ],
)
def test_a_broken_quantized_checkpoint_names_the_tensor(name, change, message):
    weights = mx.load(str(QUANTIZED / name / "model.safetensors"))
    ((suffix, array),) = change.items()
    (key,) = [k for k in weights if "layers.0." in k and k.endswith(suffix)] or [
        next(k for k in weights if "layers.0." in k and "q_proj.weight" in k).rpartition(".")[0] + ".pre_quant_scale"
    ]
    weights.pop(key, None)
    if array is not None:
        weights[key] = array
    model = Model(ModelArgs.from_dict(load_config(QUANTIZED / name)))
    with pytest.raises(CheckpointError, match=message):
        model.sanitize(weights)


def test_a_float_expert_among_packed_ones_makes_its_projection_float(caplog):
    name = "awq-g64"
    weights = mx.load(str(QUANTIZED / name / "model.safetensors"))
    prefix = "language_model.model.layers.0.mlp"
    expected, _ = load(QUANTIZED / name)
    expert = f"model.{prefix.replace('.model', '', 1)}.experts.2.up_proj"
    up = expected.layers[0].mlp.switch_mlp.up_proj
    whole = mx.dequantize(up.weight, up.scales, up.biases, up.group_size, up.bits)
    for suffix in ("qweight", "qzeros", "scales"):
        del weights[f"{expert}.{suffix}"]
    weights[f"{expert}.weight"] = whole[2]
    model = Model(ModelArgs.from_dict(config := load_config(QUANTIZED / name)))
    found = model.sanitize(weights)
    assert mx.allclose(found[f"{prefix}.switch_mlp.up_proj.weight"], whole, rtol=1e-6, atol=1e-7)
    assert f"{prefix}.switch_mlp.gate_proj.scales" in found
    assert "experts of one layer in different formats" in caplog.text
    assert config["quantization"]["bits"] == 4


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"quant_method": "sinq"}, r"quant_method: expected one of .*awq, .*, found .sinq"),
        ({"bits": 4, "quant_method": None}, r"quant_method: expected one of"),
        ({"quant_method": "compressed-tensors", "transform_config": {"a": 1}}, r"transform_config: expected nothing"),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
            r"sparsity_config: expected nothing",
        ),
    ],
)
def test_an_unknown_description_is_refused(description, message):
    config = load_config(QUANTIZED / "awq-g64") | {"quantization_config": description}
    with pytest.raises(CheckpointError, match=message):
        ModelArgs.from_dict(config)


@pytest.mark.parametrize("algorithm", ["W8A16", "W8A8_SQ_PER_CHANNEL"])
def test_modelopts_8_bit_integers_are_packed(algorithm):
    weight = mx.random.randint(-128, 128, (8, 64), dtype=mx.int8)
    scales = mx.random.uniform(0.5, 1, (8,))
    tensors = {"weight": weight, "weight_scale": scales, "input_scale": mx.ones(1)}
    packed, parameters, _ = decode(tensors, {"quant_method": "modelopt", "quant_algo": algorithm})
    assert parameters == {"group_size": 64, "bits": 8}
    assert mx.allclose(
        quantization.dequantize(packed, parameters, mx.float32), weight * scales[:, None], rtol=1e-6, atol=1e-4
    )


def test_modelopts_awq_without_scales_of_inputs_is_packed():
    """The tool may have them in the layer before."""
    stored = mx.load(str(QUANTIZED / "modelopt-int4-awq" / "model.safetensors"))
    prefix = "model.language_model.layers.0.self_attn.o_proj."
    tensors = {key.removeprefix(prefix): array for key, array in stored.items() if key.startswith(prefix)}
    settings = {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "group_size": 32}
    whole, parameters, _ = decode(tensors, settings)
    assert parameters is None
    smooth = tensors.pop("pre_quant_scale")
    packed, parameters, _ = decode(tensors, settings)
    assert parameters == {"group_size": 32, "bits": 4}
    found = quantization.dequantize(packed, parameters, mx.float32) * smooth
    assert mx.allclose(found, whole["weight"], rtol=1e-6, atol=1e-7)
    with pytest.raises(CheckpointError, match=r"layer\.weight_scale: expected 64 inputs in groups of 64, found 2"):
        decode(tensors, settings | {"group_size": 64})
    with pytest.raises(
        CheckpointError, match=r"layer\.weight: expected another quant_algo in quantization_config, found W4A8_AWQ"
    ):
        decode(tensors, settings | {"quant_algo": "W4A8_AWQ"})


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_gives_the_same_logits_in_the_unchanged_host(name, tmp_path, error_in_the_unchanged_host):
    from mlx_lm.utils import save_config, save_model

    model, config = load(QUANTIZED / name, in_float32=True)
    save_model(tmp_path, model)
    save_config(config, tmp_path / "config.json")
    assert error_in_the_unchanged_host(tmp_path, QUANTIZED / name / "golden.safetensors") < 1e-4


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("awq-g32-bf16", []),
        pytest.param("awq-g32-bf16", ["--dequantize"], marks=pytest.mark.thorough),
        ("ct-mixed", []),
        pytest.param("gptq-w4-asym", [], marks=pytest.mark.thorough),
        pytest.param("fp8-fused-official", [], marks=pytest.mark.thorough),
    ],
)
def test_mlx_lm_convert_writes_what_the_unchanged_host_loads(name, options, tmp_path, error_in_the_unchanged_host):
    """The real command, which casts to the checkpoint's dtype: exact zero points come through."""
    source = tmp_path / "source"
    shutil.copytree(QUANTIZED / name, source, ignore=shutil.ignore_patterns("golden*"))
    for file in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        shutil.copy(ROOT / "examples" / "tiny-qwen3-vl-moe" / file, source)
    run(Path(sys.executable).parent / "mlx_lm.convert", "--hf-path", source, "--mlx-path", tmp_path / "out", *options)
    error = error_in_the_unchanged_host(tmp_path / "out", QUANTIZED / name / "golden.safetensors")
    assert error < (0.01 if name in FLOAT else 1e-4)  # bfloat16 rounds a float weight


@pytest.mark.parametrize("name", ["awq-g32-bf16", "gptq-w4-sym", "ct-mxfp4"])
def test_lora_trains_on_a_packed_base_and_fuses(name):
    """With the host's own tuner, on attention and experts."""
    model, _ = load(QUANTIZED / name)
    ids = golden(name)["ids"]
    mx.random.seed(0)
    model.freeze()
    linear_to_lora_layers(model, 3, {"rank": 4, "scale": 4.0, "dropout": 0.0})
    model.train()

    def loss(model):
        return nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:], reduction="mean")

    step, optimizer, losses = nn.value_and_grad(model, loss), optimizers.Adam(learning_rate=2e-3), []
    for _ in range(8):
        value, gradients = step(model)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(value.item())
    assert losses[-1] < 0.8 * losses[0]

    model.eval()
    model.set_dtype(mx.float32, lambda dtype: dtype in (mx.bfloat16, mx.float16, mx.float32))
    tuned = model(ids)
    fused = [(path, layer.fuse(dequantize=True)) for path, layer in model.named_modules() if hasattr(layer, "fuse")]
    model.update_modules(tree_unflatten(fused))
    assert mx.abs(dequantize_model(model)(ids) - tuned).max() < 1e-2 * mx.abs(tuned).max()


@pytest.mark.parametrize("place", ["top", "text_config", "hf_quant_config.json"])
def test_the_description_is_found_in_all_three_places(place, tmp_path):
    name = "modelopt-nvfp4" if place == "hf_quant_config.json" else "awq-g64"
    shutil.copytree(QUANTIZED / name, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "hf_quant_config.json").unlink(missing_ok=True)
    description = config.pop("quantization_config")
    if place == "top":
        config["quantization_config"] = description
    elif place == "text_config":
        config["text_config"]["quantization_config"] = description
    else:
        nested = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
        (tmp_path / "hf_quant_config.json").write_text(json.dumps(nested))
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, _ = load(tmp_path, in_float32=True)
    model.set_dtype(mx.float32)
    assert relative_error(model, golden(name)) < 1e-4
