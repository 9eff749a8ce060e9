"""What `restore` refuses, by name: pairs that do not fit, and files that are broken."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from support import FIXTURES, QUANTIZED
from support.checkpoints import Checkpoint, bfloat16
from support.tuned import converted, files, pair_in, refusal, weights_of

from mlx_lm_qwen3vlmoe.restoring.restore import restore


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    return pair_in(tmp_path)


# --- what is refused ------------------------------------------------------------------------------------------------


def change_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= fields
    (folder / "config.json").write_text(json.dumps(config))


def test_another_vocabulary_is_named(tmp_path):
    checkpoint = Checkpoint("official")
    for key in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        checkpoint.change(key, lambda array: array[:-8])
    checkpoint.text["vocab_size"] -= 8
    made = converted(checkpoint.save(tmp_path / "smaller"), tmp_path / "tuned")
    message = refusal(made, FIXTURES / "official", tmp_path / "out")
    assert "vocab_size: expected 96, as in the original, found 88" in message


def test_a_layer_too_many_or_too_few_is_named(tmp_path):
    checkpoint = Checkpoint("official")
    checkpoint.tensors = {key: array for key, array in checkpoint.tensors.items() if ".layers.2." not in key}
    checkpoint.text["num_hidden_layers"] = 2
    small = checkpoint.save(tmp_path / "small")
    whole = FIXTURES / "official"
    for one, other in ((small, whole), (whole, small)):
        made = converted(one, tmp_path / f"of-{one.name}")
        assert "num_hidden_layers: expected" in refusal(made, other, tmp_path / "out")


def test_a_layer_that_is_sparse_in_one_and_dense_in_the_other_is_named(tmp_path):
    checkpoint = Checkpoint("official")
    sparse = {key: array for key, array in checkpoint.tensors.items() if ".layers.2.mlp" in key}
    checkpoint.tensors = {key: array for key, array in checkpoint.tensors.items() if ".layers.1.mlp" not in key} | {
        key.replace(".2.", ".1."): array for key, array in sparse.items()
    }
    checkpoint.text["mlp_only_layers"] = []
    made = converted(checkpoint.save(tmp_path / "other"), tmp_path / "tuned")
    message = refusal(made, FIXTURES / "official", tmp_path / "out")
    assert re.match(
        r"model\.language_model\.layers\.1\.mlp\.\w+\.weight: expected this tensor in both checkpoints or in neither, "
        "found one in ",
        message,
    )


def test_a_tied_tuned_model_does_not_fit_an_untied_original(tmp_path):
    made = converted(FIXTURES / "tied", tmp_path / "tuned")
    weights = weights_of(made)
    del weights["language_model.lm_head.weight"]
    mx.save_safetensors(str(made / "model.safetensors"), weights)
    (made / "model.safetensors.index.json").unlink()
    assert "lm_head.weight: expected this tensor in both" in refusal(made, FIXTURES / "official", tmp_path / "out")


def test_a_head_that_was_tuned_has_no_place_in_a_tied_original(tmp_path):
    made = converted(FIXTURES / "tied", tmp_path / "tuned")
    weights = weights_of(made)
    head = weights["language_model.lm_head.weight"]
    head[50, 3] += 1
    mx.save_safetensors(str(made / "model.safetensors"), weights)
    message = refusal(made, FIXTURES / "tied", tmp_path / "out")
    assert message.startswith("language_model.lm_head.weight: expected the embeddings")


@pytest.mark.parametrize("name", ["fp8-fused-official", "awq-g32-bf16", "gptq-w4-actorder", "bnb-nf4-double"])
def test_a_quantized_original_is_refused(name, pair, tmp_path):
    assert "expected an unquantized original, found quantization" in refusal(
        pair[0], QUANTIZED / name, tmp_path / "out"
    )


def test_an_original_of_mlx_that_is_quantized_is_refused(pair, tmp_path):
    assert "expected an unquantized original" in refusal(pair[0], FIXTURES / "mlx_lm_4bit", tmp_path / "out")


def test_the_one_to_take_in_place_of_a_quantized_original_is_named(pair, tmp_path):
    original = tmp_path / "Qwen3-VL-30B-A3B-Instruct-FP8"
    shutil.copytree(QUANTIZED / "fp8-fused-official", original)
    message = refusal(pair[0], original, tmp_path / "out")
    assert message.endswith("Use the original that it was made from: Qwen/Qwen3-VL-30B-A3B-Instruct.")


def test_codes_without_a_description_are_no_floats(pair, tmp_path):
    checkpoint = Checkpoint("fp8-fused-official")
    checkpoint.config.pop("quantization_config", None)
    message = refusal(pair[0], checkpoint.save(tmp_path / "codes"), tmp_path / "out")
    assert "expected an unquantized original" in message or "does not load: " in message


@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_config.json", "adapter_model.safetensors"])
def test_adapters_that_are_not_fused_are_refused(name, pair, tmp_path):
    (pair[0] / name).write_text("{}")
    message = refusal(*pair, tmp_path / "out")
    assert f"{name}: expected a model without adapters" in message
    assert "mlx_lm.fuse" in message


def test_tensors_of_adapters_are_refused(pair, tmp_path):
    weights = weights_of(pair[0])
    weights["language_model.model.layers.0.self_attn.q_proj.lora_a"] = mx.zeros((2, 2))
    mx.save_safetensors(str(pair[0] / "model.safetensors"), weights)
    assert "q_proj.lora_a: expected a model without adapters" in refusal(*pair, tmp_path / "out")


def test_the_two_in_the_wrong_order_are_refused(pair, tmp_path):
    made, original = pair
    message = refusal(original, made, tmp_path / "out")
    assert "expected a model that mlx_lm.fuse or mlx_lm.convert wrote" in message
    assert "experts" in message


def test_one_that_another_tool_quantized_is_none_of_the_hosts(pair, tmp_path):
    message = refusal(QUANTIZED / "awq-g32-bf16", pair[1], tmp_path / "out")
    assert "expected a model that mlx_lm.fuse or mlx_lm.convert wrote, found quantization_config" in message


def test_numbers_that_are_not_finite_are_refused(pair, tmp_path):
    weights = weights_of(pair[0])
    name = "language_model.model.layers.2.mlp.switch_mlp.up_proj.weight"
    weights[name][3, 5, 7] = float("nan")
    mx.save_safetensors(str(pair[0] / "model.safetensors"), weights)
    message = refusal(*pair, tmp_path / "out")
    assert message.startswith("model.language_model.layers.2.mlp.experts.gate_up_proj: expected finite numbers in BF16")


def test_a_number_beyond_float16_is_refused(tmp_path):
    checkpoint = Checkpoint("official")
    for key, (_, array) in checkpoint.tensors.items():
        checkpoint.tensors[key] = "F16", (array.astype("u4") << 16).view("f4").astype("f2")
    original = checkpoint.save(tmp_path / "original")
    made = converted(original, tmp_path / "tuned", lambda w: w.astype(mx.float32) * 1e5)
    assert "expected finite numbers in F16" in refusal(made, original, tmp_path / "out")


def test_what_is_not_finite_in_the_original_comes_back(tmp_path):
    checkpoint = Checkpoint("official")
    for key in ("lm_head.weight", "model.language_model.layers.0.mlp.experts.down_proj"):
        dtype, array = checkpoint.tensors[key]
        array = array.copy()
        array.reshape(-1)[:3] = 0x7FC1, 0xFF80, 0x7F80  # a NaN with a payload, infinities
        checkpoint.tensors[key] = dtype, array
    original = checkpoint.save(tmp_path / "original")
    restore(str(converted(original, tmp_path / "tuned")), str(original), str(tmp_path / "out"))
    assert files(tmp_path / "out") == files(original)


def test_places_that_are_in_each_others_way_are_refused(pair, tmp_path):
    made, original = pair
    (tmp_path / "link").symlink_to(original)
    for one, other, out, text in (
        (made, made, tmp_path / "out", "found one folder for both"),
        (original, tmp_path / "link", tmp_path / "out", "found one folder for both"),
        (made, original, made, "expected a new or empty folder, found a folder with files"),
        (made, original, original / "out", "expected a folder outside of"),
        (made, original, tmp_path / "link" / "out", "expected a folder outside of"),
        (tmp_path / "none", original, tmp_path / "out", "none: expected a folder that mlx_lm.fuse"),
    ):
        assert text in refusal(one, other, out)
    made.rename(original / "tuned")
    assert "expected a folder outside of" in refusal(original / "tuned", original, tmp_path / "out")


def test_what_is_there_already_is_left_alone(pair, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    assert "expected a new or empty folder, found a folder with files" in refusal(*pair, out)
    assert files(out) == {"mine": b"mine"}
    assert "expected a new or empty folder" in refusal(*pair, out / "mine")


def test_an_empty_folder_and_a_link_to_one_are_filled(pair, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    restore(*map(str, pair), str(tmp_path / "out"))
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "real" / "config.json").exists()


def test_folders_above_are_made(pair, tmp_path):
    restore(*map(str, pair), str(tmp_path / "a" / "b" / "out"))
    assert (tmp_path / "a" / "b" / "out" / "config.json").exists()


# --- files that are broken ------------------------------------------------------------------------------------------


def shards(tmp_path: Path) -> tuple[Path, Path]:
    shutil.copytree(FIXTURES / "official_sharded", tmp_path / "original")
    return converted(tmp_path / "original", tmp_path / "tuned"), tmp_path / "original"


def test_a_shard_that_is_missing_is_named(tmp_path):
    """Even one of vision tensors, without which text loads."""
    made, original = shards(tmp_path)
    index = json.loads((original / "model.safetensors.index.json").read_text())["weight_map"]
    for file in sorted(set(index.values())):
        (original / file).rename(tmp_path / "aside")
        message = refusal(made, original, tmp_path / "out")
        assert message.startswith("model.safetensors.index.json: ")
        assert f'expected in "{file}", as the index says, found nowhere' in message
        (tmp_path / "aside").rename(original / file)


def test_a_file_that_is_cut_short_is_named(tmp_path):
    made, original = shards(tmp_path)
    for folder, file in ((original, "model-00006-of-00006.safetensors"), (made, "model.safetensors")):
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[:-1])
        assert f"{folder / file}: " in refusal(made, original, tmp_path / "out")
        (folder / file).write_bytes(content)


def test_a_tensor_in_two_files_is_named(tmp_path):
    made, original = shards(tmp_path)
    shutil.copy(original / "model-00001-of-00006.safetensors", original / "model-00007-of-00006.safetensors")
    message = refusal(made, original, tmp_path / "out")
    assert "expected in one file, found in model-00001-of-00006.safetensors and model-00007" in message


@pytest.mark.parametrize(
    ("index", "text"),
    [
        ("[]", "expected a weight_map"),
        ("{", "expected a weight_map"),
        ('{"weight_map": {"lm_head.weight": "../model.safetensors"}}', 'expected in "../model.safetensors"'),
        ('{"weight_map": {"more": "model-00001-of-00006.safetensors"}}', "more: expected in"),
    ],
)
def test_an_index_that_is_of_no_use_is_named(index, text, tmp_path):
    made, original = shards(tmp_path)
    (original / "model.safetensors.index.json").write_text(index)
    assert text in refusal(made, original, tmp_path / "out")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data_offsets", [-8, 3840]),
        ("data_offsets", [8, 0]),
        ("data_offsets", [0, 10**15]),
        ("data_offsets", ["0", "1"]),
        ("data_offsets", [0]),
        ("shape", [96, 41]),
        ("shape", [-96, -40]),
        ("shape", ["96", 40]),
        ("dtype", ["BF16"]),
        ("dtype", "F32"),
    ],
)
@pytest.mark.parametrize("which", [0, 1])
def test_a_header_that_lies_is_an_error(field, value, which, pair, tmp_path):
    file = pair[which] / "model.safetensors"
    content = file.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:size])
    header[next(name for name in header if "embed_tokens" in name)][field] = value
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[size:])
    assert str(file) in refusal(*pair, tmp_path / "out")


def test_tensors_that_overlap_are_an_error(pair, tmp_path):
    file = pair[1] / "model.safetensors"
    content = file.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:size])
    one, other = [name for name in header if name.endswith("q_norm.weight")][:2]
    header[one]["data_offsets"] = header[other]["data_offsets"]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[size:])
    assert "that no other tensor uses" in refusal(*pair, tmp_path / "out")


def test_an_unknown_tensor_in_the_original_is_named(pair, tmp_path):
    checkpoint = Checkpoint("official")
    checkpoint.tensors["audio.weight"] = bfloat16(np.zeros((2, 2)))
    message = refusal(pair[0], checkpoint.save(pair[1]), tmp_path / "out")
    assert "audio.weight: expected a tensor of a Qwen3-VL-MoE model" in message


def test_a_link_to_nothing_and_a_pipe_are_named(pair, tmp_path):
    """As a download leaves them that was broken off, or somebody who wants a reader to wait."""
    (pair[1] / "tokenizer.json").symlink_to(tmp_path / "gone")
    assert "tokenizer.json: expected a file, found a broken link" in refusal(*pair, tmp_path / "out")
    (pair[1] / "tokenizer.json").unlink()
    os.mkfifo(pair[1] / "tokenizer.json")
    assert "tokenizer.json: expected a file, found a broken link" in refusal(*pair, tmp_path / "out")
