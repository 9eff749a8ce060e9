"""What `inspect` says of a checkpoint's folder: what a load does not look at, looks at twice, or reads otherwise."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model
from support import FIXTURES, TINY
from support.checkpoints import Checkpoint
from support.commands import run
from support.hub import Hub, serving_hub
from support.tuned import pair_in, refusal

from mlx_lm_qwen3vlmoe.inspection.report import inspect, render


@pytest.fixture
def folder(tmp_path) -> Path:
    shutil.copytree(FIXTURES / "official_sharded", tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "golden.safetensors").unlink()
    return tmp_path / "checkpoint"


def notes(folder: Path, on: str | None = None) -> str:
    return "\n".join(inspect(str(folder), on=on)["notes"])


def save(folder: Path, name: str, dtype: str = "F32") -> None:
    header = json.dumps({"x": {"dtype": dtype, "shape": [0], "data_offsets": [0, 0]}}).encode()
    (folder / name).write_bytes(len(header).to_bytes(8, "little") + header)


def test_a_folder_of_one_save_has_no_notes(folder):
    assert notes(folder, on="gpu") == ""
    assert notes(TINY, on="gpu") == ""


def test_a_second_set_of_weights_is_named_with_its_files(folder):
    weights = {}
    for file in folder.glob("model-*.safetensors"):
        weights |= mx.load(str(file))
    mx.save_safetensors(str(folder / "model.safetensors"), {name: 0.5 * each for name, each in weights.items()})
    said = notes(folder)
    assert f" and {len(weights) - 1} others: in more than one file (model-00001-of-00006.safetensors, " in said
    assert "transformers model.safetensors. Remove the files of one save." in said
    assert "\nnote          " in render(inspect(str(folder)))


@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_in_the_folder_is_not_applied(name, folder):
    save(folder, name)
    assert f"{name}: an adapter is in this folder, but loading the model does not apply it." in notes(folder)


@pytest.mark.parametrize("name", ["00000.safetensors", "pytorch_model.safetensors", "consolidated.safetensors"])
def test_files_that_the_host_does_not_look_at_are_named(name, folder):
    save(folder, name)
    assert f"{name}: mlx-lm reads only files that are named model*.safetensors." in notes(folder)


def test_what_a_folder_has_instead_of_weights_is_named(folder):
    """As cosmos-rl saves them."""
    for number, file in enumerate(sorted(folder.glob("model-*.safetensors"))):
        file.rename(folder / f"{number:05}.safetensors")
    done = run(sys.executable, "-m", "mlx_lm_qwen3vlmoe", "inspect", folder, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "expected model*.safetensors, found 00000.safetensors, 00001.safetensors" in done.stderr


def test_a_missing_tensor_and_the_file_that_it_may_be_in_are_told_together(folder):
    (folder / "model-00002-of-00006.safetensors").rename(folder / "00002.safetensors")
    said = render(inspect(str(folder)))
    assert "\nloads         no: " in said
    assert "\nnote          00002.safetensors: mlx-lm reads only files " in said


def test_quanto_is_named(folder):
    (folder / "quanto_qmap.json").write_text("{}")
    assert "quanto_qmap.json: optimum-quanto quantized this checkpoint" in notes(folder)


@pytest.mark.parametrize("dtype", ["F64", "F8_E5M2", "F4", "\x1b[2J"])
def test_a_dtype_that_mlx_does_not_read_is_named_with_its_tensor_and_file(dtype, folder):
    save(folder, "model-00007.safetensors", dtype)
    with pytest.raises(RuntimeError, match="unsupported dtype"):
        load_model(folder)
    error = inspect(str(folder))["error"]
    assert error.startswith("model-00007.safetensors: x: expected a dtype that MLX reads, found ")
    assert error.isprintable()


@pytest.mark.parametrize("dtype", ["I64", "BOOL", "F16"])
def test_a_dtype_that_mlx_reads_is_none_of_a_problem(dtype, folder):
    save(folder, "model-00007.safetensors", dtype)
    assert "dtype" not in inspect(str(folder))["error"]


# --- JANG -----------------------------------------------------------------------------------------------------------


def rotate(folder: Path, value: object = True) -> None:
    (folder / "jang_config.json").write_text(json.dumps({"quantization": {"hadamard_rotation": value}}))


def test_rotated_weights_do_not_load_rightly_and_that_is_said(folder):
    rotate(folder)
    done = run(sys.executable, "-m", "mlx_lm_qwen3vlmoe", "inspect", folder, check=False)
    assert done.returncode == 1
    assert "loads         no: jang_config.json: quantization.hadamard_rotation: expected false" in done.stdout


@pytest.mark.parametrize("text", ['{"quantization": {"hadamard_rotation": false}}', '{"quantization": {}}', "{}", "["])
def test_without_a_rotation_a_checkpoint_by_jang_loads(text, folder):
    (folder / "jang_config.json").write_text(text)
    assert inspect(str(folder))["error"] is None


def test_rotated_weights_are_not_restored(tmp_path):
    made, original = pair_in(tmp_path)
    rotate(made)
    assert "quantization.hadamard_rotation: expected false, found true" in refusal(made, original, tmp_path / "out")


# --- where it lies, and what it is for ------------------------------------------------------------------------------


def test_a_path_that_the_host_takes_for_a_pattern_is_told(tmp_path):
    folder = Checkpoint("official").save(tmp_path / "models[1]")
    with pytest.raises(FileNotFoundError):
        load_model(folder)
    assert "expected a path without [ and ], found one with them" in inspect(str(folder))["error"]


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems have no such names")
def test_a_path_that_mlx_cannot_open_is_told(tmp_path):
    folder = Checkpoint("official").save(tmp_path / os.fsdecode(b"caf\xe9"))
    with pytest.raises(RuntimeError):
        load_model(folder)
    assert "expected a path in UTF-8" in inspect(str(folder))["error"]


CLASS = "Qwen3VLMoeForConditionalGeneration"


@pytest.mark.parametrize("classes", [[CLASS], CLASS, None, [], 5, [[CLASS]], [{}], {"a": 1}, True, [None]])
def test_inspect_says_yes_of_the_architectures_that_the_host_loads(classes, tmp_path):
    checkpoint = Checkpoint("official")
    checkpoint.config["architectures"] = classes
    folder = checkpoint.save(tmp_path / "checkpoint")
    try:
        load_model(folder)
        loads = True
    except TypeError:
        loads = False
    error = inspect(str(folder))["error"]
    assert (error is None) == loads
    assert loads or error.startswith("config.json: architectures: expected a list of names, found ")


def test_a_class_by_which_the_host_loads_another_type_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "mlx_lm.utils.MODEL_ARCHITECTURE_REMAPPING", {("qwen3_vl_moe", CLASS): "another"}, raising=False
    )
    error = inspect(str(TINY))["error"]
    assert "config.json: architectures: expected no class that mlx-lm loads as another" in error


class HubWithMore(Hub):
    """Whose repository has more files."""

    more = (("00000.safetensors", b""), ("jang_config.json", b'{"quantization": {"hadamard_rotation": true}}'))

    def do_GET(self, body: bool = True):  # noqa: N802
        name = self.path.split("?")[0].rpartition("/")[2]
        if name in dict(self.more) and self.model in self.path:
            return self.answer(dict(self.more)[name], body)
        return super().do_GET(body)

    def answer(self, content: bytes, body: bool, count: bool = False) -> None:
        if content.startswith((b"[{", b'{"id"')) and self.path.startswith("/api/models/"):
            listing = json.loads(content)
            files = listing if isinstance(listing, list) else listing["siblings"]
            files += [files[0] | {"path": name, "rfilename": name} for name, _ in self.more]
            content = json.dumps(listing).encode()
        super().answer(content, body, count)


def test_a_repository_is_looked_at_like_a_folder(tmp_path):
    with serving_hub(HubWithMore) as variables:
        command = (sys.executable, "-m", "mlx_lm_qwen3vlmoe", "inspect", "some/model", "--json")
        done = run(*command, check=False, env=variables | {"HF_HOME": str(tmp_path)})
    report = json.loads(done.stdout)
    assert report["error"].startswith("jang_config.json: quantization.hadamard_rotation: expected false")
    assert report["notes"][0].startswith("00000.safetensors: mlx-lm reads only files")
