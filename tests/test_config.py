"""Configs of every writer become what the host's qwen3_moe takes, in place."""

from __future__ import annotations

import copy
import inspect
import json
import math
import sys

import mlx.core as mx
import pytest
from mlx_lm.models import qwen3_moe
from mlx_lm.utils import load_config
from support import FIXTURES
from support.configs import NEWER_ROPE, official

from mlx_lm_qwen3vlmoe import CheckpointError, Model, ModelArgs
from mlx_lm_qwen3vlmoe.config import normalize
from mlx_lm_qwen3vlmoe.quantization.description import foreign_quantization, own_quantization, settle_quantization


def test_the_official_config_loads_as_published():
    args = ModelArgs.from_dict(official())
    model = Model(args)
    assert len(model.layers) == 48
    assert model.model_type == "qwen3_vl_moe"
    assert args.tie_word_embeddings is False


def test_the_live_config_becomes_what_the_unchanged_host_takes():
    config = official(
        rope_theta=..., rope_scaling=..., rope_parameters=NEWER_ROPE, num_experts=..., num_local_experts=128
    )
    ModelArgs.from_dict(config)
    required = [
        name
        for name, parameter in inspect.signature(qwen3_moe.ModelArgs).parameters.items()
        if parameter.default is inspect.Parameter.empty
    ]
    assert set(required) <= config["text_config"].keys()
    assert config["text_config"]["num_experts"] == 128
    assert config["text_config"]["rope_theta"] == 5000000
    assert "rope_parameters" not in config["text_config"]


@pytest.mark.parametrize("name", sorted(path.parent.name for path in FIXTURES.glob("*/config.json")))
def test_normalizing_twice_changes_nothing(name):
    config = json.loads((FIXTURES / name / "config.json").read_text())
    normalize(config)
    once = copy.deepcopy(config)
    normalize(config)
    assert config == once


@pytest.mark.parametrize(
    ("changes", "version", "theta"),
    [
        ({}, "4.57.6", 5000000),
        ({"rope_theta": ...}, "4.57.6", 5000000),
        ({"rope_theta": ...}, "5.10.2", 500000),
        ({"rope_theta": ..., "rope_parameters": {"rope_theta": 7, "rope_type": "default"}}, "5.10.2", 7),
    ],
)
def test_a_missing_rope_theta_is_the_writers_default(changes, version, theta):
    text = normalize(official(**changes) | {"transformers_version": version})
    assert text["rope_theta"] == theta


def test_a_stray_rope_at_the_top_level_is_not_believed():
    """GPTQModel writes one, with a theta of 10000."""
    text = normalize(official() | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}})
    assert text["rope_theta"] == 5000000


YARN = {"factor": 3.0, "original_max_position_embeddings": 262144}


@pytest.mark.parametrize(
    ("fields", "theta", "scaling"),
    [
        pytest.param({"rope_scaling": {"type": "yarn", **YARN}}, 5000000, {"rope_type": "yarn", **YARN}, id="type"),
        pytest.param(
            {"rope_theta": ..., "rope_scaling": ..., "rope_parameters": {"type": "yarn", "rope_theta": 7, **YARN}},
            *(7, {"rope_type": "yarn", **YARN}),
            id="type in rope_parameters",
        ),
        pytest.param(
            {"rope_parameters": NEWER_ROPE, "rope_scaling": {"type": "yarn", **YARN}},
            *(5000000, {"rope_type": "yarn", **YARN}),
            id="type beside rope_type of the other field",
        ),
        pytest.param(
            {"rope_parameters": {"rope_type": "yarn", "attention_factor": 2.0, **YARN}, "rope_scaling": YARN},
            *(5000000, {"rope_type": "default", **YARN}),
            id="no type beside yarn in the other field",
        ),
        pytest.param(
            {
                "rope_parameters": {"rope_type": "yarn", "attention_factor": 2.0, "partial_rotary_factor": 0.5, **YARN},
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            },
            *(5000000, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
            id="yarn in both",
        ),
        pytest.param(
            {"rope_parameters": {"rope_type": "yarn", **YARN}, "rope_scaling": {}},
            *(5000000, {"rope_type": "yarn", **YARN}),
            id="an empty rope_scaling",
        ),
        pytest.param(
            {"rope_parameters": {"rope_type": "yarn", **YARN}, "rope_scaling": None},
            *(5000000, {"rope_type": "yarn", **YARN}),
            id="no rope_scaling",
        ),
        pytest.param(
            {"rope_theta": ..., "rope_scaling": {"rope_type": "yarn", "rope_theta": 7, **YARN}},
            *(7, {"rope_type": "yarn", **YARN}),
            id="theta in rope_scaling",
        ),
        pytest.param(
            {"rope_scaling": {"type": "default", "rope_type": "yarn", **YARN}},
            *(5000000, {"rope_type": "yarn", **YARN}),
            id="both names of the type",
        ),
        pytest.param({"rope_scaling": {"type": "mrope"}}, 5000000, {"rope_type": "default"}, id="mrope"),
    ],
)
@pytest.mark.parametrize("nested", [True, False])
def test_rope_scaling_takes_the_place_of_rope_parameters(fields, theta, scaling, nested):
    """As `Qwen3VLMoeConfig` of transformers 5.24.0 read all of these but ``mrope``, a type of Qwen2-VL's."""
    config = official(**fields)
    if not nested:
        config |= config.pop("text_config") | {"model_type": "qwen3_vl_moe"}
    text = normalize(config)
    assert (text["rope_theta"], text["rope_scaling"]) == (theta, scaling)
    assert "rope_parameters" not in text


def test_theta_stays_where_rope_scaling_takes_the_place_of_the_field_that_has_it():
    """transformers 5.24.0 falls back to a theta of 500000 there, for which no weights were trained."""
    fields = {"rope_parameters": NEWER_ROPE, "rope_scaling": {"rope_type": "yarn", **YARN}}
    text = normalize(official(rope_theta=..., **fields) | {"transformers_version": "5.24.0"})
    assert text["rope_theta"] == 5000000


@pytest.mark.parametrize("text", [{}, {"rope_theta": ..., "rope_scaling": ...}])
def test_rope_at_the_top_level_is_not_that_of_the_text_config(text):
    """Not even where the text config has none: then the theta is the writer's default."""
    stray = {"rope_theta": 7, "rope_scaling": {"type": "yarn", **YARN}, "rope_parameters": {"rope_theta": 8}}
    found = normalize(official(**text) | stray)
    assert found["rope_theta"] == 5000000
    assert found["rope_scaling"]["rope_type"] == "default"


def test_text_fields_at_the_top_level_are_gathered():
    nested = official()
    flat = {name: value for name, value in nested.items() if name != "text_config"} | nested["text_config"]
    flat["model_type"] = "qwen3_vl_moe"
    text = normalize(flat)
    expected = normalize(nested)
    assert {name: text[name] for name in inspect.signature(qwen3_moe.ModelArgs).parameters} == {
        name: expected[name] for name in inspect.signature(qwen3_moe.ModelArgs).parameters
    }
    assert "hidden_size" not in flat


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": ...}, r"num_experts: expected a positive integer, found nothing"),
        ({"hidden_size": "2048"}, r'hidden_size: expected a positive integer, found "2048"'),
        ({"vocab_size": -1}, r"vocab_size: expected a positive integer, found -1"),
        ({"num_local_experts": 64}, r"num_experts: expected 64, as in num_local_experts, found 128"),
        ({"num_experts_per_tok": 129}, r"num_experts_per_tok: expected at most num_experts"),
        ({"num_key_value_heads": 5}, r"num_key_value_heads: expected a divisor of num_attention_heads"),
        ({"attention_bias": True}, r"attention_bias: expected false"),
        ({"hidden_act": "gelu"}, r'hidden_act: expected "silu"'),
        ({"mlp_only_layers": 3}, r"mlp_only_layers: expected a list of integers, found 3"),
        ({"rms_norm_eps": "small"}, r"rms_norm_eps: expected a positive number, found .small"),
        ({"rope_theta": "big"}, r"rope_theta: expected a positive number, found .big"),
        ({"rope_parameters": {"rope_theta": 1}}, r"rope_theta: expected the same value"),
        ({"rope_scaling": {"rope_type": "longrope"}}, r'rope_type: expected "default" or "yarn", found "longrope"'),
        ({"rope_scaling": {"type": "dynamic"}}, r'rope_type: expected "default" or "yarn", found "dynamic"'),
        ({"rope_scaling": [1]}, r"rope_scaling: expected an object"),
        ({"rope_scaling": {"rope_type": "yarn"}}, r"factor of YaRN: expected a positive number, found nothing"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor: expected 1\.0, found 0\.5"),
    ],
)
def test_a_field_that_is_missing_or_of_no_use_is_named(changes, message):
    with pytest.raises(CheckpointError, match=message):
        ModelArgs.from_dict(official(**changes))


@pytest.mark.parametrize("text", [None, 3, []])
def test_a_config_without_a_language_model_is_refused(text):
    with pytest.raises(CheckpointError, match="text_config"):
        ModelArgs.from_dict({"model_type": "qwen3_vl_moe", "text_config": text})


def yarn(**fields) -> dict:
    return {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 64} | fields


def tiny(rope_scaling: dict) -> Model:
    config = json.loads((FIXTURES / "official" / "config.json").read_text())
    config["text_config"] |= {"rope_scaling": rope_scaling, "max_position_embeddings": 192}
    return Model(ModelArgs.from_dict(config))


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({}, 0.1 * math.log(3.0) + 1),
        ({"attention_factor": 1.25}, 1.25),
        ({"mscale": 2.0}, 0.1 * math.log(3.0) + 1),  # one of the pair alone has no effect
        ({"mscale": 2.0, "mscale_all_dim": 1.0}, (0.2 * math.log(3.0) + 1) / (0.1 * math.log(3.0) + 1)),
        ({"beta_fast": None, "attention_factor": None}, 0.1 * math.log(3.0) + 1),
    ],
)
def test_yarn_scales_attention_as_transformers_does(fields, scale):
    rope = tiny(yarn(**fields)).layers[0].self_attn.rope
    assert rope.mscale == pytest.approx(scale)


def test_yarn_without_an_original_length_takes_the_context_length_as_transformers_does():
    given = tiny(yarn(original_max_position_embeddings=192)).layers[0].self_attn.rope
    missing = yarn()
    del missing["original_max_position_embeddings"]
    assert mx.array_equal(tiny(missing).layers[0].self_attn.rope._freqs, given._freqs)


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128}
MLX = {"bits": 4, "group_size": 64}


@pytest.mark.parametrize(
    ("config", "foreign", "own"),
    [
        ({}, None, None),
        ({"quantization_config": AWQ}, AWQ, None),
        ({"text_config": {"compression_config": AWQ}}, AWQ, None),
        ({"quantization": MLX, "quantization_config": MLX}, None, MLX),
        ({"quantization_config": MLX}, None, MLX),
        ({"quantization": MLX, "text_config": {"quantization_config": AWQ}}, None, MLX),  # of before a conversion
        ({"quantization_config": {"quant_method": "auto-round", "packing_format": "mlx", **MLX}}, None, MLX),
    ],
)
def test_quantization_is_another_tools_or_mlxs_wherever_it_stands(config, foreign, own):
    """To ask changes nothing; what is settled is all that the host looks at."""
    before = copy.deepcopy(config)
    assert (foreign_quantization(config), own_quantization(config)) == (foreign, own)
    assert config == before
    settle_quantization(config)
    assert (config.get("quantization"), own_quantization(config)) == (own, own)
    for home in (config, config.get("text_config", {})):
        for field in ("quantization_config", "compression_config"):
            assert home.get(field) in (None, MLX)


@pytest.mark.parametrize("missing", [{}, {"group_size": None, "bits": None}])
@pytest.mark.parametrize(
    ("mode", "group_size", "bits"), [("affine", 64, 4), ("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)]
)
def test_what_is_null_or_missing_in_an_entry_is_the_default_of_its_mode(mode, group_size, bits, missing):
    found = own_quantization({"quantization": {**MLX, "a": {"mode": mode, **missing}, "b": True}})
    assert found == {**MLX, "a": {"mode": mode, "group_size": group_size, "bits": bits}, "b": True}


def test_an_entry_without_a_mode_is_affine_whatever_the_others_are():
    """As MLX's own layers take it."""
    found = own_quantization({"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4", "a": {"bits": 8}}})
    assert found["a"] == {"bits": 8, "group_size": 64}


def test_importing_the_package_imports_neither_mlx_nor_the_host():
    from support.commands import run

    code = "import sys, mlx_lm_qwen3vlmoe as p; dir(p); p.install(); print({'mlx', 'mlx_lm'} & set(sys.modules))"
    assert run(sys.executable, "-c", code).stdout.strip() == "set()"


@pytest.mark.parametrize(
    "fields",
    [
        {"attn_logit_softcapping": 30.0},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"sliding_window": 4096, "use_sliding_window": True},
        {"n_shared_experts": 2, "routed_scaling_factor": 2.5},
    ],
)
def test_fields_that_nobody_reads_get_one_warning(fields, caplog):
    config = load_config(FIXTURES / "official")
    config["text_config"] |= fields
    ModelArgs.from_dict(config)
    (message,) = [record.getMessage() for record in caplog.records if "nor this package reads" in record.getMessage()]
    assert all(field in message for field in fields)


@pytest.mark.parametrize("folder", sorted(path.parent for path in FIXTURES.glob("*/config.json")), ids=lambda p: p.name)
def test_real_configs_get_no_such_warning(folder, caplog):
    ModelArgs.from_dict(load_config(folder))
    assert "nor this package reads" not in caplog.text


def test_layers_of_their_own_config_are_refused():
    """transformers 5.24 can give single layers other sizes."""
    config = load_config(FIXTURES / "official")
    config["text_config"]["per_layer_config"] = {"1": {"moe_intermediate_size": 8}}
    with pytest.raises(CheckpointError, match="per_layer_config: expected no such field"):
        ModelArgs.from_dict(config)
