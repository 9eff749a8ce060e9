"""Whatever is changed in a checkpoint: torch's logits, or one error that the user can act on. Never wrong numbers."""

from __future__ import annotations

import copy
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from mlx_lm.utils import load_model
from support import examples, thorough
from support.checkpoints import TOLERANCE, TYPES, Checkpoint, logits_error

from mlx_lm_qwen3vlmoe import CheckpointError, Model, ModelArgs

# The host's own errors, and those of MLX in it, for tensors that do not fit its parameters.
HOST = ("Missing ", "Received ", "Expected shape ", "[quantize] ")
FLOAT = ["official", "per_expert", "resave_5_23_0", "tied", "square_gate"]
FOREIGN = ["awq-g32-bf16", "gptq-w4-actorder", "ct-w4a16-asym-g32", "ct-mxfp4", "fp8-fused-official", "modelopt-nvfp4"]
CONFIGS = [*FLOAT, "yarn", "flat_config", "mlx_lm_4bit", "ct-w4a16-asym-g32"]
SQUARE = ["square_gate", "fp8-fused-official"]  # one tensor, or its scales, has the same shape when it is turned

# Fields that a writer may have put there, in one version or another.
ADDED = [
    *(("quantization",), ("quantization_config",), ("dtype",), ("torch_dtype",), ("tie_word_embeddings",)),
    *(("transformers_version",), ("text_config", "dtype"), ("text_config", "tie_word_embeddings")),
    *(("text_config", "rope_parameters"), ("text_config", "num_local_experts"), ("text_config", "rope_theta")),
    *(("text_config", "partial_rotary_factor"), ("text_config", "quantization_config")),
    *(("text_config", "rope_scaling", field) for field in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")),
    *(("text_config", "rope_scaling", field) for field in ("attention_factor", "truncate", "type", "factor")),
]
# Fields that mean something else with another value that is as good; what they become is what is used.
MEANT = {"rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps", "num_experts_per_tok", "transformers_version"}
MEANT |= {"tie_word_embeddings", "rope_type", "type", "factor", "max_position_embeddings", "quantization_config"}
MEANT |= {"original_max_position_embeddings", "attention_factor"}

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-2, 9)
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from([10**12, 10**30, 2**31 - 1, 2**31, 1e-320, 1e300, 1.0000001])
    | st.sampled_from(["", "5", "true", "foo", "int32", "array", "bfloat16", "default", "yarn", "mrope", "gptq"])
)
keys = st.sampled_from(["rope_type", "factor", "rope_theta", "quant_method", "bits", "group_size", "hidden_size", "x"])
junk = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3))
bounded = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def paths(value: dict, start: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, inner in value.items():
        found.append((*start, key))
        if isinstance(inner, dict) and key != "vision_config":
            found += paths(inner, found[-1])
    return found


@st.composite
def configs(
    draw, names: list[str], most: int, fixed: tuple[str, ...] = ()
) -> tuple[Checkpoint, list[tuple[str, object]]]:
    """A good checkpoint whose config lost some fields, or has junk in them; and what was changed, by name."""
    checkpoint = Checkpoint(draw(st.sampled_from(names)))
    changes = []
    for _ in range(draw(st.integers(1, most))):
        *homes, field = draw(st.sampled_from([p for p in [*paths(checkpoint.config), *ADDED] if p[-1] not in fixed]))
        home = checkpoint.config
        for key in homes:
            home = home.get(key) if isinstance(home, dict) else None
        if isinstance(home, dict):
            home[field] = draw(junk | st.just(...))
            changes.append((field, home[field]))
            if home[field] is ...:
                del home[field]
    return checkpoint, changes


@settings(bounded, max_examples=examples(1000))
@given(configs(CONFIGS, 4))
def test_any_config_is_a_model_or_one_error(drawn):
    checkpoint, _ = drawn
    try:
        model = Model(ModelArgs.from_dict(checkpoint.config))
    except CheckpointError as caught:
        event("refused")
        error = caught
    else:
        event("a model")
        assert len(model.layers) == checkpoint.config["text_config"]["num_hidden_layers"]
        once = copy.deepcopy(checkpoint.config)
        ModelArgs.from_dict(checkpoint.config)
        assert repr(checkpoint.config) == repr(once)  # as text, for NaN equals nothing
        return
    assert re.search("expected .*, found ", str(error), re.DOTALL)
    assert error.__cause__ is error.__context__ is None


def outcome(checkpoint: Checkpoint) -> float | None:
    """The error of the logits, or None for a checkpoint that is refused."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return logits_error(checkpoint.save(Path(folder)), checkpoint.source)
        except CheckpointError:
            event("refused")
        except ValueError as error:
            if not str(error).startswith(HOST):
                raise
            event("refused by the host")
    return None


@settings(bounded, max_examples=examples(200))
@given(configs([*FLOAT, "mlx_lm_4bit"], 2, fixed=("text_config", "model_type", "architectures")))
def test_a_config_that_loads_gives_torchs_logits_unless_its_meaning_changed(drawn):
    checkpoint, changes = drawn
    error = outcome(checkpoint)
    if error is not None and not MEANT & {field for field, _ in changes}:
        event("the logits")
        assert error < TOLERANCE, changes


@settings(bounded, max_examples=examples(100))
@given(
    field=st.sampled_from(["rope_theta", "rms_norm_eps", "num_experts_per_tok"]),
    value=st.integers(1, 5) | st.floats(1e-9, 1e9),
)
def test_a_number_that_means_something_else_is_used_as_it_is(field, value):
    checkpoint = Checkpoint("official")
    checkpoint.text[field] = value
    with tempfile.TemporaryDirectory() as folder:
        try:
            model, config = load_model(checkpoint.save(Path(folder)), lazy=True)
        except CheckpointError:
            assert field == "num_experts_per_tok"
            assert not isinstance(value, int)
            return
    assert config["text_config"][field] == value
    layer = model.layers[0]
    used = {
        "rope_theta": lambda: layer.self_attn.rope.base,
        "rms_norm_eps": lambda: layer.input_layernorm.eps,
        "num_experts_per_tok": lambda: layer.mlp.top_k,
    }
    assert used[field]() == value


@st.composite
def tensors(draw, name: str, kinds: tuple[str, ...]) -> tuple[Checkpoint, list[tuple[str, str]]]:
    """A good checkpoint with one or two tensors that are gone, or of another name, shape or type."""
    checkpoint = Checkpoint(name)
    changes = []
    for key in draw(st.lists(st.sampled_from(sorted(checkpoint.tensors)), min_size=1, max_size=2, unique=True)):
        kind = draw(st.sampled_from([kind for kind in kinds if kind != "turn" or name not in SQUARE]))
        dtype, array = checkpoint.tensors[key]
        changes.append((kind, key))
        if kind in ("drop", "rename"):
            del checkpoint.tensors[key]
        if kind in ("rename", "double"):
            number = draw(st.integers(0, 12))
            new = draw(
                st.sampled_from(
                    [
                        key.replace("model.language_model.", "language_model.model."),
                        key.replace("model.language_model.", ""),
                        key.replace("layers.0.", f"layers.{number}."),
                        key.replace("experts.0.", f"experts.{number}."),
                        key.replace("_proj", ""),
                        key.rpartition(".")[0],
                        f"{key}.{number}",
                        key.upper(),
                    ]
                )
            )
            checkpoint.tensors.setdefault(new, (dtype, array))
        elif kind == "reshape":
            shapes = [(-1,), (1, *array.shape), (*array.shape, 1), (array.size, 1), (1, array.size)]
            shapes = [shape for shape in shapes if shape != array.shape]
            checkpoint.tensors[key] = (dtype, array.reshape(draw(st.sampled_from(shapes))))
        elif kind == "cut" and array.size > 1:
            # Fewer words a row are as many weights of fewer bits, where MLX packed them: the host believes the words.
            axis = draw(st.integers(0, array.ndim - 1 - (dtype == "U32")))
            size = draw(st.integers(0, array.shape[axis] - 1))
            checkpoint.tensors[key] = (dtype, array.take(range(size), axis))
        elif kind == "turn" and array.ndim > 1:
            one, other = draw(st.sampled_from([(-1, -2), (0, -1)]))
            checkpoint.tensors[key] = (dtype, np.ascontiguousarray(array.swapaxes(one, other)))
        elif kind == "recast":
            # Not to types that round, nor to those that another format has in its place.
            others = set(TYPES) - {"F8_E4M3", "F16", "BF16", *(["F32"] if dtype == "F8_E4M3" else [])}
            new = draw(st.sampled_from(sorted(others - {"U8"} if "_scale" in key else others)))
            values = (array.astype("u4") << 16).view("f4") if dtype == "BF16" else array
            with np.errstate(all="ignore"):
                checkpoint.tensors[key] = (new, values.astype(TYPES[new]))
    return checkpoint, changes


def check(drawn: tuple[Checkpoint, list[tuple[str, str]]]) -> None:
    checkpoint, changes = drawn
    error = outcome(checkpoint)
    if error is not None:
        event("the logits")
        assert error < TOLERANCE, changes


@pytest.mark.parametrize("name", [FLOAT[0], *thorough(*FLOAT[1:])])
@settings(bounded, max_examples=examples(60))
@given(data=st.data())
def test_any_tensor_may_be_missing_or_of_another_name_or_shape(name, data):
    check(data.draw(tensors(name, ("drop", "rename", "double", "reshape", "cut", "turn"))))


@pytest.mark.parametrize("name", [FOREIGN[0], *thorough(*FLOAT, *FOREIGN[1:], "mlx_lm_4bit")])
@settings(bounded, max_examples=examples(60))
@given(data=st.data())
def test_any_tensor_may_be_of_another_type_too(name, data):
    check(data.draw(tensors(name, ("drop", "rename", "double", "reshape", "cut", "turn", "recast", "recast"))))
