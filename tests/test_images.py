"""Images: this is a text-only model, and says so wherever an image or its placeholder comes in."""

from __future__ import annotations

import base64
import json
import logging
import re
import sys
import time
from functools import partial
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm.models
import openai
import pytest
from mlx.utils import tree_flatten
from mlx_lm import batch_generate, load, stream_generate
from mlx_lm.utils import load_model, quantize_model
from support import BIN, HOST, LIMIT, OURS, TINY
from support.commands import run, serving

from mlx_lm_qwen3vlmoe.runtime import images

# The smallest picture there is, without a library that draws.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
ALONE = ["<|image_pad|>", "<|video_pad|>"]
PLACEHOLDERS = [f"<|vision_start|>{token}<|vision_end|>" for token in ALONE]  # as chat templates write them
REFUSAL = "placeholders of images .*text-only model.*mlx-vlm"


@pytest.fixture(scope="module")
def tiny():
    return load(str(TINY))


def chat(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def said(model, tokenizer, prompt, **options) -> str:
    return "".join(part.text for part in stream_generate(model, tokenizer, prompt, 64, **options))


def test_generate_takes_no_image_files(tmp_path):
    image = tmp_path / "x.png"
    image.write_bytes(PNG)
    done = run(BIN / "mlx_lm.generate", "--model", TINY, "--prompt", "What is it?", "--image", image, check=False)
    assert done.returncode != 0
    assert "==========" not in done.stdout
    last = done.stderr.strip().splitlines()[-1]
    # Hosts that take images refuse them for this model; older ones have no such option.
    assert "does not take images" in last or "unrecognized arguments: --image" in last


def test_generate_refuses_a_placeholder():
    prompt = f"{PLACEHOLDERS[0]} What is it?"
    done = run(BIN / "mlx_lm.generate", "--model", TINY, "--prompt", prompt, check=False)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert re.match(f"ValueError: The prompt has {REFUSAL}", last)


@pytest.mark.parametrize("placeholder", PLACEHOLDERS)
@pytest.mark.parametrize("step", [2048, 16])  # the whole prompt at once, and in pieces
def test_stream_generate_refuses_a_placeholder(tiny, placeholder, step):
    with pytest.raises(ValueError, match=REFUSAL):
        said(*tiny, f"Who are you? {placeholder} What is it?", prefill_step_size=step)


def refusals(caplog) -> list[logging.LogRecord]:
    """Not the notice of casting experts, which whatever test is the first of a process gets."""
    return [record for record in caplog.records if record.name == OURS]


@pytest.mark.parametrize("token", ALONE)
def test_a_placeholder_that_stands_alone_is_logged(tiny, token, caplog):
    """A benchmark's random tokens may have one, and nobody asks about an image without its start."""
    said(*tiny, f"Who are you? {token} What is it?")
    (record,) = refusals(caplog)
    assert record.levelname == "ERROR"
    assert re.search(REFUSAL, record.message)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_chat_with_an_image_part_is_refused(tiny, kind):
    """The template of the checkpoint writes the placeholder."""
    model, tokenizer = tiny
    parts = [{"type": kind}, {"type": "text", "text": "What is it?"}]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    with pytest.raises(ValueError, match=REFUSAL):
        said(model, tokenizer, prompt)


def test_a_draft_model_does_not_hide_a_placeholder(tiny):
    with pytest.raises(ValueError, match=REFUSAL):
        said(*tiny, f"Who are you? {PLACEHOLDERS[0]} What is it?", draft_model=tiny[0])


def test_ordinary_prompts_go_on(tiny, tiny_questions, caplog):
    """Also one that speaks of images, and after a refusal."""
    model, tokenizer = tiny
    with pytest.raises(ValueError, match=REFUSAL):
        said(model, tokenizer, f"{PLACEHOLDERS[0]} What is it?")
    for pair in tiny_questions[:3]:
        prompt = tokenizer.apply_chat_template(chat(pair["question"]), add_generation_prompt=True)
        assert said(model, tokenizer, prompt) == pair["answer"]
    assert said(model, tokenizer, "image_pad, video_pad: <|image|> [IMG]")
    assert not refusals(caplog)


def test_a_batch_logs_an_error_and_answers_the_others(tiny, tiny_questions, caplog):
    """One request may not end the others. The caches are merged, extended and filtered as in the host's server."""
    model, tokenizer = tiny
    pair = tiny_questions[1]
    questions = [pair["question"], f"{PLACEHOLDERS[1]} What is it?", pair["question"]]
    prompts = [tokenizer.apply_chat_template(chat(question), add_generation_prompt=True) for question in questions]
    with caplog.at_level(logging.ERROR, "mlx_lm_qwen3vlmoe"):
        texts = batch_generate(model, tokenizer, prompts, max_tokens=64).texts
    assert [texts[0], texts[2]] == [pair["answer"]] * 2
    (record,) = refusals(caplog)
    assert record.levelname == "ERROR"
    assert re.search(REFUSAL, record.message)


def test_a_batch_that_continues_cached_prompts_logs_an_error_as_well(tiny, caplog):
    model, tokenizer = tiny
    first = batch_generate(
        model,
        tokenizer,
        [tokenizer.encode("Who are"), tokenizer.encode("What")],
        max_tokens=2,
        return_prompt_caches=True,
    )
    assert not refusals(caplog)
    rest = [tokenizer.encode(f" {PLACEHOLDERS[0]} you?"), tokenizer.encode(" is it?")]
    batch_generate(model, tokenizer, rest, prompt_caches=first.caches, max_tokens=2)
    (record,) = refusals(caplog)
    assert re.search(REFUSAL, record.message)


# --- training -------------------------------------------------------------------------------------------------------

WITH_IMAGE = mx.array([[1, 380, 382, 381, 380, 383, 381, 2]])
TEXT = mx.array([[1, 5, 9, 40, 200, 7, 8, 2]])
TOLD = r"training data has placeholders of images \(token 382 or 383\).*text-only model.*mlx-vlm"


def fresh_model():
    """As a trainer has it, with one trainable layer."""
    model, _ = load_model(TINY)
    model.freeze()
    model.lm_head.unfreeze()  # whose gradient does not go through experts, as that of some hosts cannot
    return model


def told(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "training data" in record.getMessage()]


def train(model, batches: list[mx.array]) -> list:
    """The step of mlx_lm's trainer, compiled with the state. Returns what was learned."""
    optimizer = optim.SGD(learning_rate=1e-3)
    state = [model.state, optimizer.state, mx.random.state]

    def loss(model, batch):
        return nn.losses.cross_entropy(model(batch[:, :-1]), batch[:, 1:]).mean()

    @partial(mx.compile, inputs=state, outputs=state)
    def step(batch):
        value, grad = nn.value_and_grad(model, loss)(model, batch)
        optimizer.update(model, grad)
        return value

    model.train()
    values = []
    for batch in batches:
        values.append(step(batch))
        mx.eval(state, values)
    return values


def test_training_is_not_refused_but_told(tiny, caplog):
    """Training data may have images for other models to see; the text around them is learned."""
    model = fresh_model()
    model.train()
    for _ in range(2):
        assert model(WITH_IMAGE).shape == (1, 8, 384)
    (message,) = told(caplog)
    assert re.search(TOLD, message)
    model.eval()
    with pytest.raises(ValueError, match=REFUSAL):
        model(WITH_IMAGE)


@pytest.mark.parametrize("read", [lambda model: model.eval(), lambda model: model.trainable_parameters()])
@pytest.mark.parametrize(
    "batches", [[WITH_IMAGE], [TEXT, WITH_IMAGE, TEXT], [TEXT, TEXT[:, :4], WITH_IMAGE], [WITH_IMAGE, WITH_IMAGE]]
)
def test_a_compiled_step_is_told_of_once_at_the_next_evaluation_or_save(caplog, read, batches):
    """In whichever batch the image was, and however often steps are compiled anew."""
    model = fresh_model()
    train(model, batches)
    read(model)
    read(model)
    (message,) = told(caplog)
    assert re.search(TOLD, message)


def test_training_without_images_is_told_of_nothing(caplog):
    model = fresh_model()
    train(model, [TEXT, TEXT])
    model.eval()
    model.trainable_parameters()
    assert told(caplog) == []


def test_a_compiled_step_learns_what_it_would_without_the_watch(monkeypatch):
    found = train(model := fresh_model(), [WITH_IMAGE, TEXT, TEXT])
    monkeypatch.setattr(images, "note", lambda *_: None)
    expected = train(other := fresh_model(), [WITH_IMAGE, TEXT, TEXT])
    assert mx.array_equal(mx.stack(found), mx.stack(expected))
    assert mx.array_equal(model.lm_head.weight, other.lm_head.weight)


def test_what_is_watched_is_no_parameter():
    model = fresh_model()
    before = [name for name, _ in tree_flatten(model.parameters())]
    train(model, [WITH_IMAGE])
    assert [name for name, _ in tree_flatten(model.parameters())] == before
    assert [name for name, _ in tree_flatten(model.trainable_parameters())] == ["language_model.lm_head.weight"]


@pytest.mark.parametrize(
    "validated",
    [True, pytest.param(False, marks=pytest.mark.skipif(HOST < (0, 30, 7), reason="this host wants that file"))],
)
def test_lora_trains_on_images_in_train_jsonl_with_one_warning(tmp_path, validated):
    """With images in no row of valid.jsonl, or without that file."""
    image = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    rows = {"train": [image] * 3} | ({"valid": ["What is it?"] * 3} if validated else {})
    for name, questions in rows.items():
        reply = {"role": "assistant", "content": "A plug-in."}
        lines = [json.dumps({"messages": [{"role": "user", "content": each}, reply]}) for each in questions]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    options = ("--iters", 3, "--batch-size", 1, "--val-batches", 1, "--num-layers", 1)
    command = ("--train", "--model", TINY, "--data", tmp_path, "--adapter-path", tmp_path / "out", *options)
    done = run(BIN / "mlx_lm.lora", *command)
    assert len(re.findall(TOLD, done.stdout + done.stderr)) == 1
    assert (tmp_path / "out" / "adapters.safetensors").exists()


def test_what_is_compiled_is_not_looked_at(tiny):
    """There are no values to look at, and the result is the same."""
    model, _ = tiny
    tokens = mx.array([[1, 380, 382, 381, 380, 383, 381, 2]])
    found = mx.compile(lambda tokens: model(tokens))(tokens)
    model.train()  # which does not look either
    try:
        assert mx.allclose(found, model(tokens), rtol=1e-4, atol=1e-4)
    finally:
        model.eval()


def as_exo_does(model, features: mx.array):
    """Put a function in place of the embeddings that splices an image's features in where its placeholder is."""
    embed = model.model.embed_tokens

    def splice(ids: mx.array) -> mx.array:
        return mx.where((ids == 382)[..., None], features, embed(ids))

    model.model.embed_tokens = splice
    return embed


@pytest.mark.parametrize("bits", [None, 4])
def test_images_that_another_program_splices_in_are_not_refused(bits, caplog):
    """Its embeddings are used, and ours of the placeholder are not."""
    model, config = load_model(TINY)
    if bits:
        model, _ = quantize_model(model, config, 32, bits)
    tokens = mx.array([[1, 380, 382, 381, 5, 7, 2]])
    features = model.model.embed_tokens(mx.array([[9]]))
    expected = model(mx.where(tokens == 382, 9, tokens))
    with pytest.raises(ValueError, match=REFUSAL):
        model(tokens)
    embed = as_exo_does(model, features)
    assert mx.array_equal(model(tokens), expected)
    assert not any("placeholders" in record.message for record in caplog.records)
    model.model.embed_tokens = embed
    with pytest.raises(ValueError, match=REFUSAL):
        model(tokens)


class Watched:
    """Token ids that tell when somebody looks at them."""

    def __init__(self, tokens: mx.array):
        self.shape, self.tokens, self.looks = tokens.shape, tokens, 0

    def __eq__(self, other: object) -> mx.array:
        self.looks += 1
        return self.tokens == other

    __hash__ = None


@pytest.mark.parametrize("shape", [(1, 1), (8, 1), (1, 2), (8, 5)])
def test_single_tokens_are_not_looked_at(tiny, monkeypatch, shape):
    """That would wait for the device at each token that is written."""
    model, _ = tiny
    monkeypatch.setattr(type(model.language_model), "__call__", lambda self, inputs, **options: inputs)
    seen = model(Watched(mx.zeros(shape, mx.int32)))
    assert bool(seen.looks) == (shape[1] > 1)


def test_the_server_refuses_images_and_goes_on_after_a_placeholder(tiny_questions, tmp_path):
    pair, log = tiny_questions[0], tmp_path / "log"
    url = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    image = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": url}}]
    with serving(TINY, log) as base:
        api = openai.OpenAI(base_url=base, api_key="none", timeout=LIMIT, max_retries=0)

        def ask(content: str | list, **options) -> str:
            reply = api.chat.completions.create(model=str(TINY), messages=chat(content), **options)
            return reply.choices[0].message.content

        with pytest.raises(openai.APIStatusError) as refusal:
            ask(image)
        assert 400 <= refusal.value.status_code < 500
        assert "text" in refusal.value.response.text
        assert pair["answer"] in ask(pair["question"])

        ask(f"{PLACEHOLDERS[0]} What is it?")  # in a batch, which goes on
        written(log, "ERROR - The prompt has placeholders of images")
        assert pair["answer"] in ask(pair["question"])

        # The host does not batch seeds, and closes the connection. What its prompt cache has is not looked at again.
        with pytest.raises(openai.APIConnectionError):
            ask(f"Look at it: {PLACEHOLDERS[1]} What is it?", seed=1)
        written(log, "ValueError: The prompt has placeholders of images")
        assert pair["answer"] in ask(pair["question"])


def written(log, text: str) -> None:
    """Wait until the server's log has this."""
    for _ in range(10 * LIMIT):
        if text in log.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(log.read_text())


# --- hosts that take images themselves ------------------------------------------------------------------------------

HIDDEN = "mlx-lm's own qwen3_vl_moe takes images, but mlx-lm-qwen3vlmoe, which serves in its place, is text-only"
SEES = """
import mlx_lm_qwen3vlmoe.no_such_module  # it is looked at, and not run

class ModelArgs: pass
class Model:
    {method}
"""


def hidden(caplog) -> list[str]:
    load_model(TINY, lazy=True)
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith(HIDDEN)]


def test_no_host_so_far_takes_images(caplog):
    assert hidden(caplog) == []


def test_a_host_with_a_processor_for_this_type_is_told_of_once_as_the_model_loads(monkeypatch, caplog):
    processors = SimpleNamespace(PROCESSORS={"qwen3_vl_moe": object, "muse_spark": object})
    monkeypatch.setitem(sys.modules, "mlx_lm.processors", processors)
    (message,) = hidden(caplog)
    assert message.endswith("To use images, set MLX_LM_PLUGINS=0.")


@pytest.mark.parametrize("processors", [None, SimpleNamespace(), SimpleNamespace(PROCESSORS={"muse_spark": object})])
def test_a_processor_for_another_type_is_none_of_this_one(monkeypatch, caplog, processors):
    monkeypatch.setitem(sys.modules, "mlx_lm.processors", processors)
    assert hidden(caplog) == []


@pytest.mark.parametrize(
    ("method", "sees"),
    [
        ("def __call__(self, inputs, cache=None, pixel_values=None): pass", True),
        ("def embed_inputs(self, inputs): pass", True),
        ("def __init__(self, args): self.vision_tower = None", True),
        ("def sanitize(self, weights): return weights.pop('vision_tower')", False),
    ],
)
def test_a_class_of_the_hosts_that_takes_images_is_told_of_as_well(monkeypatch, caplog, tmp_path, method, sees):
    (tmp_path / "qwen3_vl_moe.py").write_text(SEES.format(method=method))
    monkeypatch.setattr(mlx_lm.models, "__path__", [str(tmp_path), *mlx_lm.models.__path__])
    assert bool(hidden(caplog)) == sees


def test_the_hosts_processor_is_not_given_to_this_model(monkeypatch):
    """It is found by the module of a model's class, which is this package's: see docs/plugins.md."""
    processors = pytest.importorskip("mlx_lm.processors", reason="this host has no processors")
    monkeypatch.setitem(processors.PROCESSORS, "qwen3_vl_moe", object)
    model, config = load_model(TINY, lazy=True)
    assert processors.load_processor(model, config | {"vision_config": {"depth": 1}}) is None
