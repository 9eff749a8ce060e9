"""Experts on the CPU: cast to float32 inside a call, which keeps nothing and changes nothing."""

from __future__ import annotations

import copy
import logging
import pickle
import sys
import threading
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import qwen3_moe, switch_layers
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model
from support import FIXTURES, TINY, thorough
from support.weights import args, official

from mlx_lm_qwen3vlmoe import Model, get_model_classes
from mlx_lm_qwen3vlmoe.runtime import backend, cpu

pytestmark = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="other backends multiply 16 bits")
PROMPT = mx.array([[1, 7, 3, 2]])
LONG = mx.array([[n % 8 for n in range(40)]])  # longer than what is multiplied one expert after the other


def model_of(weights: dict[str, mx.array]) -> Model:
    model = Model(args())
    model.load_weights(list(model.sanitize(weights).items()))
    mx.eval(model.parameters())
    return model


def halves(turned: bool = False, dtype: mx.Dtype = mx.bfloat16) -> dict[str, mx.array]:
    """The official layout in 16 bits, or ``[E, out, in]`` as transformers 5 saves; the same values every time."""
    weights = {
        name: mx.random.normal(array.shape, key=mx.random.key(n)).astype(dtype)
        for n, (name, array) in enumerate(official().items())
    }
    if turned:
        weights |= {n: mx.contiguous(array.swapaxes(1, 2)) for n, array in weights.items() if ".experts." in n}
    return weights


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
    assert set(differing.values()) == {(cpu.SwitchGLU, switch_layers.SwitchGLU)}
    assert cpu.SwitchGLU.__name__ == "SwitchGLU"
    assert issubclass(cpu.SwitchGLU, switch_layers.SwitchGLU)


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


def test_nothing_is_said_while_a_model_answers(caplog):
    """`inspect` says beforehand that experts in 16 bits are cast, and those in float32 are not."""
    model = model_of(halves())
    assert cpu.casts(model)
    assert not cpu.casts(model_of(wide_experts(halves())))
    with caplog.at_level(logging.INFO):
        model(PROMPT)
    assert not caplog.records


@pytest.mark.parametrize("ids", [PROMPT[:, :1], PROMPT, LONG], ids=["token", "prompt", "long"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_the_products_are_those_of_experts_in_float32(ids, training, turned):
    """To the bit, however they lie in memory and however many are cast at a time."""
    found, wide = model_of(halves(turned)), model_of(wide_experts(halves()))
    for model in (found, wide):
        model.train(training)
    assert mx.array_equal(found(ids), wide(ids))


def wide_experts(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    return {name: array.astype(mx.float32) if ".experts." in name else array for name, array in weights.items()}


def added(model: Model, ids: mx.array) -> int:
    """The most memory that a call takes beside what is there before it."""
    mx.eval(ids)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(model(ids))
    assert mx.get_active_memory() - before < 50_000  # and keeps none of it
    return mx.get_peak_memory() - before


def large(layers: int = 1) -> Model:
    """Layers of 6.3 MB of experts in bfloat16 each, which are nearly all of the memory."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 256, "num_experts": 64, "num_hidden_layers": layers}
    model = Model(args(**sizes, mlp_only_layers=[]))
    for linear in experts(model):
        linear.weight = mx.random.normal(linear.weight.shape).astype(mx.bfloat16)
    mx.eval(model.parameters())
    model.eval()
    return model


def test_a_token_casts_the_chosen_experts_and_a_prompt_one_layer_at_a_time():
    model = large(6)
    layer = sum(linear.weight.nbytes for linear in experts(model)) / 6
    chosen = model.args.text_config["num_experts_per_tok"] / 64
    assert added(model, PROMPT[:, :1]) < 6 * 3 * layer * chosen + 500_000  # a copy, and twice the size in float32
    assert added(model, mx.zeros((1, 1000), mx.int32)) < 3 * 3 * layer  # of which some are on their way
    model.train()
    assert added(model, PROMPT) < 3 * 3 * layer


def plus_one(linear: SwitchLinear) -> None:
    linear.weight += 1


def without_the_first(linear: SwitchLinear) -> None:
    linear.weight[0] = 0


def all_at_once(linear: SwitchLinear) -> None:
    held = linear.weight
    held[:] = 0


@pytest.mark.parametrize("edit", [plus_one, without_the_first, all_at_once])
def test_an_edit_in_place_after_a_call_counts(edit):
    called, fresh = model_of(halves()), model_of(halves())
    called(PROMPT)
    for model in (called, fresh):
        edit(experts(model)[2])
    assert mx.array_equal(called(PROMPT), fresh(PROMPT))
    assert_same(stored(called), stored(fresh))


def test_a_replaced_projection_is_used():
    model, other = model_of(halves()), model_of({name: array * 2 for name, array in halves().items()})
    logits = model(PROMPT)
    model.layers[1].mlp.switch_mlp.down_proj = experts(other)[2]
    assert not mx.array_equal(model(PROMPT), logits)


def elsewhere(action: Callable[[], object]) -> object:
    """What an action gives in another thread."""
    found: list[object] = []

    def run() -> None:
        try:
            found.append(action())
        except Exception as e:
            found.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize(
    "action",
    [
        lambda model: mx.eval(model(PROMPT)),
        lambda model: mx.eval(model.parameters()),
        lambda model: model.train() and model.eval() and mx.eval(model(PROMPT)),
        lambda model: nn.quantize(model, 32, 4) or mx.eval(model.parameters()),
        lambda model: model.set_dtype(mx.float32) or mx.eval(model.parameters()),
    ],
    ids=["call", "eval", "train", "quantize", "set_dtype"],
)
def test_after_a_call_another_thread_can_use_the_model(action):
    model, _ = load_model(TINY)
    mx.eval(model(PROMPT))
    assert elsewhere(lambda: action(model)) is None


@pytest.mark.skipif(not hasattr(mx, "new_thread_local_stream"), reason="MLX before 0.31.2 is for one thread at a time")
@pytest.mark.parametrize("called", [False, True])
def test_several_threads_can_call_one_model(called):
    """Each gets what one gets alone. They take turns as often as they can."""
    model, _ = load_model(TINY)
    prompts = [PROMPT[:, :1], PROMPT, mx.zeros((1, 200), mx.int32)]
    mx.eval(prompts)
    twin, _ = load_model(TINY)
    expected = [bytes(memoryview(twin(ids).astype(mx.float32))) for ids in prompts]
    if called:
        mx.eval(model(PROMPT))
    wrong: list[object] = []

    def run(turn: int) -> None:
        try:
            for n in range(turn, turn + 6):
                found = bytes(memoryview(model(prompts[n % 3]).astype(mx.float32)))
                if found != expected[n % 3]:
                    wrong.append(n)
        except Exception as e:
            wrong.append(e)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=run, args=(turn,)) for turn in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def test_an_interrupted_call_leaves_the_model_as_it_was():
    model, fresh = model_of(halves()), model_of(halves())

    def interrupted(*arguments: object) -> mx.array:
        raise KeyboardInterrupt

    glu = model.layers[1].mlp.switch_mlp
    activation, glu.activation = glu.activation, interrupted
    with pytest.raises(KeyboardInterrupt):
        model(PROMPT)
    glu.activation = activation
    assert_same(stored(model), stored(fresh))
    assert mx.array_equal(model(PROMPT), fresh(PROMPT))


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


@pytest.mark.parametrize("training", [False, True])
def test_gradients_of_all_weights_are_those_of_experts_in_float32(training):
    """In their own dtypes, and also after a call without gradients."""
    model = model_of(halves())
    model.train(training)
    wide = model_of(wide_experts(halves()))
    expected = dict(tree_flatten(nn.value_and_grad(wide, loss)(wide)[1]))
    for _ in range(2):
        found = dict(tree_flatten(nn.value_and_grad(model, loss)(model)[1]))
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            assert gradient.dtype == mx.bfloat16
            furthest = mx.abs(gradient - expected[name]).max()
            assert furthest <= 0.02 * mx.abs(expected[name]).max(), name  # sums are rounded
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
