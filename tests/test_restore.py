"""`mlx-lm-qwen3vlmoe restore`: the original with tuned text in it, in every layout; and what is refused."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import ClassVar

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model, save_config, save_model
from support import FIXTURES, TINY, thorough
from support.checkpoints import Checkpoint, split
from support.commands import CLEAN, run
from support.hub import Hub, serving_hub
from support.tuned import converted, files, pair_in, tuned, weights_of

from mlx_lm_qwen3vlmoe.restoring.restore import restore

BIN = Path(sys.executable).parent
FLOAT = sorted(
    path.parent.name
    for path in FIXTURES.glob("*/golden.safetensors")
    if "quantization" not in json.loads((path.parent / "config.json").read_text())
)
LAYOUTS = [name for name in FLOAT if name not in ("yarn", "no_vision", "mlx_lm_float")]


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


def command(*arguments: object, **options) -> subprocess.CompletedProcess:
    return run(sys.executable, "-m", "mlx_lm_qwen3vlmoe", "restore", *arguments, **options)


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    return pair_in(tmp_path)


# --- what comes back ------------------------------------------------------------------------------------------------


def test_there_are_originals_of_every_layout():
    assert {"official", "official_sharded", "resave_5_0_0", "resave_5_23_0", "per_expert", "tied"} <= set(FLOAT)
    assert {"mlx_vlm", "text_4_57_6", "text_5_23_0", "per_expert_projection_first", "square_gate_v5"} <= set(FLOAT)


@pytest.mark.parametrize(
    "at_once", [5_000, *thorough(1, 32_000_000)]
)  # bytes: an expert or a row, some, a whole tensor
@pytest.mark.parametrize("name", FLOAT)
def test_text_that_was_not_changed_comes_back_bit_for_bit(name, at_once, tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_lm_qwen3vlmoe.files.tensors._AT_ONCE", at_once)
    restore(str(converted(FIXTURES / name, tmp_path / "tuned")), str(FIXTURES / name), str(tmp_path / "out"))
    assert files(tmp_path / "out") == files(FIXTURES / name)


def test_what_mlx_lm_without_this_package_and_mlx_vlm_wrote_comes_back(tmp_path, caplog):
    restore(str(FIXTURES / "mlx_lm_float"), str(FIXTURES / "official_b"), str(tmp_path / "b"))
    assert files(tmp_path / "b") == files(FIXTURES / "official_b")
    assert not caplog.text
    restore(str(FIXTURES / "mlx_vlm"), str(FIXTURES / "official"), str(tmp_path / "a"))
    assert files(tmp_path / "a") == files(FIXTURES / "official")
    (notice,) = caplog.messages
    assert "The vision tensors of" in notice


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
    home = {"HF_HOME": str(tmp_path / "home")}
    with serving_hub(Hub) as variables:
        command(made, "--original", "some/model", "--save-path", tmp_path / "1", env=variables | home)
    command(made, "--original", "some/model", "--save-path", tmp_path / "2", env=home)
    assert files(tmp_path / "1") == files(tmp_path / "2") == files(TINY)
    assert not any(path.is_symlink() for path in (tmp_path / "1").iterdir())
    error = command(made, "--original", "a/c", "--save-path", tmp_path / "3", check=False, env=home)
    assert error.returncode == 1
    assert "a/c: no such folder; the hub's cache on this machine does not have all of it" in error.stderr


class QuantizedHub(Hub):
    """A hub whose model is quantized, and that counts who asks for its tensors."""

    asked: ClassVar[list[str]] = []
    model = "Qwen/Qwen3-VL-30B-A3B-Thinking-FP8"

    def do_GET(self, body: bool = True):  # noqa: N802
        self.asked.append(self.path)
        if self.path.split("?")[0].endswith("config.json"):
            config = json.loads((TINY / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
            return self.answer(json.dumps(config).encode(), body)
        return super().do_GET(body)


def test_a_quantized_repository_is_refused_before_it_is_downloaded(tmp_path):
    arguments = (FIXTURES / "mlx_lm_float", "--original", "Qwen/Qwen3-VL-30B-A3B-Thinking-FP8")
    with serving_hub(QuantizedHub) as variables:
        environment = variables | {"HF_HOME": str(tmp_path / "home")}
        done = command(*arguments, "--save-path", tmp_path / "out", check=False, env=environment)
    assert "Use the original that it was made from: Qwen/Qwen3-VL-30B-A3B-Thinking." in done.stderr
    assert any("config.json" in path for path in QuantizedHub.asked)
    assert not any("model.safetensors" in path for path in QuantizedHub.asked)


# --- notices --------------------------------------------------------------------------------------------------------


def test_another_meaning_of_the_config_is_said(pair, tmp_path, caplog):
    made, original = pair
    config = json.loads((made / "config.json").read_text())
    config["text_config"] |= {"rope_theta": 10000, "num_experts_per_tok": 1}
    (made / "config.json").write_text(json.dumps(config))
    restore(str(made), str(original), str(tmp_path / "out"))
    assert "is the original's, although the tuned model has another num_experts_per_tok, rope_theta" in caplog.text
    assert (tmp_path / "out" / "config.json").read_bytes() == (original / "config.json").read_bytes()


def test_what_was_rounded_before_is_said(pair, tmp_path, caplog):
    made = converted(pair[1], tmp_path / "half", lambda w: w.astype(mx.float16))
    restore(str(made), str(pair[1]), str(tmp_path / "out"))
    assert "Tensors in F16 are written in the original's BF16" in caplog.text


def test_nothing_is_said_of_an_ordinary_pair(pair, tmp_path):
    done = command(pair[0], "--original", pair[1], "--save-path", tmp_path / "out")
    assert done.stderr == ""
    assert done.stdout == f"Wrote {tmp_path / 'out'}: 36 tensors from the tuned model, 27 from the original\n"


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
