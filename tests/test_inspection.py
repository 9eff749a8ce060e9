"""The plan of ``mlx-lm-qwen3vlmoe inspect`` against real loads, and of checkpoints that only have headers."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm.models.qwen3_moe
import pytest
from support import FIXTURES, QUANTIZED, TINY, thorough
from support.commands import run
from support.hollow import AWQ, BIG, FP8, awq, bf16, fp8, swapped, tensors, write, write_config
from support.hub import Hub, serving_hub

from mlx_lm_qwen3vlmoe import CheckpointError
from mlx_lm_qwen3vlmoe.files import headers
from mlx_lm_qwen3vlmoe.inspection.report import inspect, render

THOROUGH = pytest.mark.thorough
CAN_SHARD = hasattr(mlx_lm.models.qwen3_moe.Model, "shard")


EMPTY = "expected model*.safetensors, found no such file. Is the download complete? If not, download it again."


def inspect_command(*arguments: object, **options):
    return run(sys.executable, "-m", "mlx_lm_qwen3vlmoe", "inspect", *arguments, **options)


def test_the_235b_shape_is_planned_from_headers_alone(tmp_path):
    """128 experts in 94 layers; the numbers are those of the model card: 235B parameters, 4 key-value heads."""
    write_config(tmp_path, BIG)
    stored = write(tmp_path, bf16(tensors(BIG)))
    report = inspect(str(tmp_path), ranks=4, context=32768, on="gpu")
    assert report["error"] is None, report
    assert "bytes are missing" in report["notes"][0]  # as there is no data here
    vision = 1152 * 3 * 2 * 16 * 16 * 2
    assert report["weights_bytes"] == stored - vision
    assert 234e9 < report["weights_bytes"] / 2 < 236e9
    assert report["cache_bytes"] == 94 * 2 * 4 * 128 * 2 * 32768
    assert report["tensors"] == {"kept": 94 * 11 + 3, "dropped": 1, "unknown": []}
    if not CAN_SHARD:
        return
    assert report["tensor"]["allowed"] == [1, 2, 4]
    assert report["pipeline"]["allowed"] == list(range(1, 95))
    # Every rank has the embeddings, the head, the routers and the norms, and a quarter of all else.
    replicated = 2 * (2 * 151936 * 4096 + 4096 + 94 * (128 * 4096 + 2 * 4096 + 2 * 128))
    part = replicated + (report["weights_bytes"] - replicated) // 4
    assert [rank["weights_bytes"] for rank in report["tensor"]["ranks"]] == [part] * 4
    assert [rank["layers"] for rank in report["pipeline"]["ranks"]] == [24, 24, 23, 23]
    assert sum(rank["cache_bytes"] for rank in report["pipeline"]["ranks"]) == report["cache_bytes"]
    # The CPU casts experts to float32 as it uses them, and keeps no copy.
    cpu = inspect(str(tmp_path), on="cpu")
    assert cpu["weights_bytes"] == report["weights_bytes"]
    assert cpu["needs_bytes"] == cpu["weights_bytes"] + cpu["cache_bytes"]
    # 4.5 bits a weight, and 8.5 for the routers.
    assert inspect(str(tmp_path), bits=4)["weights_bytes"] == pytest.approx(235.09e9 * 4.5 / 8, rel=0.002)


@pytest.mark.thorough
def test_a_235b_checkpoint_in_fp8_with_an_expert_a_tensor_is_planned_too(tmp_path):
    write_config(tmp_path, BIG, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    write(tmp_path, fp8(tensors(BIG, per_expert=True)))
    report = inspect(str(tmp_path), on="gpu")
    assert report["error"] is None, report
    assert report["weights_bytes"] == pytest.approx(2 * 235.09e9, rel=0.001)  # bfloat16, as the note says
    assert report["layout"] == "one tensor an expert"
    assert report["quantization"] == "fp8"
    assert any("dequantized" in note for note in report["notes"])


MIDDLE = {  # large enough that what MLX's allocator rounds up does not show
    "hidden_size": 512,
    "moe_intermediate_size": 384,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 2048,
    "dtype": "bfloat16",
}
MEASURE = """
import gc, sys, mlx.core as mx
from pathlib import Path
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
model, _ = load_model(Path(sys.argv[1]))
gc.collect()
weights = mx.get_active_memory()
mx.eval(model(mx.zeros((1, 1), mx.int32)))
gc.collect()
kept = mx.get_active_memory() - weights
cache = make_prompt_cache(model)
mx.eval(model(mx.zeros((1, int(sys.argv[2])), mx.int32), cache=cache))
gc.collect()
print(weights, kept, mx.get_active_memory() - weights - kept)
"""


@pytest.mark.parametrize(
    ("form", "per_expert", "others", "layout", "quantization"),
    [
        pytest.param(bf16, False, {}, "fused experts, [experts, in, out]", "none", id="official"),
        pytest.param(
            swapped, False, {}, "fused experts, [experts, out, in]", "none", id="transformers-5", marks=THOROUGH
        ),
        pytest.param(bf16, True, {}, "one tensor an expert", "none", id="per-expert", marks=THOROUGH),
        pytest.param(fp8, False, FP8, "fused experts, [experts, in, out]", "fp8", id="fp8", marks=THOROUGH),
        pytest.param(fp8, True, FP8, "one tensor an expert", "fp8", id="fp8-per-expert", marks=THOROUGH),
        pytest.param(awq, True, AWQ, "one tensor an expert", "awq gemm", id="awq"),
    ],
)
def test_the_plan_is_what_a_real_load_takes(tmp_path, form, per_expert, others, layout, quantization):
    """Weights, and the cache after a prompt, within 2 % of the memory that MLX has in use; a call keeps nothing."""
    write_config(tmp_path, MIDDLE, **others)
    write(tmp_path, form(tensors(MIDDLE, per_expert)), data=True)
    report = json.loads(inspect_command(tmp_path, "--context", 256, "--json").stdout)
    weights, kept, cache = map(int, run(sys.executable, "-c", MEASURE, tmp_path, 256).stdout.split())
    assert report["weights_bytes"] == pytest.approx(weights, rel=0.02)
    assert report["cache_bytes"] == pytest.approx(cache, rel=0.02)
    assert kept < 2e6
    assert report["layout"].startswith(layout)
    assert report["quantization"] == quantization


@pytest.mark.parametrize("bits", [4, *thorough(3, 8)])
def test_the_plan_for_bits_is_what_convert_makes(tmp_path, bits):
    source = tmp_path / "source"
    source.mkdir()
    for file in TINY.iterdir():
        if file.suffix != ".safetensors":
            (source / file.name).write_bytes(file.read_bytes())
    write_config(source, MIDDLE)
    write(source, bf16(tensors(MIDDLE)), data=True)
    convert = "from mlx_lm import convert; import sys; convert(sys.argv[1], sys.argv[2], True, q_bits=int(sys.argv[3]))"
    run(sys.executable, "-c", convert, source, tmp_path / "target", bits)
    weights, *_ = map(int, run(sys.executable, "-c", MEASURE, tmp_path / "target", 10).stdout.split())
    assert inspect(str(source), bits=bits)["weights_bytes"] == pytest.approx(weights, rel=0.02)
    assert inspect(str(tmp_path / "target"))["quantization"] == f"MLX affine {bits} bits, groups of 64"


@pytest.mark.parametrize(
    "folder",
    [path.parent for home in (FIXTURES, QUANTIZED) for path in home.glob("*/golden.safetensors")],
    ids=lambda folder: folder.name,
)
def test_every_tensor_of_every_fixture_is_accounted_for(folder):
    report = inspect(str(folder))
    names = sum(len(mx.load(str(file))) for file in folder.glob("model*.safetensors"))
    assert report["error"] is None, report
    assert report["tensors"]["unknown"] == []
    assert report["tensors"]["kept"] + report["tensors"]["dropped"] == names
    assert report["layout"] != "no experts"
    described = folder.name.endswith("4bit") or (folder.parent == QUANTIZED and folder.name != "fp8-cast")
    assert (report["quantization"] != "none") == described
    assert re.match(r"needs [\d.]+ MB; this machine has [\d.]+ GB\n\n", render(report))


@pytest.mark.skipif(not CAN_SHARD, reason="needs mlx-lm 0.32.0")
def test_what_cannot_be_spread_is_said_with_the_numbers_that_can():
    report = inspect(str(TINY), ranks=3)
    assert "num_key_value_heads (2)" in report["tensor"]["error"]
    assert "expected 1 or 2 ranks" in report["tensor"]["error"]
    assert [rank["layers"] for rank in report["pipeline"]["ranks"]] == [2, 1, 1]
    assert "no more than num_hidden_layers (4)" in inspect(str(TINY), ranks=5)["pipeline"]["error"]


def test_a_checkpoint_that_does_not_load_is_described_with_the_error_of_a_load(tmp_path):
    write_config(tmp_path, MIDDLE)
    entries = bf16(tensors(MIDDLE))
    del entries["model.language_model.layers.2.mlp.experts.down_proj"]
    write(tmp_path, entries | {"audio.weight": ("F16", 2, (4,))})
    done = inspect_command(tmp_path, check=False)
    assert done.returncode == 1
    assert "audio.weight" in done.stdout
    assert "loads         no: audio.weight: expected a tensor of a Qwen3-VL-MoE model" in done.stdout


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ({}, "expected model*.safetensors, found no such file"),
        ({"model.safetensors": b"\x00" * 4}, "expected the header of a safetensors file"),
        ({"model.safetensors": b"\xff" * 400}, "expected the header of a safetensors file"),
        ({"model.safetensors": b"\x02" + bytes(7) + b"[]"}, "expected the header of a safetensors file"),
        ({"model.safetensors": b"\x02" + bytes(7) + b"{}"}, "expected config.json"),
        (
            {"model.safetensors": b"\x02" + bytes(7) + b"{}", "config.json": b"[1]"},
            "expected qwen3_vl_moe or qwen3_vl_moe_text, found [1]",
        ),
        ({"model.safetensors": b"\x02" + bytes(7) + b"{}", "config.json": b'{"model_type": "lama"}'}, 'found "lama"'),
    ],
)
def test_what_is_no_checkpoint_is_one_line(tmp_path, files, error):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(error)) as caught:
        inspect(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.fixture
def hub():
    with serving_hub(Hub) as variables:
        yield variables


def test_a_repository_is_planned_without_its_tensors_being_fetched(tmp_path, hub):
    """Against a server that speaks the hub's protocol; `huggingface_hub` asks for 100 kB of each file."""
    Hub.served = 0
    report = json.loads(inspect_command("some/model", "--json", env=hub | {"HF_HOME": str(tmp_path)}).stdout)
    assert report | {"checkpoint": str(TINY)} == inspect(str(TINY))
    assert 0 < Hub.served <= 110_000


@pytest.mark.parametrize("offline", [{"HF_HUB_OFFLINE": "1"}, *thorough({"HF_ENDPOINT": "http://127.0.0.1:9"})])
def test_a_repository_in_the_hubs_cache_is_planned_without_the_hub(tmp_path, hub, offline):
    """Downloaded as mlx-lm does it, with the hub's offline switch set, or without a network."""
    download = (
        "from huggingface_hub import snapshot_download\n"
        "snapshot_download('some/model', allow_patterns=['*.json', 'model*.safetensors', '*.jinja'])"
    )
    hub |= {"HF_HOME": str(tmp_path)}
    run(sys.executable, "-c", download, env=hub)
    done = inspect_command("some/model", "--json", env=hub | offline)
    assert json.loads(done.stdout) | {"checkpoint": str(TINY)} == inspect(str(TINY))
    # Of one that is there in part, nothing is guessed.
    next(tmp_path.glob("hub/*/snapshots/*/model.safetensors")).unlink()
    done = inspect_command("some/model", check=False, env=hub | offline)
    assert done.stderr.startswith("some/model: no such folder; the hub's cache on this machine does not have all of it")


def test_a_repository_that_the_hub_does_not_have_is_one_line(tmp_path, hub):
    done = inspect_command("no/model", check=False, env=hub | {"HF_HOME": str(tmp_path)})
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "no/model: no such folder; the hub has no such repository, or shows it only after a login (hf auth login)."
    )


def test_a_repository_that_cannot_be_reached_is_one_line(tmp_path):
    done = inspect_command("some/model", check=False, env={"HF_HOME": str(tmp_path)})
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("some/model: no such folder; the hub's cache on this machine does not have all of it, and ")


@pytest.mark.parametrize(
    "path", ["./nothing", "/no/thing", "~/nothing", "~nobody-of-this-name/nothing", "a/b/c", "nothing/", "."]
)
def test_a_path_that_is_no_folder_never_gets_to_the_hub(path, tmp_path, monkeypatch):
    """Nor does a folder without a checkpoint."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(headers, "_hub_headers", None)
    expected = "no such folder. If you mean a repository on the hub, its name has the form owner/model."
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: {expected if path != '.' else EMPTY}")):
        inspect(path)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "model.gguf").touch()
    done = inspect_command("model.gguf", check=False, cwd=tmp_path)
    assert done.stderr == "model.gguf: expected a folder, found a file. Name the folder that it is in.\n"


# --- the lines that are read first ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("info", "weights", "line"),
    [
        ({"memory_size": 24 * 2**30}, 17.1e9, "needs 17.5 GB; this machine has 25.8 GB"),
        ({"total_memory": 16 * 10**9}, 17.1e9, "needs 17.5 GB; this machine has 16 GB, which is not enough"),
        (
            {"memory_size": 24 * 2**30, "max_recommended_working_set_size": 16 * 2**30},
            17.1e9,
            (
                "needs 17.5 GB; this machine has 25.8 GB, but its GPU can use 17.2 GB: mlx-lm's README says how to "
                "raise that (Large Models)"
            ),
        ),
        (
            {"memory_size": 24 * 2**30, "max_recommended_working_set_size": 16 * 2**30},
            5e7,
            "needs 0.453 GB; this machine has 25.8 GB",
        ),
    ],
)
def test_what_a_checkpoint_needs_and_what_there_is_are_one_line(monkeypatch, info, weights, line):
    """On a Mac, on a GPU with memory of its own, and where macOS gives the GPU less than all."""
    monkeypatch.setattr(mx, "device_info", lambda: info)
    report = inspect(str(TINY), on="gpu") | {"weights_bytes": int(weights)}
    report["needs_bytes"] = report["weights_bytes"] + 403_000_000
    first, second = render(report).splitlines()[:2]
    assert first == line
    assert second == ""


def test_on_a_cpu_the_machine_has_its_main_memory():
    if mx.default_device() == mx.cpu:
        sizes = dict(re.findall(r"(\w+): +(\d+) kB", Path("/proc/meminfo").read_text()))
        assert 0 < inspect(str(TINY))["machine_bytes"] <= int(sizes["MemTotal"]) * 1024


def test_sizes_are_in_mb_below_a_tenth_of_a_gb():
    report = inspect(str(TINY), on="gpu")
    assert "\nweights       2.67 MB\n" in render(report)
    assert "\nweights       17.2 GB\n" in render(report | {"weights_bytes": 17_180_000_000})
    assert "\nweights       0.1 GB\n" in render(report | {"weights_bytes": 100_000_000})
    assert "\nweights       99.9 MB\n" in render(report | {"weights_bytes": 99_900_000})
    assert "\nweights       1234 GB\n" in render(report | {"weights_bytes": 1_234_000_000_000})
    assert "\nweights       1000 GB\n" in render(report | {"weights_bytes": 999_600_000_000})


def test_ranks_are_told_only_when_asked_for():
    report = inspect(str(TINY))
    assert not {"ranks", "tensor", "pipeline"} & report.keys()
    assert "rank" not in render(report)
    if CAN_SHARD:
        assert "\npipeline      on 1 rank (possible: 1 to 4)" in render(inspect(str(TINY), ranks=1))


@pytest.mark.parametrize("model_type", ["qwen3_vl", *thorough("llama", "mistral")])
def test_a_model_of_the_hosts_own_is_told_in_one_line(tmp_path, model_type):
    if model_type == "qwen3_vl" and not (Path(mlx_lm.models.qwen3_moe.__file__).parent / "qwen3_vl.py").exists():
        pytest.skip("this mlx-lm has no such type")
    write_config(tmp_path, BIG, model_type=model_type)
    write(tmp_path, {})
    done = inspect_command(tmp_path, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"{tmp_path}: mlx-lm has its own model for {model_type}. Load it with mlx_lm: this command is not needed.\n"
    )


def test_what_converting_takes_is_said_where_it_was_measured():
    report = inspect(str(FIXTURES / "official"), bits=4)
    assert report["convert_bytes"] > report["weights_bytes"]
    assert re.search(r"^convert -q +[\d.]+ [MG]B at most$", render(report), re.MULTILINE)
    report = inspect(str(QUANTIZED / "awq-g64"), bits=4)
    assert report["convert_bytes"] is None
    assert re.search(r"^convert -q +unknown: ", render(report), re.MULTILINE)
    assert "\nconvert -q" not in render(inspect(str(FIXTURES / "official")))
