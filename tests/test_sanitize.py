"""Facts about the reshaping itself."""

from __future__ import annotations

import sys

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_config
from support import FIXTURES, QUANTIZED
from support.commands import run
from support.weights import E, H, I, L, args, config, experts, official

from mlx_lm_qwen3vlmoe import CheckpointError, Model, ModelArgs
from mlx_lm_qwen3vlmoe.sanitize import sanitize


def per_expert(projection_first: bool = False, **extra) -> dict[str, mx.array]:
    weights = {name: array for name, array in official().items() if ".experts." not in name}
    for layer in range(L):
        gate_up, down = experts(layer)
        for e in range(E):
            for name, array in (("gate", gate_up[e, :, :I].T), ("up", gate_up[e, :, I:].T), ("down", down[e].T)):
                key = f"{name}_proj.{e}" if projection_first else f"{e}.{name}_proj"
                weights[f"model.language_model.layers.{layer}.mlp.experts.{key}.weight"] = array
    return weights | extra


def same(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    return a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]) for name in a)


def test_the_result_is_exactly_the_models_parameters():
    model = Model(args())
    found = {name: array.shape for name, array in model.sanitize(official()).items()}
    assert found == {name: array.shape for name, array in tree_flatten(model.parameters())}


def test_gate_up_is_cut_in_halves_and_turned():
    """Written out with loops, so that a swapped half or axis shows."""
    found = sanitize(official(), args())
    gate_up, down = (array.tolist() for array in experts(1))
    mlp = "language_model.model.layers.1.mlp.switch_mlp"
    gate, up, turned = (found[f"{mlp}.{p}_proj.weight"].tolist() for p in ("gate", "up", "down"))
    for e in range(E):
        for h in range(H):
            for i in range(I):
                assert gate[e][i][h] == gate_up[e][h][i]
                assert up[e][i][h] == gate_up[e][h][I + i]
                assert turned[e][h][i] == down[e][i][h]


def test_every_layout_of_the_same_experts_gives_the_same_result():
    expected = sanitize(official(), args())
    newer = {n: a.swapaxes(-1, -2) if ".experts." in n else a for n, a in official().items()}
    broken = {name: array for name, array in official().items() if ".experts." not in name}
    for layer in range(L):
        gate_up, down = experts(layer)
        for e in range(E):
            key = f"model.language_model.layers.{layer}.mlp.experts.{e}"
            broken[f"{key}.gate_proj.weight"] = gate_up[e, : H // 2]
            broken[f"{key}.up_proj.weight"] = gate_up[e, H // 2 :]
            broken[f"{key}.down_proj.weight"] = down[e]
    for weights in (newer, broken, per_expert(), per_expert(projection_first=True), expected):
        assert same(sanitize(weights, args()), expected)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.", "language_model.", ""])
def test_every_prefix_gives_the_same_result(prefix):
    assert same(sanitize(official(prefix), args()), sanitize(official(), args()))


def test_layers_of_different_layouts_may_be_mixed():
    mixed = official()
    for name in [name for name in mixed if "layers.1.mlp.experts" in name]:
        del mixed[name]
    mixed |= {name: array for name, array in per_expert().items() if "layers.1.mlp.experts" in name}
    assert same(sanitize(mixed, args()), sanitize(official(), args()))


UNEVALUABLE = """
import mlx.core as mx
x = mx.ones((1, 1, 1), mx.bfloat16)
poison = mx.gather_mm(x, x, rhs_indices=mx.zeros((1,), mx.uint32))[0, 0, 0].astype(mx.float32)
"""


def test_nothing_is_evaluated():
    """An array whose evaluation ends the process goes all the way through."""
    code = UNEVALUABLE + (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from support.weights import args, official\n"
        "from mlx_lm_qwen3vlmoe.sanitize import sanitize\n"
        "found = sanitize({name: mx.zeros(array.shape) + poison for name, array in official().items()}, args())\n"
        "print(len(found))"
    )
    assert int(run(sys.executable, "-c", code, FIXTURES.parent).stdout) == len(sanitize(official(), args()))
    assert run(sys.executable, "-c", UNEVALUABLE + "mx.eval(poison)", check=False).returncode != 0


def test_sanitizing_twice_changes_nothing():
    once = sanitize(official(), args())
    assert same(sanitize(once, args()), once)


def test_the_input_is_left_as_it_is():
    weights = official()
    names = list(weights)
    sanitize(weights, args())
    assert list(weights) == names


def test_nothing_gives_nothing():
    assert sanitize({}, args()) == {}
    assert Model(args()).sanitize({}) == {}


def test_part_of_the_layers_is_enough():
    part = {name: array for name, array in official().items() if "layers.0." in name}
    whole = sanitize(official(), args())
    assert same(sanitize(part, args()), {name: array for name, array in whole.items() if "layers.0." in name})


def test_a_file_that_ends_between_a_weight_and_its_scale_is_enough_too():
    weights = mx.load(str(QUANTIZED / "fp8-perexpert" / "model.safetensors"))
    part = {name: array for name, array in weights.items() if "layers.0." in name}
    del part["model.language_model.layers.0.mlp.experts.2.up_proj.weight_scale_inv"]
    del part["model.language_model.layers.0.mlp.experts.1.up_proj.weight"]
    model = Model(ModelArgs.from_dict(load_config(QUANTIZED / "fp8-perexpert")))
    found = model.sanitize(part)
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in found
    assert [name for name in found if "switch_mlp" in name] == []


@pytest.mark.parametrize("source", [official, per_expert])
def test_a_file_that_ends_in_the_middle_of_a_layer_is_enough_for_a_pipeline_stage(source):
    part = {name: array for name, array in source().items() if "layers.0." in name}
    part.pop(next(name for name in part if "experts" in name))
    assert [name for name in sanitize(part, args()) if "switch_mlp" in name] == []


def test_dense_layers_among_sparse_ones():
    weights = {name: array for name, array in official().items() if "layers.0.mlp" not in name}
    dense = {"gate": (7, H), "up": (7, H), "down": (H, 7)}
    for name, shape in dense.items():
        weights[f"model.language_model.layers.0.mlp.{name}_proj.weight"] = mx.ones(shape)
    found = sanitize(weights, args(mlp_only_layers=[0]))
    assert found["language_model.model.layers.0.mlp.down_proj.weight"].shape == (H, 7)
    assert "language_model.model.layers.1.mlp.switch_mlp.down_proj.weight" in found
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.gate_proj.*expected experts in layer 0"):
        sanitize(weights, args())
    with pytest.raises(CheckpointError, match=r"expected a dense MLP in layer 1"):
        sanitize(weights, args(mlp_only_layers=[0, 1]))


def test_vision_and_meaningless_tensors_are_dropped_by_name():
    extra = {
        "visual.blocks.0.attn.qkv.weight": mx.ones(1),
        "vision_tower.merger.norm.weight": mx.ones(1),
        "model.language_model.rotary_emb.inv_freq": mx.ones(1),
        "model.language_model.layers.0.mlp.gate.bias": mx.ones(1),
    }
    assert same(sanitize(official() | extra, args()), sanitize(official(), args()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio_tower.proj.weight": mx.ones(1)}, r"^audio_tower\.proj\.weight: expected a tensor of a Qwen3-VL-MoE"),
        ({"model.language_model.layers.0.mlp.router.weight": mx.ones(1)}, r"layers\.0\.mlp\.router\.weight: expected"),
        ({"model.language_model.layers.2.mlp.gate.weight": mx.ones(1)}, r"layers\.2\.mlp.*expected no layer after 1"),
        ({"model.language_model.layers.0.mlp.experts.bias": mx.ones(1)}, r"layers\.0\.mlp\.experts\.bias: expected"),
        ({"visual_extra.weight": mx.ones(1)}, r"^visual_extra\.weight"),
        ({"language_model.lm_head.weight": mx.ones(1)}, r"language_model\.lm_head\.weight.*found both"),
        (
            {"model.language_model.layers.0.mlp.experts.gate_up_proj": None},
            r"gate_up_proj: expected this tensor beside the other",
        ),
        ({"lm_head.weight": None}, r"^lm_head\.weight: expected .* found nothing"),
        (
            {"model.language_model.layers.0.mlp.experts.down_proj": mx.ones((E, I, H + 1))},
            r"layers\.0\.mlp\.experts\.down_proj: expected the shape \[3, 5, 6\] or \[3, 6, 5\], found \[3, 5, 7\]",
        ),
        (
            {"model.language_model.layers.0.mlp.experts.0.up_proj.weight": mx.ones((I, H))},
            r"experts\.0\.up_proj\.weight: expected the experts of a layer in one layout",
        ),
    ],
)
def test_a_broken_checkpoint_is_one_error_that_names_the_tensor(change, message):
    weights = {name: array for name, array in (official() | change).items() if array is not None}
    with pytest.raises(CheckpointError, match=message):
        sanitize(weights, args())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"1.up_proj": None},
            r"layers\.1\.mlp\.experts\.1\.up_proj\.weight: expected this tensor beside the other experts",
        ),
        ({"3.up_proj": (I, H)}, r"experts\.3\.up_proj\.weight: expected no expert after 2"),
        (
            {"2.up_proj": (I, H + 1)},
            r"experts\.2\.up_proj\.weight: expected the shape \[5, 6\] of the other experts, found \[5, 7\]",
        ),
        (
            {"2.up_proj": (H, I)},
            r"experts\.2\.up_proj\.weight: expected the shape \[5, 6\] of the other experts, found \[6, 5\]",
        ),
        (
            {"up_proj.2": (I, H)},
            r"experts\.2\.up_proj\.weight.*: expected one of these, as they are the same tensor, found both",
        ),
    ],
)
def test_a_broken_expert_is_one_error_that_names_it(change, message):
    ((key, shape),) = change.items()
    name = f"model.language_model.layers.1.mlp.experts.{key}.weight"
    weights = per_expert()
    weights.pop(name, None)
    if shape:
        weights[name] = mx.ones(shape)
    with pytest.raises(CheckpointError, match=message):
        sanitize(weights, args())


@pytest.mark.parametrize(
    ("top", "nested", "head", "outcome"),
    [
        (None, None, True, "own"),
        (None, None, False, "error"),
        (False, None, True, "own"),
        (False, None, False, "error"),
        (None, False, False, "error"),
        (False, True, True, "own"),  # transformers 5 writes this beside a real head
        (False, True, False, "shared"),  # transformers 4.57 ties by text_config
        (None, True, True, "own"),
        (None, True, False, "shared"),
        (True, None, True, "own"),  # transformers 5 does not tie two different matrices either
        (True, True, True, "own"),
        (True, True, False, "shared"),
        (True, False, True, "own"),
        (True, False, False, "shared"),
    ],
)
def test_the_head_is_what_the_tensors_and_the_config_say(top, nested, head, outcome):
    weights, settings = official(), config()
    if not head:
        del weights["lm_head.weight"]
    settings |= {"tie_word_embeddings": top}
    settings["text_config"] |= {"tie_word_embeddings": nested}
    model = Model(ModelArgs.from_dict(settings))
    if outcome == "error":
        with pytest.raises(CheckpointError, match=r"^lm_head\.weight: expected"):
            model.sanitize(weights)
        return
    found = model.sanitize(weights)
    embeddings = found["language_model.model.embed_tokens.weight"]
    assert (found["language_model.lm_head.weight"] is embeddings) == (outcome == "shared")
    model.load_weights(list(found.items()), strict=True)


def test_the_dtype_of_float_experts_is_kept():
    halves = {name: array.astype(mx.bfloat16) for name, array in official().items()}
    assert {array.dtype for array in sanitize(halves, args()).values()} == {mx.bfloat16}


def test_work_grows_linearly_with_the_number_of_tensors():
    """Counted in calls of functions, of Python's and of C's, as no clock tells it on a busy machine."""

    def calls(layers: int, number: int = 16) -> int:
        shapes = {"gate": (I, H), "up": (I, H), "down": (H, I)}
        weights = {
            f"model.language_model.layers.{n}.mlp.experts.{e}.{p}_proj.weight": mx.zeros(shape)
            for n in range(layers)
            for e in range(number)
            for p, shape in shapes.items()
        }
        sizes = args(num_hidden_layers=layers, num_experts=number)
        events = []
        sys.setprofile(lambda frame, event, arg: events.append(event))
        try:
            sanitize(weights, sizes)
        finally:
            sys.setprofile(None)
        return sum(event in ("call", "c_call") for event in events)

    assert calls(32) < 4.1 * calls(8)


def test_the_real_official_fixture_needs_every_step():
    """The tests above use made-up arrays: the same names and shapes come out of a file that transformers wrote."""
    path = FIXTURES / "official"
    model = Model(ModelArgs.from_dict(load_config(path)))
    found = model.sanitize(mx.load(str(path / "model.safetensors")))
    assert {n: a.shape for n, a in found.items()} == {n: a.shape for n, a in tree_flatten(model.parameters())}
