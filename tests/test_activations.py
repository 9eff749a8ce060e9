"""Packed layers on the CPU: the model computes in float32, in which MLX's kernels are fast, and stores what it did."""

from __future__ import annotations

import copy

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm import batch_generate, load, stream_generate
from mlx_lm.models import qwen3_moe
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model, quantize_model
from support import FIXTURES, TINY

from mlx_lm_qwen3vlmoe import Model, get_model_classes
from mlx_lm_qwen3vlmoe.runtime import backend

pytestmark = [
    pytest.mark.skipif(mx.default_device() != mx.cpu, reason="other backends are as fast in 16 bits"),
    pytest.mark.skipif(
        "input_embeddings" not in qwen3_moe.Model.__call__.__annotations__, reason="this host takes no embeddings"
    ),
]
IDS = mx.arange(3, 23).reshape(1, 20)


def quantized(**how) -> Model:
    model, config = load_model(TINY)
    model, _ = quantize_model(model, config, how.pop("group_size", 32), how.pop("bits", 4), **how)
    return model


@pytest.fixture(scope="module")
def tiny():
    """The tiny model in 4 bits, and its tokenizer."""
    return quantized(), load(str(TINY))[1]


def dtypes(cache) -> set[mx.Dtype]:
    return {array.dtype for layer in cache for array in (layer.keys, layer.values)}


def said(model, tokenizer, prompt, **options) -> str:
    return "".join(part.text for part in stream_generate(model, tokenizer, prompt, 64, **options))


def prompt_of(tokenizer, question: str) -> list[int]:
    return tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)


def native(model: Model, ids: mx.array, cache=None) -> mx.array:
    """As the host computes: in the dtype of the embeddings."""
    return model.language_model(ids, cache=cache)


def distance(found: mx.array, expected: mx.array) -> float:
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    return (mx.abs(found - expected).max() / mx.abs(expected).max()).item()


@pytest.mark.parametrize("how", [{}, {"bits": 8}, {"mode": "mxfp4"}, {"mode": "mxfp8", "bits": 8}])
def test_packed_layers_compute_in_float32_and_stay_as_they_are(how):
    model = quantized(**how)
    before = {name: array.dtype for name, array in tree_flatten(model.parameters())}
    cache = make_prompt_cache(model)
    assert model(IDS, cache=cache).dtype == mx.float32
    assert dtypes(cache) == {mx.float32}
    assert {name: array.dtype for name, array in tree_flatten(model.parameters())} == before
    assert mx.float32 not in before.values()


def exact_copy(model: Model) -> Model:
    """All in float32, but for the embeddings, which are rounded as they are unpacked."""
    exact = copy.deepcopy(model)
    exact.set_dtype(mx.float32)
    exact.model.embed_tokens = model.model.embed_tokens
    return exact


def test_the_logits_are_those_of_a_model_in_float32():
    model = quantized()
    assert mx.array_equal(model(IDS), exact_copy(model)(IDS))


def test_floats_in_16_bits_compute_in_their_own():
    """In which a matrix of 16 bits is multiplied fastest; experts alone are cast."""
    model, _ = load_model(TINY)
    cache = make_prompt_cache(model)
    assert model(IDS, cache=cache).dtype == mx.bfloat16
    assert dtypes(cache) == {mx.bfloat16}


def test_packed_experts_beside_floats_compute_in_float32_by_themselves():
    model, _ = load_model(TINY)
    nn.quantize(model, 32, 4, class_predicate=lambda path, module: path.endswith("_proj") and "switch_mlp" in path)
    seen = []
    glu = next(layer.mlp.switch_mlp for layer in model.layers if "switch_mlp" in layer.mlp)
    glu.activation = lambda up, gate: seen.append(up.dtype) or nn.silu(gate) * up
    assert model(IDS).dtype == mx.bfloat16
    assert seen == [mx.float32]


def test_on_a_gpu_nothing_is_cast():
    model = quantized()
    with backend.planned(mx.Device(mx.gpu)):
        assert not backend.widens(model.model)
    assert backend.widens(model.model)


def test_embeddings_in_place_of_ids_are_cast_as_well(tiny):
    model, _ = tiny
    embeddings = model.model.embed_tokens(IDS)
    assert embeddings.dtype == mx.bfloat16
    assert mx.array_equal(model(IDS, input_embeddings=embeddings), model(IDS))


@pytest.mark.parametrize("kind", ["plain", "quantized"])
@pytest.mark.parametrize("first", ["ours", "native"])
def test_a_saved_prompt_cache_goes_on_in_the_other_dtype(tiny, tiny_questions, first, kind, tmp_path):
    """One saved where the activations were bfloat16 is used here, and the reverse."""
    model, tokenizer = tiny
    prompt = prompt_of(tokenizer, tiny_questions[0]["question"])
    answer = tokenizer.encode(tiny_questions[0]["answer"], add_special_tokens=False)
    ways = {"ours": model, "native": lambda ids, cache: native(model, ids, cache)}
    cache = make_prompt_cache(model)
    if kind == "quantized":
        cache = [layer.to_quantized(group_size=32, bits=8) for layer in cache]
    ways.pop(first)(mx.array([prompt[:-1]]), cache=cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    cache = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert kind == "quantized" or dtypes(cache) == {mx.float32 if first == "ours" else mx.bfloat16}
    (go_on,) = ways.values()
    said = [go_on(mx.array([[token]]), cache=cache).argmax().item() for token in [prompt[-1], *answer[:-1]]]
    assert said == answer


def test_a_quantized_cache_answers_word_for_word(tiny, tiny_questions):
    model, tokenizer = tiny
    for pair in tiny_questions[:2]:
        prompt = prompt_of(tokenizer, pair["question"])
        plain = said(model, tokenizer, prompt)
        assert said(model, tokenizer, prompt, kv_bits=8, kv_group_size=32, quantized_kv_start=0) == plain
        assert said(model, tokenizer, prompt, kv_bits=8, kv_group_size=32, quantized_kv_start=10) == plain


def test_a_batch_answers_as_one_by_one(tiny, tiny_questions):
    model, tokenizer = tiny
    prompts = [prompt_of(tokenizer, pair["question"]) for pair in tiny_questions[:3]]
    alone = [said(model, tokenizer, prompt) for prompt in prompts]
    assert batch_generate(model, tokenizer, prompts, max_tokens=64).texts == alone


def test_lora_gradients_are_those_of_float32():
    """And in the dtype of the adapters."""
    model = quantized()
    exact = exact_copy(model)

    def loss(model: Model) -> mx.array:
        logits = model(IDS[:, :-1]).astype(mx.float32)
        return nn.losses.cross_entropy(logits, IDS[:, 1:]).mean()

    found = []
    for each in (model, exact):
        each.freeze()
        mx.random.seed(0)
        linear_to_lora_layers(each, 4, {"rank": 2, "scale": 2.0, "dropout": 0.0})
        found.append(dict(tree_flatten(nn.value_and_grad(each, loss)(each)[1])))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert gradient.dtype == mx.float32
        assert mx.allclose(gradient, found[1][name], rtol=1e-4), name


def test_what_inspect_counts_is_the_cache_in_float32():
    model, _ = load_model(FIXTURES / "mlx_lm_4bit", get_model_classes=get_model_classes)
    with backend.planned(mx.Device(mx.cpu)):
        cache = make_prompt_cache(model)
        model(mx.zeros((1, 64), mx.int32), cache=cache)
        assert dtypes(cache) == {mx.float32}
