"""The plan of ``mlx-lm-qwen3vlmoe inspect`` against real loads, and of checkpoints that only have headers."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import mlx.core as mx
import mlx_lm.models.qwen3_moe
import pytest
from conftest import FIXTURES, QUANTIZED, TINY, run

from mlx_lm_qwen3vlmoe import CheckpointError
from mlx_lm_qwen3vlmoe.inspection import inspect, render

CAN_SHARD = hasattr(mlx_lm.models.qwen3_moe.Model, "shard")
BIG = {  # Qwen3-VL-235B-A22B
    "hidden_size": 4096,
    "moe_intermediate_size": 1536,
    "intermediate_size": 12288,
    "num_hidden_layers": 94,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "dtype": "bfloat16",
}


def inspect_command(*arguments: object, **options):
    return run(sys.executable, "-m", "mlx_lm_qwen3vlmoe", "inspect", *arguments, **options)


def tensors(sizes: dict, per_expert: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint: the official layout, or one tensor an expert."""
    h, i, e, d = (sizes[name] for name in ("hidden_size", "moe_intermediate_size", "num_experts", "head_dim"))
    heads, kv = sizes["num_attention_heads"] * d, sizes["num_key_value_heads"] * d
    shapes = {"lm_head.weight": (sizes["vocab_size"], h), "model.visual.patch_embed.proj.weight": (1152, 3, 2, 16, 16)}
    shapes |= {"model.language_model.embed_tokens.weight": shapes["lm_head.weight"]}
    shapes |= {"model.language_model.norm.weight": (h,)}
    for n in range(sizes["num_hidden_layers"]):
        layer = f"model.language_model.layers.{n}"
        shapes |= {f"{layer}.{name}_layernorm.weight": (h,) for name in ("input", "post_attention")}
        shapes |= {f"{layer}.self_attn.{name}_norm.weight": (d,) for name in "qk"}
        for name, shape in {"q": (heads, h), "k": (kv, h), "v": (kv, h), "o": (h, heads)}.items():
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = shape
        shapes[f"{layer}.mlp.gate.weight"] = e, h
        if per_expert:
            for expert in range(e):
                experts = f"{layer}.mlp.experts.{expert}"
                shapes |= {f"{experts}.{name}_proj.weight": (i, h) for name in ("gate", "up")}
                shapes[f"{experts}.down_proj.weight"] = h, i
        else:
            shapes[f"{layer}.mlp.experts.gate_up_proj"] = e, h, 2 * i
            shapes[f"{layer}.mlp.experts.down_proj"] = e, i, h
    return shapes


def write_config(folder: Path, sizes: dict, **others) -> None:
    config = json.loads((TINY / "config.json").read_text()) | others
    config["text_config"] |= sizes
    (folder / "config.json").write_text(json.dumps(config))


def bf16(shapes: dict) -> dict:
    """A checkpoint as it is released; entries have a dtype, its size, and a shape."""
    return {name: ("BF16", 2, shape) for name, shape in shapes.items()}


def swapped(shapes: dict) -> dict:
    """With the axes of the experts swapped, as transformers 5 saves them."""
    return bf16({name: (s[0], s[2], s[1]) if ".experts." in name else s for name, s in shapes.items()})


def fp8(shapes: dict) -> dict:
    """Every linear layer in blocks of e4m3."""
    entries = bf16(shapes)
    for name, shape in shapes.items():
        if "_proj" in name and ".layers." in name:
            blocks = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
            entries |= {name: ("F8_E4M3", 1, shape), f"{name}_scale_inv": ("F32", 4, blocks)}
    return entries


def awq(shapes: dict) -> dict:
    """Every linear layer as AutoAWQ packs it."""
    entries = bf16(shapes)
    for name, shape in shapes.items():
        if "_proj" in name and ".layers." in name:
            (out, inputs), layer = shape, name.removesuffix("weight")
            del entries[name]
            entries[f"{layer}qweight"] = "I32", 4, (inputs, out // 8)
            entries[f"{layer}qzeros"] = "I32", 4, (inputs // 128, out // 8)
            entries[f"{layer}scales"] = "F16", 2, (inputs // 128, out)
    return entries


def write(folder: Path, entries: dict, data: bool = False) -> int:
    """Write a file of a header, with random data or with none; return the size of the data."""
    header, offset = {}, 0
    for name, (dtype, size, shape) in entries.items():
        end = offset + size * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(random.randbytes(offset) if data else b"")
    return offset


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
    # On the CPU, the experts will be cast to float32.
    cpu = inspect(str(tmp_path), on="cpu")
    assert cpu["weights_bytes"] == report["weights_bytes"]
    assert f"{94 * 128 * 3 * 4096 * 1536 * 2 / 1e9:.3f} GB more" in cpu["notes"][1]
    # 4.5 bits a weight, and 8.5 for the routers.
    assert inspect(str(tmp_path), bits=4)["weights_bytes"] == pytest.approx(235.09e9 * 4.5 / 8, rel=0.002)


def test_a_235b_checkpoint_in_fp8_with_an_expert_a_tensor_takes_seconds(tmp_path):
    write_config(tmp_path, BIG, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    write(tmp_path, fp8(tensors(BIG, per_expert=True)))
    start = time.perf_counter()
    report = inspect(str(tmp_path), on="gpu")
    assert report["error"] is None, report
    assert report["weights_bytes"] == pytest.approx(2 * 235.09e9, rel=0.001)  # bfloat16, as the note says
    assert report["layout"] == "one tensor an expert"
    assert report["quantization"] == "fp8"
    assert any("dequantized" in note for note in report["notes"])
    assert time.perf_counter() - start < 60


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
used = mx.get_active_memory()
cache = make_prompt_cache(model)
mx.eval(model(mx.zeros((1, int(sys.argv[2])), mx.int32), cache=cache))
gc.collect()
print(weights, used - weights, mx.get_active_memory() - used)
"""


FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
AWQ = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}}


@pytest.mark.parametrize(
    ("form", "per_expert", "others", "layout", "quantization"),
    [
        pytest.param(bf16, False, {}, "fused experts, [experts, in, out]", "none", id="official"),
        pytest.param(swapped, False, {}, "fused experts, [experts, out, in]", "none", id="transformers-5"),
        pytest.param(bf16, True, {}, "one tensor an expert", "none", id="per-expert"),
        pytest.param(fp8, False, FP8, "fused experts, [experts, in, out]", "fp8", id="fp8"),
        pytest.param(fp8, True, FP8, "one tensor an expert", "fp8", id="fp8-per-expert"),
        pytest.param(awq, True, AWQ, "one tensor an expert", "awq gemm", id="awq"),
    ],
)
def test_the_plan_is_what_a_real_load_takes(tmp_path, form, per_expert, others, layout, quantization):
    """Weights, and the cache after a prompt, within 2 % of the memory that MLX has in use."""
    write_config(tmp_path, MIDDLE, **others)
    write(tmp_path, form(tensors(MIDDLE, per_expert)), data=True)
    report = json.loads(inspect_command(tmp_path, "--context", 256, "--json").stdout)
    weights, cast, cache = map(int, run(sys.executable, "-c", MEASURE, tmp_path, 256).stdout.split())
    assert report["weights_bytes"] == pytest.approx(weights, rel=0.02)
    assert report["cache_bytes"] == pytest.approx(cache, rel=0.02)
    told = [re.search(r"float32 when first used: ([\d.]+) GB", note) for note in report["notes"]]
    assert sum(float(match[1]) for match in told if match) == pytest.approx(cast / 1e9, rel=0.02, abs=2e-3)
    assert report["layout"].startswith(layout)
    assert report["quantization"] == quantization


@pytest.mark.parametrize("bits", [3, 4, 8])
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
    assert (report["quantization"] != "none") == (folder.parent == QUANTIZED or folder.name.endswith("4bit"))
    assert "GB" in render(report)


@pytest.mark.skipif(not CAN_SHARD, reason="needs mlx-lm 0.32.0")
def test_what_cannot_be_spread_is_said_with_the_numbers_that_can():
    report = inspect(str(TINY), ranks=3)
    assert "num_key_value_heads (2)" in report["tensor"]["error"]
    assert "1 or 2, found 3" in report["tensor"]["error"]
    assert [rank["layers"] for rank in report["pipeline"]["ranks"]] == [2, 1, 1]
    assert "at most one rank" in inspect(str(TINY), ranks=5)["pipeline"]["error"]


def test_a_checkpoint_that_does_not_load_is_described_with_the_error_of_a_load(tmp_path):
    write_config(tmp_path, MIDDLE)
    entries = bf16(tensors(MIDDLE))
    del entries["model.language_model.layers.2.mlp.experts.down_proj"]
    write(tmp_path, entries | {"audio.weight": ("F16", 2, (4,))})
    done = inspect_command(tmp_path, check=False)
    assert done.returncode == 1
    assert "audio.weight" in done.stdout
    assert "loads         no: CheckpointError: audio.weight: expected a tensor of a Qwen3-VL-MoE model" in done.stdout


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ({}, "expected model*.safetensors, found none"),
        ({"model.safetensors": b"\x00" * 4}, "expected the header of a safetensors file"),
        ({"model.safetensors": b"\xff" * 400}, "expected the header of a safetensors file"),
        ({"model.safetensors": b"\x02" + bytes(7) + b"[]"}, "expected the header of a safetensors file"),
        ({"model.safetensors": b"\x02" + bytes(7) + b"{}"}, "expected config.json"),
        (
            {"model.safetensors": b"\x02" + bytes(7) + b"{}", "config.json": b"[1]"},
            "expected 'qwen3_vl_moe' or 'qwen3_vl_moe_text', found [1]",
        ),
        ({"model.safetensors": b"\x02" + bytes(7) + b"{}", "config.json": b'{"model_type": "llama"}'}, "found 'llama'"),
    ],
)
def test_what_is_no_checkpoint_is_one_line(tmp_path, files, error):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(error)):
        inspect(str(tmp_path))
    done = inspect_command(tmp_path, check=False)
    assert done.returncode == 1
    assert error in done.stderr
    assert len(done.stderr.splitlines()) == 1


class Hub(BaseHTTPRequestHandler):
    """A hub that has the tiny model, and counts the bytes of tensors' files that it is asked for."""

    served = 0

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body: bool = True):
        path = self.path.split("?")[0]
        files = [{"type": "file", "path": f.name, "rfilename": f.name, "size": 1, "oid": "0"} for f in TINY.iterdir()]
        if path.startswith("/api/models/"):
            answer = files if "/tree/" in path else {"id": "some/model", "sha": "0" * 40, "siblings": files}
            return self.answer(json.dumps(answer).encode(), body)
        file = TINY / path.rpartition("/")[2]
        if not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        return self.answer(file.read_bytes(), body, file.suffix == ".safetensors")

    def answer(self, content: bytes, body: bool, count: bool = False) -> None:
        status, size, tag = 200, len(content), hashlib.sha256(content).hexdigest()
        if match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            status, content = 206, content[int(match[1]) : int(match[2]) + 1]
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Range", f"bytes 0-{len(content) - 1}/{size}")
        self.send_header("ETag", f'"{tag}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if body:
            self.wfile.write(content)
            Hub.served += len(content) * count

    def log_message(self, *arguments):
        pass


def test_a_repository_is_planned_without_its_tensors_being_fetched(tmp_path):
    """Against a server that speaks the hub's protocol; `huggingface_hub` asks for 100 kB of each file."""
    server, before = ThreadingHTTPServer(("127.0.0.1", 0), Hub), Hub.served
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        hub = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        report = json.loads(inspect_command("some/model", "--json", env=hub).stdout)
    finally:
        server.shutdown()
    local = inspect(str(TINY))
    assert report | {"checkpoint": str(TINY)} == local
    assert 0 < Hub.served - before <= 110_000


def test_a_repository_that_cannot_be_reached_is_one_line(tmp_path):
    done = inspect_command("some/model", check=False, env={"HF_HOME": str(tmp_path)})
    assert done.returncode == 1
    assert "some/model: expected a folder or a reachable repository" in done.stderr
