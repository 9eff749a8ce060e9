"""Every subcommand of mlx_lm and every variant of training on the tiny model, as listed in docs/commands.md.

What generate, chat, server, convert, lora, fuse, cache_prompt, benchmark and perplexity do by default is tested in
tests/test_commands.py.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import openai
import pytest
from support import BIN, LIMIT, ROOT, TINY
from support.commands import UNCHANGED, answer, assert_same_in_unchanged_host, logits, mlx_lm, run, serving, write_chats
from support.environments import Environment

DOCS = ROOT / "docs" / "commands.md"
ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
EXPERTS = [f"mlp.switch_mlp.{name}_proj" for name in ("gate", "up", "down")]


def refusal(*command: object, **options) -> str:
    """The last line that a command prints when it fails."""
    done = run(*command, check=False, **options)
    assert done.returncode != 0
    return done.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("subcommands")


@pytest.fixture(scope="module")
def data(work, tiny_questions) -> Path:
    """A made-up answer to learn, among others that the model knows."""
    return write_chats(work / "data", [{"question": "Say it.", "answer": "A plug-in."}, *tiny_questions[:3]])


@pytest.fixture(scope="module")
def converted(work) -> dict[str, Path]:
    """Copies of the tiny model that load in the unchanged host too."""
    options = {"float32": ["--dtype", "float32"], "4 bits": ["-q"], "2 bits": ["-q", "--q-bits", 2]}
    paths = {name: work / name.replace(" ", "-") for name in options}
    for name, path in paths.items():
        mlx_lm("convert", "--hf-path", TINY, "--mlx-path", path, *options[name])
    return paths


# The table: subcommands


def test_the_table_has_every_subcommand_and_a_test_runs_each():
    """A new host with one more subcommand fails here."""
    text = DOCS.read_text()
    listed = run(BIN / "mlx_lm", "--help").stdout
    subcommands = re.findall(r"'(\w+)'", listed.splitlines()[0])
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", text.split("\n## ")[0], re.MULTILINE))
    assert sorted(rows) == sorted(subcommands)
    assert set(rows.values()) == {"works", "host's limit", "needs a hub"}
    sources = ("slow/test_subcommands.py", "test_commands.py", "support/commands.py")  # which starts servers
    tests = "".join((ROOT / "tests" / source).read_text() for source in sources)
    assert [name for name in rows if not re.search(rf'"(mlx_lm\.)?{name}"', tests)] == []


def test_awq_is_refused_as_the_host_has_no_recipe_for_this_model_type(work):
    line = refusal(BIN / "mlx_lm.awq", "--model", TINY, "--mlx-path", work / "awq")
    assert line == "NotImplementedError: AWQ support for qwen3_vl_moe models NYI."


@pytest.fixture(scope="module")
def calibrated(work, tiny_questions) -> dict[str, str]:
    """An environment whose home has the host's calibration text, so that it is not downloaded; here: the answers."""
    cache = work / "home" / ".cache" / "mlx-lm"
    cache.mkdir(parents=True)
    text = "\n".join(
        f"<|im_start|>user\n{pair['question']}<|im_end|>\n<|im_start|>assistant\n{pair['answer']}<|im_end|>"
        for pair in tiny_questions
    )
    (cache / "calibration_v5.txt").write_text(text)
    return {"HOME": str(work / "home")}


def test_gptq_of_two_bits_is_closer_to_the_original_than_plain_rounding(calibrated, converted, work):
    path = work / "gptq"
    mlx_lm(
        *("gptq", "--model", TINY, "--mlx-path", path, "--bits", 2, "--sequence-length", 64),
        env=calibrated,
    )
    original, plain, ours = (logits(model, work, "mlx_lm_qwen3vlmoe.") for model in (TINY, converted["2 bits"], path))
    assert mx.square(ours - original).mean() < 0.7 * mx.square(plain - original).mean()
    assert_same_in_unchanged_host(path, work)


def test_gptq_of_four_bits_answers_word_for_word(calibrated, work, tiny_questions):
    path = work / "gptq-4bit"
    mlx_lm("gptq", "--model", TINY, "--mlx-path", path, "--sequence-length", 64, env=calibrated)
    assert answer(path, tiny_questions[0]["question"]) == tiny_questions[0]["answer"]


def test_dynamic_quant_mixes_four_and_five_bits(calibrated, work, tiny_questions):
    path = work / "dynamic"
    mlx_lm("dynamic_quant", "--model", TINY, "--mlx-path", path, "--target-bpw", 5, env=calibrated, cwd=work)
    quantization = json.loads((path / "config.json").read_text())["quantization"]
    assert quantization["bits"] == 4
    assert {"group_size": 64, "bits": 5} in quantization.values()
    assert answer(path, tiny_questions[0]["question"]) == tiny_questions[0]["answer"]
    assert_same_in_unchanged_host(path, work)


def test_dwq_brings_three_bits_closer_to_the_original(work, tiny_questions):
    """On a local data set: the trained chats."""
    data = write_chats(work / "dwq-data", tiny_questions[:12])
    path = work / "dwq"
    done = run(
        *(BIN / "mlx_lm.dwq", "--model", TINY, "--mlx-path", path, "--bits", 3, "--data-path", data),
        *("--num-samples", 8, "--batch-size", 2, "--learning-rate", 1e-4, "--max-seq-length", 64),
    )
    first, last = map(float, re.findall(r"Validation: it=\d+, loss=([\d.]+)", done.stderr + done.stdout))
    assert last < first
    assert_same_in_unchanged_host(path, work)


def test_dwq_by_default_needs_a_data_set_from_the_hub(work):
    line = refusal(BIN / "mlx_lm.dwq", "--model", TINY, "--mlx-path", work / "dwq-default")
    assert "Couldn't reach 'allenai/tulu-3-sft-mixture' on the Hub" in line


def test_evaluate_scores_answers_and_choices(wheel, tmp_path, tiny_questions):
    """lm-eval, which mlx-lm does not bring along, on tasks of local files."""
    installed = Environment(tmp_path / "env")
    installed.pip("install", "--no-deps", wheel)
    installed.pip("install", "lm-eval")
    rows = [
        {**pair, "choices": [tiny_questions[n - 1]["answer"], pair["answer"]]} for n, pair in enumerate(tiny_questions)
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "questions.jsonl"}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    generating = {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 64},
        "metric_list": [{"metric": "exact_match"}],
    }
    choosing = {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 1,
        "metric_list": [{"metric": "acc"}],
    }
    for name, task in (("answers", generating), ("choices", choosing)):  # YAML, of which JSON is a part
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **task}))
    output = run(
        *(installed.python, "-m", "mlx_lm", "evaluate", "--model", TINY, "--tasks", "answers.yaml", "choices.yaml"),
        cwd=tmp_path,
    ).stdout
    assert '"exact_match,none": 1.0' in output
    assert '"acc,none": 1.0' in output


def test_manage_lists_and_deletes_a_model_that_the_hub_cache_has(tmp_path, tiny_questions):
    """The cache is made up, as a download would leave it; commands take the model by its hub name."""
    repository = tmp_path / "hub" / "models--made-up--tiny"
    shutil.copytree(TINY, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    cache = {"HF_HOME": str(tmp_path)}
    assert "made-up/tiny" in mlx_lm("manage", "--scan", "--pattern", "made-up", env=cache)
    assert answer("made-up/tiny", tiny_questions[0]["question"], env=cache) == tiny_questions[0]["answer"]
    output = mlx_lm("manage", "--delete", "--pattern", "made-up", input="y\n", env=cache)
    assert "successfully" in output
    assert not repository.exists()


def test_share_copies_a_checkpoint_to_a_second_node(tmp_path, tiny_questions):
    """Both nodes are this machine."""
    node = {"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}
    (tmp_path / "hosts.json").write_text(json.dumps({"backend": "ring", "hosts": [node, node]}))
    copy = tmp_path / "there" / "copy"
    run(
        *(BIN / "mlx_lm.share", "--path", TINY, "--hostfile", tmp_path / "hosts.json"),
        *("--dst", copy, "--tmpdir", tmp_path),
    )
    for file in TINY.iterdir():
        assert (copy / file.name).read_bytes() == file.read_bytes()
    assert answer(copy, tiny_questions[0]["question"]) == tiny_questions[0]["answer"]


def test_upload_stops_only_where_it_needs_the_hub(converted, tmp_path):
    """It has read the card that `convert` wrote, and written a new one, when it asks the hub for a repository."""
    path = shutil.copytree(converted["4 bits"], tmp_path / "model")
    line = refusal(BIN / "mlx_lm.upload", "--path", path, "--upload-repo", "made-up/tiny")
    assert re.search(r"OfflineModeIsEnabled: Cannot reach https?://\S+/api/repos/create: offline mode", line)
    assert "# made-up/tiny" in (path / "README.md").read_text()


# Training


def train(model: Path, data: Path, adapters: Path, *arguments: object, iterations: int = 40, **options) -> list[float]:
    """Train a variant; the losses on the validation set, before and after."""
    adapters.mkdir()
    few = iterations < 10  # a quantized base, which is slow on the CPU, learns in larger steps
    output = mlx_lm(
        *("lora", "--train", "--model", model, "--data", data, "--adapter-path", adapters, "--iters", iterations),
        *("--batch-size", 2 if few else 4, "--learning-rate", 1e-3 if few else 2e-4),
        *("--num-layers", -1, "--val-batches", 1, *arguments),
        **options,
    )
    return [float(loss) for loss in re.findall(r"val ([\d.]+)", re.sub(r"\x1b\[[\d;]*m", "", output))]


def on(keys: list[str], folder: Path) -> tuple[object, ...]:
    """The options that choose the layers to train: a file of the host's, YAML, of which JSON is a part."""
    file = folder / f"{len(keys)}-keys.yaml"
    file.write_text(json.dumps({"lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0, "keys": keys}}))
    return ("--config", file)


VARIANTS = {
    "lora-attention": ("lora", ATTENTION),
    "lora-experts": ("lora", EXPERTS),
    "dora-attention": ("dora", ATTENTION),
    "full": ("full", []),
}


@pytest.fixture(scope="module")
def trained(data, work):
    """Gives the adapters of a variant, trained once on the float base."""

    @functools.cache
    def adapters(variant: str) -> Path:
        kind, keys = VARIANTS[variant]
        path = work / f"float-{variant}"
        train(TINY, data, path, "--fine-tune-type", kind, *(on(keys, work) if keys else ()))
        return path

    return adapters


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_float_base_learns_an_answer_with_every_variant(trained, work, variant):
    fused = work / f"float-{variant}-fused"
    assert answer(TINY, "Say it.", "--adapter-path", trained(variant)) == "A plug-in."
    mlx_lm("fuse", "--model", TINY, "--adapter-path", trained(variant), "--save-path", fused)
    assert answer(fused, "Say it.") == "A plug-in."
    assert_same_in_unchanged_host(fused, work)


def test_a_fused_model_keeps_its_dtype(trained, tmp_path):
    """On the CPU too, which computes in float32."""
    fused = tmp_path / "fused"
    mlx_lm("fuse", "--model", TINY, "--adapter-path", trained("lora-experts"), "--save-path", fused)
    assert {array.dtype for array in mx.load(str(fused / "model.safetensors")).values()} == {mx.bfloat16}
    assert answer(fused, "Say it.") == "A plug-in."


def test_export_to_gguf_is_refused_by_the_host(trained, tmp_path):
    line = refusal(
        *(BIN / "mlx_lm.fuse", "--model", TINY, "--adapter-path", trained("lora-experts")),
        *("--save-path", tmp_path / "fused", "--export-gguf"),
    )
    assert line == "ValueError: Model type qwen3_vl_moe not supported for GGUF conversion."


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "full"])
def test_a_quantized_base_learns_with_every_variant_but_full(converted, data, work, variant):
    kind, keys = VARIANTS[variant]
    base, adapters, fused = converted["4 bits"], work / f"4bit-{variant}", work / f"4bit-{variant}-fused"
    before, after = train(base, data, adapters, "--fine-tune-type", kind, *on(keys, work), iterations=3)
    assert after < 0.7 * before
    mlx_lm("fuse", "--model", base, "--adapter-path", adapters, "--save-path", fused)
    assert_same_in_unchanged_host(fused, work)


@pytest.mark.parametrize(
    ("base", "layer"),
    [("float32", "SwitchLinear"), ("4 bits", "QuantizedSwitchLinear")],
)
def test_dora_of_experts_is_refused_by_the_host(converted, data, tmp_path, base, layer):
    """By default, too: without keys the host takes every linear layer."""
    command = BIN / "mlx_lm.lora", "--train", "--model", converted[base], "--data", data, "--num-layers", -1
    for keys in (on(EXPERTS, tmp_path), ()):
        line = refusal(*command, "--adapter-path", tmp_path, "--fine-tune-type", "dora", *keys)
        assert line == f"ValueError: {layer} doesn't support DoRA yet."


def test_full_training_of_a_quantized_base_is_refused_by_the_host(converted, data, tmp_path):
    line = refusal(
        *(BIN / "mlx_lm.lora", "--train", "--model", converted["4 bits"], "--data", data, "--num-layers", -1),
        *("--adapter-path", tmp_path, "--fine-tune-type", "full", "--iters", 1),
    )
    assert line == "RuntimeError: [GatherQMM::vjp] no gradient wrt the quantized weights."


def test_gradient_checkpoints_do_not_change_what_is_learned(data, tmp_path):
    plain = train(TINY, data, tmp_path / "plain", iterations=10)
    checkpointed = train(TINY, data, tmp_path / "checkpointed", "--grad-checkpoint", iterations=10)
    assert checkpointed == pytest.approx(plain, abs=0.02)
    assert plain[1] < 0.8 * plain[0]


def test_training_goes_on_from_saved_adapters(data, tmp_path):
    first = train(TINY, data, tmp_path / "first", iterations=12)
    saved = tmp_path / "first" / "adapters.safetensors"
    second = train(TINY, data, tmp_path / "second", "--resume-adapter-file", saved, iterations=12)
    assert second[0] == pytest.approx(first[1], abs=0.02)
    assert second[1] < second[0]


LOADED = {"ours": {}, "unchanged host": UNCHANGED}


@pytest.mark.parametrize("trainer", LOADED)
def test_adapters_trained_with_one_load_with_the_other(converted, data, tmp_path, trainer):
    """On a float base, which both can run: the answer learned with one is given with both."""
    base, adapters = converted["float32"], tmp_path / "adapters"
    train(base, data, adapters, env=LOADED[trainer])
    for environment in LOADED.values():
        assert answer(base, "Say it.", "--adapter-path", adapters, env=environment) == "A plug-in."
    assert answer(TINY, "Say it.", "--adapter-path", adapters) == "A plug-in."  # what the base was made from


ADAPTED = """
import sys, mlx.core as mx
from mlx_lm import load
model, tokenizer = load(sys.argv[1], adapter_path=sys.argv[2] or None)
model.set_dtype(mx.float32)
ids = mx.array([tokenizer.encode("What is a mixture of experts?")])
mx.save_safetensors(sys.argv[3], {"logits": model(ids).astype(mx.float32)})
print(type(model).__module__)
"""


@pytest.mark.parametrize("trainer", LOADED)
def test_adapters_of_a_quantized_base_give_the_same_logits_with_both(converted, data, tmp_path, trainer):
    base, adapters = converted["4 bits"], tmp_path / "adapters"
    train(base, data, adapters, iterations=2, env=LOADED[trainer])
    found = []
    for adapter, environment in (("", {}), *((adapters, environment) for environment in LOADED.values())):
        out = tmp_path / f"{len(found)}.safetensors"
        module = run(sys.executable, "-c", ADAPTED, base, adapter, out, env=environment).stdout
        assert module.startswith("mlx_lm.models." if environment else "mlx_lm_qwen3vlmoe.")
        found.append(mx.load(str(out))["logits"])
    without, ours, theirs = found
    assert mx.abs(ours - without).max() > 0.1
    assert mx.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


# KV cache


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_kv_cache_leaves_the_answer_as_it_is(bits, tiny_questions):
    """With the group size that the tiny model's heads need: they are 32 wide, and the host's default is 64."""
    question, options = tiny_questions[3], ("--kv-bits", bits, "--quantized-kv-start", 0)
    assert answer(TINY, question["question"], *options, "--kv-group-size", 32) == question["answer"]
    line = refusal(BIN / "mlx_lm.generate", "--model", TINY, "--prompt", "Hello", *options)
    assert "needs to be divisible by the quantization group size 64" in line


@pytest.mark.parametrize(("writer", "reader"), [({}, UNCHANGED), (UNCHANGED, {})], ids=["ours first", "host first"])
def test_a_quantized_prompt_cache_saved_with_one_is_used_by_the_other(
    converted, tmp_path, tiny_questions, writer, reader
):
    """The cache holds the beginning of a message, and `generate` continues it, if told the same group size."""
    beginning, end = tiny_questions[0]["question"].rsplit(" ", 1)
    model, cache = converted["4 bits"], tmp_path / "cache.safetensors"
    mlx_lm(
        *("cache_prompt", "--model", model, "--prompt", beginning, "--prompt-cache-file", cache),
        *("--kv-bits", 8, "--kv-group-size", 32, "--quantized-kv-start", 0),
        env=writer,
    )
    assert mx.uint32 in {array.dtype for array in mx.load(str(cache)).values()}
    options = ("--prompt-cache-file", cache, "--kv-bits", 8)
    for environment in (writer, reader):
        found = answer(model, f" {end}", *options, "--kv-group-size", 32, env=environment)
        assert found == tiny_questions[0]["answer"]
    line = refusal(BIN / "mlx_lm.generate", "--model", model, "--prompt", end, *options)
    assert line == "ValueError: --kv-group-size does not match the kv cache loaded from --prompt-cache-file."


# Speculative decoding

STRANGER = """
import json, shutil, sys
from pathlib import Path
import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3
source, target = map(Path, sys.argv[1:])
shutil.copytree(source, target)
text = json.loads((source / "config.json").read_text())["text_config"]
config = {**text, "model_type": "qwen3", "num_hidden_layers": 2, "tie_word_embeddings": True}
(target / "config.json").write_text(json.dumps(config))
weights = dict(tree_flatten(qwen3.Model(qwen3.ModelArgs.from_dict(config)).parameters()))
mx.save_safetensors(str(target / "model.safetensors"), weights, {"format": "mlx"})
"""


@pytest.fixture(scope="module")
def drafts(converted, work) -> dict[str, Path]:
    """Draft models with the tokenizer of the tiny one: a good, a poor and a useless one, which is a dense qwen3."""
    run(sys.executable, "-c", STRANGER, TINY, work / "dense")
    return {"4 bits": converted["4 bits"], "2 bits": converted["2 bits"], "an untrained qwen3": work / "dense"}


@pytest.mark.parametrize("draft", ["4 bits", "2 bits", "an untrained qwen3"])
def test_no_draft_model_changes_the_answer(drafts, tiny_questions, draft):
    """What a draft model gets wrong is taken back out of the caches."""
    question = tiny_questions[1]
    options = ("--draft-model", drafts[draft], "--num-draft-tokens", 4)
    assert answer(TINY, question["question"], *options) == question["answer"]


def test_a_good_draft_model_writes_most_of_the_answer_and_a_useless_one_none(drafts, tiny_questions):
    code = (
        "import sys; from mlx_lm import load, stream_generate\n"
        "model, tokenizer = load(sys.argv[1])\n"
        "chat = [{'role': 'user', 'content': sys.argv[3]}]\n"
        "prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)\n"
        "draft, _ = load(sys.argv[2])\n"
        "parts = list(stream_generate(model, tokenizer, prompt, 64, draft_model=draft, num_draft_tokens=4))\n"
        "print(sum(part.from_draft for part in parts) / len(parts), ''.join(part.text for part in parts))\n"
    )
    shares = {}
    for name, draft in drafts.items():
        output = run(sys.executable, "-c", code, TINY, draft, tiny_questions[1]["question"]).stdout
        share, text = output.strip().split(" ", 1)
        assert text == tiny_questions[1]["answer"]
        shares[name] = float(share)
    assert shares["4 bits"] > 0.7
    assert shares["an untrained qwen3"] < 0.1


# Batch generation


@pytest.mark.parametrize("model", ["float", "4 bits"])
def test_a_batch_gets_every_answer_word_for_word(converted, tiny_questions, model):
    """22 prompts of different lengths at a time, whose answers end at different times."""
    code = (
        "import json, sys; from mlx_lm import batch_generate, load\n"
        "model, tokenizer = load(sys.argv[1])\n"
        "chats = [[{'role': 'user', 'content': pair['question']}] for pair in json.load(open(sys.argv[2]))]\n"
        "prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]\n"
        "print(json.dumps(batch_generate(model, tokenizer, prompts, max_tokens=64).texts))\n"
    )
    path = TINY if model == "float" else converted[model]
    output = run(sys.executable, "-c", code, path, ROOT / "examples" / "tiny_questions.json").stdout
    assert json.loads(output) == [pair["answer"] for pair in tiny_questions]


# Server


def test_ten_streaming_clients_at_a_time_get_their_own_answers(tiny_questions, tmp_path):
    """Ten clients ask all questions, each in another order; nothing is lost, mixed up or cut off."""
    start, lock = threading.Barrier(10), threading.Lock()
    open_now, most = 0, 0

    def ask(url: str, model: Path, client: int) -> list[tuple[str, str | None]]:
        nonlocal open_now, most
        api = openai.OpenAI(base_url=url, api_key="none", timeout=LIMIT, max_retries=0)
        replies = []
        start.wait()
        for turn in range(len(tiny_questions)):
            pair = tiny_questions[(turn + 2 * client) % len(tiny_questions)]
            stream = api.chat.completions.create(
                model=str(model), messages=[{"role": "user", "content": pair["question"]}], stream=True
            )
            chunks = []
            for chunk in stream:
                if not chunks:
                    with lock:
                        open_now += 1
                        most = max(most, open_now)
                chunks.append(chunk.choices[0])
            with lock:
                open_now -= 1
            text = "".join(choice.delta.content or "" for choice in chunks)
            replies.append((pair["answer"], text, chunks[-1].finish_reason))
        return replies

    with serving(TINY, tmp_path / "log") as url, ThreadPoolExecutor(10) as pool:
        for future in [pool.submit(ask, url, TINY, client) for client in range(10)]:
            for expected, found, reason in future.result():
                assert found == expected
                assert reason == "stop"
    assert most == 10


def test_a_client_that_hangs_up_costs_the_others_nothing(tiny_questions, tmp_path):
    first, second = tiny_questions[:2]
    with serving(TINY, tmp_path / "log") as url:
        api = openai.OpenAI(base_url=url, api_key="none", timeout=LIMIT, max_retries=0)

        def ask(pair: dict[str, str]) -> openai.Stream:
            chat = [{"role": "user", "content": pair["question"]}]
            return api.chat.completions.create(model=str(TINY), messages=chat, stream=True)

        leaving, staying = ask(first), ask(second)
        next(leaving)
        leaving.close()
        assert "".join(chunk.choices[0].delta.content or "" for chunk in staying) == second["answer"]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in ask(first)) == first["answer"]


def test_requests_name_adapters_and_a_draft_model(trained, drafts, tiny_questions, tmp_path):
    """One server, one base model: each request gets what it names, and the next one without gets the base again."""
    pair = tiny_questions[1]
    with serving(TINY, tmp_path / "log") as url:
        api = openai.OpenAI(base_url=url, api_key="none", timeout=LIMIT, max_retries=0)

        def ask(question: str, **extra: object) -> str:
            chat = [{"role": "user", "content": question}]
            reply = api.chat.completions.create(model=str(TINY), messages=chat, extra_body=extra)
            return reply.choices[0].message.content

        assert ask("Say it.", adapters=str(trained("lora-experts"))) == "A plug-in."
        assert ask("Say it.") != "A plug-in."
        assert ask(pair["question"], draft_model=str(drafts["4 bits"]), num_draft_tokens=4) == pair["answer"]
        assert ask(pair["question"]) == pair["answer"]
