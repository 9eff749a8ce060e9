"""`mlx-lm-qwen3vlmoe export`: the plain text model of every layout and format, as bare mlx-lm loads it."""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, load_tokenizer, quantize_model, save_config, save_model
from support import FIXTURES, QUANTIZED, TINY, thorough
from support.checkpoints import TOLERANCE, Checkpoint, bfloat16, split
from support.commands import UNCHANGED, run
from support.hub import Hub, serving_hub
from support.tuned import converted, files, weights_of

from mlx_lm_qwen3vlmoe import CheckpointError
from mlx_lm_qwen3vlmoe.exporting.export import export

# On the CPU, bare mlx-lm has no products of experts in 16 bits.
ASK = """
import sys, mlx.core as mx
from mlx_lm import generate, load
model, tokenizer = load(sys.argv[1])
assert type(model).__module__ == "mlx_lm.models.qwen3_moe"
model.set_dtype(mx.float32)
messages = [{"role": "user", "content": sys.argv[2]}]
print(generate(model, tokenizer, tokenizer.apply_chat_template(messages, add_generation_prompt=True), max_tokens=64))
"""
EXPERT = "model.layers.{}.mlp.experts.{}.{}_proj.weight"
FLOATS = ("official", "per_expert", "resave_5_0_0", "resave_5_23_0", "tied", "mlx_vlm", "text_5_23_0", "mlx_lm_float")
OTHERS = sorted(
    path.parent.name
    for path in FIXTURES.glob("*/golden.safetensors")
    if "quantization" not in json.loads((path.parent / "config.json").read_text())
    and path.parent.name not in (*FLOATS, "yarn")
)
PACKED = ("awq-g64", "gptq-w4-asym", "ct-mxfp4", "autoround-mxfp8", "hqq-4bit-g32", "ct-mixed")  # and stay so
LOST = ("fp8-fused-official", "bnb-nf4", "modelopt-nvfp4", "gptq-w4-actorder", "fp8-cast")  # on a CPU
TOOLS = sorted(path.name for path in QUANTIZED.iterdir() if path.name not in (*PACKED, *LOST))


def parameters(model) -> dict[str, mx.array]:
    return {name.removeprefix("language_model."): array for name, array in tree_flatten(model.parameters())}


def assert_same(source: Path, out: Path) -> float | None:
    """Bare mlx-lm has the parameters that this package loads, bit for bit, and the same logits in float32.

    Returns the error against the golden logits, if there are any.
    """
    ours, theirs = load_model(source)[0], load_model(out)[0]
    assert type(theirs).__module__ == "mlx_lm.models.qwen3_moe"
    mine, found = parameters(ours), parameters(theirs)
    if json.loads((out / "config.json").read_text())["tie_word_embeddings"]:
        del mine["lm_head.weight"]
    assert found.keys() == mine.keys()
    for name, array in mine.items():
        assert found[name].dtype == array.dtype
        assert mx.array_equal(found[name], array, equal_nan=True), name
    golden = mx.load(str(source / "golden.safetensors"))
    for model in (ours, theirs):
        model.set_dtype(mx.float32)
    logits = theirs(golden["ids"]).astype(mx.float32)
    assert mx.array_equal(logits, ours(golden["ids"]).astype(mx.float32))
    return (mx.abs(logits - golden["logits"]).max() / mx.abs(golden["logits"]).max()).item()


def refusal(source: Path, out: Path, **options: bool) -> str:
    with pytest.raises(CheckpointError) as caught:
        export(str(source), str(out), **options)
    assert not list(out.parent.glob(f"{out.name}*"))  # nothing is left of it
    return str(caught.value)


def command(*arguments: object, **options):
    return run(sys.executable, "-m", "mlx_lm_qwen3vlmoe", "export", *arguments, **options)


# --- floats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FLOATS, *thorough(*OTHERS)])
def test_floats_become_the_layout_of_the_official_text_model(name, tmp_path):
    export(str(FIXTURES / name), str(tmp_path / "out"))
    tensors, config = weights_of(tmp_path / "out"), json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "qwen3_moe"
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert config["rope_scaling"] is None
    assert config["tie_word_embeddings"] == (name == "tied") != ("lm_head.weight" in tensors)
    assert "text_config" not in config
    experts, layers = config["num_experts"], range(config["num_hidden_layers"])
    sparse = [layer for layer in layers if layer not in config["mlp_only_layers"]]
    expected = {EXPERT.format(n, e, p) for n in sparse for e in range(experts) for p in ("gate", "up", "down")}
    assert {key for key in tensors if ".experts." in key} == expected
    wide, narrow = config["hidden_size"], config["moe_intermediate_size"]
    assert tensors[EXPERT.format(sparse[0], 0, "up")].shape == (narrow, wide)
    assert tensors[EXPERT.format(sparse[0], 0, "down")].shape == (wide, narrow)
    assert assert_same(FIXTURES / name, tmp_path / "out") < TOLERANCE


@pytest.mark.parametrize("dtype", ["F16", *thorough("F32")])
@pytest.mark.parametrize("name", ["official", *thorough("resave_5_0_0", "per_expert")])
def test_other_dtypes_stay(name, dtype, tmp_path):
    checkpoint = Checkpoint(name)
    for key, (_, array) in checkpoint.tensors.items():
        values = (array.astype("u4") << 16).view("f4")
        checkpoint.tensors[key] = dtype, values.astype("f2" if dtype == "F16" else "f4")
    export(str(checkpoint.save(tmp_path / "source")), str(tmp_path / "out"))
    (tmp_path / "source" / "golden.safetensors").symlink_to(FIXTURES / name / "golden.safetensors")
    assert_same(tmp_path / "source", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == f"float{dtype[1:]}"


@pytest.mark.parametrize("at_once", [1, *thorough(3_000)])
def test_a_tensor_is_written_some_rows_at_a_time_and_a_checkpoint_in_shards(at_once, tmp_path, monkeypatch):
    export(str(FIXTURES / "official"), str(tmp_path / "whole"))
    monkeypatch.setattr("mlx_lm_qwen3vlmoe.files.tensors._AT_ONCE", at_once)
    monkeypatch.setattr("mlx_lm_qwen3vlmoe.files.saving._SHARD", 50_000)
    export(str(FIXTURES / "official"), str(tmp_path / "out"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found, written = {}, []
    for file in sorted(set(index["weight_map"].values())):
        tensors = mx.load(str(tmp_path / "out" / file))
        written += split((tmp_path / "out" / file).read_bytes())[0]
        assert sum(array.nbytes for array in tensors.values()) <= 50_000
        assert all(index["weight_map"][name] == file for name in tensors)
        found |= tensors
    order = [re.search(r"layers\.(\d+)\.", name) for name in written]
    numbers = [int(match[1]) for match in order if match]
    assert numbers == sorted(numbers)  # one layer after the other
    whole = weights_of(tmp_path / "whole")
    assert found.keys() == whole.keys() == index["weight_map"].keys()
    assert all(mx.array_equal(found[name], whole[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in whole.values())
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert names == [f"model-{number + 1:05}-of-{len(names):05}.safetensors" for number in range(len(names))]
    assert len(names) > 2


def test_what_mlx_lm_converted_is_exported_as_its_original(tmp_path):
    export(str(converted(FIXTURES / "official", tmp_path / "converted")), str(tmp_path / "out"))
    export(str(FIXTURES / "official"), str(tmp_path / "direct"))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "direct" / "model.safetensors"
    ).read_bytes()


def test_merged_projections_are_cut_and_a_router_bias_of_zeros_is_left_out(tmp_path):
    """What vLLM's sharded state has of attention, and cosmos-rl of routers."""
    for value, folder in ((0.0, "zeros"), (0.5, "others")):
        checkpoint = Checkpoint("resave_5_23_0")
        prefix = "model.language_model.layers.0"
        parts = [checkpoint.tensors.pop(f"{prefix}.self_attn.{p}_proj.weight") for p in "qkv"]
        checkpoint.tensors[f"{prefix}.self_attn.qkv_proj.weight"] = "BF16", np.concatenate([part[1] for part in parts])
        bias = np.full(checkpoint.text["num_local_experts"], value)
        checkpoint.tensors[f"{prefix}.mlp.gate.e_score_correction_bias"] = bfloat16(bias)
        checkpoint.save(tmp_path / folder)
    export(str(tmp_path / "zeros"), str(tmp_path / "out"))
    export(str(FIXTURES / "resave_5_23_0"), str(tmp_path / "direct"))
    mine, direct = (weights_of(tmp_path / name) for name in ("out", "direct"))
    assert mine.keys() == direct.keys()
    assert all(mx.array_equal(mine[name], direct[name]) for name in mine)
    message = refusal(tmp_path / "others", tmp_path / "none")
    assert message.startswith("model.language_model.layers.0.mlp.gate.e_score_correction_bias: expected zeros")


# --- packed ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlx_lm_4bit", "mlx_vlm_4bit"])
def test_what_mlx_packed_stays_packed(name, tmp_path):
    export(str(FIXTURES / name), str(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    if name == "mlx_lm_4bit":
        assert config["quantization"]["model.layers.1.mlp.gate"]["bits"] == 8
    assert "model.layers.1.mlp.switch_mlp.up_proj.scales" in weights_of(tmp_path / "out")
    assert assert_same(FIXTURES / name, tmp_path / "out") < TOLERANCE


def packed(folder: Path, **options: object) -> Path:
    """What mlx_lm.convert -q writes of official_b."""
    model, config = load_model(FIXTURES / "official_b")
    model, config = quantize_model(model, config, **options)
    folder.mkdir()
    save_model(folder, model)
    save_config(config, folder / "config.json")
    (folder / "golden.safetensors").symlink_to(FIXTURES / "official_b" / "golden.safetensors")
    return folder


MIXED = {"down_proj": {"group_size": 32, "bits": 6}, "q_proj": False, "gate": {"group_size": 64, "bits": 8}}
RECIPES = {
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    "nvfp4": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
    "mixed": {
        "group_size": 32,
        "bits": 4,
        "quant_predicate": lambda path, *_: MIXED.get(path.rpartition(".")[2], True),
    },
}


@pytest.mark.parametrize("recipe", ["mixed", "nvfp4", *thorough("mxfp4", "mxfp8")])
def test_every_mode_and_a_mixture_stay(recipe, tmp_path):
    try:
        source = packed(tmp_path / "source", **RECIPES[recipe])
    except (TypeError, ValueError) as e:
        pytest.skip(f"this host cannot pack it: {e}")
    export(str(source), str(tmp_path / "out"))
    assert_same(source, tmp_path / "out")


@pytest.mark.parametrize("name", PACKED)
def test_what_another_tool_packed_is_packed_as_loading_packs_it(name, tmp_path):
    export(str(QUANTIZED / name), str(tmp_path / "out"))
    assert any(key.endswith("_proj.scales") for key in weights_of(tmp_path / "out"))
    assert assert_same(QUANTIZED / name, tmp_path / "out") < 2e-3


@pytest.mark.parametrize("name", [*LOST, *thorough(*TOOLS)])
def test_what_becomes_floats_is_refused_unless_floats_are_asked_for(name, tmp_path):
    source, message = QUANTIZED / name, ""
    try:
        export(str(source), str(tmp_path / "out"))
    except CheckpointError as e:
        message = str(e)
    assert message or name not in LOST
    if not message:
        assert_same(source, tmp_path / "out")
    elif "does not load: " not in message:
        assert "expected floats, or a quantization that MLX has a format for" in message
        assert "Run mlx_lm.convert -q first" in message
        export(str(source), str(tmp_path / "out"), dequantize=True)
        assert not any(key.endswith(".scales") for key in weights_of(tmp_path / "out"))
        if not any(key.endswith(".scales") for key in parameters(load_model(source)[0])):
            assert_same(source, tmp_path / "out")


def test_dequantized_weights_are_those_of_mlx_rounded_once(tmp_path):
    export(str(FIXTURES / "mlx_lm_4bit"), str(tmp_path / "out"), dequantize=True)
    stored, found = weights_of(FIXTURES / "mlx_lm_4bit"), weights_of(tmp_path / "out")
    path = "language_model.model.layers.1.mlp.switch_mlp.down_proj"
    scales, biases = (stored[f"{path}.{suffix}"].astype(mx.float32) for suffix in ("scales", "biases"))
    whole = mx.dequantize(stored[f"{path}.weight"], scales, biases, 32, 4).astype(mx.bfloat16)
    assert mx.array_equal(found[EXPERT.format(1, 3, "down")], whole[3])
    assert not any(key.endswith(".scales") for key in found)
    assert "quantization" not in json.loads((tmp_path / "out" / "config.json").read_text())


# --- YaRN -----------------------------------------------------------------------------------------------------------


def test_yarn_is_kept_for_those_who_honor_it_and_one_line_says_who_does_not(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        export(str(FIXTURES / "yarn"), str(tmp_path / "out"))
    (notice,) = caplog.messages
    assert "keeps YaRN, which transformers applies and mlx-lm's qwen3_moe ignores" in notice
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_scaling"]["rope_type"] == "yarn"
    assert not any(field.startswith("mrope") for field in config["rope_scaling"])


def test_without_yarn_the_context_has_the_original_length(tmp_path, caplog):
    yarn = json.loads((FIXTURES / "yarn" / "config.json").read_text())["text_config"]
    scaling = yarn.get("rope_scaling") or yarn["rope_parameters"]
    export(str(FIXTURES / "yarn"), str(tmp_path / "out"), drop_yarn=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_scaling"] is None
    assert config["max_position_embeddings"] == scaling["original_max_position_embeddings"]
    assert not caplog.messages


def test_packed_weights_with_yarn_are_refused(tmp_path):
    source = packed(tmp_path / "source", group_size=32, bits=4)
    config = json.loads((source / "config.json").read_text())
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    config["text_config"]["rope_scaling"] = yarn
    (source / "config.json").write_text(json.dumps(config))
    message = refusal(source, tmp_path / "out")
    assert "expected plain RoPE for packed weights, as mlx-lm's qwen3_moe ignores YaRN, found YaRN" in message
    assert "--drop-yarn for contexts of up to 64 tokens" in message
    export(str(source), str(tmp_path / "out"), drop_yarn=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"] is None


# --- what comes along -----------------------------------------------------------------------------------------------


def test_the_tokenizer_comes_along_and_nothing_of_images(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for file in TINY.iterdir():
        (source / file.name).symlink_to(file)
    (source / "LICENSE").write_text("Apache")
    (source / "tokenizer_config.json").unlink()
    fields = json.loads((TINY / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(fields | {"processor_class": "Qwen3VLProcessor"}))
    (source / "README.md").write_text("pipeline_tag: image-text-to-text")
    export(str(source), str(tmp_path / "out"))
    found, left = files(tmp_path / "out"), files(source)
    assert left.keys() - found.keys() == {"README.md", "preprocessor_config.json", "video_preprocessor_config.json"}
    changed = {"model.safetensors", "config.json", "tokenizer_config.json"}
    assert all(found[name] == left[name] for name in found.keys() - changed)
    fields.pop("processor_class", None)
    assert json.loads(found["tokenizer_config.json"]) == fields
    text = [{"role": "user", "content": "Hi"}]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    one, other = (load_tokenizer(folder) for folder in (TINY, tmp_path / "out"))
    for options in ({}, {"tools": tools}, {"enable_thinking": True}):
        assert one.apply_chat_template(text, **options) == other.apply_chat_template(text, **options)
    for name in ("has_thinking", "has_tool_calling"):
        assert getattr(one, name, None) == getattr(other, name, None)


def test_bare_mlx_lm_answers_with_what_the_command_wrote(tiny_questions, tmp_path):
    done = command(TINY, "--save-path", tmp_path / "out")
    assert done.stdout == f"{tmp_path / 'out'}: a qwen3_moe model, 111 tensors in bfloat16\n"
    assert done.stderr == ""
    pair = tiny_questions[0]
    assert pair["answer"] in run(sys.executable, "-c", ASK, tmp_path / "out", pair["question"], env=UNCHANGED).stdout


@pytest.mark.thorough
def test_a_repository_on_the_hub_is_exported(tmp_path):
    """Against a server that speaks the hub's protocol."""
    with serving_hub(Hub) as variables:
        command("some/model", "--save-path", tmp_path / "1", env=variables | {"HF_HOME": str(tmp_path / "home")})
    export(str(TINY), str(tmp_path / "2"))
    assert files(tmp_path / "1") == files(tmp_path / "2")
