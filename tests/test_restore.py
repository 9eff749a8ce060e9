"""`mlx-lm-qwen3vlmoe restore`: the original with tuned text in it, in every layout; and what is refused."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import mlx.core as mx
import numpy as np
import pytest
from conftest import CLEAN, FIXTURES, QUANTIZED, TINY, run
from mlx.utils import tree_map
from mlx_lm.utils import load_model, save_config, save_model
from test_broken import Checkpoint, bfloat16, split
from test_inspection import Hub

from mlx_lm_qwen3vlmoe import CheckpointError
from mlx_lm_qwen3vlmoe.restoring import restore

BIN = Path(sys.executable).parent
FLOAT = sorted(
    path.parent.name
    for path in FIXTURES.glob("*/golden.safetensors")
    if "quantization" not in json.loads((path.parent / "config.json").read_text())
)
LAYOUTS = [name for name in FLOAT if name not in ("yarn", "no_vision", "mlx_lm_float")]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def contents(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Every tensor of a checkpoint, whatever file it is in, to its bits."""
    found = {}
    for file in folder.glob("model*.safetensors"):
        header, data = split(file.read_bytes())
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            found[name] = entry["dtype"], entry["shape"], data[begin:end]
    return found


def converted(original: Path, folder: Path, change: Callable[[mx.array], mx.array] | None = None) -> Path:
    """What `mlx_lm.convert` makes of a checkpoint, with changed weights."""
    model, config = load_model(original, lazy=True)
    if change:
        model.update(tree_map(change, model.parameters()))
    folder.mkdir(parents=True)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    return folder


def weights_of(folder: Path) -> dict[str, mx.array]:
    """Evaluated, as the file may be written anew."""
    weights = mx.load(str(folder / "model.safetensors"))
    mx.eval(weights)
    return weights


def tuned(original: Path, folder: Path) -> Path:
    mx.random.seed(7)
    return converted(original, folder, lambda w: w + (0.1 * mx.random.normal(w.shape)).astype(w.dtype))


def command(*arguments: object, **options) -> subprocess.CompletedProcess:
    return run(sys.executable, "-m", "mlx_lm_qwen3vlmoe", "restore", *arguments, **options)


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    """A tuned model, and its original, in sibling folders that a test may change."""
    shutil.copytree(FIXTURES / "official", tmp_path / "original")
    return tuned(tmp_path / "original", tmp_path / "tuned"), tmp_path / "original"


def refusal(tuned: Path, original: Path | str, out: Path) -> str:
    before = sorted(path.name for path in out.parent.iterdir())
    with pytest.raises(CheckpointError) as caught:
        restore(str(tuned), str(original), str(out))
    assert sorted(path.name for path in out.parent.iterdir()) == before  # nothing is left of it
    return str(caught.value)


# --- what comes back ------------------------------------------------------------------------------------------------


def test_there_are_originals_of_every_layout():
    assert {"official", "official_sharded", "resave_5_0_0", "resave_5_23_0", "per_expert", "tied"} <= set(FLOAT)
    assert {"mlx_vlm", "text_4_57_6", "text_5_23_0", "per_expert_projection_first", "square_gate_v5"} <= set(FLOAT)


@pytest.mark.parametrize("at_once", [1, 5_000, 32_000_000])  # bytes: an expert or a row, some, a whole tensor
@pytest.mark.parametrize("name", FLOAT)
def test_text_that_was_not_changed_comes_back_bit_for_bit(name, at_once, tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_lm_qwen3vlmoe.stored._AT_ONCE", at_once)
    restore(str(converted(FIXTURES / name, tmp_path / "tuned")), str(FIXTURES / name), str(tmp_path / "out"))
    assert files(tmp_path / "out") == files(FIXTURES / name)


def test_what_mlx_lm_without_this_package_and_mlx_vlm_wrote_comes_back(tmp_path, caplog):
    restore(str(FIXTURES / "mlx_lm_float"), str(FIXTURES / "official_b"), str(tmp_path / "b"))
    assert files(tmp_path / "b") == files(FIXTURES / "official_b")
    assert not caplog.text
    restore(str(FIXTURES / "mlx_vlm"), str(FIXTURES / "official"), str(tmp_path / "a"))
    assert files(tmp_path / "a") == files(FIXTURES / "official")
    (notice,) = caplog.messages
    assert "has beside text is left out" in notice


def test_float32_in_between_rounds_nothing(tmp_path):
    made = converted(FIXTURES / "official", tmp_path / "tuned", lambda w: w.astype(mx.float32))
    restore(str(made), str(FIXTURES / "official"), str(tmp_path / "out"))
    assert files(tmp_path / "out") == files(FIXTURES / "official")


@pytest.mark.parametrize("dtype", ["F16", "F32"])
@pytest.mark.parametrize("name", ["official", "resave_5_0_0", "per_expert", "resave_5_23_0"])
def test_other_dtypes_come_back_bit_for_bit(name, dtype, tmp_path):
    """Subnormal numbers, negative zeros, all of it: the bits are random."""
    checkpoint, numbers = Checkpoint(name), np.random.default_rng(3)
    for key, (_, array) in checkpoint.tensors.items():
        words = numbers.integers(0, 2**16, array.shape, "u2") & 0xBBFF  # without infinities
        checkpoint.tensors[key] = dtype, words.view("f2").astype("f2" if dtype == "F16" else "f4")
    original = checkpoint.save(tmp_path / "original")
    restore(str(converted(original, tmp_path / "tuned")), str(original), str(tmp_path / "out"))
    assert files(tmp_path / "out") == files(original)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_restored_checkpoint_gives_the_logits_of_the_tuned_model(name, tmp_path):
    original = FIXTURES / name
    if name == "tied":  # where the head has to stay the embeddings
        made = converted(original, tmp_path / "tuned", lambda w: w * 2)
    else:
        made = tuned(original, tmp_path / "tuned")
    restore(str(made), str(original), str(tmp_path / "out"))
    models = [load_model(folder)[0] for folder in (made, tmp_path / "out", original)]
    ids = mx.load(str(original / "golden.safetensors"))["ids"]
    mine, back, before = (model(ids).astype(mx.float32) for model in models)
    assert mx.array_equal(mine, back)
    assert not mx.allclose(mine, before, rtol=0.1)
    old, new = contents(original), contents(tmp_path / "out")
    vision = [key for key in old if "visual." in key or "vision_tower." in key]
    assert bool(vision) != name.startswith("text")
    assert old.keys() == new.keys()
    assert all(new[key] == old[key] for key in vision)


def test_a_tuned_model_in_shards_fits_an_original_in_others(tmp_path):
    made = tuned(FIXTURES / "official", tmp_path / "tuned")
    weights = weights_of(made)
    names = sorted(weights, key=hash)
    for number in range(3):
        mx.save_safetensors(
            str(made / f"model-{number}.safetensors"), {name: weights[name] for name in names[number::3]}
        )
    (made / "model.safetensors").unlink()
    (made / "model.safetensors.index.json").unlink()
    for name in ("official", "official_sharded"):
        restore(str(made), str(FIXTURES / name), str(tmp_path / name))
    assert contents(tmp_path / "official") == contents(tmp_path / "official_sharded")


def test_whatever_else_is_in_the_folder_comes_along(pair, tmp_path):
    made, original = pair
    (original / "figures").mkdir()
    (original / "figures" / "config.json").write_text("{}")
    (original / "preprocessor_config.json").write_text('{"size": 1}')
    (original / ".gitattributes").write_text("*.safetensors lfs")
    (original / ".cache").mkdir()
    (original / ".cache" / "lock").write_text("")
    restore(str(made), str(original), str(tmp_path / "out"))
    expected, found = files(original), files(tmp_path / "out")
    assert found.keys() == expected.keys() - {".cache/lock"}
    assert all(found[name] == expected[name] for name in found if name != "model.safetensors")


def test_a_hole_between_tensors_is_copied(pair, tmp_path):
    """The format wants none, but MLX reads on."""
    original = pair[1]
    checkpoint = Checkpoint("official")
    header, data = {}, b""
    for key, (dtype, array) in checkpoint.tensors.items():
        data += b"hole"
        header[key] = {"dtype": dtype, "shape": array.shape, "data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    text = json.dumps(header).encode() + b"   "
    (original / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data + b"end")
    plain = converted(original, tmp_path / "plain")
    restore(str(plain), str(original), str(tmp_path / "out"))
    assert files(tmp_path / "out") == files(original)


def test_what_the_host_quantized_is_dequantized_with_a_notice(tmp_path, caplog):
    """The 4-bit copy of official_b that mlx-lm made: every number as MLX dequantizes it, rounded once."""
    with caplog.at_level(logging.WARNING):
        restore(str(FIXTURES / "mlx_lm_4bit"), str(FIXTURES / "official_b"), str(tmp_path / "out"))
    assert "is quantized: 17 of its layers are dequantized" in caplog.text
    packed = mx.load(str(FIXTURES / "mlx_lm_4bit" / "model.safetensors"))
    back, old = (mx.load(str(folder / "model.safetensors")) for folder in (tmp_path / "out", FIXTURES / "official_b"))
    path = "language_model.model.layers.1.mlp.switch_mlp"

    def weight(layer: str, bits: int = 4, group_size: int = 32) -> mx.array:
        scales, biases = (packed[f"{layer}.{name}"].astype(mx.float32) for name in ("scales", "biases"))
        whole = mx.dequantize(packed[f"{layer}.weight"], scales, biases, group_size, bits)
        return whole.astype(mx.bfloat16)

    experts = "model.language_model.layers.1.mlp.experts"
    gate_up = mx.concatenate([weight(f"{path}.gate_proj"), weight(f"{path}.up_proj")], 1).swapaxes(1, 2)
    assert mx.array_equal(back[f"{experts}.gate_up_proj"], gate_up)
    assert mx.array_equal(back[f"{experts}.down_proj"], weight(f"{path}.down_proj").swapaxes(1, 2))
    assert mx.array_equal(back["lm_head.weight"], weight("language_model.lm_head"))
    router = weight("language_model.model.layers.1.mlp.gate", 8, 64)
    assert mx.array_equal(back["model.language_model.layers.1.mlp.gate.weight"], router)
    assert back.keys() == old.keys()
    kept = [name for name in old if "visual" in name or "norm" in name]
    assert all(mx.array_equal(back[name], old[name]) for name in kept)


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4"])
def test_other_modes_are_dequantized(mode, tmp_path):
    from mlx_lm.utils import quantize_model

    model, config = load_model(FIXTURES / "official_b")
    model.set_dtype(mx.float32)
    group_size = 32 if mode == "mxfp4" else 16
    model, config = quantize_model(model, config, group_size, 4, mode=mode, quant_predicate=model.quant_predicate)
    made = tmp_path / "tuned"
    made.mkdir()
    save_model(made, model, donate_model=False)
    save_config(config, made / "config.json")
    checkpoint = Checkpoint("official_b")
    for key, (dtype, array) in checkpoint.tensors.items():
        assert dtype == "BF16"
        checkpoint.tensors[key] = "F32", (array.astype("u4") << 16).view("f4")
    original = checkpoint.save(tmp_path / "original")
    restore(str(made), str(original), str(tmp_path / "out"))
    back, _ = load_model(tmp_path / "out")
    ids = mx.load(str(FIXTURES / "official_b" / "golden.safetensors"))["ids"]
    expected = model(ids)
    assert mx.abs(back(ids) - expected).max() < 1e-3 * mx.abs(expected).max()


def test_every_expert_has_its_own_second_scale_of_nvfp4():
    """As mlx-lm 0.32.1 and newer store them on a GPU."""
    from mlx_lm_qwen3vlmoe.quantization import dequantize

    weight = mx.random.normal((3, 8, 32)) * mx.array([1, 5, 0.1])[:, None, None]
    largest = mx.abs(weight).max((1, 2))
    try:
        pairs = [mx.quantize(w, 16, 4, "nvfp4", global_scale=g) for w, g in zip(weight, largest, strict=True)]
    except TypeError:
        pytest.skip("this MLX has no second scale")
    tensors = {"weight": mx.stack([p[0] for p in pairs]), "scales": mx.stack([p[1] for p in pairs])}
    parameters = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    found = dequantize(tensors | {"global_scale": largest}, parameters, mx.float32)
    assert (mx.abs(found - weight).max((1, 2)) < 0.15 * largest).all()


def test_the_original_may_be_a_repository_on_the_hub_or_in_its_cache(tmp_path):
    """Against a server that speaks the hub's protocol, then from what that left in the cache."""
    made = converted(TINY, tmp_path / "tuned")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_HUB_DISABLE_XET": "1"}
    try:
        command(made, "--original", "a/b", "--save-path", tmp_path / "1", env=environment | {"HF_HUB_OFFLINE": "0"})
    finally:
        server.shutdown()
    command(made, "--original", "a/b", "--save-path", tmp_path / "2", env=environment)
    assert files(tmp_path / "1") == files(tmp_path / "2") == files(TINY)
    assert not any(path.is_symlink() for path in (tmp_path / "1").iterdir())
    error = command(made, "--original", "a/c", "--save-path", tmp_path / "3", check=False, env=environment)
    assert error.returncode == 1
    assert "a/c: expected a folder or a reachable repository" in error.stderr


class QuantizedHub(Hub):
    """A hub whose model is quantized, and that counts who asks for its tensors."""

    asked: ClassVar[list[str]] = []

    def do_GET(self, body: bool = True):  # noqa: N802
        self.asked.append(self.path)
        if self.path.split("?")[0].endswith("config.json"):
            config = json.loads((TINY / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
            return self.answer(json.dumps(config).encode(), body)
        return super().do_GET(body)


def test_a_quantized_repository_is_refused_before_it_is_downloaded(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), QuantizedHub)
    Thread(target=server.serve_forever, daemon=True).start()
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    arguments = (FIXTURES / "mlx_lm_float", "--original", "Qwen/Qwen3-VL-30B-A3B-Thinking-FP8")
    try:
        done = command(*arguments, "--save-path", tmp_path / "out", check=False, env=environment)
    finally:
        server.shutdown()
    assert "Take the one that it was made from: Qwen/Qwen3-VL-30B-A3B-Thinking." in done.stderr
    assert any("config.json" in path for path in QuantizedHub.asked)
    assert not any("model.safetensors" in path for path in QuantizedHub.asked)


# --- notices --------------------------------------------------------------------------------------------------------


def test_another_meaning_of_the_config_is_said(pair, tmp_path, caplog):
    made, original = pair
    config = json.loads((made / "config.json").read_text())
    config["text_config"] |= {"rope_theta": 10000, "num_experts_per_tok": 1}
    (made / "config.json").write_text(json.dumps(config))
    restore(str(made), str(original), str(tmp_path / "out"))
    assert "stays the original's, though the tuned model has another num_experts_per_tok, rope_theta" in caplog.text
    assert (tmp_path / "out" / "config.json").read_bytes() == (original / "config.json").read_bytes()


def test_what_was_rounded_before_is_said(pair, tmp_path, caplog):
    made = converted(pair[1], tmp_path / "half", lambda w: w.astype(mx.float16))
    restore(str(made), str(pair[1]), str(tmp_path / "out"))
    assert "Tensors in F16 come back in the original's BF16" in caplog.text


def test_nothing_is_said_of_an_ordinary_pair(pair, tmp_path):
    done = command(pair[0], "--original", pair[1], "--save-path", tmp_path / "out")
    assert done.stderr == ""
    assert done.stdout == f"{tmp_path / 'out'}: 36 tensors of the tuned text, 27 of the original\n"


def test_a_terminal_gets_a_bar(pair, tmp_path):
    terminal, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    arguments = (pair[0], "--original", pair[1], "--save-path", tmp_path / "out")
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_lm_qwen3vlmoe", "restore", *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=other,
        env=CLEAN,
    )
    os.close(other)
    assert process.wait(60) == 0
    shown = b""
    while b"100%" not in shown:
        shown += os.read(terminal, 10_000)  # fails at the end
    os.close(terminal)


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
    assert re.match(r"language_model\.model\.layers\.1\.mlp\.\w+: expected in both or in none, found in ", message)


def test_a_tied_tuned_model_does_not_fit_an_untied_original(tmp_path):
    made = converted(FIXTURES / "tied", tmp_path / "tuned")
    weights = weights_of(made)
    del weights["language_model.lm_head.weight"]
    mx.save_safetensors(str(made / "model.safetensors"), weights)
    (made / "model.safetensors.index.json").unlink()
    assert "language_model.lm_head: expected in both" in refusal(made, FIXTURES / "official", tmp_path / "out")


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
    assert message.endswith("Take the one that it was made from: Qwen/Qwen3-VL-30B-A3B-Instruct.")


def test_codes_without_a_description_are_no_floats(pair, tmp_path):
    checkpoint = Checkpoint("fp8-fused-official")
    checkpoint.config.pop("quantization_config", None)
    message = refusal(pair[0], checkpoint.save(tmp_path / "codes"), tmp_path / "out")
    assert "expected an unquantized original" in message or "expected a checkpoint that loads" in message


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
        (made, original, made, "expected nothing, or an empty folder, found files"),
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
    assert "expected nothing, or an empty folder, found files" in refusal(*pair, out)
    assert files(out) == {"mine": b"mine"}
    assert "expected nothing, or an empty folder" in refusal(*pair, out / "mine")


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
        assert f"expected in '{file}', as the index says, found nowhere" in message
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
        ('{"weight_map": {"lm_head.weight": "../model.safetensors"}}', "expected in '../model.safetensors'"),
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
    assert "expected data of its own" in refusal(*pair, tmp_path / "out")


def test_an_unknown_tensor_in_the_original_is_named(pair, tmp_path):
    checkpoint = Checkpoint("official")
    checkpoint.tensors["audio.weight"] = bfloat16(np.zeros((2, 2)))
    message = refusal(pair[0], checkpoint.save(pair[1]), tmp_path / "out")
    assert "audio.weight: expected a tensor of a Qwen3-VL-MoE model" in message


def test_a_link_to_nothing_and_a_pipe_are_named(pair, tmp_path):
    """As a download leaves them that was broken off, or somebody who wants a reader to wait."""
    (pair[1] / "tokenizer.json").symlink_to(tmp_path / "gone")
    assert "tokenizer.json: expected a file, found none" in refusal(*pair, tmp_path / "out")
    (pair[1] / "tokenizer.json").unlink()
    os.mkfifo(pair[1] / "tokenizer.json")
    assert "tokenizer.json: expected a file, found none" in refusal(*pair, tmp_path / "out")


# --- when it is stopped ---------------------------------------------------------------------------------------------

HALFWAY = """
import sys, time
from mlx_lm_qwen3vlmoe import __main__, restoring
write = restoring._write
def slowly(*arguments):
    for number, done in enumerate(write(*arguments)):
        if number == 30:
            print("half", flush=True)
            time.sleep(60)
        yield done
restoring._write = slowly
__main__.main(["restore", *sys.argv[1:]])
"""


def halfway(*arguments: object) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HALFWAY, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=CLEAN,
    )
    assert process.stdout.readline() == "half\n"
    return process


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_stop_leaves_nothing(number, status, pair, tmp_path):
    process = halfway(pair[0], "--original", pair[1], "--save-path", tmp_path / "out")
    assert (tmp_path / "out.unfinished" / "model.safetensors").exists()
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == status
    assert "Traceback" not in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["original", "tuned"]


def test_a_kill_leaves_nothing_that_looks_finished_and_the_next_run_names_it(pair, tmp_path):
    process = halfway(pair[0], "--original", pair[1], "--save-path", tmp_path / "out")
    process.kill()
    process.communicate(timeout=30)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.unfinished" / "config.json").exists()  # without which nothing loads it
    message = refusal(*pair, tmp_path / "out")
    assert "out.unfinished: expected nothing, found what another run is writing, or one that was killed left" in message


def test_two_runs_at_a_time_do_not_mix(pair, tmp_path):
    process = halfway(pair[0], "--original", pair[1], "--save-path", tmp_path / "out")
    try:
        assert "another run is writing" in refusal(*pair, tmp_path / "out")
    finally:
        process.kill()
        process.communicate(timeout=30)


def test_a_disk_without_room_is_said_before_anything_is_written(pair, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "GB of free space, found 0.000 GB" in refusal(*pair, tmp_path / "out")


def test_a_disk_that_becomes_full_leaves_nothing(pair, tmp_path):
    """The limit on the size of files stands for it: the same error of the same call."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from mlx_lm_qwen3vlmoe import restoring, __main__\n"
        "real = restoring.Original\n"
        "__main__.main(['restore', *sys.argv[1:]])"
    )
    arguments = (pair[0], "--original", pair[1], "--save-path", tmp_path / "out")
    done = run(sys.executable, "-c", code, *arguments, check=False)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["original", "tuned"]
