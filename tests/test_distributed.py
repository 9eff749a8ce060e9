"""Several ranks, as `mlx.launch` starts them: real processes on this machine, joined by the ring backend.

A start takes seconds, so one pair (or three) of ranks goes through many checkpoints, and the tests read its report.
"""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import mlx.core as mx
import openai
import pytest
from mlx_lm.models import qwen3_moe
from mlx_lm.utils import load_config, load_model, quantize_model, save_config, save_model
from support import FIXTURES, LIMIT, OURS, QUANTIZED, ROOT, TINY, thorough
from support.commands import run
from support.ranks import answers, free_port, indexed, launched

from mlx_lm_qwen3vlmoe import Model, ModelArgs

if not hasattr(qwen3_moe.Model, "shard"):
    pytest.skip("this mlx-lm cannot spread qwen3_moe over ranks: 0.32.0 and newer can", allow_module_level=True)

BIN = Path(sys.executable).parent
WORKERS = ROOT / "tests" / "distributed"
TOLERANCE = 1e-4  # of the largest logit, in float32, as in one process
FLOAT = sorted(path.parent.name for path in FIXTURES.glob("*/golden.safetensors"))
NOT_IN_TWO = {"mlx_lm_4bit", "mlx_vlm_4bit"}  # half an expert's width of 96 is one group of 32 and a half


def layers_and_heads(path: Path) -> tuple[int, int]:
    text = load_config(path)
    text = text.get("text_config", text)
    return text["num_hidden_layers"], text["num_key_value_heads"]


FOREIGN = sorted(path.parent.name for path in QUANTIZED.glob("*/golden.safetensors"))
# Packed in an odd number of groups: 160 inputs are five of 32, an expert's 96 are three.
RAGGED = {"autoround-export-gptq-ragged", "autoround-ragged-asym", "gptq-w4-g128-uneven", "gptqmodel-gguf-q4"}
FOREIGN_TENSOR = [name for name in FOREIGN if layers_and_heads(QUANTIZED / name)[1] > 1 and name not in RAGGED]
FOREIGN_PIPELINE = [name for name in FOREIGN if layers_and_heads(QUANTIZED / name)[0] > 1]
CASES = [
    *(f"tensor {name}" for name in FLOAT if name not in NOT_IN_TWO),
    *(f"pipeline {name}" for name in FLOAT),
    *(f"tensor {name}" for name in FOREIGN_TENSOR),
    *(f"pipeline {name}" for name in FOREIGN_PIPELINE),
]
# What `make test` runs: each kind of module that ranks cut, and each of what decides it.
KINDS = {"official", "yarn", "mlx_lm_4bit", "awq-g64", "modelopt-nvfp4"}
# In 16 bits, with experts that this machine's CPU takes in float32, and with scales in float32.
STORED = [
    *(f"tensor {name}" for name in ("tiny", "awq-g64", "fp8-fused-v5-bf16")),
    *(f"pipeline {name}" for name in ("tiny", "converted", "awq-g32-bf16", "ct-mixed", "fp8-fused-v5-bf16")),
]
# Sizes that two or three ranks cannot share, and what the error is to say.
REFUSALS = {
    "2 tensor one key-value head": ({"num_key_value_heads": 1}, "num_key_value_heads (1)", "1"),
    "2 tensor odd experts": ({"moe_intermediate_size": 27}, "moe_intermediate_size (27)", "1"),
    "2 tensor odd dense layer": ({"intermediate_size": 55}, "divide intermediate_size (55)", "1"),
    "2 tensor half a group": ("mlx_lm_4bit", "moe_intermediate_size in groups of 32 (3)", "1"),
    "3 tensor two key-value heads": ({}, "num_key_value_heads (2)", "1 or 2"),
    "3 tensor attention heads": (
        {"num_key_value_heads": 4, "moe_intermediate_size": 24, "intermediate_size": 48},
        "num_attention_heads (4)",
        "1, 2 or 4",
    ),
    "3 pipeline two layers": ("official_b", "num_hidden_layers (2)", "1 or 2"),
}


def made(folder: Path, sizes: dict[str, int]) -> Path:
    """A checkpoint of random numbers, of the sizes of a fixture but some."""
    config = load_config(FIXTURES / "official")
    config["text_config"].update(sizes)
    model = Model(ModelArgs.from_dict(config))
    folder.mkdir(parents=True)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    return folder


def job(mode: str, path: Path, golden: Path | None = None, dtype: str | None = "float32") -> dict:
    return {"mode": mode, "path": str(path), "golden": golden and str(golden / "golden.safetensors"), "dtype": dtype}


def reports(folder: Path, ranks: int, jobs: dict[str, dict]) -> list[dict]:
    """What every rank reports of all jobs."""
    folder.mkdir(exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    with launched(folder, ranks, sys.executable, WORKERS / "logits.py", folder / "jobs.json", folder) as launch:
        launch.ends()
        assert "Traceback" not in launch.stderr, launch.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def refusal_jobs(ranks: int, work: Path) -> dict[str, dict]:
    jobs = {}
    for name, (what, *_) in REFUSALS.items():
        if name.startswith(str(ranks)):
            folder = work / name.replace(" ", "-")
            source = FIXTURES / what if isinstance(what, str) else made(folder / "made", what)
            jobs[name] = job(name.split()[1], indexed(source, folder / "indexed"))
    return jobs


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def tiny(work) -> Path:
    """The tiny model with an index, as larger checkpoints have one."""
    return indexed(TINY, work / "tiny")


@pytest.fixture(scope="module")
def converted(work) -> Path:
    """What `mlx_lm.convert -q` makes of the tiny model."""
    path = work / "converted"
    run(BIN / "mlx_lm.convert", "--hf-path", TINY, "--mlx-path", path, "-q", "--q-group-size", 32)
    return path


@pytest.fixture(scope="module")
def two(request, work, converted) -> list[dict]:
    """The reports of two ranks."""
    jobs = {}
    selected = {item.callspec.params.get("case") for item in request.session.items if hasattr(item, "callspec")}
    for case in selected.intersection(CASES):
        mode, name = case.split()
        source = (FIXTURES if name in FLOAT else QUANTIZED) / name
        jobs[case] = job(mode, indexed(source, work / name, in_float32=True), source)
    for mode in ("tensor", "pipeline"):
        jobs[f"{mode} converted"] = job(mode, converted)
    own_files(work)
    jobs["own files"] = job("pipeline", work / "own-{rank}", FIXTURES / "official_sharded")
    return reports(work / "two", 2, jobs | refusal_jobs(2, work))


@pytest.fixture(scope="module")
def as_stored(work, tiny, converted) -> list[dict]:
    """The reports of two ranks that compute in the dtypes of the checkpoint, as every command does."""
    jobs = {}
    for case in STORED:
        mode, name = case.split()
        path = {"tiny": tiny, "converted": converted}.get(name) or indexed(QUANTIZED / name, work / name)
        jobs[case] = job(mode, path, dtype=None)
    return reports(work / "stored", 2, jobs)


@pytest.fixture(scope="module")
def three(work, tiny) -> list[dict]:
    """The reports of three ranks."""
    official = FIXTURES / "official"
    jobs = {"uneven": job("pipeline", tiny), "even": job("pipeline", indexed(official, work / "official"), official)}
    return reports(work / "three", 3, jobs | refusal_jobs(3, work))


def own_files(work: Path) -> None:
    """For each of two ranks a folder with the index of all files and only the files of its own layers."""
    source = FIXTURES / "official_sharded"
    weight_map = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    for rank, own in ((0, {1, 2}), (1, {0})):  # of three layers; the last ones are those of rank 0
        layers = {tensor: re.search(r"\.layers\.(\d+)\.", tensor) for tensor in weight_map if ".visual." not in tensor}
        files = {weight_map[tensor] for tensor, match in layers.items() if match is None or int(match[1]) in own}
        assert files < set(weight_map.values())
        folder = indexed(source, work / f"own-{rank}")
        for file in folder.glob("*.safetensors"):
            if file.name not in files:
                file.unlink()


def assert_equal(ranks: list[dict], name: str) -> None:
    for report in ranks:
        assert report[name]["class"] == OURS
        assert report[name]["at once"] < TOLERANCE
        assert report[name]["token by token"] < TOLERANCE


@pytest.mark.parametrize(
    "case", [each for case in CASES for each in ([case] if case.split()[1] in KINDS else thorough(case))]
)
def test_logits_over_two_ranks_equal_torchs(two, case):
    """On both ranks, at once and token by token through the cache."""
    assert_equal(two, case)


@pytest.mark.parametrize("mode", ["tensor", "pipeline"])
def test_a_converted_checkpoint_over_two_ranks_gives_the_logits_of_one_process(two, mode):
    assert_equal(two, f"{mode} converted")


@pytest.mark.thorough
@pytest.mark.parametrize("case", STORED)
def test_logits_in_the_dtypes_of_the_checkpoint_are_those_of_one_process(as_stored, case):
    """But for the rounding of sums in 16 bits: what a stage of a pipeline sends has the dtype that the next expects."""
    for report in as_stored:
        assert report[case]["at once"] < 0.03
        assert report[case]["token by token"] < 0.03


def test_a_model_that_is_let_go_frees_its_memory(tiny):
    """At once, without a run of the garbage collector: a server may load another model in its place."""
    before = mx.get_active_memory()
    gc.disable()
    try:
        model, _ = load_model(tiny)
        assert mx.get_active_memory() - before > 1_000_000
        del model
        assert mx.get_active_memory() - before < 1_000_000
    finally:
        gc.enable()


def test_a_stage_of_a_pipeline_needs_only_the_files_of_its_own_layers(two):
    """As when each machine downloads its part from the hub."""
    assert_equal(two, "own files")


@pytest.mark.thorough
def test_four_layers_over_three_ranks_give_the_logits_of_one_process(three):
    assert [report["uneven"]["layers"] for report in three] == [2, 1, 1]
    assert_equal(three, "uneven")


@pytest.mark.thorough
def test_one_layer_a_rank_gives_torchs_logits(three):
    assert [report["even"]["layers"] for report in three] == [1, 1, 1]
    assert_equal(three, "even")


@pytest.mark.parametrize("name", [each for n in REFUSALS for each in ([n] if n[0] == "2" else thorough(n))])
def test_ranks_that_cannot_share_a_model_are_told_how_many_can(request, name):
    """By one error on every rank, before anything has been evaluated."""
    _, field, numbers = REFUSALS[name]
    ranks = int(name[0])
    for report in request.getfixturevalue({2: "two", 3: "three"}[ranks]):
        assert "refusal" in report[name], report[name]
        message = report[name]["refusal"]
        assert field in message
        assert f"expected {numbers} {'rank' if numbers == '1' else 'ranks'}, " in message
        assert f"found {ranks} ranks" in message
        assert report[name]["evaluated"] < 50_000


@pytest.mark.thorough
def test_a_refused_launch_ends_with_one_error_a_rank(work, tiny):
    """The command, as a user types it."""
    with launched(work / "refused", 3, BIN / "mlx_lm.chat", "--model", tiny, text="Hello\n") as launch:
        stderr = launch.ends()
        assert "CheckpointError" in stderr
        assert "expected 1 or 2 ranks" in stderr
        assert len(re.findall(r"Node with rank \d (?:exited with code [1-9-]|was killed)", stderr)) == 3
        assert launch.leaves_nothing()


@pytest.mark.parametrize("mode", ["tensor", *thorough("pipeline")])
def test_chat_answers_word_for_word(work, tiny, tiny_questions, mode):
    pair = tiny_questions[0]
    command = [BIN / "mlx_lm.chat", "--model", tiny, *(["--pipeline"] if mode == "pipeline" else [])]
    with launched(work / f"chat-{mode}", 2, *command, text=f"{pair['question']}\n") as launch:
        launch.reaches("an answer", lambda: pair["answer"] in launch.stdout)
        time.sleep(0.5)  # as a person would: the host computes one token more than it shows, on all ranks
        launch.types("q\n")
        assert "Traceback" not in launch.ends()
        lines = launch.stdout.splitlines()
        assert [line.removeprefix(">> ") for line in lines].count(pair["answer"]) == 1  # rank 0 alone speaks
        assert launch.leaves_nothing()


@pytest.mark.thorough
@pytest.mark.parametrize("mode", ["tensor", "pipeline"])
def test_benchmark_runs(work, tiny, mode):
    """In a pipeline, the host itself may lose a rank in the last trial: the other is done, and gone, before it."""
    command = [BIN / "mlx_lm.benchmark", "--model", tiny, "-p", 32, "-g", 8, "-n", 3]
    with launched(work / f"benchmark-{mode}", 2, *command, *(["--pipeline"] if mode == "pipeline" else [])) as launch:
        stderr = launch.ends()
        assert re.search(r"Trial 2: +prompt_tps=[\d.]+, generation_tps=[\d.]+", launch.stdout)
        if mode == "tensor":
            assert "Traceback" not in stderr
            assert "Averages: prompt_tps=" in launch.stdout


@pytest.mark.parametrize("mode", ["tensor", *thorough("pipeline")])
def test_the_server_streams_the_trained_answers(work, tiny, tiny_questions, mode):
    """Two requests, as the ranks must agree on the second as well."""
    port = free_port(1)
    command = [BIN / "mlx_lm.server", "--model", tiny, "--port", port, *(["--pipeline"] if mode == "pipeline" else [])]
    with launched(work / f"server-{mode}", 2, *command) as launch:
        launch.reaches("a server", lambda: answers(port))
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=LIMIT)
        for pair in tiny_questions[:2]:
            chat = [{"role": "user", "content": pair["question"]}]
            stream = client.chat.completions.create(model=str(tiny), messages=chat, stream=True, temperature=0)
            chunks = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
            assert "".join(chunks).removesuffix("<|im_end|>") == pair["answer"]
            assert len(chunks) > 5


@pytest.mark.parametrize(("mode", "victim"), [("tensor", 1), pytest.param("pipeline", 0, marks=pytest.mark.thorough)])
def test_when_one_rank_is_killed_the_others_and_the_launcher_end(work, tiny, mode, victim):
    """In the middle of an answer. Nothing hangs, and nothing is left over."""
    with launched(work / f"killed-{mode}", 2, sys.executable, WORKERS / "endless.py", tiny, mode) as launch:
        for rank in range(2):
            launch.reaches("an answer", lambda said=f"rank {rank} generates": said in launch.stdout)
        (pid,) = re.findall(rf"rank {victim} is process (\d+)", launch.stdout)
        os.kill(int(pid), signal.SIGKILL)
        stderr = launch.ends()
        assert re.search(rf"Node with rank {victim} exited with code -9", stderr)
        assert re.search(rf"Node with rank {1 - victim} (?:exited with code -?[1-9]|was killed)", stderr)
        assert launch.leaves_nothing()


@pytest.fixture(scope="module")
def memory(work) -> list[dict]:
    """What two ranks report of a checkpoint with the layers of the 30B model, four of them with four experts each."""
    folder, packed = work / "large", work / "large-4bit"
    folder.mkdir()
    h, i, e, heads, kv, d, vocab, layers = 2048, 768, 4, 32, 4, 128, 4096, 4
    config = load_config(TINY)
    text = config["text_config"]
    text.update(hidden_size=h, num_attention_heads=heads, num_key_value_heads=kv, head_dim=d, num_hidden_layers=layers)
    text.update(num_experts=e, num_experts_per_tok=2, moe_intermediate_size=i, vocab_size=vocab, dtype="float32")
    save_config(config | {"tie_word_embeddings": False}, folder / "config.json")
    shapes = {f"self_attn.{name}_proj.weight": (width * d, h) for name, width in (("q", heads), ("k", kv), ("v", kv))}
    shapes |= {"self_attn.o_proj.weight": (h, heads * d), "mlp.gate.weight": (e, h)}
    shapes |= {"mlp.experts.gate_up_proj": (e, h, 2 * i), "mlp.experts.down_proj": (e, i, h)}
    shapes |= {f"self_attn.{name}_norm.weight": (d,) for name in "qk"}
    shapes |= {f"{name}_layernorm.weight": (h,) for name in ("input", "post_attention")}
    outer = {"model.language_model.embed_tokens.weight": (vocab, h), "lm_head.weight": (vocab, h)}
    files = [outer | {"model.language_model.norm.weight": (h,)}]
    files += [{f"model.language_model.layers.{n}.{name}": s for name, s in shapes.items()} for n in range(layers)]
    for n, tensors in enumerate(files):
        path = folder / f"model-{n + 1:05}-of-{len(files):05}.safetensors"
        mx.save_safetensors(str(path), {name: mx.ones(shape) for name, shape in tensors.items()})
    model, config = load_model(folder, lazy=True)
    model, config = quantize_model(model, config, 64, 4)
    packed.mkdir()
    save_model(packed, model, donate_model=True)
    save_config(config, packed / "config.json")
    del model
    paths = [indexed(path, work / f"{path.name}-indexed") for path in (folder, packed)]
    mx.clear_cache()
    with launched(work / "memory", 2, sys.executable, WORKERS / "memory.py", work / "memory", *paths) as launch:
        assert "Traceback" not in launch.ends(), launch.stderr
    return [json.loads((work / "memory" / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.thorough
@pytest.mark.parametrize(
    "case", [f"{name} {mode}" for name in ("large", "large-4bit") for mode in ("tensor", "pipeline")]
)
def test_a_rank_holds_its_share_and_no_more(memory, case):
    """Within 2 %: the parts that it computes with, and what all ranks have (embeddings, head, norms, routers)."""
    for report in memory:
        figures = report[case.replace(" ", "-indexed ")]
        print(case, {name: round(figures[name] / figures["total"], 3) for name in figures})
        assert figures["active"] == pytest.approx(figures["own"], rel=0.02)
        assert figures["own"] < 0.6 * figures["total"]
        assert figures["peak"] < 1.05 * (figures["own"] + figures["layer"])  # while it loads: a whole layer beside it
