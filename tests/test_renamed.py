"""Formats and layouts that differ from a fixture's by names alone, or by how the same numbers are put together."""

from __future__ import annotations

import re
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model
from support.changes import check_refusal
from support.checkpoints import TOLERANCE, Checkpoint, logits_error

from mlx_lm_qwen3vlmoe import CheckpointError, quantization
from mlx_lm_qwen3vlmoe.layouts.aliases import ALIASES
from mlx_lm_qwen3vlmoe.layouts.names import layer_and_suffix

LAYERS = "model.language_model.layers"
V5 = "resave_5_23_0"
Change = Callable[[Checkpoint], None]


def renamed(pattern: str, new: str, **description: object) -> Change:
    """Other names for tensors; with a description that has these fields alone, unless there are none."""

    def change(c: Checkpoint) -> None:
        c.tensors = {re.sub(pattern, new, key): array for key, array in c.tensors.items()}
        if description:
            c.config["quantization_config"] = description

    return change


def quark(c: Checkpoint) -> None:
    """Quark 0.11, whose modules' own names are in the file."""
    renamed(r"\.(weight|input|output)_(scale|zero_point)$", r".\1_quantizer.\2")(c)


def quark_of_two_levels(c: Checkpoint) -> None:
    renamed(r"\.weight_(scale|zero_point)$", r".weight_quantizer.0.\1")(c)
    renamed(r"\.weight_(scale|zero_point)_2$", r".weight_quantizer.1.\1")(c)


def comfy(c: Checkpoint) -> None:
    renamed(r"\.weight_scale$", ".scale_weight")(c)
    renamed(r"\.input_scale$", ".scale_input")(c)
    c.tensors["scaled_fp8"] = ("F8_E4M3", np.zeros(2, "u1"))
    del c.config["quantization_config"]


def pairs(c: Checkpoint) -> None:
    """AngelSlim's 4 bits: two's complement, in int8."""
    for key, (_, array) in c.tensors.items():
        if key.endswith("weight_packed"):
            c.tensors[key] = ("I8", (array.view("u4") ^ 0x88888888).view("i1"))
    c.config["quantization_config"]["format"] = "int-quantized"


def w4afp8(c: Checkpoint) -> None:
    for key in [key for key in c.tensors if key.endswith("_proj.weight_scale")]:
        del c.tensors[key]
    renamed(r"\.qweight$", ".weight")(c)
    renamed(r"\.weight_scale\.int4$", ".weight_scale_inv")(c)
    for key, (dtype, array) in c.tensors.items():
        if key.endswith("self_attn.o_proj.weight_scale_inv"):
            c.tensors[key] = (dtype, array.reshape(-1, 1))
        elif ".self_attn." in key and key.endswith("weight_scale_inv"):
            c.tensors[key] = (dtype, array.reshape(1, -1))
    c.config["quantization_config"] = {"quant_method": "w4afp8", "weight_block_size": [128, 128]}


def naive(c: Checkpoint) -> None:
    weights = {"num_bits": 8, "strategy": "tensor", "symmetric": True, "type": "float"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    c.config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "naive-quantized",
        "config_groups": groups,
    }


def sharded_state(c: Checkpoint) -> None:
    """What vLLM has after loading: projections merged, names of its own."""
    renamed(r"^model\.language_model\.", "language_model.model.")(c)
    renamed(r"^lm_head\.", "language_model.lm_head.")(c)
    renamed(r"\.experts\.gate_up_proj$", ".experts.w13_weight")(c)
    renamed(r"\.experts\.down_proj$", ".experts.w2_weight")(c)
    merged = {"self_attn.q": "kv", "mlp.gate": ("up",)}
    for key in [key for key in c.tensors if re.search(r"layers\.\d+\.(self_attn\.q|mlp\.gate)_proj\.weight$", key)]:
        first = next(first for first in merged if f"{first}_proj" in key)
        others = [key.replace(f".{first.split('.')[1]}_proj", f".{other}_proj") for other in merged[first]]
        dtype = c.tensors[key][0]
        joined = np.concatenate([c.tensors.pop(each)[1] for each in (key, *others)])
        c.tensors[key.replace("q_proj", "qkv_proj").replace("gate_proj", "gate_up_proj")] = (dtype, joined)


def kv_scale(c: Checkpoint) -> None:
    renamed(r"\.k_proj\.k_scale$", ".kv_scale")(c)
    c.tensors = {key: array for key, array in c.tensors.items() if not key.endswith(".v_scale")}
    c.config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "static"}


def router_bias(value: float) -> Change:
    def change(c: Checkpoint) -> None:
        c.tensors[f"{LAYERS}.0.mlp.gate.e_score_correction_bias"] = ("F32", np.full(c.text["num_experts"], value, "f4"))

    return change


BLOCKS = {"quant_method": "blockwise_int8", "weight_block_size": [2, 32]}
KINDS: dict[str, tuple[str, Change]] = {
    "quark-0.11-mxfp4": ("quark-mxfp4", quark),
    "quark-0.11-int8": ("quark-int8", quark),
    "quark-0.11-nvfp4": ("quark-nvfp4", quark_of_two_levels),
    "quark-0.11-int4-fp8": ("quark-int4-fp8", quark_of_two_levels),
    "comfyui": ("modelopt-fp8", comfy),
    "fbgemm_fp8": ("ct-fp8-dynamic", renamed("$", "", quant_method="fbgemm_fp8", activation_scale_ub=1200.0)),
    "sglang-w8a8_fp8": ("ct-fp8-dynamic", renamed("$", "", quant_method="w8a8_fp8")),
    "sglang-w8a8_int8": ("ct-w8a8-int8", renamed("$", "", quant_method="w8a8_int8")),
    "sglang-blockwise_int8": ("ct-int8-block", renamed(r"\.weight_scale$", ".weight_scale_inv", **BLOCKS)),
    "sglang-w4afp8": ("angelslim-w4a8", w4afp8),
    "angelslim-int8-pairs": ("ct-w4a16-g32", pairs),
    "angelslim-naive-quantized": ("angelslim-fp8-static", naive),
    "autofp8-kv-scale": ("modelopt-fp8", kv_scale),
    "cosmos-rl": ("official", router_bias(0)),
    "ddp": ("official", renamed("^", "module.")),
    "compiled": ("official", renamed("^", "_orig_mod.")),
    "compiled-by-layer": ("official", renamed(r"(\.layers\.\d+\.)", r"\1_orig_mod.")),
    "fsdp": ("official", renamed(r"^(.*\.layers\.\d+\.)", r"_fsdp_wrapped_module.\1_fsdp_wrapped_module.")),
    "checkpointed": ("official", renamed(r"(\.layers\.\d+\.)", r"\1_checkpoint_wrapped_module.")),
    "peft-merged": ("official", renamed("^", "base_model.model.")),
    "peft-merged-compiled": ("official", renamed("^", "_orig_mod.module.base_model.model.")),
    "repeated": ("official", renamed(r"^model\.language_model\.", "model.language_model.language_model.")),
    "compiled-fp8": ("fp8-perexpert", renamed(r"(\.layers\.\d+\.)", r"\1_orig_mod.")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_another_name_changes_no_number(kind, tmp_path):
    name, change = KINDS[kind]
    checkpoint = Checkpoint(name)
    change(checkpoint)
    assert logits_error(checkpoint.save(tmp_path), checkpoint.source) < TOLERANCE


def test_vllms_sharded_state_is_cut_into_the_hosts_projections(tmp_path):
    checkpoint = Checkpoint(V5)
    sharded_state(checkpoint)
    assert any(key.endswith("qkv_proj.weight") for key in checkpoint.tensors)
    assert logits_error(checkpoint.save(tmp_path), checkpoint.source) < TOLERANCE


def test_every_alias_is_read_as_the_suffix_that_families_know():
    path = "language_model.model.layers.0.mlp.experts.3.up_proj"
    for alias, known in ALIASES.items():
        assert layer_and_suffix(f"{path}.{alias}") == (path, known)


def test_suffixes_of_fused_experts():
    path = "language_model.model.layers.0.mlp.experts.gate_up_proj"
    for name, suffix in {
        "gate_up_proj": "weight",
        "gate_up_proj_scale_inv": "weight_scale_inv",
        "gate_up_proj_weight_scale": "weight_scale",
        "_gate_up_proj_qdata": "_weight_qdata",
        "gate_up_proj.nested_absmax": "weight.nested_absmax",
        "gate_up_proj.quant_state.bitsandbytes__nf4": "weight.quant_state.bitsandbytes__nf4",
    }.items():
        assert layer_and_suffix(f"language_model.model.layers.0.mlp.experts.{name}") == (path, suffix)


def both(prefix: str) -> Change:
    def change(c: Checkpoint) -> None:
        c.tensors[f"{prefix}lm_head.weight"] = c.tensors["lm_head.weight"]

    return change


def unmerged(c: Checkpoint) -> None:
    renamed("^", "base_model.model.")(c)
    renamed(r"\.q_proj\.weight$", ".q_proj.base_layer.weight")(c)


def merged_twice(c: Checkpoint) -> None:
    before = dict(c.tensors)
    sharded_state(c)
    key = "language_model.model.layers.0.self_attn.k_proj.weight"
    c.tensors[key] = before[key.replace("language_model.model.", "model.language_model.")]


def merged_too_short(c: Checkpoint) -> None:
    sharded_state(c)
    c.change("language_model.model.layers.0.self_attn.qkv_proj.weight", lambda array: array[:-1])


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        pytest.param("official", both("module."), ["module.lm_head.weight", "lm_head.weight: "], id="two-of-one-name"),
        pytest.param("official", unmerged, ["base_layer", "a PEFT adapter that is not merged"], id="unmerged"),
        pytest.param("official", renamed("^", "wrapped."), ["wrapped.", "no known tool"], id="unknown-wrapper"),
        pytest.param("official", router_bias(0.5), ["mlp.gate.e_score_correction_bias", "zeros"], id="router-bias"),
        pytest.param(V5, merged_twice, ["qkv_proj.weight, ", "k_proj.weight", "found both"], id="merged-twice"),
        pytest.param(
            "resave_5_23_0",
            merged_too_short,
            ["layers.0.self_attn.qkv_proj.weight", "of the shape ["],
            id="merged-short",
        ),
    ],
)
def test_what_is_left_in_doubt_is_one_error(name, change, expected, tmp_path):
    check_refusal(name, change, expected, tmp_path)


def test_a_layer_without_its_scale_is_no_cast(tmp_path):
    """Of a checkpoint without a description, whose other layers have one."""
    for name, change in {"modelopt-fp8": comfy, "fp8-cast": lambda c: None}.items():
        checkpoint = Checkpoint(name)
        change(checkpoint)
        key = f"{LAYERS}.0.self_attn.q_proj."
        if name == "modelopt-fp8":
            del checkpoint.tensors[f"{key}scale_weight"]
        else:
            checkpoint.tensors[f"{key}weight"] = ("I8", checkpoint.tensors[f"{key}weight"][1].view("i1"))
        with pytest.raises(CheckpointError, match=r"_proj\.weight: expected the quant_method"):
            load_model(checkpoint.save(tmp_path / name), lazy=True)


def test_scales_of_gate_and_up_are_cut_with_them():
    weight, scales = mx.zeros((3, 8, 12), mx.uint8), mx.array([[1.0, 2], [3, 4], [5, 6]])
    pair = quantization.halves({"weight": weight, "weight_scale": scales, "input_scale": mx.ones(3)}, -1, {})
    assert [half["weight_scale"].tolist() for half in pair] == [[[1], [3], [5]], [[2], [4], [6]]]
    assert [half["weight"].shape for half in pair] == [(3, 8, 6)] * 2
