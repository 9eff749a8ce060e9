"""The patterns of PEFT's `rank_pattern`, against Python's `re`, and in a number of steps that has a bound."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import examples

from mlx_lm_qwen3vlmoe.adapters.patterns import Pattern

PIECES = ["a", "b", "1", "_", ".", r"\.", r"\d", r"\w", "[ab]", "[^a]", "[a-b1]", "(", "(?:", ")", "|", "*", "+", "?"]
PIECES += ["{2}", "{1,3}", "{2,}", "*?", "^", "$"]


@settings(max_examples=examples(4000), deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=9).map("".join), st.text("ab1_.", max_size=8))
def test_a_pattern_that_is_taken_matches_what_peft_matches(text, name):
    try:
        pattern = Pattern(text)
    except ValueError:
        return
    assert pattern.matches(name) == bool(re.match(rf"(.*\.)?({text})$", name))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj"),
        (r"layers\.0\.self_attn\.q_proj", "model.layers.0.self_attn.q_proj"),
        (r".*layers\.(0|1)\..*(q|k)_proj", "model.layers.1.self_attn.k_proj"),
        (r"layers\.\d+\.mlp\.experts\.\d+\.[a-z]+_proj", "model.layers.10.mlp.experts.7.gate_proj"),
        (r"^model\.layers\.[0-9]+\..*$", "model.layers.1.self_attn.k_proj"),
        (r"(?:model\.)?layers\.\d{1,2}\.mlp\.gate", "layers.12.mlp.gate"),
    ],
)
def test_what_people_write_is_taken(text, name):
    assert Pattern(text).matches(name)
    assert not Pattern(text).matches(name + "x_") or text.endswith(".*$")


@pytest.mark.parametrize(
    "text",
    [
        *(r"(a)\1", "(?i)A", "(?=a)", "(?P<n>a)(?P=n)", "(a+)+", "(a|b)*", r"\ba", r"\Aa", "a{,3}", "a**", "[", "("),
        *(")", "\\", "a{3,1}", "a" * 1001, "(" * 50 + "a" + ")" * 50),
    ],
)
def test_what_could_run_for_ever_or_means_something_else_is_refused(text):
    with pytest.raises((ValueError, re.error)):
        Pattern(text)


@pytest.mark.parametrize("text", [".*" * 400 + "!", ".?" * 450 + "!", "(.|.)" * 150 + "!", "(a|a|a)" * 140 + "!"])
def test_a_hostile_pattern_comes_to_an_end(text):
    """`re` would take longer than the world has been there."""
    assert not Pattern(text).matches("a" * 1000)
