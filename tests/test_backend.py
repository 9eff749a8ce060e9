"""Experts on the CPU: multiplied as float32 copies that nobody else sees, made at the first use and not before."""

from __future__ import annotations

import copy
import logging
import pickle

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import qwen3_moe, switch_layers
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model
from support import FIXTURES, thorough
from support.weights import E, H, I, L, args, official

from mlx_lm_qwen3vlmoe import Model, get_model_classes
from mlx_lm_qwen3vlmoe.runtime import backend

pytestmark = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="other backends multiply 16 bits")
PROMPT = mx.array([[1, 7, 3, 2]])


def model_of(weights: dict[str, mx.array]) -> Model:
    model = Model(args())
    model.load_weights(list(model.sanitize(weights).items()))
    mx.eval(model.parameters())
    return model


def halves(turned: bool = False, dtype: mx.Dtype = mx.bfloat16) -> dict[str, mx.array]:
    """The official layout in 16 bits, or ``[E, out, in]`` as transformers 5 saves."""
    return {
        name: (mx.contiguous(array.swapaxes(1, 2)) if turned and ".experts." in name else array).astype(dtype)
        for name, array in official().items()
    }


def experts(model: Model) -> list[SwitchLinear]:
    sparse = [layer.mlp.switch_mlp for layer in model.layers if "switch_mlp" in layer.mlp]
    return [getattr(mlp, f"{p}_proj") for mlp in sparse for p in ("gate", "up", "down")]


def stored(model: Model) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def assert_same(found: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    """The same names, dtypes and bits."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert mx.array_equal(found[name], array), name


def test_every_module_has_the_type_that_the_host_gives_it():
    """Programs test exact types, of all but this one: its subclass has its name."""
    model = Model(args())
    host = qwen3_moe.Model(qwen3_moe.ModelArgs.from_dict(model.args.text_config))
    ours = {path: type(module) for path, module in model.language_model.named_modules()}
    theirs = {path: type(module) for path, module in host.named_modules()}
    assert ours.keys() == theirs.keys()
    differing = {path: (ours[path], theirs[path]) for path in ours if ours[path] is not theirs[path]}
    assert set(differing.values()) == {(backend.SwitchGLU, switch_layers.SwitchGLU)}
    assert backend.SwitchGLU.__name__ == "SwitchGLU"
    assert issubclass(backend.SwitchGLU, switch_layers.SwitchGLU)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_a_call_changes_nothing_that_is_stored(turned, dtype, tmp_path):
    model = model_of(halves(turned, dtype))
    before = {name: mx.array(array) for name, array in stored(model).items()}
    logits = model(PROMPT)
    assert_same(stored(model), before)
    assert mx.array_equal(model(PROMPT), logits)
    assert_same(stored(model), before)
    model.save_weights(str(tmp_path / "model.safetensors"))
    assert_same(mx.load(str(tmp_path / "model.safetensors")), before)


def test_one_notice_says_that_they_are_cast(caplog):
    backend._announce_cast.cache_clear()
    with caplog.at_level(logging.WARNING):
        model = model_of(halves())
        assert not caplog.records
        model(PROMPT)
        model(PROMPT)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "On the CPU, MLX multiplies unquantized experts in float32 only"
    ]


def test_the_products_are_those_of_experts_in_float32():
    wide = model_of(
        {name: array.astype(mx.float32) if ".experts." in name else array for name, array in halves().items()}
    )
    assert mx.array_equal(model_of(halves())(PROMPT), wide(PROMPT))


@pytest.mark.parametrize("turned", [False, True])
def test_copies_are_contiguous_in_the_order_of_the_file(turned, monkeypatch):
    seen, call = [], SwitchLinear.__call__
    monkeypatch.setattr(
        SwitchLinear, "__call__", lambda self, *a, **o: seen.append(self["weight"]) or call(self, *a, **o)
    )
    model_of(halves(turned))(PROMPT)
    for wide, (out, inner) in zip(seen, [(I, H), (I, H), (H, I)] * L, strict=True):
        assert (wide.dtype, wide.shape) == (mx.float32, (E, out, inner))
        strides = memoryview(wide).strides
        assert strides[1:] == ((inner * 4, 4) if turned else (4, out * 4))


def large() -> Model:
    """One layer, nearly all of whose memory is 6.3 MB of experts in bfloat16."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 256, "num_experts": 64, "num_hidden_layers": 1}
    model = Model(args(**sizes, mlp_only_layers=[]))
    glu = model.layers[0].mlp.switch_mlp
    for linear in (glu.gate_proj, glu.up_proj, glu.down_proj):
        linear.weight = mx.random.normal(linear.weight.shape).astype(mx.bfloat16)
    mx.eval(model.parameters())
    return model


def test_only_the_copies_stay_in_memory():
    """Twice the size in 16 bits, and no more; what somebody has evaluated meanwhile goes with the next call."""
    model = large()
    size = sum(linear.weight.nbytes for linear in experts(model))
    without = mx.get_active_memory() - size
    for _ in range(3):
        mx.eval(model(PROMPT))
        assert mx.get_active_memory() - without == pytest.approx(2 * size, rel=0.02)
        mx.eval(model.parameters())
        assert mx.get_active_memory() - without == pytest.approx(3 * size, rel=0.02)
    model.train()  # what is trained is cast in each step
    mx.eval(model.parameters())
    assert mx.get_active_memory() - without == pytest.approx(size, rel=0.02)


def test_weights_that_are_loaded_after_a_call_are_used():
    model, other = model_of(halves()), {name: array * 2 for name, array in halves().items()}
    model(PROMPT)
    model.load_weights(list(model.sanitize(dict(other)).items()))
    assert mx.array_equal(model(PROMPT), model_of(other)(PROMPT))


def test_experts_quantized_after_a_call_are_those_quantized_before():
    called, fresh = large(), large()
    fresh.update(called.parameters())
    called(PROMPT)
    for model in (called, fresh):
        nn.quantize(model, 64, 4, class_predicate=lambda path, module: isinstance(module, SwitchLinear))
    assert_same(stored(called), stored(fresh))
    assert experts(called)[2].scales.dtype == mx.bfloat16


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_can_be_copied_after_a_call(again):
    model = model_of(halves())
    logits = model(PROMPT)
    twin = again(model)
    assert_same(stored(twin), stored(model))
    assert mx.array_equal(twin(PROMPT), logits)
    experts(twin)[0].weight = experts(twin)[0].weight * 2
    assert not mx.array_equal(twin(PROMPT), logits)
    assert mx.array_equal(model(PROMPT), logits)


def test_a_compiled_call_leaves_the_model_usable():
    model, expected = model_of(halves()), model_of(halves())(PROMPT)
    compiled = mx.compile(lambda ids: model(ids))
    assert mx.allclose(compiled(PROMPT), expected, rtol=0.02)
    assert mx.array_equal(model(PROMPT), expected)
    assert mx.allclose(compiled(PROMPT), expected, rtol=0.02)
    assert_same(stored(model), stored(model_of(halves())))


def test_a_replaced_layer_is_used():
    model = model_of(halves())
    layer = copy.deepcopy(model.layers[1])
    layer.post_attention_layernorm.weight = layer.post_attention_layernorm.weight * 0
    logits = model(PROMPT)
    model.layers[1] = layer
    assert model.layers[1] is layer
    assert not mx.array_equal(model(PROMPT), logits)


def loss(model: Model, ids: mx.array = PROMPT) -> mx.array:
    return model(ids).astype(mx.float32).square().sum()


def test_gradients_of_all_weights_are_those_of_experts_in_float32():
    """In their own dtypes, and also after a call without gradients."""
    model = model_of(halves())
    wide = model_of(
        {name: array.astype(mx.float32) if ".experts." in name else array for name, array in halves().items()}
    )
    expected = dict(tree_flatten(nn.value_and_grad(wide, loss)(wide)[1]))
    for _ in range(2):
        found = dict(tree_flatten(nn.value_and_grad(model, loss)(model)[1]))
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            assert gradient.dtype == mx.bfloat16
            assert mx.allclose(gradient, expected[name].astype(mx.bfloat16), rtol=0.02, atol=1e-3), name
        model(PROMPT)


@pytest.mark.parametrize("compiled", [False, *thorough(True)])
def test_full_training_changes_the_weights_and_keeps_their_dtype(compiled):
    model, optimizer = model_of(halves()), optim.SGD(1e-3)
    before, state = {name: mx.array(array) for name, array in stored(model).items()}, [model.state, optimizer.state]
    model(PROMPT)

    def step() -> mx.array:
        value, gradients = nn.value_and_grad(model, loss)(model)
        optimizer.update(model, gradients)
        return value

    step = mx.compile(step, inputs=state, outputs=state) if compiled else step
    losses = []
    for _ in range(3):
        losses.append(step().item())
        mx.eval(state)
    assert losses[2] < losses[0]
    assert loss(model).item() < losses[0]
    for name, array in stored(model).items():
        assert array.dtype == before[name].dtype
    assert not all(mx.array_equal(stored(model)[name], before[name]) for name in before if "switch_mlp" in name)


def test_lora_of_experts_trains_and_fuses_in_the_dtype_of_the_base():
    model = model_of(halves())
    model(PROMPT)
    model.freeze()
    keys = [f"mlp.switch_mlp.{p}_proj" for p in ("gate", "up", "down")]
    linear_to_lora_layers(model, 2, {"rank": 2, "scale": 2.0, "dropout": 0.0, "keys": keys})
    optimizer, before = optim.SGD(1e-2), loss(model).item()
    for _ in range(3):
        _, gradients = nn.value_and_grad(model, loss)(model)
        optimizer.update(model, gradients)
    assert loss(model).item() < before
    fused = [(path, module.fuse()) for path, module in model.named_modules() if hasattr(module, "fuse")]
    model.update_modules(tree_unflatten(fused))
    assert {type(linear) for linear in experts(model)} == {SwitchLinear}
    assert {array.dtype for array in stored(model).values()} == {mx.bfloat16}
    assert loss(model).item() < before


def test_gptq_finds_every_layer():
    """Before and after a call, by the exact types that it looks for; the calls go through its own wrappers."""
    gptq = pytest.importorskip("mlx_lm.quant.gptq")
    model = large()
    model(PROMPT)
    linear = [m for _, m in model.named_modules() if type(m) in {nn.Linear, SwitchLinear}]
    assert len(linear) == 4 + 1 + 3 + 1  # attention, router, experts, head
    caught = [gptq.Catcher(module) for module in experts(model)]
    glu = model.layers[0].mlp.switch_mlp
    logits = model(PROMPT)
    glu.gate_proj, glu.up_proj, glu.down_proj = caught
    assert mx.array_equal(model(PROMPT), logits)
    assert {catcher.module.weight.dtype for catcher in caught} == {mx.bfloat16}


def test_a_plan_evaluates_and_casts_nothing():
    model = Model(args())
    model.load_weights(list(model.sanitize(halves()).items()))
    before = mx.get_active_memory()
    with backend.planned():
        logits = model(PROMPT)
    assert logits.dtype == mx.bfloat16
    assert {e.weight.dtype for e in experts(model)} == {mx.bfloat16}
    assert mx.get_active_memory() - before < 10_000


def test_on_a_gpu_the_hosts_own_layers_stay():
    with backend.planned(mx.Device(mx.gpu)):
        model = Model(args())
    assert {type(layer.mlp.switch_mlp) for layer in model.layers if "switch_mlp" in layer.mlp} == {
        switch_layers.SwitchGLU
    }


def test_quantized_checkpoints_load_into_the_hosts_own_layers():
    model, _ = load_model(FIXTURES / "mlx_lm_4bit", get_model_classes=get_model_classes)
    assert {type(e).__name__ for e in experts(model)} == {"QuantizedSwitchLinear"}
