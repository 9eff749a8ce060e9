"""Ordinary mlx_lm commands, as a user types them, on the tiny model; what they save then runs in the unchanged host."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import mlx.core as mx
import openai
import pytest
from support import BIN, HOST, HOST_HAS_THE_TYPE, LIMIT, ROOT, TINY, thorough
from support.checkpoints import Checkpoint
from support.commands import (
    UNCHANGED,
    answer,
    assert_same_in_unchanged_host,
    ended,
    logits,
    mlx_lm,
    run,
    serving,
    write_chats,
)


@pytest.fixture(scope="module")
def question(tiny_questions):
    return tiny_questions[0]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def quantized(work) -> dict[int, Path]:
    """The tiny model converted to 4 and to 8 bits."""
    paths = {bits: work / f"{bits}bit" for bits in (4, 8)}
    for bits, path in paths.items():
        mlx_lm("convert", "--hf-path", TINY, "--mlx-path", path, "-q", "--q-bits", bits)
    return paths


@pytest.fixture(scope="module")
def adapters(work) -> Path:
    """LoRA adapters trained on a made-up answer."""
    write_chats(work / "data", [{"question": "Say it.", "answer": "A plug-in."}])
    path = work / "adapters"
    train(TINY, work / "data", path, iterations=30)
    return path


def train(model: Path, data: Path, adapters: Path, iterations: int) -> None:
    settings = adapters.with_suffix(".json")  # as YAML, which JSON is
    attention = {"keys": ["self_attn.q_proj", "self_attn.v_proj"], "rank": 8, "scale": 20.0, "dropout": 0.0}
    # mlx-lm 0.28.2 cannot train adapters of experts, of any model.
    settings.write_text(json.dumps({"lora_parameters": attention} if HOST < (0, 28, 3) else {}))
    mlx_lm(
        *("lora", "--train", "--model", model, "--data", data, "--adapter-path", adapters, "--batch-size", 1),
        *("--config", settings, "--iters", iterations, "--learning-rate", 3e-4, "--num-layers", 4, "--val-batches", 1),
    )


def test_every_answer_is_word_for_word_what_was_trained(tiny_questions):
    """A wrong axis anywhere turns them to noise."""
    code = (
        "import json, sys; from mlx_lm import load, generate\n"
        "model, tokenizer = load(sys.argv[1])\n"
        "for pair in json.load(open(sys.argv[2])):\n"
        "    chat = [{'role': 'user', 'content': pair['question']}]\n"
        "    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)\n"
        "    print(json.dumps(generate(model, tokenizer, prompt, max_tokens=64)))\n"
    )
    output = run(sys.executable, "-c", code, TINY, ROOT / "examples" / "tiny_questions.json").stdout
    assert list(map(json.loads, output.splitlines())) == [pair["answer"] for pair in tiny_questions]


def test_generate_answers_and_says_nothing_else(question):
    done = run(
        *(BIN / "mlx_lm.generate", "--model", TINY, "--prompt", question["question"], "--temp", 0, "--max-tokens", 64),
    )
    assert question["answer"] in done.stdout
    assert not done.stderr


def test_chat_answers_two_questions_in_a_row(tiny_questions):
    asked = tiny_questions[0], tiny_questions[3]
    piped = "".join(f"{pair['question']}\n" for pair in asked) + "q\n"
    output = mlx_lm("chat", "--model", TINY, "--temp", 0, "--max-tokens", 64, input=piped)
    plain = " ".join(re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output).split())
    for pair in asked:
        assert " ".join(pair["answer"].split()) in plain


def test_server_completes_streams_and_reuses_the_prompt_cache(tiny_questions, tmp_path):
    first, second = tiny_questions[0], tiny_questions[5]
    with serving(TINY, tmp_path / "log") as url:
        client = openai.OpenAI(base_url=url, api_key="none", timeout=LIMIT)
        chat = [{"role": "user", "content": first["question"]}]
        reply = client.chat.completions.create(model=str(TINY), messages=chat)
        assert ended(reply.choices[0].message.content) == first["answer"]
        assert reply.choices[0].finish_reason == "stop"

        # The second request continues the first: its prompt begins with what the server has in its cache.
        chat += [{"role": "assistant", "content": first["answer"]}, {"role": "user", "content": second["question"]}]
        stream = client.chat.completions.create(
            model=str(TINY), messages=chat, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        assert ended("".join(c.choices[0].delta.content or "" for c in chunks if c.choices)) == second["answer"]
        assert len(chunks) > 5
        if HOST >= (0, 32):  # older servers do not report it
            usage = next(chunk.usage for chunk in chunks if chunk.usage)
            assert usage.prompt_tokens_details.cached_tokens > 10

        plain = f"<|im_start|>user\n{first['question']}<|im_end|>\n<|im_start|>assistant\n"
        assert ended(client.completions.create(model=str(TINY), prompt=plain).choices[0].text) == first["answer"]


def test_convert_to_float_and_load_in_the_unchanged_host(work, question):
    path = work / "float"
    mlx_lm("convert", "--hf-path", TINY, "--mlx-path", path)
    stored = mx.load(str(path / "model.safetensors"))
    assert {array.dtype for array in stored.values()} == {mx.bfloat16}  # not the float32 that this CPU computes in
    assert not any("visual" in name for name in stored)
    assert answer(path, question["question"]) == question["answer"]
    assert_same_in_unchanged_host(path, work)


@pytest.mark.parametrize("bits", [4, *thorough(8)])
def test_convert_quantized_and_load_in_the_unchanged_host(quantized, work, question, bits):
    path = quantized[bits]
    config = json.loads((path / "config.json").read_text())
    assert config["quantization"]["bits"] == bits
    assert config["quantization"]["language_model.model.layers.0.mlp.gate"]["bits"] == 8  # the router
    assert answer(path, question["question"]) == question["answer"]
    if HOST_HAS_THE_TYPE:
        assert answer(path, question["question"], env=UNCHANGED) == question["answer"]
    assert_same_in_unchanged_host(path, work)


@pytest.mark.thorough
def test_dequantize_and_load_in_the_unchanged_host(quantized, work, question):
    path = work / "dequantized"
    mlx_lm("convert", "--hf-path", quantized[8], "--mlx-path", path, "--dequantize")
    assert "quantization" not in json.loads((path / "config.json").read_text())
    assert answer(path, question["question"]) == question["answer"]
    assert_same_in_unchanged_host(path, work)


def test_lora_trains_fuses_and_generates(adapters, work):
    assert answer(TINY, "Say it.", "--adapter-path", adapters) == "A plug-in."
    fused = work / "fused"
    mlx_lm("fuse", "--model", TINY, "--adapter-path", adapters, "--save-path", fused)
    assert answer(fused, "Say it.") == "A plug-in."
    assert_same_in_unchanged_host(fused, work)


@pytest.mark.thorough
def test_lora_trains_on_a_quantized_base(quantized, adapters, work):
    path = work / "adapters-4bit"
    train(quantized[4], work / "data", path, iterations=3)  # slow on the CPU
    fused = work / "fused-4bit"
    mlx_lm("fuse", "--model", quantized[4], "--adapter-path", path, "--save-path", fused)
    base, tuned = (logits(model, work, "mlx_lm_qwen3vlmoe.") for model in (quantized[4], fused))
    assert mx.abs(base - tuned).max() > 0.1
    assert_same_in_unchanged_host(fused, work)


def test_a_prompt_cache_is_saved_and_used(work, question):
    """The host caches the beginning of a message, and `generate` continues that message."""
    beginning, end = question["question"].rsplit(" ", 1)
    cache = work / "prompt.safetensors"
    mlx_lm("cache_prompt", "--model", TINY, "--prompt", beginning, "--prompt-cache-file", cache)
    assert answer(TINY, f" {end}", "--prompt-cache-file", cache) == question["answer"]


def test_benchmark_runs():
    output = mlx_lm("benchmark", "--model", TINY, "-p", 32, "-g", 8, "-n", 2)
    assert re.search(r"Averages: prompt_tps=[\d.]+, generation_tps=[\d.]+", output)


@pytest.mark.thorough
def test_perplexity_is_the_same_as_in_the_unchanged_host(quantized, work, tiny_questions):
    """On a local data set: the trained chats."""
    data = work / "texts"
    data.mkdir()
    chats = [
        {"messages": [{"role": "user", "content": p["question"]}, {"role": "assistant", "content": p["answer"]}]}
        for p in tiny_questions
    ]
    (data / "train.jsonl").write_text("\n".join(map(json.dumps, chats)))

    def perplexity(model: Path, **options) -> float:
        arguments = ("--data-path", data, "--sequence-length", 40, "--num-samples", 8, "--batch-size", 4)
        output = mlx_lm("perplexity", "--model", model, *arguments, **options)
        return float(re.search(r"Perplexity: ([\d.]+)", output)[1])

    if HOST_HAS_THE_TYPE:
        # On a CPU, the host computes in 16 bits where this package does in 32; questions, which nobody trained it to
        # predict, are most of the sum.
        assert perplexity(quantized[8]) == pytest.approx(perplexity(quantized[8], env=UNCHANGED), rel=0.05)
    assert perplexity(TINY) == pytest.approx(perplexity(quantized[8]), rel=0.2)


def test_the_tiny_checkpoint_is_what_it_says():
    """The official layout and field set, a vision tower to drop, at most 3 MB in all."""
    weights = mx.load(str(TINY / "model.safetensors"))
    config = json.loads((TINY / "config.json").read_text())
    text = config["text_config"]
    e, h, i = text["num_experts"], text["hidden_size"], text["moe_intermediate_size"]
    assert weights["model.language_model.layers.0.mlp.experts.gate_up_proj"].shape == (e, h, 2 * i)
    assert any(name.startswith("model.visual.") for name in weights)
    assert "tie_word_embeddings" in config
    assert "tie_word_embeddings" not in text
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 3_000_000


def test_the_demo_prints_what_the_readme_shows():
    """`make demo`, in the environment of these tests: the answer, who served it, and what the host says without."""
    output = run("make", "-C", ROOT, "demo", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/demo.stamp").stdout
    (shown,) = re.findall(r"(?ms)^```text\n(Question .*?)^```$", (ROOT / "README.md").read_text())
    if "site-packages" in output:  # where the wheel is tested, and not the clone
        output = re.sub(r"\S+(?=mlx_lm_qwen3vlmoe/model.py)", "", output)
    output, shown = (re.sub(r"\d+ a second on this \w+", "", text) for text in (output, shown))
    assert shown[: None if HOST >= (0, 32) else shown.index("With this")] in output


def test_run_prints_an_error_about_a_checkpoint_as_one_sentence(tmp_path):
    """Where the host's own commands end in a traceback."""
    checkpoint = Checkpoint("official")
    del checkpoint.tensors["model.language_model.norm.weight"]
    done = run(
        *(
            BIN / "mlx-lm-qwen3vlmoe",
            "run",
            "generate",
            "--model",
            checkpoint.save(tmp_path / "broken"),
            "--prompt",
            "Hi",
        ),
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        "model.language_model.norm.weight: expected this tensor in a complete checkpoint"
    )
