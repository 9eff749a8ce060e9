"""16-bit experts on the CPU: cast when they are first used, and not before."""

from __future__ import annotations

import copy
import logging

import mlx.core as mx
import pytest
from conftest import FIXTURES
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import load_model
from test_sanitize import E, H, I, args, official

from mlx_lm_qwen3vlmoe import Model, backend, get_model_classes

pytestmark = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="other backends multiply 16 bits")
PROMPT = mx.array([[1, 7, 3, 2]])


def model_of(weights: dict[str, mx.array]) -> Model:
    model = Model(args())
    model.load_weights(list(model.sanitize(weights).items()))
    mx.eval(model.parameters())
    return model


def halves(turned: bool = False) -> dict[str, mx.array]:
    """The official layout in bfloat16, or ``[E, out, in]`` as transformers 5 saves."""
    return {
        name: (mx.contiguous(array.swapaxes(1, 2)) if turned and ".experts." in name else array).astype(mx.bfloat16)
        for name, array in official().items()
    }


def experts(model: Model) -> list[SwitchLinear]:
    sparse = [layer.mlp.switch_mlp for layer in model.layers if "switch_mlp" in layer.mlp]
    return [getattr(mlp, f"{p}_proj") for mlp in sparse for p in ("gate", "up", "down")]


@pytest.mark.parametrize("turned", [False, True])
def test_they_keep_their_dtype_until_they_are_used(turned, caplog):
    backend._announce_cast.cache_clear()
    with caplog.at_level(logging.WARNING):
        model = model_of(halves(turned))
        assert {e.weight.dtype for e in experts(model)} == {mx.bfloat16}
        assert not caplog.records
        logits = model(PROMPT)
    assert {e.weight.dtype for e in experts(model)} == {mx.float32}
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "On the CPU, MLX multiplies unquantized experts in float32 only"
    ]
    wide = model_of(
        {name: array.astype(mx.float32) if ".experts." in name else array for name, array in halves().items()}
    )
    assert mx.array_equal(logits, wide(PROMPT))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_then_each_is_contiguous_in_the_order_of_the_file(turned, dtype):
    model = model_of({name: array.astype(dtype) for name, array in halves(turned).items()})
    model(PROMPT)
    for module, (out, inner) in zip(experts(model), [(I, H), (I, H), (H, I)] * 2, strict=True):
        assert module.weight.shape == (E, out, inner)
        strides = memoryview(module.weight).strides
        assert strides[1:] == ((inner * 4, 4) if turned else (4, out * 4))


def test_a_compiled_call_leaves_the_model_usable():
    model, expected = model_of(halves()), model_of(halves())(PROMPT)
    compiled = mx.compile(lambda ids: model(ids))
    assert mx.allclose(compiled(PROMPT), expected, rtol=1e-5)
    assert mx.array_equal(model(PROMPT), expected)
    assert mx.allclose(compiled(PROMPT), expected, rtol=1e-5)


def test_gradients_pass_through_them():
    model, wide = model_of(halves()), model_of(halves())
    wide(PROMPT)

    def loss(x: mx.array, model: Model) -> mx.array:
        return model(PROMPT, input_embeddings=x).square().sum()

    x = mx.random.normal((1, 4, H), key=mx.random.key(0)).astype(mx.bfloat16)
    assert mx.array_equal(mx.grad(loss)(x, model), mx.grad(loss)(x, wide))


def test_a_plan_evaluates_and_casts_nothing():
    model = Model(args())
    model.load_weights(list(model.sanitize(halves()).items()))
    before = mx.get_active_memory()
    with backend.planned():
        logits = model(PROMPT)
    assert logits.dtype == mx.float32
    assert {e.weight.dtype for e in experts(model)} == {mx.bfloat16}
    assert mx.get_active_memory() - before < 10_000


def test_what_is_quantized_or_copied_is_never_cast():
    model = model_of(halves())
    twin = copy.deepcopy(model)
    gate = experts(twin)[0]
    gate.weight = mx.random.normal((E, 64, 64)).astype(mx.bfloat16)
    assert type(gate.to_quantized(64, 4)).__name__ == "QuantizedSwitchLinear"
    assert {e.weight.dtype for e in experts(model)} == {mx.bfloat16}


def test_on_a_gpu_the_hosts_own_layers_stay():
    with backend.planned(mx.Device(mx.gpu)):
        model = Model(args())
    assert {type(e) for e in experts(model)} == {SwitchLinear}


def test_quantized_checkpoints_load_into_the_hosts_own_layers():
    model, _ = load_model(FIXTURES / "mlx_lm_4bit", get_model_classes=get_model_classes)
    assert {type(e).__name__ for e in experts(model)} == {"QuantizedSwitchLinear"}
