"""Each step of `sanitize` and its inverse put together are the identity, for every layout, of any size, to the bit."""

from __future__ import annotations

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import examples

from mlx_lm_qwen3vlmoe import ModelArgs
from mlx_lm_qwen3vlmoe.layouts.names import HEAD
from mlx_lm_qwen3vlmoe.layouts.stacking import Part, as_in_out, join, miscut
from mlx_lm_qwen3vlmoe.runtime.backend import as_out_in
from mlx_lm_qwen3vlmoe.sanitize import by_layer, rename, restore_names, sanitize, unsanitize

Weights = dict[str, mx.array]
PREFIXES = {  # of the decoder → of the head, and of vision
    "model.language_model.": ("", "model.visual."),
    "language_model.model.": ("language_model.", "vision_tower."),
    "language_model.": ("", "visual."),
    "model.": ("", "visual."),
    "": ("", "visual."),
}


def random(*shape: int, dtype: mx.Dtype) -> mx.array:
    """Any bits: NaN with payloads, too."""
    bits = mx.uint32 if dtype == mx.float32 else mx.uint16
    return mx.random.randint(0, 2 ** (8 * bits.size) - 1, shape, mx.uint32).astype(bits).view(dtype)


def same(one: mx.array, other: mx.array) -> bool:
    bits = mx.uint32 if one.dtype == mx.float32 else mx.uint16
    one, other = (mx.contiguous(array) for array in (one, other))  # old MLX views others wrongly
    return one.dtype == other.dtype and bool(mx.array_equal(one.view(bits), other.view(bits)).item())


def whole(part: Part, weights: Weights) -> mx.array:
    """A stored tensor from the host's whole ones."""
    made_of = [weights[f"{path}.weight"] for path in part.layers]
    if part.row is None:
        return part.form(*made_of)
    row = part.form(*(weight[part.row : part.row + 1] for weight in made_of))
    return mx.contiguous(row)[0]  # old MLX forgets the order of axes after a first one of size 1


# The experts of a layer, from gate, up and down of each, [out, in], as their writers store them.


def official(gate, up, down):
    return {"gate_up_proj": mx.stack([mx.concatenate([g.T, u.T], 1) for g, u in zip(gate, up, strict=True)])} | {
        "down_proj": mx.stack([d.T for d in down])
    }


def transformers5(gate, up, down):
    return {name: array.swapaxes(1, 2) for name, array in official(gate, up, down).items()}


def one_each(gate, up, down):
    pairs = {"gate": gate, "up": up, "down": down}.items()
    return {f"{e}.{name}_proj.weight": w for name, weights in pairs for e, w in enumerate(weights)}


def projection_first(gate, up, down):
    pairs = {"gate": gate, "up": up, "down": down}.items()
    return {f"{name}_proj.{e}.weight": w for name, weights in pairs for e, w in enumerate(weights)}


def two_in_one(gate, up, down):
    joined = {
        f"gate_up_projs.{e}.weight": mx.concatenate([g, u]) for e, (g, u) in enumerate(zip(gate, up, strict=True))
    }
    return joined | {f"down_projs.{e}.weight": w for e, w in enumerate(down)}


def broken(gate, up, down):
    """transformers 5.0 and 5.1 cut [hidden, 2 * width] along the other axis."""
    whole = official(gate, up, down)
    found = {}
    for e, (both, last) in enumerate(zip(whole["gate_up_proj"], whole["down_proj"], strict=True)):
        upper, lower = mx.split(both, 2, 0)
        found |= {f"{e}.gate_proj.weight": upper, f"{e}.up_proj.weight": lower, f"{e}.down_proj.weight": last}
    return found


def stacked(gate, up, down):
    pairs = {"gate": gate, "up": up, "down": down}.items()
    return {f"../switch_mlp.{name}_proj.weight": mx.stack(weights) for name, weights in pairs}


LAYOUTS = [official, transformers5, one_each, projection_first, two_in_one, broken, stacked]


@st.composite
def checkpoints(draw) -> tuple[Weights, dict]:
    """A checkpoint of any layout, prefix, dtype and size, with dense layers and vision tensors among the others."""
    mx.random.seed(draw(st.integers(0, 2**31)))
    layout = draw(st.sampled_from(LAYOUTS))
    dtype = draw(st.sampled_from([mx.bfloat16, mx.float16, mx.float32]))
    prefix = draw(st.sampled_from(sorted(PREFIXES)))
    tied = draw(st.booleans())
    e, h, i = draw(st.integers(1, 4)), 2 * draw(st.integers(1, 6)), draw(st.integers(1, 12))
    dense = draw(st.lists(st.integers(0, 2), max_size=2, unique=True))
    text = {
        "hidden_size": h,
        "moe_intermediate_size": i,
        "intermediate_size": 7,
        "num_experts": e,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 2,
        "vocab_size": 5,
        "rope_theta": 10000,
        "mlp_only_layers": dense,
    }
    head, vision = PREFIXES[prefix]

    def make(*shape: int) -> mx.array:
        return random(*shape, dtype=dtype)

    weights = {f"{prefix}embed_tokens.weight": make(5, h), f"{prefix}norm.weight": make(h), f"{vision}x": make(2, 3)}
    if not tied:
        weights[f"{head}lm_head.weight"] = make(5, h)
    for n in range(3):
        layer = f"{prefix}layers.{n}"
        weights |= {f"{layer}.{name}_layernorm.weight": make(h) for name in ("input", "post_attention")}
        weights |= {f"{layer}.self_attn.{name}_norm.weight": make(2) for name in "qk"}
        weights |= {f"{layer}.self_attn.{name}_proj.weight": make(2 if name in "kv" else 4, h) for name in "qkv"}
        weights[f"{layer}.self_attn.o_proj.weight"] = make(h, 4)
        if n in dense:
            weights |= {f"{layer}.mlp.{name}_proj.weight": make(7, h) for name in ("gate", "up")}
            weights[f"{layer}.mlp.down_proj.weight"] = make(h, 7)
            continue
        weights |= {f"{layer}.mlp.gate.weight": make(e, h), f"{layer}.mlp.gate.bias": make(e)}
        shapes = ((i, h), (i, h), (h, i))
        parts = layout(*([make(*shape) for _ in range(e)] for shape in shapes))
        weights |= {f"{layer}.mlp.experts.{name}".replace("experts.../", ""): array for name, array in parts.items()}
    return weights, {"model_type": "qwen3_vl_moe", "text_config": text, "tie_word_embeddings": tied}


any_size = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=examples(300),
    suppress_health_check=[HealthCheck.too_slow],
)


@any_size
@given(checkpoints())
def test_back_and_forth_is_the_identity(drawn):
    stored, config = drawn
    args = ModelArgs.from_dict(config)
    weights = sanitize(stored, args)
    parts = unsanitize(stored, args)
    back = {name: whole(part, weights) for name, part in parts.items()}
    assert back.keys() == stored.keys() - {name for name in stored if name.endswith(("x", "gate.bias"))}
    assert all(same(back[name], stored[name]) for name in back)
    again = sanitize(back, args)
    assert again.keys() == weights.keys()
    assert all(same(again[name], weights[name]) for name in again)
    used = {f"{path}.weight" for part in parts.values() for path in part.layers}
    assert weights.keys() - used == ({f"{HEAD}.weight"} if config["tie_word_embeddings"] else set())


@any_size
@given(checkpoints(), st.integers(1, 3))
def test_rows_at_a_time_are_the_whole(drawn, step):
    """What `restore` relies on: the forms know nothing of the rows around."""
    stored, config = drawn
    args = ModelArgs.from_dict(config)
    weights = sanitize(stored, args)
    for name, part in unsanitize(stored, args).items():
        if part.row is None:
            made_of = [weights[f"{path}.weight"] for path in part.layers]
            pieces = [part.form(*(w[n : n + step] for w in made_of)) for n in range(0, len(made_of[0]), step)]
            assert same(mx.concatenate(pieces), stored[name])


@any_size
@given(checkpoints())
def test_names_come_back(drawn):
    stored, _ = drawn
    paths = by_layer(rename(stored))
    named = restore_names({path: Part((path,)) for path in paths}, stored)
    assert sorted(part.layers[0] for part in named.values() if part.layers) == sorted(
        path for path, tensors in paths.items() for _ in tensors
    )
    assert named.keys() == {name for name in stored if not name.endswith(("x", "gate.bias"))}


shapes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3))


@any_size
@given(shapes)
def test_turning_back_undoes_turning(shape):
    array = random(*shape, dtype=mx.float16)
    assert same(as_in_out(as_out_in(array)), array)
    assert same(as_out_in(as_in_out(array)), array)


@any_size
@given(shapes)
def test_joining_undoes_the_cut(shape):
    e, i, h = shape
    array = random(e, 2 * i, h, dtype=mx.bfloat16)
    assert same(join(*mx.split(array, 2, -2)), array)
    turned_array = as_in_out(array)
    assert same(as_in_out(join(*map(as_in_out, mx.split(turned_array, 2, -1)))), turned_array)


@any_size
@given(shapes)
def test_what_was_cut_wrongly_is_cut_wrongly_again(shape):
    e, i, half = shape
    upper, lower = (random(e, half, 2 * i, dtype=mx.bfloat16) for _ in range(2))
    gate, up = map(as_in_out, mx.split(mx.concatenate([upper, lower], -2), 2, -1))
    assert same(miscut(0, gate, up), upper)
    assert same(miscut(1, gate, up), lower)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_layout_is_drawn(layout):
    """The layouts differ in names or shapes, so that the tests above are about each."""
    made = layout(*([mx.zeros(shape)] * 2 for shape in ((3, 4), (3, 4), (4, 3))))
    signature = {name: array.shape for name, array in made.items()}
    others = [each for each in LAYOUTS if each is not layout]
    for each in others:
        other = each(*([mx.zeros(shape)] * 2 for shape in ((3, 4), (3, 4), (4, 3))))
        assert signature != {name: array.shape for name, array in other.items()}
