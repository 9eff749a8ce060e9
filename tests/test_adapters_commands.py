"""Real commands with an adapter that real PEFT trained on the tiny model, and the command that converts it."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import openai
import pytest
from support import BIN, HOST, TINY
from support.adapters import ADAPTERS, tensors
from support.commands import UNCHANGED, answer, assert_same_in_unchanged_host, mlx_lm, run, serving

if HOST < (0, 28, 3):
    pytest.skip("mlx-lm 0.28.2 runs no adapters of experts, of any model", allow_module_level=True)


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> Path:
    """An adapter of attention and experts that real PEFT trained to give an answer, converted by the command."""
    out = tmp_path_factory.mktemp("learned") / "adapters"
    command = (BIN / "mlx-lm-qwen3vlmoe", "adapters", ADAPTERS / "tiny_answer", "--save-path", out)
    assert run(*command).stdout == f"Wrote {out} for mlx_lm: LoRA of 16 modules\n"
    return out


def test_generate_gives_the_answer_that_peft_taught(learned):
    assert answer(TINY, "Say it.") != "A plug-in."
    assert answer(TINY, "Say it.", "--adapter-path", learned) == "A plug-in."


def test_fuse_and_the_unchanged_host_give_it_too(learned, tmp_path):
    mlx_lm("fuse", "--model", TINY, "--adapter-path", learned, "--save-path", tmp_path / "fused")
    assert answer(tmp_path / "fused", "Say it.") == "A plug-in."
    assert_same_in_unchanged_host(tmp_path / "fused", tmp_path)


def test_a_quantized_base_in_either_class_takes_it(learned, tmp_path):
    mlx_lm("convert", "--hf-path", TINY, "--mlx-path", tmp_path / "8bit", "-q", "--q-bits", 8)
    for environment in ({}, UNCHANGED):
        found = answer(tmp_path / "8bit", "Say it.", "--adapter-path", learned, env=environment)
        assert found == "A plug-in."


def test_the_server_gives_it(learned, tmp_path):
    with serving(TINY, tmp_path / "log") as url:
        api = openai.OpenAI(base_url=url, api_key="none", timeout=120, max_retries=0)
        chat = [{"role": "user", "content": "Say it."}]
        reply = api.chat.completions.create(
            model=str(TINY), messages=chat, extra_body={"adapters": str(learned)}, temperature=0
        )
    assert reply.choices[0].message.content == "A plug-in."


def test_training_goes_on_from_it(learned, tmp_path):
    """Its own config is one for `mlx_lm.lora`."""
    for part in ("train", "valid"):
        chat = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "A plug-in."}]
        (tmp_path / f"{part}.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    mlx_lm(
        *("lora", "--train", "--model", TINY, "--data", tmp_path, "--config", learned / "adapter_config.json"),
        *("--resume-adapter-file", learned / "adapters.safetensors", "--adapter-path", tmp_path / "further"),
        *("--iters", 2, "--batch-size", 1, "--val-batches", 1, "--learning-rate", "1e-5"),
    )
    before, after = tensors(learned), mx.load(str(tmp_path / "further" / "adapters.safetensors"))
    assert before.keys() == after.keys()
    assert all(mx.allclose(before[path], after[path], atol=1e-3).item() for path in before)
    assert answer(TINY, "Say it.", "--adapter-path", tmp_path / "further") == "A plug-in."


def test_the_command_says_what_is_wrong_in_a_line_and_has_a_status(tmp_path):
    command = (BIN / "mlx-lm-qwen3vlmoe", "adapters", ADAPTERS / "gate_up_alone", "--save-path", tmp_path / "out")
    done = run(*command, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Name its folder or a reachable repository with --model." in done.stderr
    assert "Traceback" not in done.stderr
