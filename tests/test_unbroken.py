"""Changes that a reader may make something of: the logits must be right."""

from __future__ import annotations

import numpy as np
import pytest
from support.changes import (
    FUSED,
    LAYERS,
    MLX,
    UP,
    Q,
    drop,
    recast,
    text,
    top,
    turn,
    without,
)
from support.checkpoints import TOLERANCE, Checkpoint, bfloat16, logits_error


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
