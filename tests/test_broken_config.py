"""A config that is broken: one error that names the field."""

from __future__ import annotations

import json
import sys

import pytest
from support.changes import (
    check_refusal,
    text,
    top,
    without,
)
from support.checkpoints import Checkpoint, refusal
from support.commands import run


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        pytest.param(
            "official",
            without("text_config"),
            ["text_config", "found nothing", "Is this a Qwen3-VL-MoE checkpoint?"],
            id="no-text-config",
        ),
        pytest.param(
            "official", top(text_config="text"), ["text_config", 'found "text"'], id="text-config-of-a-string"
        ),
        pytest.param("official", top(text_config=[1]), ["text_config", "[1]"], id="text-config-of-a-list"),
        pytest.param(
            "official",
            text(hidden_act="gelu"),
            ["hidden_act", '"silu"', '"gelu"', "mlx-lm's qwen3_moe cannot run such a model"],
            id="activation",
        ),
        pytest.param(
            "official",
            text(attention_bias=True),
            ["attention_bias", "expected false, found true", "cannot run such a model"],
            id="bias-in-config",
        ),
        pytest.param(
            "official",
            text(num_key_value_heads=3),
            ["num_key_value_heads", "divisor of num_attention_heads (4)"],
            id="kv-heads",
        ),
        pytest.param("official", text(num_experts_per_tok=6), ["num_experts_per_tok", "at most"], id="per-token"),
        pytest.param("official", text(mlp_only_layers={}), ["mlp_only_layers", "list of integers"], id="dense-layers"),
        pytest.param("official", text(rms_norm_eps=float("nan")), ["rms_norm_eps", "found NaN"], id="epsilon-of-nan"),
        pytest.param("official", text(rope_theta=float("inf")), ["rope_theta", "found Infinity"], id="infinite-theta"),
        pytest.param("official", without("rope_theta", "transformers_version"), ["rope_theta", "5000000"], id="theta"),
        pytest.param(
            "official", text(rope_scaling={"type": "su"}), ["rope_type", '"yarn"', 'found "su"'], id="rope-type"
        ),
        pytest.param("official", text(rope_scaling="yarn"), ["rope_scaling", "an object"], id="rope-of-a-string"),
        pytest.param(
            "official",
            text(rope_scaling={"rope_type": "yarn", "factor": 2, "beta_fast": "32"}),
            ["beta_fast of YaRN", "a positive number", 'found "32"'],
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
            ["(8 bits in groups of 64)", "bits and group_size under quantization"],
            id="mlx-bits-and-group",
        ),
        pytest.param("mlx_lm_4bit", top(quantization={}), ["quantization", "group_size and bits"], id="mlx-empty"),
        pytest.param("mlx_lm_4bit", top(quantization="4bit"), ["quantization", 'found "4bit"'], id="mlx-of-a-string"),
        pytest.param(
            "mlx_lm_4bit",
            top(quantization={"group_size": "32", "bits": 4}),
            ["quantization: group_size", "positive integer"],
            id="mlx-group-of-a-string",
        ),
    ],
)
def test_a_field(name, change, expected, tmp_path):
    check_refusal(name, change, expected, tmp_path)


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
    found = "nothing" if value in (..., None) else json.dumps(value)
    assert f"{field}: expected a positive integer, found {found}. " in message
    assert ("A dense Qwen3-VL has the model_type qwen3_vl" in message) == (
        field in ("moe_intermediate_size", "num_experts", "num_experts_per_tok")
    )


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
        "import json, pathlib, resource, sys\n"
        "from mlx_lm.utils import load_model\n"
        "import mlx_lm_qwen3vlmoe.model\n"
        "pages = int(open('/proc/self/statm').read().split()[0]) if sys.platform == 'linux' else None\n"
        "if pages: resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**29,) * 2)\n"
        "found = {}\n"
        "for path in pathlib.Path(sys.argv[1]).iterdir():\n"
        "    try: load_model(path)\n"
        "    except ValueError as error: found[path.name] = str(error)\n"
        "print(json.dumps(found))"
    )
    return json.loads(run(sys.executable, "-c", code, folder).stdout)


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_sizes_cost_neither_time_nor_memory(name, absurd_sizes):
    assert absurd_sizes[name]
    if name.endswith(str(10**12)):
        assert f"{name.partition('-')[0]}: expected at most" in absurd_sizes[name]
