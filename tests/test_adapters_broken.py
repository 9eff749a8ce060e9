"""Adapters that are broken, or that the other format cannot hold: one error that names it, and nothing on the disk."""

from __future__ import annotations

import json
import re
import shutil

import mlx.core as mx
import pytest
from support.adapters import ADAPTERS, BASE, LAYER, converted, copied, equal, refusal, tensors

from mlx_lm_qwen3vlmoe.adapters import convert

# --- configs and tensors --------------------------------------------------------------------------------------------

FIELDS = [
    ({"peft_type": "IA3"}, "peft_type: expected LORA"),
    ({"peft_type": "LOHA"}, "peft_type: expected LORA"),
    ({"peft_type": "VERA"}, "peft_type: expected LORA"),
    ({"peft_type": "XLORA"}, "peft_type: expected LORA"),
    ({"peft_type": "ADALORA"}, "peft_type: expected LORA"),
    ({"peft_type": None}, "peft_type: expected a string, found nothing"),
    ({"bias": "all"}, "bias: expected none"),
    ({"lora_bias": True}, "lora_bias: expected nothing"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save: expected nothing"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices: expected nothing"),
    ({"layer_replication": [[0, 2]]}, "layer_replication: expected nothing"),
    ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens: expected nothing"),
    ({"use_qalora": True}, "use_qalora: expected nothing"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out: expected nothing"),
    *(({"init_lora_weights": name}, "init_lora_weights: ") for name in ("pissa", "pissa_niter_4", "olora", "corda")),
    *(({"init_lora_weights": name}, "init_lora_weights: ") for name in ("loftq", "lora_ga", 3, [])),
    ({"use_dora": True}, "expected lora_A, lora_B and lora_magnitude_vector, found lora_A and lora_B"),
    ({"r": 0}, "r: expected a positive integer, found 0"),
    ({"r": 2.0}, "r: expected a positive integer"),
    ({"r": True}, "r: expected a positive integer"),
    ({"r": 10**12}, "r: expected a positive integer"),
    ({"r": 3}, "according to r and rank_pattern"),
    ({"r": None}, "r: expected a positive integer, found nothing"),
    ({"lora_alpha": float("nan")}, "lora_alpha: expected a number"),
    ({"lora_alpha": float("inf")}, "lora_alpha: expected a number"),
    ({"lora_alpha": "16"}, "lora_alpha: expected a number"),
    ({"use_rslora": "yes"}, "use_rslora: expected true or false"),
    ({"target_parameters": "mlp.experts"}, "target_parameters: expected a list of strings"),
    ({"target_parameters": [1]}, "target_parameters: expected a list of strings"),
    ({"rank_pattern": []}, "rank_pattern: expected an object"),
    ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern.q_proj: expected a positive integer"),
    ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern.q_proj: expected a number"),
    ({"rank_pattern": {"(": 4}}, "rank_pattern: expected names of modules, or simple regular expressions"),
    ({"rank_pattern": {"(a+)+b": 4}}, "rank_pattern: expected names of modules, or simple regular expressions"),
    ({"rank_pattern": {"(?i)Q_PROJ": 4}}, "expected names of modules, or simple regular expressions"),
    ({"rank_pattern": {r"(.*)\1": 4}}, "expected names of modules, or simple regular expressions"),
    ({"lora_alpha": 10**400}, "lora_alpha: expected a number"),
    ({"alpha_pattern": {"q_proj": 10**400}}, "alpha_pattern.q_proj: expected a number"),
    ({"auto_mapping": 3}, "auto_mapping: expected an object"),
    ({"lora_B_layout": "diagonal"}, "lora_B_layout: expected rank_major or grouped_by_expert"),
]


@pytest.mark.parametrize(("fields", "message"), FIELDS, ids=[json.dumps(fields) for fields, _ in FIELDS])
def test_a_config_that_means_something_else_is_refused_by_its_field(fields, message, tmp_path):
    assert message in refusal(copied(tmp_path, **fields), tmp_path)


def renamed(old: str, new: str):
    return lambda found: {n.replace(old, new): a for n, a in found.items()}


def added(name: str, *shape: int):
    return lambda found: found | {name: mx.ones(shape)}


TENSORS = [
    (added(LAYER.format(0) + "input_layernorm.lora_A.weight", 2, 40), "input_layernorm"),
    (added(LAYER.format(0) + "self_attn.q_proj.lora_B.bias", 64), "q_proj.lora_B.bias: expected"),
    (added(LAYER.format(0) + "self_attn.q_proj.ia3_l", 64, 1), "q_proj.ia3_l: expected"),
    (added("base_model.model.lm_head.weight", 96, 40), "lm_head.weight: expected"),
    (added("base_model.model.model.thinker.layers.0.q_proj.lora_A.weight", 2, 40), "thinker.layers.0.q_proj.lora_A"),
    (added(LAYER.format(0) + "self_attn.q_proj.lora_A.second.weight", 2, 40), "found two"),
    (
        added("model.layers.0.self_attn.q_proj.lora_A.weight", 2, 40),
        "expected one of these, as they are the same tensor, found both",
    ),
    (
        added(LAYER.format(0) + "self_attn.q_proj.lora_magnitude_vector", 64),
        "q_proj: expected lora_A and lora_B, found lora_A, lora_B and lora_magnitude_vector",
    ),
    (added(LAYER.format(0) + "mlp.experts.lora_magnitude_vector", 64), "experts: expected lora_A and lora_B"),
    (renamed("layers.2", "layers.7"), "layers.7.mlp.experts.base_layer: expected a module that the base model has"),
    (renamed("layers.0", "layers.1"), "layers.1.mlp.experts.base_layer: expected a module that the base model has"),
    (renamed("layers.0", "layers.00"), "layers.00"),
    (lambda found: {n: a.astype(mx.int32) for n, a in found.items()}, "expected floats, found"),
    (lambda found: {n: a for n, a in found.items() if "visual" in n} | {"x": mx.zeros(1)}, "x: expected lora_A"),
]


@pytest.mark.parametrize(("change", "message"), TENSORS, ids=[message for _, message in TENSORS])
def test_a_tensor_that_belongs_to_nothing_is_refused_by_its_name(change, message, tmp_path):
    assert message in refusal(copied(tmp_path, change=change), tmp_path)


@pytest.mark.parametrize("tensor", sorted(tensors(ADAPTERS / "experts")))
def test_a_tensor_that_is_missing_or_cut_is_an_error(tensor, tmp_path):
    """Cut along either axis, with another number of axes, or away."""
    module = tensor.removeprefix("base_model.model.model.language_model.").partition(".lora_")[0]
    for number, change in enumerate(
        (
            lambda found: {n: a for n, a in found.items() if n != tensor},
            lambda found: found | {tensor: found[tensor][:-1]},
            lambda found: found | {tensor: found[tensor][:, :-1]},
            lambda found: found | {tensor: found[tensor][0]},
            lambda found: found | {tensor: found[tensor][None]},
        )
    ):
        (tmp_path / str(number)).mkdir()
        message = refusal(copied(tmp_path / str(number), change=change), tmp_path / str(number))
        assert re.search(module.replace(".base_layer", "").replace("experts", "(experts|switch_mlp)"), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed("experts.3", "experts.5"), "experts.5.down_proj: expected no expert after 4"),
        (renamed("experts.3", "experts.03"), "experts.03"),
        (renamed(".lora_A", ".lora_C"), "lora_C"),
    ],
)
def test_separate_experts_are_those_of_the_base_model(change, message, tmp_path):
    assert message in refusal(copied(tmp_path, "separate_experts_some", change), tmp_path)


def test_a_base_model_that_is_not_there_is_an_error_if_the_user_names_it(tmp_path):
    assert "--model: expected the base model's config" in refusal(ADAPTERS / "experts", tmp_path, tmp_path / "nothing")
    converted(copied(tmp_path, base_model_name_or_path="/not/here"), tmp_path, None)


def test_a_tensor_of_mlx_lm_under_two_names_is_an_error(tmp_path):
    def again(found):
        name = "language_model.model.layers.2.self_attn.q_proj.lora_a"
        return found | {name.replace("language_model.model.", "model."): found[name]}

    assert "expected one of these, as they are the same tensor, found both" in refusal(
        copied(tmp_path, "trained_lora/mlx", again), tmp_path
    )


def test_how_many_experts_there_are_is_not_guessed_in_silence(tmp_path, caplog):
    """One adapter is of all experts but tells it by the router, the other of experts 1 and 3."""
    converted(ADAPTERS / "separate_experts", tmp_path, None)
    assert not caplog.text
    router = copied(
        tmp_path, "separate_experts", lambda found: {n: a for n, a in found.items() if ".gate.lora" not in n}
    )
    converted(router, tmp_path, None)
    assert "it is taken to have the 5 experts of the adapter" in caplog.text
    assert "an adapter of some of the experts: expected the base model" in refusal(
        ADAPTERS / "separate_experts_some", tmp_path, None
    )


TRAINED_FIELDS = [
    ({"fine_tune_type": "full"}, 'fine_tune_type: expected lora or dora, found "full"'),
    ({"fine_tune_type": "other"}, 'fine_tune_type: expected lora or dora, found "other"'),
    ({"fine_tune_type": "dora"}, "expected lora_a, lora_b and m, found lora_a and lora_b"),
    ({"lora_parameters": None}, "lora_parameters: expected an object, found nothing"),
    ({"lora_parameters": {"rank": 3, "alpha": 5}}, "lora_parameters.scale: expected a number, found nothing"),
    ({"lora_parameters": {"rank": 4, "scale": 5.0}}, "of rank 4, according to lora_parameters"),
    ({"lora_parameters": {"rank": 3, "scale": float("nan")}}, "lora_parameters.scale: expected a number"),
]


@pytest.mark.parametrize(("fields", "message"), TRAINED_FIELDS, ids=[json.dumps(f) for f, _ in TRAINED_FIELDS])
def test_a_config_of_mlx_lm_that_is_no_adapters_is_refused(fields, message, tmp_path):
    assert message in refusal(copied(tmp_path, "trained_lora/mlx", **fields), tmp_path)


@pytest.mark.parametrize("tensor", sorted(tensors(ADAPTERS / "trained_dora" / "mlx"))[:6])
def test_a_tensor_of_mlx_lm_that_is_missing_or_cut_is_an_error(tensor, tmp_path):
    for number, change in enumerate(
        (
            lambda found: {n: a for n, a in found.items() if n != tensor},
            lambda found: found | {tensor: found[tensor][:-1]},
            lambda found: found | {tensor: found[tensor][..., :-1]},
        )
    ):
        (tmp_path / str(number)).mkdir()
        folder = copied(tmp_path / str(number), "trained_dora/mlx", change)
        assert tensor.rpartition(".")[0] in refusal(folder, tmp_path / str(number))


def test_dora_of_experts_is_refused(tmp_path):
    def change(found):
        for name in [name for name in found if name.endswith("lora_B.weight")]:
            found[name.replace("lora_B.weight", "lora_magnitude_vector")] = mx.ones(found[name].shape[:1])

    for number, name in enumerate(("separate_experts_some", "experts")):
        (tmp_path / str(number)).mkdir()
        message = refusal(copied(tmp_path / str(number), name, change, use_dora=True), tmp_path / str(number))
        assert re.search("experts.*: expected LoRA, found DoRA|lora_magnitude_vector", message)


def test_dora_of_some_modules_and_lora_of_others_is_refused(tmp_path):
    def change(found):
        for layer in range(3):
            found[LAYER.format(layer) + "self_attn.q_proj.lora_magnitude_vector"] = mx.ones(64)

    message = refusal(copied(tmp_path, change=change, use_dora=True), tmp_path)
    assert "mlp.experts.base_layer: expected DoRA, as in the other modules, found LoRA" in message


def test_dora_of_embeddings_is_refused(tmp_path):
    """PEFT has a magnitude for each of the hidden size, mlx_lm for each token."""
    shapes = {"lora_a": (96, 2), "lora_b": (2, 40), "m": (96,)}

    def change(found):
        return found | {f"language_model.model.embed_tokens.{kind}": mx.ones(shape) for kind, shape in shapes.items()}

    message = refusal(copied(tmp_path, "trained_dora/mlx", change), tmp_path)
    assert "embed_tokens: expected LoRA, found DoRA" in message


def test_whole_weights_of_mlx_lm_are_refused(tmp_path):
    change = added("language_model.model.norm.weight", 40)
    assert "norm.weight: expected lora_a" in refusal(copied(tmp_path, "trained_lora/mlx", change), tmp_path)


TINKER = ["model.layers.0.mlp.experts.w1.lora_A.weight", "model.unembed_tokens.lora_B.weight"]


@pytest.mark.parametrize("name", TINKER)
def test_an_adapter_as_tinker_downloads_it_is_refused_with_the_function_that_converts_it(name, tmp_path):
    """Its config says neither `peft_type` nor anything else of PEFT."""
    folder = copied(tmp_path, change=added(f"base_model.model.{name}", 1, 2, 40))
    (folder / "adapter_config.json").write_text('{"lora_alpha": 1, "r": 2}')
    message = refusal(folder, tmp_path)
    assert message.startswith(
        f"base_model.model.{name}: expected an adapter that PEFT saved, found one that Tinker saved."
    )
    assert "tinker_cookbook.weights.build_lora_adapter" in message


# --- files ----------------------------------------------------------------------------------------------------------


def test_pickled_files_are_refused_by_their_name(tmp_path):
    folder = copied(tmp_path)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "found adapter_model.bin. Pickled files" in refusal(folder, tmp_path)


def test_a_folder_with_both_formats_or_none_is_refused(tmp_path):
    folder = copied(tmp_path)
    shutil.copy(folder / "adapter_model.safetensors", folder / "adapters.safetensors")
    assert "found both" in refusal(folder, tmp_path)
    assert "found neither" in refusal(BASE, tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", '{"a": ', "[" * 100_000])
def test_a_config_that_is_no_object_is_refused(text, tmp_path):
    folder = copied(tmp_path)
    (folder / "adapter_config.json").write_text(text)
    assert "adapter_config.json" in refusal(folder, tmp_path)
    (folder / "adapter_config.json").unlink()
    assert "adapter_config.json" in refusal(folder, tmp_path)


def test_a_truncated_file_is_refused(tmp_path):
    folder = copied(tmp_path)
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(9000)
    assert "adapter_model.safetensors: expected a safetensors file" in refusal(folder, tmp_path)


def test_no_such_adapter_is_one_error(tmp_path):
    message = refusal(tmp_path / "nothing", tmp_path)
    assert "nothing: expected an adapter's folder or a reachable repository" in message


def test_a_folder_that_is_not_empty_is_not_written_to(tmp_path):
    (tmp_path / "out").mkdir()
    convert(str(ADAPTERS / "attention"), str(tmp_path / "out"))  # empty, it is taken
    before = tensors(tmp_path / "out")
    assert "out: expected a new or empty folder" in refusal(ADAPTERS / "experts", tmp_path)
    assert equal(tensors(tmp_path / "out"), before)


def test_what_stops_on_the_way_leaves_nothing(tmp_path, monkeypatch):
    """A full disk, and a stop by the user."""
    from mlx_lm_qwen3vlmoe.adapters import files

    for stop in (OSError(28, "No space left on device"), KeyboardInterrupt()):

        def fail(*_: object, stop=stop) -> None:
            raise stop

        monkeypatch.setattr(files.mx, "contiguous", fail)
        with pytest.raises(type(stop)):
            convert(str(ADAPTERS / "attention"), str(tmp_path / "out"))
        assert list(tmp_path.iterdir()) == []
