"""Experts that are broken, fused or one by one: one error that names the tensor."""

from __future__ import annotations

import numpy as np
import pytest
from support.changes import (
    EXPERT,
    FOUND_BOTH,
    FUSED,
    LAYERS,
    MORE_LAYOUTS,
    ONE,
    add,
    check_refusal,
    cut,
    drop,
    rename,
    reshape,
    text,
    turn,
)
from support.checkpoints import bfloat16


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        # 5 experts, 40 wide, 28 within; layer 1 is dense.
        pytest.param(
            "official", drop(f"{FUSED}.gate_up_proj"), ["layers.0", "gate_up_proj", "found none"], id="no-gate-up"
        ),
        pytest.param("official", drop(f"{FUSED}.down_proj"), ["layers.0", "down_proj", "found none"], id="no-down"),
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
            ["layers.0.mlp", MORE_LAYOUTS, "Remove"],
            id="fused-and-separate",
        ),
        pytest.param(
            "official",
            add(f"{LAYERS}.0.mlp.switch_mlp.down_proj.weight", bfloat16(np.ones((5, 40, 28)))),
            ["layers.0.mlp", MORE_LAYOUTS, "Remove"],
            id="fused-and-stacked",
        ),
        pytest.param(
            "official",
            add(f"{FUSED}.bias", ONE),
            ["experts.bias", "found a bias, which this model type does not have"],
            id="expert-bias",
        ),
        pytest.param(
            "official",
            rename(f"{FUSED}.gate_up_proj", f"{FUSED}.w1"),
            ["experts.w1", "found one that no known tool writes"],
            id="experts-of-another-name",
        ),
    ],
)
def test_fused_experts(name, change, expected, tmp_path):
    check_refusal(name, change, expected, tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        pytest.param(
            "per_expert",
            drop(f"{EXPERT}.up_proj.weight"),
            ["layers.2.mlp.experts.1.up_proj.weight", "found none"],
            id="no-up-of-one-expert",
        ),
        pytest.param(
            "per_expert",
            drop(*(f"{LAYERS}.2.mlp.experts.{n}.up_proj.weight" for n in range(5))),
            ["layers.2.mlp.experts.0.up_proj.weight", "found none"],
            id="no-up-of-any-expert",
        ),
        pytest.param(
            "per_expert",
            drop(*(f"{EXPERT}.{p}_proj.weight" for p in ("gate", "up", "down"))),
            ["layers.2.mlp.experts.1.gate_proj.weight", "found none"],
            id="no-expert",
        ),
        pytest.param(
            "per_expert",
            rename(f"{EXPERT}.down_proj.weight", f"{LAYERS}.2.mlp.experts.5.down_proj.weight"),
            ["layers.2.mlp.experts.5.down_proj.weight", "no expert after 4, as num_experts is 5, found expert 5. "],
            id="expert-out-of-range",
        ),
        pytest.param(
            "per_expert",
            add(f"{LAYERS}.2.mlp.experts.{10**30}.down_proj.weight", ONE),
            ["no expert after 4"],
            id="expert-far-out-of-range",
        ),
        pytest.param(
            "per_expert",
            text(num_experts=4),
            ["no expert after 3", "Correct num_experts in config.json"],
            id="num-separate-experts",
        ),
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
            ["experts.1.up_proj.weight", FOUND_BOTH],
            id="expert-under-two-names",
        ),
        pytest.param(
            "official",
            turn(f"{FUSED}.down_proj"),
            ["expected both [experts, in, out] or both [experts, out, in], found [5, 40, 56] and [5, 40, 28]"],
            id="one-tensor-turned",
        ),
    ],
)
def test_separate_experts(name, change, expected, tmp_path):
    check_refusal(name, change, expected, tmp_path)
