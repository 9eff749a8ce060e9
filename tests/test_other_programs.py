"""Programs that look inside a model, or put their own layers into one."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_config, load_model, quantize_model, save_config, save_model
from support import FIXTURES, TINY

from mlx_lm_qwen3vlmoe import CheckpointError, Model, ModelArgs
from mlx_lm_qwen3vlmoe.inspection.report import inspect

IDS = mx.array([[1, 5, 9, 40, 200, 7]])


def made(name: str = "official") -> Model:
    return Model(ModelArgs.from_dict(load_config(FIXTURES / name)))


# --- the head beside the decoder ------------------------------------------------------------------------------------


def as_lenses_do(model: Model, ids: mx.array) -> mx.array:
    """The logits of programs that take a model without ``lm_head`` for a tied one (mlx-lm-lens, mlx-genkit)."""
    h = model.model(ids)
    head = getattr(model, "lm_head", None)
    return head(h) if head is not None else model.model.embed_tokens.as_linear(h)


@pytest.mark.parametrize("bits", [None, 4])
def test_the_head_is_beside_the_decoder(bits):
    model, config = load_model(TINY)
    if bits:
        model, _ = quantize_model(model, config, 32, bits)
    model.set_dtype(mx.float32)
    assert mx.allclose(as_lenses_do(model, IDS), model(IDS), rtol=1e-4, atol=1e-4)


def test_a_tied_model_has_the_embeddings_there():
    model, _ = load_model(FIXTURES / "tied")
    assert mx.array_equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_the_head_is_stored_once_and_where_the_host_has_it():
    model = made()
    names = [name for name, _ in tree_flatten(model.parameters()) if "lm_head" in name]
    assert names == ["language_model.lm_head.weight"]
    assert "lm_head" not in model


def test_a_replaced_head_is_used_and_stored_in_the_place_of_the_old_one():
    model, _ = load_model(FIXTURES / "official")
    head = nn.Linear(model.lm_head.weight.shape[1], 3, bias=False)
    model.lm_head = head
    assert model.lm_head is model.language_model.lm_head is head
    assert model(IDS % 50).shape[-1] == 3
    assert [name for name, _ in tree_flatten(model.parameters()) if "lm_head" in name] == [
        "language_model.lm_head.weight"
    ]


def test_a_head_that_the_host_does_not_have_is_not_offered():
    model = made()
    del model.language_model.lm_head
    assert not hasattr(model, "lm_head")


# --- layers that programs bring -------------------------------------------------------------------------------------

ATTENTION = "language_model.model.layers.0.self_attn.q_proj"
EXPERTS = "language_model.model.layers.1.mlp.switch_mlp.up_proj"
EMBEDDINGS = "language_model.model.embed_tokens"


def parameters(bits: int | None = None) -> tuple[Model, dict[str, mx.array], dict]:
    """A conversion of mlx-lm's, for a program to build on."""
    model, config = load_model(TINY)
    if bits:
        model, config = quantize_model(model, config, 32, bits)
    return model, dict(tree_flatten(model.parameters())), config


class Rotated(nn.Module):
    """A layer with tensors of its own, as turboquant's."""

    def __init__(self, weights: dict[str, mx.array], path: str):
        super().__init__()
        for name, array in weights.items():
            if name.startswith(f"{path}."):
                self[name[len(path) + 1 :]] = array


Rotated.__module__ = "turboquant_mlx.layers"  # no module of a program's is named like this one in a test of it


@pytest.mark.parametrize("path", [ATTENTION, EXPERTS, EMBEDDINGS])
@pytest.mark.parametrize("suffixes", [["codebook", "signs"], ["weight.raw", "weight.table"]])
def test_tensors_of_a_programs_own_layer_are_handed_on_as_they_are(path, suffixes):
    """With the words that the program packed in a way of its own, and whatever MLX packed for it beside them."""
    model, weights, _ = parameters()
    own = {f"{path}.{suffix}": mx.ones((7,), mx.uint8) for suffix in suffixes}
    if "codebook" in suffixes:
        own |= {f"{path}.weight": mx.ones((3, 5), mx.uint32), f"{path}.scales": mx.ones((3, 2))}
        own |= {
            "language_model.lm_head.weight": mx.ones((3, 1), mx.uint32),
            "language_model.lm_head.scales": mx.ones(3),
        }
    else:
        del weights[f"{path}.weight"]
    found = model.sanitize(weights | own)
    assert found.keys() == (weights | own).keys()
    assert all(found[name] is own[name] for name in own)


def test_names_of_the_original_become_those_of_the_model():
    """By which programs find the layers to replace: one tensor a layer, and the same object comes back."""
    mark = mx.zeros((1,), mx.uint8)
    stored = "model.language_model.layers.0.self_attn.q_proj.weight.raw"
    (found,) = parameters()[0].sanitize({stored: mark}).items()
    assert found == (f"{ATTENTION}.weight.raw", mark)
    assert found[1] is mark


def test_a_layer_that_a_program_has_replaced_takes_its_tensors_whatever_they_are_called():
    """Here as AWQ and HQQ call theirs, in shapes that theirs never have."""
    model, weights, _ = parameters()
    del weights[f"{ATTENTION}.weight"]
    weights |= {f"{ATTENTION}.{suffix}": mx.ones((7,)) for suffix in ("qweight", "scale")}
    model.layers[0].self_attn.q_proj = Rotated(weights, ATTENTION)
    found = model.sanitize(weights)
    assert found.keys() == weights.keys()
    model.load_weights(list(found.items()), strict=True)


def test_a_program_that_puts_its_layers_in_after_sanitize_loads():
    model, weights, _ = parameters()
    weights |= {f"{ATTENTION}.weight": mx.ones((3, 5), mx.uint32), f"{ATTENTION}.codebook": mx.ones((16,))}
    found = model.sanitize(weights)
    model.layers[0].self_attn.q_proj = Rotated(weights, ATTENTION)
    model.load_weights(list(found.items()), strict=False)
    assert mx.array_equal(model.layers[0].self_attn.q_proj.codebook, mx.ones((16,)))


@pytest.mark.parametrize("strict", [True, False])
def test_without_the_program_one_error_names_the_tensor(strict):
    """The host would drop it without a word where it is not strict, as on several machines."""
    model, weights, _ = parameters()
    found = model.sanitize(weights | {f"{ATTENTION}.signs": mx.ones((7,))})
    with pytest.raises(
        CheckpointError, match=r"q_proj\.signs: expected a tensor that MLX's layer has.*the program that made it"
    ):
        model.load_weights(list(found.items()), strict=strict)


def saved(folder, config: dict, weights: dict[str, mx.array]):
    model, _ = load_model(TINY)
    save_model(folder, model)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    save_config(config, folder / "config.json")
    return folder


def test_a_mode_that_mlx_does_not_have_is_the_programs():
    """Its description stays as it is, and so do its layers; the others are MLX's."""
    _, weights, config = parameters(4)
    config["quantization"] = {"mode": "turboquant", "bits": 3, "rotation": "hadamard"}
    model = Model(ModelArgs.from_dict(config))
    weights |= {f"{ATTENTION}.scales": mx.ones((3,)), f"{ATTENTION}.codebook": mx.ones((8,))}
    found = model.sanitize(weights)
    assert found.keys() == weights.keys()
    assert found[f"{ATTENTION}.scales"].shape == (3,)
    assert config["quantization"] == {"mode": "turboquant", "bits": 3, "rotation": "hadamard"}


def test_a_checkpoint_in_such_a_mode_is_refused_by_name_when_nobody_brings_its_layers(tmp_path):
    """Even if its tensors look like MLX's: what they stand for is not known."""
    _, weights, config = parameters(4)
    config["quantization"] |= {"mode": "turboquant"}
    config["quantization"] = {name: value for name, value in config["quantization"].items() if type(value) is not dict}
    folder = saved(tmp_path / "own", config, weights)
    with pytest.raises(ValueError, match="turboquant"):
        load_model(folder)
    assert "turboquant" in inspect(str(folder))["error"]


@pytest.mark.parametrize("suffix", ["bias", "lora_a", "pre_quant_scale", "g_idx"])
def test_a_tensor_that_would_change_the_weight_is_still_refused(suffix):
    """It is known what it is, and no layer of a program's."""
    model, weights, _ = parameters()
    with pytest.raises(CheckpointError, match=suffix):
        model.sanitize(weights | {f"{ATTENTION}.{suffix}": mx.ones((7,))})


def test_what_is_unknown_beside_words_that_mlx_describes_is_still_refused():
    """The host would make a layer of MLX's of what may not be one."""
    model, weights, config = parameters(4)
    model = Model(ModelArgs.from_dict(config))
    with pytest.raises(CheckpointError, match="signs"):
        model.sanitize(weights | {f"{ATTENTION}.signs": mx.ones((7,))})


def test_what_is_unknown_beside_another_tools_format_is_still_refused():
    config = load_config(TINY) | {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32}}
    weights = parameters()[1]
    with pytest.raises(CheckpointError, match="signs"):
        Model(ModelArgs.from_dict(config)).sanitize(weights | {f"{ATTENTION}.signs": mx.ones((7,))})
