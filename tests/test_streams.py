"""The cores of the CPU: products are spread over streams, with the same bits, and nothing else changes."""

from __future__ import annotations

import copy
import json
import os
import pickle
import threading

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model, quantize_model
from support import TINY, thorough

from mlx_lm_qwen3vlmoe import Model
from mlx_lm_qwen3vlmoe.runtime import backend, cpu, streams

pytestmark = [
    pytest.mark.skipif(mx.default_device() != mx.cpu, reason="a GPU computes a product on all of it"),
    pytest.mark.skipif(not hasattr(mx, "new_thread_local_stream"), reason="MLX before 0.31.2 keeps to one stream"),
]
IDS = mx.array([[n % 90 + 3 for n in range(40)]])


@pytest.fixture
def cores(monkeypatch):
    """Has a number of cores, on which every product is worth a stream; the streams that were used are what it gives."""
    used: set[int] = set()
    on = streams.on

    def counted(number: int):
        used.add(number % streams.count())
        return on(number)

    def have(number: int) -> set[int]:
        used.clear()
        monkeypatch.setattr(streams, "_GRAIN", 1)
        monkeypatch.setattr(streams, "_cores", lambda: number)
        monkeypatch.setattr(streams, "on", counted)
        monkeypatch.setattr(streams, "_own", threading.local())
        monkeypatch.setattr(streams, "_free", [])
        return used

    return have


def tiny(kind: str = "4 bits") -> Model:
    model, config = load_model(TINY)
    if kind in ("float32", "float16"):
        model.set_dtype(getattr(mx, kind))
    elif kind == "packed beside float16":
        model.set_dtype(mx.float16)
        model, _ = quantize_model(model, config, 32, 4)
    elif kind.startswith("mx"):
        model, _ = quantize_model(model, config, 32, int(kind[-1]), mode=kind)
    elif kind != "bfloat16":
        model, _ = quantize_model(model, config, 32, int(kind[0]))
    mx.eval(model.parameters())
    return model


def results(model: Model, prompt: int) -> list[mx.array]:
    """The logits of a prompt, and of two tokens after it."""
    cache = make_prompt_cache(model)
    parts = (IDS[:, :prompt], IDS[:, prompt : prompt + 1], IDS[:, prompt + 1 : prompt + 2])
    return [model(ids, cache=cache) for ids in parts]


def assert_same(found: list[mx.array], expected: list[mx.array]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert mx.array_equal(a, b)


@pytest.mark.parametrize("number", [2, *thorough(3, 5)])
@pytest.mark.parametrize(
    "kind", ["4 bits", "bfloat16", "float32", "8 bits", "mxfp4", *thorough("float16", "packed beside float16", "mxfp8")]
)
def test_several_streams_give_the_bits_of_one(kind, number, cores):
    """A single token is cut elsewhere than several are, and a long prompt is sorted by experts first."""
    model = tiny(kind)
    for prompt in (1, 2, 3, 7, 38):
        used = cores(1)
        expected = results(model, prompt)
        assert used <= {0}
        used = cores(number)
        found = results(model, prompt)
        assert used == set(range(number))
        assert_same(found, expected)


@pytest.mark.parametrize("kind", ["4 bits", "bfloat16"])
def test_a_batch_on_several_streams_has_the_bits_of_one(kind, cores):
    model, ids = tiny(kind), IDS[:, :36].reshape(4, 9)
    cores(1)
    expected = model(ids)
    cores(2)
    assert mx.array_equal(model(ids), expected)


def test_a_tied_head_is_spread_too(cores):
    model = tiny()
    embeddings = model.model.embed_tokens
    used = cores(1)
    expected = embeddings.as_linear(mx.ones((1, 1, 192)))
    used = cores(2)
    found = cpu._spread(embeddings, False)
    assert mx.array_equal(found(IDS), embeddings(IDS))
    assert mx.array_equal(found.as_linear(mx.ones((1, 1, 192))), expected)
    assert used == {0, 1}


def test_the_rows_of_a_cut_weight_are_not_copied(cores):
    layer = nn.QuantizedLinear(256, 8192, bias=False, group_size=64, bits=4)
    layer.eval()
    x = mx.ones((1, 1, 256))
    mx.eval(layer.parameters(), x)
    cores(2)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(cpu._spread(layer, False)(x))
    assert mx.get_peak_memory() - before < layer.weight.nbytes // 4


def test_small_products_stay_on_one_stream(cores, monkeypatch):
    used = cores(2)
    monkeypatch.setattr(streams, "_GRAIN", 1 << 30)
    mx.eval(tiny()(IDS))
    assert used <= {0, 1}
    assert streams.side_by_side(lambda part: mx.arange(part.stop), 8, 1 << 20, 0).size == 8


def test_one_core_a_plan_and_a_gpu_have_one_stream(cores):
    model = tiny()
    cores(1)
    assert streams.count() == 1
    cores(4)
    assert streams.count() == 4
    with backend.planned():
        assert streams.count() == 1
        model(IDS)
    with backend.planned(mx.Device(mx.gpu)):
        assert streams.count() == 1


def test_every_thread_has_streams_of_its_own(cores):
    """The server computes in a thread of its own."""
    model = tiny()
    cores(1)
    expected = [bytes(memoryview(model(IDS[:, :n]))) for n in (1, 20)]
    cores(2)
    mx.eval(model(IDS))
    wrong: list[object] = []

    def run() -> None:
        try:
            for _ in range(3):
                found = [bytes(memoryview(model(IDS[:, :n]))) for n in (1, 20)]
                if found != expected:
                    wrong.append("other numbers")
        except Exception as e:
            wrong.append(e)

    for together in (1, 4):
        threads = [threading.Thread(target=run) for _ in range(together)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.skipif(not streams._REUSABLE, reason="MLX before 0.32.0 binds streams to their thread")
def test_the_streams_of_a_thread_that_has_ended_serve_the_next(cores, monkeypatch):
    """MLX never ends the thread behind a stream."""
    model, made = tiny(), []
    cores(3)
    monkeypatch.setattr(
        streams, "_new_stream", lambda device: made.append(mx.new_thread_unsafe_stream(device)) or made[-1]
    )
    expected = bytes(memoryview(model(IDS)))
    same = []
    for _ in range(4):
        thread = threading.Thread(target=lambda: same.append(bytes(memoryview(model(IDS))) == expected))
        thread.start()
        thread.join()
    assert same == [True] * 4
    assert len(made) == 4  # of this thread and of one other, two each


@pytest.mark.parametrize("kind", ["4 bits", "bfloat16"])
def test_a_call_on_several_streams_changes_no_module(kind, cores):
    model = tiny(kind)
    modules = {path: (module, type(module)) for path, module in model.named_modules()}
    arrays = dict(tree_flatten(model.parameters()))
    cores(2)
    logits = model(IDS)
    assert {path: (module, type(module)) for path, module in model.named_modules()} == modules
    assert all(array is arrays[path] for path, array in tree_flatten(model.parameters()))
    for again in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        assert mx.array_equal(again(model)(IDS), logits)


def test_a_model_is_quantized_after_a_call_as_before(cores):
    called, fresh = tiny("bfloat16"), tiny("bfloat16")
    cores(2)
    called(IDS)
    for model in (called, fresh):
        nn.quantize(model, 32, 4)
    assert mx.array_equal(called(IDS), fresh(IDS))


def test_layers_of_other_programs_are_called_as_they_are(cores):
    class Own(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner
            self.calls = 0

        def __call__(self, x: mx.array) -> mx.array:
            self.calls += 1
            return self.inner(x)

    model = tiny()
    attention = model.layers[0].self_attn
    attention.q_proj = Own(attention.q_proj)
    cores(1)
    expected = model(IDS)
    cores(2)
    assert mx.array_equal(model(IDS), expected)
    assert attention.q_proj.calls == 2


def test_a_compiled_call_on_several_streams_has_the_same_bits(cores):
    model = tiny()
    cores(1)
    expected = mx.compile(lambda ids: model(ids))(IDS)
    cores(2)
    compiled = mx.compile(lambda ids: model(ids))
    assert mx.array_equal(compiled(IDS), expected)
    assert mx.array_equal(compiled(IDS), expected)


@pytest.mark.parametrize("kind", ["4 bits", *thorough("bfloat16")])
def test_gradients_of_lora_have_the_bits_of_one_stream(kind, cores):
    """Attention and experts, and the losses, step after step."""
    found = []
    used: set[int] = set()
    for number in (1, 2):
        model = tiny(kind)
        model.freeze()
        mx.random.seed(0)
        linear_to_lora_layers(model, 4, {"rank": 2, "scale": 2.0, "dropout": 0.0})
        model.train()
        used = cores(number)

        def loss(model: Model) -> mx.array:
            return nn.losses.cross_entropy(model(IDS[:, :-1]).astype(mx.float32), IDS[:, 1:]).mean()

        value, gradients = nn.value_and_grad(model, loss)(model)
        found.append([value, *(array for _, array in tree_flatten(gradients))])
    assert (used == {0, 1}) == (kind == "4 bits")  # floats in training stay whole
    assert_same(*found)


LIMITS = {
    "two of the machine's": ({"affinity": 2}, 2),
    "one": ({"affinity": 1}, 1),
    "half of a core": ({"affinity": 8, "cpu.max": "50000 100000"}, 1),
    "three by a container": ({"affinity": 8, "cpu.max": "300000 100000"}, 3),
    "a container without a limit": ({"affinity": 8, "cpu.max": "max 100000"}, 8),
    "an older container": ({"affinity": 8, "cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
    "one without a limit": (
        {"affinity": 8, "cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
        8,
    ),
    "two ranks here": ({"affinity": 8, "hosts": [["127.0.0.1:1"], ["127.0.0.1:2"]]}, 4),
    "more ranks than cores": ({"affinity": 2, "hosts": [["127.0.0.1:1"], ["127.0.0.1:2"], ["127.0.0.1:3"]]}, 1),
    "a rank a machine": ({"affinity": 8, "hosts": [["10.0.0.1:1"], ["10.0.0.2:1"]]}, 8),
    "ranks of MPI": ({"affinity": 8, "mpi": "4"}, 2),
    "a launch of one": ({"affinity": 8, "hosts": ""}, 8),
}


@pytest.mark.parametrize("name", LIMITS)
def test_there_are_as_many_streams_as_cores_for_this_process(name, tmp_path, monkeypatch):
    limits, expected = LIMITS[name]
    for variable in ("MLX_HOSTFILE", "MLX_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(limits["affinity"])), raising=False)
    monkeypatch.setattr(streams, "_CGROUP", tmp_path)
    for file, text in limits.items():
        if file.startswith("cpu"):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).write_text(f"{text}\n")
    if "hosts" in limits:
        (tmp_path / "hosts.json").write_text(json.dumps(limits["hosts"]) if limits["hosts"] else "")
        monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts.json"))
        monkeypatch.setenv("MLX_RANK", "1")
    if "mpi" in limits:
        monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", limits["mpi"])
    assert streams._cores.__wrapped__() == expected
