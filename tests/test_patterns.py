"""Regular expressions from files: as `re` has them, or one error, and an end in any case."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_lm_qwen3vlmoe import CheckpointError, quantization
from mlx_lm_qwen3vlmoe.quantization import patterns

NAME = "model.language_model.layers.46.mlp.experts.127.gate_proj"
REAL = (
    ".*lm_head",
    ".*visual.*",
    "^(?!.*experts).*",
    r".*\.mlp\.experts\..*",
    r".*layers\.\d+\.mlp\.experts\.\d+\..*(gate|up|down)_proj$",
    r".*model.*layers.*mlp.*experts.*gate.*proj.*",
    r"model\.language_model\.layers\.(?:4[0-7]|[0-9])\.(?:self_attn|mlp)\..*",
    "(?i).*MLP.*",
)
ENDLESS = ("(a+)+$", "(.*)*x", "(a|a)*b", "(.*a){20}", "(?:a?){30}a{30}", ".*.*.*.*.*x", "((a*)*)*b")
INVALID = ("(", "*", "[z-a]", "(?P<n>a)(?P=n)", r"(a)\1", "(" * 3000)
PARTS = ("a", "b", ".", "[ab]", "[^a]", "a*", "b+", "a?", "a{1,2}", "(a|b)", "(ab|a)", "(?!b)", "(?=a)", "(?<=a)")
PARTS += ("(?<!b)", "^", "$", r"\b", r"\Z", "(b?a){1}", ".*?", r"\d*", r"\W", "(?:a|ab|)", "(?:a.){0,1}")


@pytest.mark.parametrize("text", REAL)
def test_patterns_of_real_tools_match_as_re_does(text):
    for name in (NAME, "lm_head", "model.visual.blocks.0.attn", "model.language_model.embed_tokens"):
        assert patterns.pattern("targets", text).match(name) == bool(re.match(text, name))
        assert patterns.pattern("targets", text).fullmatch(name) == bool(re.fullmatch(text, name))


@pytest.mark.parametrize("text", [*ENDLESS, *INVALID])
def test_what_never_ends_or_is_invalid_is_one_error(text):
    with pytest.raises(CheckpointError, match=r"quantization_config: dynamic: expected a regular expression \("):
        patterns.pattern("dynamic", text)


@given(st.lists(st.sampled_from(PARTS), max_size=7), st.text("ab1\n.", max_size=9))
def test_following_all_ways_at_once_finds_what_re_finds(parts, name):
    text = "".join(parts)
    try:
        found = patterns.Pattern(text)
    except (ValueError, re.error):
        return
    found._quick = None
    assert found.match(name) == bool(re.match(text, name))
    assert found.fullmatch(name) == bool(re.fullmatch(text, name))


def test_many_repeats_end():
    """Not decided by a clock: with `re`, this would take longer than anybody waits."""
    text = "".join(f".*[a{n}]" for n in range(30)) + "(a|ab)(a|b)?" * 40 + "$"
    assert not patterns.pattern("targets", text).match("a" * 199 + "c")


def test_a_name_that_no_module_has_is_an_error():
    with pytest.raises(CheckpointError, match="expected a name of at most 200 characters"):
        patterns.pattern("targets", "a").match("a" * 201)


@pytest.mark.parametrize("text", ["(a+)+$", "("])
@pytest.mark.parametrize(
    "description",
    [
        lambda text: {"quant_method": "gptq", "dynamic": {f"+:{text}": {"bits": 8}}},
        lambda text: {"quant_method": "gptq", "dynamic": {f"-:{text}": {}}},
        lambda text: {"quant_method": "fp8", "dynamic": {text: {"bits": 8}}},
        lambda text: {"quant_method": "auto-round", "extra_config": {f".*{text}": {"bits": 8}}},
        lambda text: {"quant_method": "compressed-tensors", "config_groups": {"0": {"targets": [f"re:{text}"]}}},
        lambda text: {
            "quant_method": "torchao",
            "quant_type": {"default": {"_type": "FqnToConfig", "_data": {"fqn_to_config": {f"re:{text}": None}}}},
        },
    ],
)
def test_every_family_refuses_such_a_pattern_in_its_description(description, text):
    with pytest.raises(CheckpointError, match="expected a regular expression"):
        quantization.read_description(description(text))
