"""Checkpoints by quantization tools that are broken: one error that names the tensor or the field."""

from __future__ import annotations

import pytest
from support.changes import (
    EXPERT,
    FUSED,
    LAYERS,
    ONE,
    UP,
    add,
    check_refusal,
    cut,
    drop,
    group,
    quantization,
    reshape,
    scheme,
    top,
    without,
)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        pytest.param(
            "awq-g32-bf16",
            drop(f"{EXPERT}.up_proj.scales"),
            ["layers.2.mlp.experts.1.up_proj.scales", "found none"],
            id="awq-no-scales",
        ),
        pytest.param(
            "awq-g32-bf16",
            cut(f"{EXPERT}.up_proj.scales", 2),
            ["layers.2.mlp.experts.1.up_proj.scales", "96 inputs in groups of 32, found 2 groups"],
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
            ["up_proj.pre_quant_scale", "found this one, which may change the weight"],
            id="pre-quant-scale",
        ),
        pytest.param("awq-g32-bf16", quantization(bits=8), ["qweight", "4 bits", "found 8 bits"], id="awq-bits"),
        pytest.param("awq-g32-bf16", quantization(version="gemv"), ["up_proj.scales", "[96, 32]"], id="awq-gemv"),
        pytest.param(
            "awq-g32-bf16",
            without("quantization_config"),
            [
                "qweight",
                "auto-round, awq, gguf, gptq, ",
                "found nothing",
                "config.json that the quantization tool wrote",
            ],
            id="awq-undescribed",
        ),
        pytest.param(
            "awq-g32-bf16",
            quantization(quant_method="sinq"),
            [
                "quant_method",
                "awq, ",
                "compressed-tensors, fbgemm_fp8, fp8, gguf, gptq, ",
                '"sinq"',
                "mlx_lm.convert -q",
            ],
            id="unknown-method",
        ),
        pytest.param(
            "awq-g32-bf16", quantization(quant_method=None), ["quant_method", "found nothing"], id="no-method"
        ),
        pytest.param("awq-g32-bf16", quantization(quant_method=[]), ["quant_method", "[]"], id="method-of-a-list"),
        pytest.param(
            "awq-g32-bf16", top(quantization_config="awq"), ["quantization_config", "an object"], id="method-alone"
        ),
        pytest.param(
            "gptq-w4-sym",
            drop(f"{EXPERT}.up_proj.qzeros"),
            ["layers.2.mlp.experts.1.up_proj.qzeros", "found none"],
            id="gptq-no-zeros",
        ),
        pytest.param(
            "gptq-w4-sym",
            cut(f"{EXPERT}.up_proj.scales", 3, 63),
            ["layers.2.mlp.experts.1.up_proj.qzeros", "63 outputs", "found the shape [3, 8]"],
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
            ["checkpoint_format", "gptq, gptq_v2 or gptq_p", '"marlin"'],
            id="gptq-marlin",
        ),
        pytest.param(
            "ct-w4a16-asym-g32",
            drop(f"{EXPERT}.up_proj.weight_scale"),
            ["layers.2.mlp.experts.1.up_proj.weight_scale", "found none"],
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
            ["layers.2.mlp.experts.1.up_proj.weight_scale", "found none"],
            id="nvfp4-no-scale",
        ),
        pytest.param(
            "modelopt-nvfp4",
            drop(f"{EXPERT}.up_proj.weight_scale_2"),
            ["layers.2.mlp.experts.1.up_proj.weight_scale_2", "found none"],
            id="nvfp4-no-second-scale",
        ),
        pytest.param(
            "modelopt-nvfp4",
            cut(f"{EXPERT}.up_proj.weight_scale", 64, 5),
            ["layers.2.mlp.experts.1.up_proj.weight_scale", "96 inputs in groups of 16, found 5 groups"],
            id="nvfp4-scale-too-narrow",
        ),
        pytest.param(
            "fp8-perexpert",
            drop(f"{LAYERS}.0.mlp.experts.1.up_proj.weight_scale_inv"),
            ["layers.0.mlp.experts.1.up_proj.weight_scale_inv", "found none"],
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
    ],
)
def test_a_tensor_of_a_quantized_layer(name, change, expected, tmp_path):
    check_refusal(name, change, expected, tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        pytest.param(
            "gptq-w4-sym",
            quantization(bits="4"),
            ["bits", 'expected a positive integer, found "4"'],
            id="gptq-bits-of-a-string",
        ),
        pytest.param(
            "gptq-w4-actorder",
            lambda c: [c.tensors.pop(key) for key in list(c.tensors) if key.endswith("g_idx")],
            ["g_idx", "found none"],
            id="act-order-without-the-order",
        ),
        pytest.param("awq-g32-bf16", cut(f"{UP}.qweight", 0), ["up_proj.qweight", "[0, 8]"], id="awq-empty"),
        pytest.param("gptq-w4-actorder", cut(f"{UP}.g_idx", 0), ["up_proj.g_idx", "[0]"], id="gptq-empty-order"),
        pytest.param(
            "fp8-perexpert", quantization(weight_block_size=5), ["weight_block_size", "5"], id="fp8-block-of-5"
        ),
        pytest.param("ct-w4a16-asym-g32", quantization(sparsity_config=[1]), ["sparsity_config"], id="sparsity-list"),
        pytest.param("ct-w4a16-asym-g32", quantization(config_groups=[1]), ["config_groups", "[1]"], id="groups-list"),
        pytest.param("ct-w4a16-asym-g32", scheme(num_bits="4"), ["num_bits", '"4"'], id="ct-bits-of-a-string"),
        pytest.param(
            "ct-w4a16-asym-g32",
            scheme(num_bits=0),
            ["num_bits", "expected a positive integer, found 0"],
            id="ct-no-bits",
        ),
        pytest.param("ct-w4a16-asym-g32", group(targets=5), ["targets", "5"], id="ct-targets"),
        pytest.param("ct-w4a16-asym-g32", group(targets=["re:*("]), ["targets", "*("], id="ct-targets-of-no-regex"),
    ],
)
def test_a_description(name, change, expected, tmp_path):
    check_refusal(name, change, expected, tmp_path)
