"""Fields of the language model at the top level of a config, where `load(…, model_config=…)` and users put them."""

from __future__ import annotations

import copy
import json
import shutil

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model
from support import FIXTURES
from support.configs import NEWER_ROPE, official

from mlx_lm_qwen3vlmoe import CheckpointError, ModelArgs
from mlx_lm_qwen3vlmoe.config import normalize

WARNING = "config.json, or model_config, has fields of the language model at the top level."
TOP_YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}


def told(caplog) -> str:
    """The one warning."""
    (record,) = (record for record in caplog.records if record.name.startswith("mlx_lm_qwen3vlmoe"))
    assert record.levelname == "WARNING"
    return record.getMessage()


@pytest.mark.parametrize(
    ("field", "value", "before"),
    [
        ("num_experts_per_tok", 1, 8),
        ("rms_norm_eps", 0.5, 1e-6),
        ("rope_theta", 7, 5000000),
        ("max_position_embeddings", 64, 262144),
    ],
)
def test_a_field_at_the_top_that_differs_counts_and_is_told(caplog, field, value, before):
    """`load(…, model_config={…})` puts it there, or a user does by hand."""
    config = official() | {field: value}
    text = normalize(config)
    assert text[field] == value
    assert told(caplog) == f"{WARNING} Used: {field} {value} in place of {before if before != 1e-6 else '1e-06'}."
    assert field not in config  # so that what is saved says it once
    once = copy.deepcopy(config)
    assert normalize(config) == once["text_config"]


@pytest.mark.parametrize("newer", [False, True])
def test_theta_at_the_top_counts_whatever_names_it_below(newer):
    """As of a config of transformers 5, whose theta is in rope_parameters."""
    places = {"rope_theta": ..., "rope_scaling": ..., "rope_parameters": NEWER_ROPE} if newer else {}
    assert normalize(official(**places) | {"rope_theta": 7})["rope_theta"] == 7


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize(("inside", "theta"), [({}, 5000000), ({"rope_theta": 7}, 7)])
def test_yarn_at_the_top_counts_and_leaves_theta_alone(caplog, newer, inside, theta):
    places = {"rope_theta": ..., "rope_scaling": ..., "rope_parameters": NEWER_ROPE} if newer else {}
    text = normalize(official(**places) | {"rope_scaling": TOP_YARN | inside})
    assert (text["rope_theta"], text["rope_scaling"]) == (theta, TOP_YARN)
    assert "Used: rope_scaling" in told(caplog)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts_per_tok": 8, "hidden_size": 2048, "num_local_experts": 128, "hidden_act": "silu"},
        {"rope_scaling": None, "rms_norm_eps": None},
        {"rope_scaling": {"type": "default"}, "use_cache": False, "initializer_range": 1.0},
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},  # GPTQModel
    ],
)
def test_a_field_at_the_top_that_changes_nothing_is_not_told(caplog, fields):
    expected = normalize(official())
    assert normalize(official() | fields) == expected
    assert not caplog.records


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 64},
        {"vocab_size": 32000, "num_hidden_layers": 2},
        {"num_local_experts": 4},
        {"mlp_only_layers": [1]},
        {"hidden_act": "gelu"},
        {"rope_parameters": TOP_YARN},
        {"rope_parameters": TOP_YARN, "rope_theta": 7},
    ],
)
def test_a_field_at_the_top_that_the_tensors_or_nobody_can_confirm_is_not_used_and_is_told(caplog, fields):
    expected = normalize(official())
    assert normalize(official() | fields) == expected
    message = told(caplog)
    assert message.startswith(f"{WARNING} Not used, as they belong in text_config: ")
    assert all(field in message for field in fields)


def test_what_is_used_and_what_is_not_are_one_warning(caplog):
    normalize(official() | {"num_experts_per_tok": 1, "vocab_size": 7})
    assert told(caplog) == (
        f"{WARNING} Used: num_experts_per_tok 1 in place of 8. Not used, as they belong in text_config: vocab_size 7."
    )


def test_a_field_at_the_top_that_the_text_config_lacks_is_taken_from_there(caplog):
    config = official(num_experts=..., head_dim=..., rope_theta=...)
    assert normalize(config | {"num_experts": 128, "head_dim": 64, "rope_theta": 7})["rope_theta"] == 7
    assert (config["text_config"]["num_experts"], config["text_config"]["head_dim"]) == (128, 64)
    assert not caplog.records


def test_a_text_config_of_a_few_fields_counts_where_the_others_are_at_the_top():
    """`load(…, model_config={"text_config": {…}})` of a config that was saved flat."""
    flat = official().pop("text_config") | {"model_type": "qwen3_vl_moe", "text_config": {"num_experts_per_tok": 1}}
    text = normalize(flat)
    assert (text["num_experts_per_tok"], text["hidden_size"]) == (1, 2048)


def test_a_text_config_of_a_few_fields_is_refused_with_the_way_to_pass_them():
    """The host has put it in place of the whole."""
    config = official() | {"text_config": {"num_experts_per_tok": 1, "rope_theta": 7}}
    with pytest.raises(CheckpointError) as refused:
        ModelArgs.from_dict(config)
    assert "it has replaced the whole text_config" in str(refused.value)
    assert str(refused.value).endswith(
        "pass the fields themselves in model_config instead (num_experts_per_tok and rope_theta)."
    )


@pytest.mark.parametrize("field", [{"rope_theta": 10000.0}, {"num_experts_per_tok": 1}, {"rope_scaling": TOP_YARN}])
def test_model_config_gives_the_logits_of_the_same_field_in_text_config(field, tmp_path):
    source = FIXTURES / "official"
    ids = mx.load(str(source / "golden.safetensors"))["ids"]
    shutil.copytree(source, tmp_path / "copy")
    config = json.loads((source / "config.json").read_text())
    config["text_config"] |= field
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    found = load_model(source, model_config=field)[0](ids)
    assert mx.array_equal(found, load_model(tmp_path / "copy")[0](ids))
    assert not mx.allclose(found, load_model(source)[0](ids))
