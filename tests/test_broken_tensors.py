"""Other tensors that are broken, and checkpoints of other models: one error that names the tensor."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from support.changes import (
    FOUND_BOTH,
    FUSED,
    LAYERS,
    MLX,
    ONE,
    UP,
    Q,
    add,
    check_refusal,
    cut,
    dense,
    drop,
    omni,
    prefixed,
    recast,
    rename,
    reshape,
    text,
    top,
    turn,
    without,
)
from support.checkpoints import Checkpoint, bfloat16
from support.commands import run


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        pytest.param("official", drop("lm_head.weight"), ["lm_head.weight", "tie_word_embeddings"], id="no-head"),
        pytest.param("resave_5_23_0", drop("lm_head.weight"), ["lm_head.weight", "found nothing"], id="no-head-of-5"),
        pytest.param(
            "official",
            add("language_model.lm_head.weight", bfloat16(np.ones((96, 40)))),
            ["lm_head.weight", FOUND_BOTH, "Remove"],
            id="two-heads",
        ),
        pytest.param(
            "official",
            add("language_model.model.norm.weight", bfloat16(np.ones(40))),
            ["norm.weight", FOUND_BOTH, "Remove"],
            id="one-tensor-under-two-prefixes",
        ),
        pytest.param(
            "official",
            add(f"{LAYERS}.0.self_attn.q_proj.bias", bfloat16(np.ones(64))),
            ["layers.0.self_attn.q_proj.bias", "a bias, which this model type does not have", "config.json"],
            id="attention-bias",
        ),
        pytest.param(
            "official",
            rename(f"{LAYERS}.0.self_attn.q_norm.weight", f"{LAYERS}.0.self_attn.q_layernorm.weight"),
            ["q_layernorm", "one that no known tool writes"],
            id="a-misspelled-name",
        ),
        pytest.param("official", add("mtp.fc.weight", ONE), ["mtp.fc.weight", "a draft model"], id="mtp"),
        pytest.param(
            "official",
            add("audio_tower.proj.weight", ONE),
            ["audio_tower.proj.weight", "found part of Qwen3-Omni"],
            id="audio",
        ),
        pytest.param(
            "official",
            add(f"{LAYERS}.0.mlp.experts.lora_A.weight", ONE),
            ["experts.lora_A.weight", "PEFT adapter that is not merged"],
            id="lora-among-the-experts",
        ),
        pytest.param(
            "official",
            add("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", ONE),
            ["base_model.model", "PEFT adapter that is not merged"],
            id="an-adapter-of-peft",
        ),
        *(
            pytest.param("official", add(name, ONE), [found, remedy], id=name)
            for name, found, remedy in (
                ("score.weight", "the head of a reward model or classifier", "Use the model that it was trained from"),
                ("v_head.summary.weight", "the value head of TRL", "pretrained_model"),
                (f"{LAYERS}.0.self_attn.q_proj.base_layer.weight", "PEFT adapter", "merge_and_unload"),
                (f"{LAYERS}.0.self_attn.q_proj.lora_A.default.weight", "PEFT adapter", "merge_and_unload"),
                (f"{LAYERS}.0.self_attn.q_proj.lora_a", "mlx_lm adapter that is not fused", "mlx_lm.fuse"),
                ("fc.weight", "a draft model", "without the draft model"),
                ("d2t", "a draft model", "without the draft model"),
            )
        ),
        pytest.param(
            "official",
            text(num_hidden_layers=2),
            ["layers.2.", "no layer after 1, as num_hidden_layers is 2, found layer 2. "],
            id="a-layer-too-many",
        ),
        pytest.param("official", text(mlp_only_layers=[]), ["layers.1.mlp", "experts in layer 1"], id="dense-experts"),
        pytest.param(
            "official", text(mlp_only_layers=[0, 1]), ["layers.0.mlp", "a dense MLP in layer 0"], id="sparse-as-dense"
        ),
        pytest.param(
            "official", text(decoder_sparse_step=2), [".mlp.", "a dense MLP in layer", "decoder_sparse_step"], id="step"
        ),
    ],
)
def test_a_tensor_beside_the_experts(name, change, expected, tmp_path):
    check_refusal(name, change, expected, tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        pytest.param("official", dense, ["moe_intermediate_size", "found nothing"], id="a-dense-qwen3-vl"),
        pytest.param(
            "official",
            rename(f"{FUSED}.down_proj", f"{LAYERS}.0.mlp.down_proj.weight"),
            ["layers.0.mlp", "experts"],
            id="a-dense-mlp",
        ),
        pytest.param("official", omni, ["text_config", "Qwen3-VL-MoE checkpoint?"], id="an-omni-config"),
        pytest.param("official", prefixed("thinker.model."), ["thinker.model.", "part of Qwen3-Omni"], id="a-thinker"),
        pytest.param("official", prefixed("talker.model."), ["talker.model.", "part of Qwen3-Omni"], id="a-talker"),
    ],
)
def test_another_model(name, change, expected, tmp_path):
    check_refusal(name, change, expected, tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        pytest.param("official", drop(f"{LAYERS}.0.self_attn.q_proj.weight"), ["layers.0.self_attn.q_proj"], id="no-q"),
        pytest.param(
            "official", drop("model.language_model.norm.weight"), ["model.language_model.norm.weight"], id="no-norm"
        ),
        pytest.param("official", drop(f"{LAYERS}.0.mlp.gate.weight"), ["layers.0.mlp.gate.weight"], id="no-router"),
        pytest.param("official", cut(f"{LAYERS}.0.mlp.gate.weight", 4), ["layers.0.mlp.gate.weight"], id="router"),
        pytest.param("official", cut(f"{LAYERS}.0.self_attn.q_proj.weight", 60), ["self_attn.q_proj.weight"], id="q"),
        pytest.param("official", turn(f"{LAYERS}.0.self_attn.o_proj.weight"), ["self_attn.o_proj.weight"], id="o-turn"),
        pytest.param("official", cut(f"{LAYERS}.0.self_attn.k_norm.weight", 8), ["self_attn.k_norm.weight"], id="norm"),
        pytest.param(
            "official", cut(f"{LAYERS}.1.mlp.up_proj.weight", 50), ["layers.1.mlp.up_proj.weight"], id="dense"
        ),
        pytest.param(
            "official", cut("lm_head.weight", 95), ["lm_head.weight", "found [95, 40]. Is vocab_size"], id="head"
        ),
        pytest.param(
            "official", text(vocab_size=97), ["97", "96", "Is vocab_size in config.json right"], id="vocabulary"
        ),
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
        pytest.param(
            "official",
            top(
                quantization={"group_size": 32, "bits": 4, "language_model.model.layers.0.mlp.gate": {"group_size": 64}}
            ),
            ["layers.0.mlp.gate.weight", "quantization in config.json lists this layer", "found floats"],
            id="mlx-lists-a-layer-of-floats",
        ),
    ],
)
def test_a_tensor_that_the_host_misses_or_cannot_place(name, change, expected, tmp_path):
    check_refusal(name, change, expected, tmp_path, ValueError)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        # Unchecked, some of these end the process: integers taken for weights, floats for packed words.
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
    ],
)
def test_a_tensor_of_another_type(name, change, expected, tmp_path):
    check_refusal(name, change, expected, tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
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
            "mlx_lm_4bit",
            drop(f"{MLX}.1.mlp.switch_mlp.up_proj.weight"),
            ["switch_mlp.up_proj"],
            id="mlx-no-weight",
        ),
        pytest.param("mlx_lm_4bit", cut(f"{MLX}.0.mlp.up_proj.scales", 128, 0), ["up_proj.scales"], id="mlx-no-groups"),
        pytest.param(
            "mlx_lm_4bit", reshape(f"{MLX}.0.mlp.up_proj.scales", -1), ["up_proj.scales"], id="mlx-flat-scales"
        ),
    ],
)
def test_a_tensor_in_another_number_of_dimensions(name, change, expected, tmp_path):
    check_refusal(name, change, expected, tmp_path)


def test_scales_for_more_groups_than_inputs_do_not_end_the_process(tmp_path):
    """The host divides by the size of a group, and MLX by what it gets."""
    checkpoint = Checkpoint("mlx_lm_4bit")
    checkpoint.change(f"{MLX}.0.mlp.up_proj.scales", lambda array: np.tile(array, (1, 100)))
    code = "import pathlib, sys; from mlx_lm.utils import load_model; load_model(pathlib.Path(sys.argv[1]))"
    done = run(sys.executable, "-c", code, checkpoint.save(tmp_path), check=False)
    assert done.returncode == 1
    assert "CheckpointError: language_model.model.layers.0.mlp.up_proj.scales: expected" in done.stderr
