"""Programs that look inside a model, or put their own layers into one."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_config, load_model, quantize_model
from support import FIXTURES, TINY

from mlx_lm_qwen3vlmoe import Model, ModelArgs

IDS = mx.array([[1, 5, 9, 40, 200, 7]])


def made(name: str = "official") -> Model:
    return Model(ModelArgs.from_dict(load_config(FIXTURES / name)))


# --- the head beside the decoder ------------------------------------------------------------------------------------


def as_lenses_do(model: Model, ids: mx.array) -> mx.array:
    """The logits of programs that take a model without ``lm_head`` for a tied one (mlx-lm-lens, mlx-genkit)."""
    h = model.model(ids)
    head = getattr(model, "lm_head", None)
    return head(h) if head is not None else model.model.embed_tokens.as_linear(h)


@pytest.mark.parametrize("bits", [None, 4])
def test_the_head_is_beside_the_decoder(bits):
    model, config = load_model(TINY)
    if bits:
        model, _ = quantize_model(model, config, 32, bits)
    model.set_dtype(mx.float32)
    assert mx.allclose(as_lenses_do(model, IDS), model(IDS), rtol=1e-4, atol=1e-4)


def test_a_tied_model_has_the_embeddings_there():
    model, _ = load_model(FIXTURES / "tied")
    assert mx.array_equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_the_head_is_stored_once_and_where_the_host_has_it():
    model = made()
    names = [name for name, _ in tree_flatten(model.parameters()) if "lm_head" in name]
    assert names == ["language_model.lm_head.weight"]
    assert "lm_head" not in model


def test_a_replaced_head_is_used_and_stored_in_the_place_of_the_old_one():
    model, _ = load_model(FIXTURES / "official")
    head = nn.Linear(model.lm_head.weight.shape[1], 3, bias=False)
    model.lm_head = head
    assert model.lm_head is model.language_model.lm_head is head
    assert model(IDS % 50).shape[-1] == 3
    assert [name for name, _ in tree_flatten(model.parameters()) if "lm_head" in name] == [
        "language_model.lm_head.weight"
    ]


def test_a_head_that_the_host_does_not_have_is_not_offered():
    model = made()
    del model.language_model.lm_head
    assert not hasattr(model, "lm_head")
