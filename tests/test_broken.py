"""Checkpoints that are good but for one change, through the real host: one error that names the place, or the logits.

Every change is made to a fixture that loads, and the folder is as it was afterwards.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import FIXTURES, QUANTIZED, TINY, float32_config, run
from mlx_lm import load
from mlx_lm.utils import load_model

from mlx_lm_qwen3vlmoe import CheckpointError

TOLERANCE = 1e-4  # of the largest logit, in float32
TYPES = {"F16": "f2", "F32": "f4", "I8": "i1", "I32": "i4", "I64": "i8", "U8": "u1", "U32": "u4"}
TYPES |= {"BF16": "u2", "F8_E4M3": "u1"}  # numpy has neither: their bits
LAYERS = "model.language_model.layers"
FUSED, EXPERT, MLX = f"{LAYERS}.0.mlp.experts", f"{LAYERS}.2.mlp.experts.1", "language_model.model.layers"

Array = tuple[str, np.ndarray]  # a safetensors dtype, and the bits


class Checkpoint:
    """A checkpoint in memory, as plain data that can be broken in any way."""

    def __init__(self, name: str):
        self.source = next(path for path in (FIXTURES / name, QUANTIZED / name) if path.exists())
        self.config = json.loads((self.source / "config.json").read_text())
        self.tensors: dict[str, Array] = {}
        for file in sorted(self.source.glob("model*.safetensors")):
            header, data = split(file.read_bytes())
            for key, entry in header.items():
                if key != "__metadata__":
                    begin, end = entry["data_offsets"]
                    array = np.frombuffer(data[begin:end], TYPES[entry["dtype"]]).reshape(entry["shape"])
                    self.tensors[key] = (entry["dtype"], array)

    @property
    def text(self) -> dict:
        return self.config["text_config"]

    def change(self, key: str, function: Callable[[np.ndarray], np.ndarray]) -> None:
        dtype, array = self.tensors[key]
        self.tensors[key] = (dtype, function(array))

    def save(self, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        header, data = {"__metadata__": {"format": "mlx"}}, b""
        for key, (dtype, array) in self.tensors.items():
            content = array.tobytes()
            header[key] = {
                "dtype": dtype,
                "shape": array.shape,
                "data_offsets": [len(data), len(data) + len(content)],
            }
            data += content
        (folder / "model.safetensors").write_bytes(joined(header, data))
        return folder


def split(file: bytes) -> tuple[dict, bytes]:
    size = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:size]), file[size:]


def joined(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def bfloat16(array: np.ndarray) -> Array:
    return "BF16", (array.astype("f4").view("u4") >> 16).astype("u2")


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in [folder, *folder.rglob("*")]}


def refusal(folder: Path, kind: type[Exception] = CheckpointError) -> str:
    """The message of the one error that loading a folder gives: quick, without a chain, and nothing written."""
    before, start = state(folder), time.monotonic()
    with pytest.raises(kind) as caught:
        load_model(folder)
    assert time.monotonic() - start < 10
    assert state(folder) == before
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return str(caught.value)


def logits_error(folder: Path, golden: Path) -> float:
    """The largest difference from torch's logits, relative to the largest of them, in float32."""
    model, _ = load_model(folder, lazy=True, model_config=float32_config(folder))
    model.set_dtype(mx.float32)
    expected = mx.load(str(golden / "golden.safetensors"))
    found = model(expected["ids"]).astype(mx.float32)
    return (mx.abs(found - expected["logits"]).max() / mx.abs(expected["logits"]).max()).item()


# Changes, as functions of a checkpoint.


def drop(*keys):
    return lambda c: [c.tensors.pop(key) for key in keys]


def rename(key, new):
    return lambda c: c.tensors.update({new: c.tensors.pop(key)})


def add(key, array):
    return lambda c: c.tensors.update({key: array})


def cut(key, *size):
    return lambda c: c.change(key, lambda array: array[tuple(map(slice, size))])


def turn(key):
    return lambda c: c.change(key, lambda array: np.ascontiguousarray(array.swapaxes(-1, -2)))


def reshape(key, *shape):
    return lambda c: c.change(key, lambda array: array.reshape(shape))


def text(**fields):
    return lambda c: c.text.update(fields)


def top(**fields):
    return lambda c: c.config.update(fields)


def quantization(**fields):
    return lambda c: c.config["quantization_config"].update(fields)


def without(*fields):
    return lambda c: [(c.text if field in c.text else c.config).pop(field) for field in fields]


def prefixed(prefix):
    def change(c):
        c.tensors = {prefix + key.removeprefix("model.language_model."): array for key, array in c.tensors.items()}

    return change


def float_expert(name):
    """One projection of one expert left unquantized."""

    def change(c):
        for key in [key for key in c.tensors if key.startswith(name)]:
            del c.tensors[key]
        c.tensors[f"{name}.weight"] = bfloat16(np.ones((64, 96)))

    return change


def dense(c):
    """A dense Qwen3-VL model: no field of experts, and an MLP in every layer."""
    for field in ("moe_intermediate_size", "num_experts", "num_experts_per_tok", "mlp_only_layers"):
        del c.text[field]
    c.tensors = {key: array for key, array in c.tensors.items() if ".experts." not in key and ".mlp.gate." not in key}


def omni(c):
    c.config = {"model_type": "qwen3_vl_moe", "thinker_config": {"text_config": c.text}}


def scheme(**fields):
    return lambda c: c.config["quantization_config"]["config_groups"]["group_0"]["weights"].update(fields)


ONE = bfloat16(np.ones(1))
FOUND_TWO = "found two"


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        # Fused experts: 5 experts, 40 wide, 28 within; layer 1 is dense.
        pytest.param(
            "official", drop(f"{FUSED}.gate_up_proj"), ["layers.0", "gate_up_proj", "found nothing"], id="no-gate-up"
        ),
        pytest.param("official", drop(f"{FUSED}.down_proj"), ["layers.0", "down_proj", "found nothing"], id="no-down"),
        pytest.param(
            "official",
            cut(f"{FUSED}.down_proj", 4),
            ["down_proj", "[5, 28, 40] or [5, 40, 28]", "found [4, 28, 40]", "num_experts"],
            id="an-expert-too-few",
        ),
        pytest.param("official", text(num_experts=4), ["gate_up_proj", "[4, 40, 56]", "[5, 40, 56]"], id="num-experts"),
        pytest.param("official", text(hidden_size=44), ["gate_up_proj", "[5, 44, 56]", "hidden_size"], id="hidden"),
        pytest.param(
            "official",
            text(moe_intermediate_size=14),
            ["gate_up_proj", "[5, 40, 28]", "moe_intermediate_size"],
            id="moe-width",
        ),
        pytest.param(
            "official",
            cut(f"{FUSED}.gate_up_proj", 5, 40, 54),
            ["gate_up_proj", "found [5, 40, 54]"],
            id="experts-too-narrow",
        ),
        pytest.param(
            "official",
            reshape(f"{FUSED}.gate_up_proj", 40, 5, 56),
            ["gate_up_proj", "found [40, 5, 56]"],
            id="experts-on-the-wrong-axis",
        ),
        pytest.param(
            "official",
            reshape(f"{FUSED}.down_proj", 140, 40),
            ["down_proj", "found [140, 40]"],
            id="experts-in-two-dimensions",
        ),
        pytest.param(
            "official",
            reshape(f"{FUSED}.down_proj", 5600),
            ["down_proj", "found [5600]"],
            id="experts-in-one-dimension",
        ),
        pytest.param(
            "square_gate",
            cut(f"{FUSED}.gate_up_proj", 5, 48, 24),
            ["gate_up_proj", "[5, 48, 48]", "found [5, 48, 24]"],
            id="half-of-a-square-gate-up",
        ),
        pytest.param(
            "official",
            add(f"{FUSED}.0.up_proj.weight", bfloat16(np.ones((28, 40)))),
            ["layers.0.mlp", FOUND_TWO, "Remove"],
            id="fused-and-separate",
        ),
        pytest.param(
            "official",
            add(f"{LAYERS}.0.mlp.switch_mlp.down_proj.weight", bfloat16(np.ones((5, 40, 28)))),
            ["layers.0.mlp", FOUND_TWO, "Remove"],
            id="fused-and-stacked",
        ),
        pytest.param("official", add(f"{FUSED}.bias", ONE), ["experts.bias", "belongs to nothing"], id="expert-bias"),
        pytest.param(
            "official",
            rename(f"{FUSED}.gate_up_proj", f"{FUSED}.w1"),
            ["experts.w1", "belongs to nothing"],
            id="experts-of-another-name",
        ),
        # The other tensors.
        pytest.param("official", drop("lm_head.weight"), ["lm_head.weight", "tie_word_embeddings"], id="no-head"),
        pytest.param("resave_5_23_0", drop("lm_head.weight"), ["lm_head.weight", "found nothing"], id="no-head-of-5"),
        pytest.param(
            "official",
            add("language_model.lm_head.weight", bfloat16(np.ones((96, 40)))),
            ["lm_head.weight", FOUND_TWO, "Remove"],
            id="two-heads",
        ),
        pytest.param(
            "official",
            add("language_model.model.norm.weight", bfloat16(np.ones(40))),
            ["norm.weight", FOUND_TWO, "Remove"],
            id="one-tensor-under-two-prefixes",
        ),
        pytest.param(
            "official",
            add(f"{LAYERS}.0.self_attn.q_proj.bias", bfloat16(np.ones(64))),
            ["layers.0.self_attn.q_proj.bias", "belongs to nothing", "config.json"],
            id="attention-bias",
        ),
        pytest.param(
            "official",
            rename(f"{LAYERS}.0.self_attn.q_norm.weight", f"{LAYERS}.0.self_attn.q_layernorm.weight"),
            ["q_layernorm", "belongs to nothing"],
            id="a-misspelled-name",
        ),
        pytest.param("official", add("mtp.fc.weight", ONE), ["mtp.fc.weight", "another model type"], id="mtp"),
        pytest.param(
            "official", add("audio_tower.proj.weight", ONE), ["audio_tower.proj.weight", "found another"], id="audio"
        ),
        pytest.param(
            "official",
            add(f"{LAYERS}.0.mlp.experts.lora_A.weight", ONE),
            ["experts.lora_A.weight", "belongs to nothing"],
            id="lora-among-the-experts",
        ),
        pytest.param(
            "official",
            add("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", ONE),
            ["base_model.model", "an adapter?"],
            id="an-adapter-of-peft",
        ),
        pytest.param("official", text(num_hidden_layers=2), ["layers.2.", "layers 0 to 1"], id="a-layer-too-many"),
        pytest.param("official", text(mlp_only_layers=[]), ["layers.1.mlp", "experts in layer 1"], id="dense-experts"),
        pytest.param(
            "official", text(mlp_only_layers=[0, 1]), ["layers.0.mlp", "a dense MLP in layer 0"], id="sparse-as-dense"
        ),
        pytest.param(
            "official", text(decoder_sparse_step=2), [".mlp.", "a dense MLP in layer", "decoder_sparse_step"], id="step"
        ),
        # Other models.
        pytest.param("official", dense, ["moe_intermediate_size", "found nothing"], id="a-dense-qwen3-vl"),
        pytest.param(
            "official",
            rename(f"{FUSED}.down_proj", f"{LAYERS}.0.mlp.down_proj.weight"),
            ["layers.0.mlp", "experts"],
            id="a-dense-mlp",
        ),
        pytest.param("official", omni, ["text_config", "Qwen3-VL-MoE checkpoint?"], id="an-omni-config"),
        pytest.param("official", prefixed("thinker.model."), ["thinker.model.", "another model type"], id="a-thinker"),
        pytest.param("official", prefixed("talker.model."), ["talker.model.", "another model type"], id="a-talker"),
        # Separate experts.
        pytest.param(
            "per_expert",
            drop(f"{EXPERT}.up_proj.weight"),
            ["layers.2.mlp.experts.1.up_proj.weight", "found nothing"],
            id="no-up-of-one-expert",
        ),
        pytest.param(
            "per_expert",
            drop(*(f"{LAYERS}.2.mlp.experts.{n}.up_proj.weight" for n in range(5))),
            ["layers.2.mlp.experts.0.up_proj.weight", "found nothing"],
            id="no-up-of-any-expert",
        ),
        pytest.param(
            "per_expert",
            drop(*(f"{EXPERT}.{p}_proj.weight" for p in ("gate", "up", "down"))),
            ["layers.2.mlp.experts.1.gate_proj.weight", "found nothing"],
            id="no-expert",
        ),
        pytest.param(
            "per_expert",
            rename(f"{EXPERT}.down_proj.weight", f"{LAYERS}.2.mlp.experts.5.down_proj.weight"),
            ["layers.2.mlp.experts.5.down_proj.weight", "experts 0 to 4", "num_experts"],
            id="expert-out-of-range",
        ),
        pytest.param(
            "per_expert",
            add(f"{LAYERS}.2.mlp.experts.{10**30}.down_proj.weight", ONE),
            ["experts 0 to 4"],
            id="expert-far-out-of-range",
        ),
        pytest.param("per_expert", text(num_experts=4), ["experts 0 to 3", "num_experts"], id="num-separate-experts"),
        pytest.param(
            "per_expert",
            cut(f"{EXPERT}.up_proj.weight", 28, 39),
            ["layers.2.mlp.experts.1.up_proj.weight", "[28, 40]", "found [28, 39]"],
            id="expert-too-narrow",
        ),
        pytest.param(
            "per_expert",
            turn(f"{EXPERT}.up_proj.weight"),
            ["layers.2.mlp.experts.1.up_proj.weight", "[28, 40]", "found [40, 28]"],
            id="one-expert-turned",
        ),
        pytest.param(
            "per_expert",
            reshape(f"{EXPERT}.up_proj.weight", 1120),
            ["layers.2.mlp.experts.1.up_proj.weight", "[28, 40]", "found [1120]"],
            id="expert-in-one-dimension",
        ),
        pytest.param(
            "per_expert",
            add(f"{LAYERS}.2.mlp.experts.up_proj.1.weight", bfloat16(np.ones((28, 40)))),
            ["experts.1.up_proj.weight", FOUND_TWO],
            id="expert-under-two-names",
        ),
        pytest.param(
            "official",
            turn(f"{FUSED}.down_proj"),
            ["mlp.experts: expected gate_up_proj and down_proj in one orientation", "[5, 40, 28]"],
            id="one-tensor-turned",
        ),
        # Quantized by other tools.
        pytest.param(
            "awq-g32-bf16",
            drop(f"{EXPERT}.up_proj.scales"),
            ["layers.2.mlp.experts.1.up_proj.scales", "found nothing"],
            id="awq-no-scales",
        ),
        pytest.param(
            "awq-g32-bf16",
            cut(f"{EXPERT}.up_proj.scales", 2),
            ["layers.2.mlp.experts.1.up_proj.scales", "groups of 32 of 96", "found 2 groups"],
            id="awq-a-group-too-few",
        ),
        pytest.param(
            "awq-g32-bf16",
            cut(f"{EXPERT}.up_proj.qzeros", 3, 7),
            ["layers.2.mlp.experts.1.up_proj.qzeros", "[3, 8]", "found [3, 7]"],
            id="awq-zeros-too-narrow",
        ),
        pytest.param(
            "awq-g32-bf16",
            add(f"{EXPERT}.up_proj.pre_quant_scale", ONE),
            ["up_proj.pre_quant_scale", "it would change the weight"],
            id="pre-quant-scale",
        ),
        pytest.param("awq-g32-bf16", quantization(bits=8), ["qweight", "4 bits", "found 8 bits"], id="awq-bits"),
        pytest.param("awq-g32-bf16", quantization(version="gemv"), ["up_proj.scales", "[96, 32]"], id="awq-gemv"),
        pytest.param(
            "awq-g32-bf16", without("quantization_config"), ["qweight", "awq or gptq", "None"], id="awq-undescribed"
        ),
        pytest.param(
            "awq-g32-bf16",
            quantization(quant_method="sinq"),
            ["quant_method", "awq, ", "compressed-tensors, fp8, gptq, ", "'sinq'", "mlx_lm.convert -q"],
            id="unknown-method",
        ),
        pytest.param("awq-g32-bf16", quantization(quant_method=None), ["quant_method", "None"], id="no-method"),
        pytest.param("awq-g32-bf16", quantization(quant_method=[]), ["quant_method", "[]"], id="method-of-a-list"),
        pytest.param(
            "awq-g32-bf16", top(quantization_config="awq"), ["quantization_config", "an object"], id="method-alone"
        ),
        pytest.param(
            "gptq-w4-sym",
            drop(f"{EXPERT}.up_proj.qzeros"),
            ["layers.2.mlp.experts.1.up_proj.qzeros", "found nothing"],
            id="gptq-no-zeros",
        ),
        pytest.param(
            "gptq-w4-sym",
            cut(f"{EXPERT}.up_proj.scales", 3, 63),
            ["layers.2.mlp.experts.1.up_proj.qzeros", "63 outputs", "found [3, 8]"],
            id="gptq-scales-too-narrow",
        ),
        pytest.param(
            "gptq-w4-sym",
            cut(f"{EXPERT}.up_proj.g_idx", 50),
            ["layers.2.mlp.experts.1.up_proj.g_idx", "[96]", "found [50]"],
            id="gptq-order-too-short",
        ),
        pytest.param("gptq-w4-sym", quantization(bits=8), ["qzeros", "8 bits", "[3, 4]"], id="gptq-bits"),
        pytest.param(
            "gptq-w4-sym",
            quantization(checkpoint_format="marlin"),
            ["checkpoint_format", "gptq, gptq_v2", "'marlin'"],
            id="gptq-marlin",
        ),
        pytest.param(
            "ct-w4a16-asym-g32",
            drop(f"{EXPERT}.up_proj.weight_scale"),
            ["layers.2.mlp.experts.1.up_proj.weight_scale", "found nothing"],
            id="ct-no-scale",
        ),
        pytest.param(
            "ct-w4a16-asym-g32",
            cut(f"{EXPERT}.up_proj.weight_scale", 63),
            ["layers.2.mlp.experts.1.up_proj.weight_scale", "[64, 3]", "found [63, 3]"],
            id="ct-scale-too-short",
        ),
        pytest.param("ct-w4a16-asym-g32", scheme(num_bits=8), ["weight_packed", "config_groups"], id="ct-bits"),
        pytest.param("ct-w4a16-asym-g32", scheme(group_size=64), ["weight_packed", "config_groups"], id="ct-group"),
        pytest.param(
            "ct-w4a16-asym-g32",
            quantization(sparsity_config={"format": "sparse-24-bitmask"}),
            ["sparsity_config", "sparse-24-bitmask"],
            id="ct-sparse",
        ),
        pytest.param(
            "ct-w4a16-asym-g32",
            quantization(transform_config={"R1": {}}),
            ["transform_config", "R1"],
            id="ct-rotated",
        ),
        pytest.param(
            "ct-mxfp4",
            cut(f"{EXPERT}.up_proj.weight_scale", 64, 2),
            ["layers.2.mlp.experts.1.up_proj.weight_scale", "[64, 3]", "found [64, 2]"],
            id="mxfp4-scale-too-narrow",
        ),
        pytest.param(
            "ct-w8a8-int8",
            cut(f"{EXPERT}.up_proj.weight_scale", 63),
            ["layers.2.mlp.experts.1.up_proj.weight_scale", "[64, 1]", "found [63, 1]"],
            id="int8-scale-too-short",
        ),
        pytest.param(
            "modelopt-nvfp4",
            drop(f"{EXPERT}.up_proj.weight_scale"),
            ["layers.2.mlp.experts.1.up_proj.weight_scale", "found nothing"],
            id="nvfp4-no-scale",
        ),
        pytest.param(
            "modelopt-nvfp4",
            drop(f"{EXPERT}.up_proj.weight_scale_2"),
            ["layers.2.mlp.experts.1.up_proj.weight"],
            id="nvfp4-no-second-scale",
        ),
        pytest.param(
            "modelopt-nvfp4",
            cut(f"{EXPERT}.up_proj.weight_scale", 64, 5),
            ["layers.2.mlp.experts.1.up_proj.weight_scale", "groups of 16 of 96", "found 5 groups"],
            id="nvfp4-scale-too-narrow",
        ),
        pytest.param(
            "fp8-perexpert",
            drop(f"{LAYERS}.0.mlp.experts.1.up_proj.weight_scale_inv"),
            ["layers.0.mlp.experts.1.up_proj", "weight_scale"],
            id="fp8-no-scale",
        ),
        pytest.param(
            "fp8-perexpert",
            reshape(f"{LAYERS}.0.mlp.experts.1.down_proj.weight_scale_inv", 2),
            ["layers.0.mlp.experts.1.down_proj.weight_scale_inv", "[2, 1]", "found [2]"],
            id="fp8-blocks-in-a-row",
        ),
        pytest.param(
            "fp8-fused-official",
            cut(f"{FUSED}.gate_up_proj_scale_inv", 3, 2, 1),
            ["layers.0.mlp.experts.gate_up_proj", "[2, 2]", "found [2, 1]"],
            id="fp8-fused-a-block-too-few",
        ),
        pytest.param(
            "fp8-perexpert",
            quantization(weight_block_size=[0, 128]),
            ["two positive integers", "[0, 128]"],
            id="fp8-empty-blocks",
        ),
        # The config.
        pytest.param("official", without("text_config"), ["text_config", "None", "original"], id="no-text-config"),
        pytest.param("official", top(text_config="text"), ["text_config", "'text'"], id="text-config-of-a-string"),
        pytest.param("official", top(text_config=[1]), ["text_config", "[1]"], id="text-config-of-a-list"),
        pytest.param("official", text(hidden_act="gelu"), ["hidden_act", "'silu'", "gelu"], id="activation"),
        pytest.param("official", text(attention_bias=True), ["attention_bias", "false", "True"], id="bias-in-config"),
        pytest.param("official", text(num_key_value_heads=3), ["num_key_value_heads", "divisor of 4"], id="kv-heads"),
        pytest.param("official", text(num_experts_per_tok=6), ["num_experts_per_tok", "at most"], id="per-token"),
        pytest.param("official", text(mlp_only_layers={}), ["mlp_only_layers", "list of integers"], id="dense-layers"),
        pytest.param("official", text(rms_norm_eps=float("nan")), ["rms_norm_eps", "found nan"], id="epsilon-of-nan"),
        pytest.param("official", text(rope_theta=float("inf")), ["rope_theta", "found inf"], id="infinite-theta"),
        pytest.param("official", without("rope_theta", "transformers_version"), ["rope_theta", "5000000"], id="theta"),
        pytest.param(
            "official", text(rope_scaling={"type": "su"}), ["rope_type", "'yarn'", "found su"], id="rope-type"
        ),
        pytest.param("official", text(rope_scaling="yarn"), ["rope_scaling", "an object"], id="rope-of-a-string"),
        pytest.param(
            "official",
            text(rope_scaling={"rope_type": "yarn", "factor": 2, "beta_fast": "32"}),
            ["beta_fast of YaRN", "a positive number", "found 32"],
            id="yarn-of-strings",
        ),
        pytest.param(
            "official",
            lambda c: c.text.update(rope_theta=1, rope_scaling={"rope_type": "yarn", "factor": 2}),
            ["rope_theta", "at least 2"],
            id="yarn-theta",
        ),
        pytest.param(
            "official", top(tie_word_embeddings="false"), ["tie_word_embeddings", "true or false"], id="tied-by-string"
        ),
        pytest.param(
            "mlx_lm_4bit",
            top(quantization={"group_size": 64, "bits": 8}),
            ["by 8 bits in groups of 64"],
            id="mlx-bits-and-group",
        ),
        pytest.param("mlx_lm_4bit", top(quantization={}), ["quantization", "group_size and bits"], id="mlx-empty"),
        pytest.param("mlx_lm_4bit", top(quantization="4bit"), ["quantization", "found 4bit"], id="mlx-of-a-string"),
        pytest.param(
            "mlx_lm_4bit",
            top(quantization={"group_size": "32", "bits": 4}),
            ["quantization", "group_size", "positive integer"],
            id="mlx-group-of-a-string",
        ),
    ],
)
def test_one_change_is_one_error_that_names_it(name, change, expected, tmp_path):
    checkpoint = Checkpoint(name)
    change(checkpoint)
    message = refusal(checkpoint.save(tmp_path))
    for part in expected:
        assert part in message


REQUIRED = [
    *("hidden_size", "num_hidden_layers", "intermediate_size", "moe_intermediate_size", "num_attention_heads"),
    *("num_key_value_heads", "num_experts", "num_experts_per_tok", "vocab_size"),
]


@pytest.mark.parametrize("field", REQUIRED)
@pytest.mark.parametrize("value", [..., None, "40", 40.0, True, 0, -1, [40], {}], ids=str)
def test_a_size_that_is_missing_or_no_size_is_named(field, value, tmp_path):
    checkpoint = Checkpoint("official")
    checkpoint.text[field] = value
    if value is ...:
        del checkpoint.text[field]
    message = refusal(checkpoint.save(tmp_path))
    found = "nothing" if value in (..., None) else value
    assert f"{field}: expected a positive integer, found {found}. Correct it" in message


ABSURD = {f"{field}-{value}": {field: value} for field in [*REQUIRED, "head_dim"] for value in (2**31 - 1, 10**12)}
ABSURD |= {
    "all": dict.fromkeys(set(REQUIRED) - {"num_hidden_layers", "num_attention_heads", "num_key_value_heads"}, 2**31 - 1)
}


@pytest.fixture(scope="module")
def absurd_sizes(tmp_path_factory) -> dict[str, str]:
    """The errors for absurd sizes, of a process that may not take much memory."""
    folder = tmp_path_factory.mktemp("absurd")
    for name, fields in ABSURD.items():
        checkpoint = Checkpoint("official")
        checkpoint.text.update(fields)
        checkpoint.save(folder / name)
    code = (
        "import json, pathlib, resource, sys, time\n"
        "from mlx_lm.utils import load_model\n"
        "import mlx_lm_qwen3vlmoe.model\n"
        "pages = int(open('/proc/self/statm').read().split()[0]) if sys.platform == 'linux' else None\n"
        "if pages: resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**29,) * 2)\n"
        "found = {}\n"
        "for path in pathlib.Path(sys.argv[1]).iterdir():\n"
        "    start = time.monotonic()\n"
        "    try: load_model(path)\n"
        "    except ValueError as error: found[path.name] = str(error)\n"
        "    assert time.monotonic() - start < 10, path\n"
        "print(json.dumps(found))"
    )
    return json.loads(run(sys.executable, "-c", code, folder).stdout)


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_sizes_cost_neither_time_nor_memory(name, absurd_sizes):
    assert absurd_sizes[name]
    if name.endswith(str(10**12)):
        assert f"{name.partition('-')[0]}: expected at most" in absurd_sizes[name]


# The host is first to see these, and its own error stands.


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        pytest.param("official", drop(f"{LAYERS}.0.self_attn.q_proj.weight"), ["layers.0.self_attn.q_proj"], id="no-q"),
        pytest.param("official", drop("model.language_model.norm.weight"), ["model.norm.weight"], id="no-norm"),
        pytest.param("official", drop(f"{LAYERS}.0.mlp.gate.weight"), ["layers.0.mlp.gate.weight"], id="no-router"),
        pytest.param("official", cut(f"{LAYERS}.0.mlp.gate.weight", 4), ["layers.0.mlp.gate.weight"], id="router"),
        pytest.param("official", cut(f"{LAYERS}.0.self_attn.q_proj.weight", 60), ["self_attn.q_proj.weight"], id="q"),
        pytest.param("official", turn(f"{LAYERS}.0.self_attn.o_proj.weight"), ["self_attn.o_proj.weight"], id="o-turn"),
        pytest.param("official", cut(f"{LAYERS}.0.self_attn.k_norm.weight", 8), ["self_attn.k_norm.weight"], id="norm"),
        pytest.param(
            "official", cut(f"{LAYERS}.1.mlp.up_proj.weight", 50), ["layers.1.mlp.up_proj.weight"], id="dense"
        ),
        pytest.param("official", cut("lm_head.weight", 95), ["lm_head.weight", "95"], id="head"),
        pytest.param("official", text(vocab_size=97), ["97", "96"], id="vocabulary"),
        pytest.param("official", text(num_attention_heads=8), ["q_proj.weight", "128"], id="heads"),
        pytest.param("official", text(head_dim=8), ["self_attn"], id="head-dim"),
        pytest.param("official", text(num_hidden_layers=4), ["layers.3."], id="a-layer-too-few"),
        pytest.param("mlx_lm_4bit", without("quantization", "quantization_config"), ["scales"], id="mlx-undescribed"),
        pytest.param("mlx_lm_4bit", drop(f"{MLX}.0.mlp.up_proj.scales"), ["layers.0.mlp.up_proj"], id="mlx-no-scales"),
        pytest.param(
            "mlx_lm_4bit",
            drop(f"{MLX}.1.mlp.switch_mlp.up_proj.biases"),
            ["switch_mlp.up_proj.biases"],
            id="mlx-no-biases",
        ),
        pytest.param(
            "mlx_lm_4bit", cut(f"{MLX}.0.mlp.up_proj.scales", 128, 1), ["layers.0.mlp.up_proj"], id="mlx-scales"
        ),
    ],
)
def test_a_tensor_that_the_host_misses_or_cannot_place_is_named(name, change, expected, tmp_path):
    checkpoint = Checkpoint(name)
    change(checkpoint)
    message = refusal(checkpoint.save(tmp_path), ValueError)
    for part in expected:
        assert part in message


UP, Q = f"{EXPERT}.up_proj", f"{LAYERS}.0.self_attn.q_proj"


def recast(key, dtype):
    """A tensor's values in another type, cut to integers where that has none but integers."""

    def change(c):
        old, array = c.tensors[key]
        values = (array.astype("u4") << 16).view("f4") if old == "BF16" else array
        c.tensors[key] = bfloat16(values) if dtype == "BF16" else (dtype, values.astype(TYPES[dtype]))

    return change


# Unchecked, some of these end the process, in the host or in MLX.


def group(**fields):
    return lambda c: c.config["quantization_config"]["config_groups"]["group_0"].update(fields)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        # Of another type: integers would be taken for weights, or floats for packed words.
        pytest.param(
            "official",
            recast("model.language_model.embed_tokens.weight", "I32"),
            ["embed_tokens.weight"],
            id="embed-i32",
        ),
        pytest.param("official", recast("model.language_model.norm.weight", "I64"), ["norm.weight"], id="norm-i64"),
        pytest.param("official", recast(f"{FUSED}.down_proj", "I32"), ["layers.0.mlp"], id="experts-i32"),
        pytest.param("per_expert", recast(f"{UP}.weight", "I32"), ["layers.2.mlp.experts.1.up_proj"], id="expert-i32"),
        pytest.param("awq-g32-bf16", recast(f"{Q}.qweight", "F32"), ["q_proj.qweight"], id="awq-float-words"),
        pytest.param("awq-g32-bf16", recast(f"{UP}.qzeros", "I64"), ["up_proj.qzeros"], id="awq-long-zeros"),
        pytest.param("awq-g32-bf16", recast(f"{Q}.scales", "I32"), ["q_proj.scales"], id="awq-integer-scales"),
        pytest.param("mlx_lm_4bit", recast(f"{MLX}.0.mlp.up_proj.scales", "I32"), ["up_proj.scales"], id="mlx-scales"),
        pytest.param("mlx_lm_4bit", recast(f"{MLX}.0.mlp.up_proj.weight", "I32"), ["up_proj.weight"], id="mlx-words"),
        # In another number of dimensions.
        pytest.param("awq-g32-bf16", reshape(f"{UP}.qweight", -1), ["up_proj.qweight", "[768]"], id="awq-flat"),
        pytest.param("gptq-w4-sym", reshape(f"{UP}.scales", -1), ["up_proj.scales", "[192]"], id="gptq-flat-scales"),
        pytest.param("ct-w4a16-asym-g32", reshape(f"{UP}.weight_packed", -1), ["up_proj.weight_packed"], id="ct-flat"),
        pytest.param("ct-mxfp4", reshape(f"{UP}.weight_packed", -1), ["up_proj.weight_packed"], id="mxfp4-flat"),
        pytest.param("ct-w8a8-int8", reshape(f"{UP}.weight", -1), ["up_proj.weight", "[6144]"], id="int8-flat"),
        pytest.param("modelopt-nvfp4", reshape(f"{UP}.weight", -1), ["up_proj.weight", "[3072]"], id="nvfp4-flat"),
        pytest.param("fp8-perexpert", reshape(f"{Q}.weight", -1), ["q_proj.weight"], id="fp8-flat"),
        pytest.param(
            "fp8-perexpert",
            cut(f"{LAYERS}.0.mlp.experts.1.down_proj.weight_scale_inv", 1),
            ["layers.0.mlp.experts.1.down_proj.weight_scale_inv", "[2, 1]", "[1, 1]"],
            id="fp8-one-block-of-two",
        ),
        pytest.param(
            "mlx_lm_4bit", drop(f"{MLX}.1.mlp.switch_mlp.up_proj.weight"), ["switch_mlp.up_proj"], id="mlx-no-weight"
        ),
        pytest.param("mlx_lm_4bit", cut(f"{MLX}.0.mlp.up_proj.scales", 128, 0), ["up_proj.scales"], id="mlx-no-groups"),
        pytest.param(
            "mlx_lm_4bit", reshape(f"{MLX}.0.mlp.up_proj.scales", -1), ["up_proj.scales"], id="mlx-flat-scales"
        ),
        # Another tool's description.
        pytest.param("gptq-w4-sym", quantization(bits="4"), ["bits", "'4'"], id="gptq-bits-of-a-string"),
        pytest.param(
            "gptq-w4-actorder",
            lambda c: [c.tensors.pop(key) for key in list(c.tensors) if key.endswith("g_idx")],
            ["g_idx", "found nothing"],
            id="act-order-without-the-order",
        ),
        pytest.param("awq-g32-bf16", cut(f"{UP}.qweight", 0), ["up_proj.qweight", "[0, 8]"], id="awq-empty"),
        pytest.param("gptq-w4-actorder", cut(f"{UP}.g_idx", 0), ["up_proj.g_idx", "[0]"], id="gptq-empty-order"),
        pytest.param(
            "fp8-perexpert", quantization(weight_block_size=5), ["weight_block_size", "5"], id="fp8-block-of-5"
        ),
        pytest.param("ct-w4a16-asym-g32", quantization(sparsity_config=[1]), ["sparsity_config"], id="sparsity-list"),
        pytest.param("ct-w4a16-asym-g32", quantization(config_groups=[1]), ["config_groups", "[1]"], id="groups-list"),
        pytest.param("ct-w4a16-asym-g32", scheme(num_bits="4"), ["num_bits", "'4'"], id="ct-bits-of-a-string"),
        pytest.param("ct-w4a16-asym-g32", scheme(num_bits=0), ["num_bits", "0"], id="ct-no-bits"),
        pytest.param("ct-w4a16-asym-g32", group(targets=5), ["targets", "5"], id="ct-targets"),
        pytest.param("ct-w4a16-asym-g32", group(targets=["re:*("]), ["targets", "*("], id="ct-targets-of-no-regex"),
    ],
)
def test_a_tensor_or_description_of_another_kind_is_one_error_that_names_it(name, change, expected, tmp_path):
    test_one_change_is_one_error_that_names_it(name, change, expected, tmp_path)


def test_scales_for_more_groups_than_inputs_do_not_end_the_process(tmp_path):
    """The host divides by the size of a group, and MLX by what it gets."""
    checkpoint = Checkpoint("mlx_lm_4bit")
    checkpoint.change(f"{MLX}.0.mlp.up_proj.scales", lambda array: np.tile(array, (1, 100)))
    code = "import pathlib, sys; from mlx_lm.utils import load_model; load_model(pathlib.Path(sys.argv[1]))"
    done = run(sys.executable, "-c", code, checkpoint.save(tmp_path), check=False)
    assert done.returncode == 1
    assert "CheckpointError: language_model.model.layers.0.mlp.up_proj.scales: expected" in done.stderr


# Changes that a reader may make something of: the logits must be right.


@pytest.mark.parametrize(
    ("name", "change"),
    [
        pytest.param("official", lambda c: None, id="none"),
        pytest.param(
            "official",
            lambda c: [turn(f"{LAYERS}.2.mlp.experts.{p}")(c) for p in ("gate_up_proj", "down_proj")],
            id="one-layer-turned",
        ),
        pytest.param("official", recast(f"{FUSED}.down_proj", "F32"), id="experts-in-float32"),
        pytest.param("official", drop("model.visual.pos_embed.weight"), id="no-vision-tensor"),
        pytest.param("official", without("vision_config"), id="no-vision-config"),
        pytest.param("official", top(quantization_config={}), id="nothing-quantized"),
        pytest.param("official", text(dtype="int32"), id="a-type-that-no-weight-has"),
        pytest.param("official", text(dtype=["bfloat16"]), id="a-type-of-a-list"),
        pytest.param("official", top(transformers_version="foo"), id="a-version-of-no-number"),
        pytest.param("official", text(mlp_only_layers=[1, 99, -1]), id="dense-layers-that-are-not-there"),
        pytest.param("official", text(num_local_experts=5), id="experts-in-both-fields"),
        pytest.param("gptq-w4-actorder", lambda c: None, id="act-order"),
        pytest.param(
            "gptq-w4-actorder", lambda c: c.config["quantization_config"].pop("desc_act"), id="act-order-undescribed"
        ),
        pytest.param("fp8-perexpert", without("quantization_config"), id="fp8-undescribed"),
        pytest.param("awq-g32-bf16", recast(f"{UP}.scales", "F32"), id="awq-scales-in-float32"),
    ],
)
def test_a_change_that_leaves_no_doubt_gives_the_logits(name, change, tmp_path):
    checkpoint = Checkpoint(name)
    change(checkpoint)
    assert logits_error(checkpoint.save(tmp_path), checkpoint.source) < TOLERANCE


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("official", "model.language_model.norm.weight"),
        ("awq-g32-bf16", f"{Q}.scales"),
        ("fp8-perexpert", f"{Q}.weight_scale_inv"),
        ("mlx_lm_4bit", f"{MLX}.0.mlp.up_proj.scales"),
    ],
)
def test_a_scale_of_no_number_shows_in_the_logits(value, name, key, tmp_path):
    """Loading is lazy, so no value is looked at. But no such value ends as a number that looks right."""
    checkpoint = Checkpoint(name)
    dtype, array = checkpoint.tensors[key]
    values = np.full(array.shape, value, "f4")
    checkpoint.tensors[key] = ("F32", values) if dtype == "F32" else bfloat16(values)
    assert np.isnan(logits_error(checkpoint.save(tmp_path), checkpoint.source))


# Folders and files that the host is first to read: its own error names what is wrong.


def test_an_empty_folder(tmp_path):
    assert str(tmp_path / "config.json") in refusal(tmp_path, FileNotFoundError)


def test_a_folder_without_weights(tmp_path):
    (Checkpoint("official").save(tmp_path) / "model.safetensors").rename(tmp_path / "pytorch_model.safetensors")
    assert "No safetensors found" in refusal(tmp_path, FileNotFoundError)


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        ("", json.JSONDecodeError, "Expecting value"),
        ("{", json.JSONDecodeError, "line 1"),
        ("[1]", AttributeError, "'list' object"),
        ("{}", KeyError, "model_type"),
        ('{"model_type": "no_such_model"}', ValueError, "Model type no_such_model not supported"),
        ('{"model_type": "qwen3_vl_moe", "text_config": null}', TypeError, "NoneType"),
        ('{"model_type": "qwen3_vl_moe", "text_config": 3}', TypeError, "int"),
    ],
)
def test_a_config_that_is_no_config(content, kind, message, tmp_path):
    (Checkpoint("official").save(tmp_path) / "config.json").write_text(content)
    with pytest.raises(kind, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda file: file[:-100], "exceeding the size of the file", id="cut-in-the-data"),
        pytest.param(lambda file: file[: len(file) // 2], "exceeding the size of the file", id="cut-in-half"),
        pytest.param(lambda file: file[:100], "incomplete download", id="cut-in-the-header"),
        pytest.param(lambda file: b"", "Unable to read", id="empty"),
        pytest.param(lambda file: b"version https://git-lfs.github.com/spec/v1\n", "Invalid json", id="lfs-pointer"),
        pytest.param(lambda file: file.replace(b'"BF16"', b'"BF17"', 1), "unsupported dtype", id="unknown-type"),
    ],
)
def test_a_damaged_file(change, message, tmp_path):
    file = Checkpoint("official").save(tmp_path) / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    assert message in refusal(tmp_path, RuntimeError)


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (2, "embed_tokens"),
        (3, "layers.0.mlp"),
        (4, "layers.1"),
        (5, "layers.2.mlp"),
        (6, "layers.2.mlp"),
    ],
)
def test_a_shard_that_is_missing_shows_as_tensors_that_are_missing(number, name, tmp_path):
    shutil.copytree(FIXTURES / "official_sharded", tmp_path, dirs_exist_ok=True)
    (tmp_path / f"model-0000{number}-of-00006.safetensors").unlink()
    assert name in refusal(tmp_path, ValueError)


def test_a_shard_of_vision_alone_is_not_missed(tmp_path):
    shutil.copytree(FIXTURES / "official_sharded", tmp_path, dirs_exist_ok=True)
    (tmp_path / "model-00001-of-00006.safetensors").unlink()
    assert logits_error(tmp_path, tmp_path) < TOLERANCE


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_may_not_be_read(name, tmp_path):
    """In a process that gives up root, which may read anything."""
    folder = Checkpoint("official").save(tmp_path)
    folder.chmod(0o755)
    (folder / name).chmod(0)
    code = (
        "import os, pathlib, sys\n"
        "from mlx_lm.utils import load_model\n"
        "import mlx_lm.models.qwen3_vl_moe\n"
        "os.chdir(sys.argv[1])\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "load_model(pathlib.Path())"
    )
    done = run(sys.executable, "-c", code, folder, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        ("PermissionError", "RuntimeError: [load_safetensors] Failed to open")
    )
    assert name in done.stderr.splitlines()[-1]


LORA = {"rank": 2, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.1.self_attn.q_proj.lora_a", (192, 2), "not an adapter parameter"),
        ("language_model.model.layers.3.self_attn.q_proj.lora_a", (48, 2), "(48, 2)"),
        ("language_model.model.layers.9.self_attn.q_proj.lora_a", (192, 2), "not an adapter parameter"),
    ],
)
def test_an_adapter_of_another_model(name, shape, expected, tmp_path):
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": LORA}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), {name: mx.ones(shape)})
    with pytest.raises(ValueError, match=name) as caught:
        load(str(TINY), adapter_path=str(tmp_path))
    assert expected in str(caught.value)


def test_an_adapter_in_place_of_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), {"lora_a": mx.ones(1)})
    assert "config.json" in refusal(tmp_path, FileNotFoundError)
