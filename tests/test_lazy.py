"""The order in which lazy arrays are computed: how little is in memory while a checkpoint is loaded or converted."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import sys
import threading
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import load_config, load_model, quantize_model, save_model
from support import OURS, QUANTIZED, ROOT, TINY, thorough

from mlx_lm_qwen3vlmoe import Model, ModelArgs
from mlx_lm_qwen3vlmoe.runtime import lazy, streams

sys.path.insert(0, str(ROOT / "benchmarks"))
from true_size import Sizes, write

SIZES = Sizes(layers=12, experts=64, hidden=512, width=256, heads=8, kv_heads=2, head_dim=64, vocab=512)
LAYER = 64 * 3 * 512 * 256 * 2  # bytes of a layer's experts in 16 bits


@pytest.fixture(autouse=True)
def pieces(monkeypatch):
    """As many pieces as there are of the 30B's layers, whose projections are 16 times as large."""
    monkeypatch.setattr(lazy, "_PIECE", 1 << 20)


def quantized_ones(model) -> dict[str, object]:
    return {path: module for path, module in model.named_modules() if hasattr(module, "to_quantized")}


@pytest.mark.parametrize("layout", ["official", "fp8", *thorough("per-expert", "fp8 fused", "nvfp4")])
def test_converting_has_the_floats_of_little_more_than_a_layer_in_memory(layout, tmp_path):
    """The host saves 5 GB at once, here the whole model, as a hash table orders it."""
    write(tmp_path / "source", SIZES, layout)
    model, config = load_model(tmp_path / "source", lazy=True)
    assert type(model).__module__ == OURS
    model, _ = quantize_model(model, config, 64, 4)
    saved = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    save_model(tmp_path / "out", model, donate_model=True)
    above = (mx.get_peak_memory() - before - saved) / LAYER
    assert above < 1.5


@pytest.mark.parametrize(
    "layout", ["awq", *thorough("awq marlin", "awq gemv_fast", "gptq", "compressed-tensors", "mxfp4")]
)
def test_loading_packed_layers_takes_little_more_than_what_stays(layout, tmp_path):
    write(tmp_path / "source", SIZES, layout)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model, _ = load_model(tmp_path / "source")
    stays = mx.get_active_memory() - before
    assert "scales" in model.layers[0].mlp.switch_mlp.up_proj
    share = (mx.get_peak_memory() - before) / stays
    assert share < 1.15


def depth(array: mx.array, file: Path) -> int:
    """The steps from the tensors of a file to an array, on the longest path."""
    mx.export_to_dot(str(file), array)
    inputs: dict[str, list[str]] = {}
    for source, target in re.findall(r'"?(\w+)"? -> "?(\w+)"?', file.read_text()):
        inputs.setdefault(target, []).append(source)
    steps: dict[str, int] = {}
    while missing := [node for node in inputs if node not in steps]:
        for node in missing:
            if all(source in steps or source not in inputs for source in inputs[node]):
                steps[node] = 1 + max(steps.get(source, 0) for source in inputs[node])
    return max(steps.values(), default=0) // 2  # arrays alternate with what makes them


@pytest.mark.parametrize("name", sorted(file.parent.name for file in QUANTIZED.glob("*/golden.safetensors")))
def test_turns_are_further_apart_than_a_weight_is_from_its_file(name, tmp_path, monkeypatch):
    """Or else the next is decoded beside it. In as many pieces as there are experts."""
    monkeypatch.setattr(lazy, "_PIECE", 1)
    model, _ = load_model(QUANTIZED / name, lazy=True)
    for path, module in quantized_ones(model).items():
        if not hasattr(module, "bits"):
            assert depth(module.weight, tmp_path / "graph.dot") < lazy.longest_path(module.weight), path


def test_the_layers_of_the_end_are_converted_without_those_before(tmp_path):
    """Nothing that is loaded depends on another layer: only what is quantized together is ordered."""
    write(tmp_path / "source", SIZES, "fp8")
    model, _ = load_model(tmp_path / "source", lazy=True)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(model.layers[-1].parameters())
    assert mx.get_peak_memory() - before < 3 * LAYER


def test_modules_in_turn_are_quantized_as_the_host_does_it():
    model, config = load_model(TINY)
    expected = {path: type(m).to_quantized(m, 32, 4) for path, m in quantized_ones(model).items()}
    quantize_model(model, config, 32, 4, quant_predicate=lambda path, module: True)
    found = {path: module for path, module in model.named_modules() if path in expected}
    assert found.keys() == expected.keys()
    for path, module in expected.items():
        assert type(found[path]) is type(module)
        for name, array in module.parameters().items():
            assert mx.array_equal(found[path][name], array), path


@pytest.mark.parametrize("shape", [(48, 512, 768), (20000, 768)])
@pytest.mark.parametrize("cores", [1, 2, 3])
def test_a_large_layer_is_quantized_in_pieces_to_the_same_values(shape, cores, monkeypatch):
    """On the CPU, by every core: experts a few at a time, and the rows of a head."""
    monkeypatch.setattr(streams, "_cores", lambda: cores)
    monkeypatch.setattr(streams, "_own", threading.local())
    monkeypatch.setattr(streams, "_free", [])
    weight = mx.random.normal(shape).astype(mx.bfloat16)
    names = ("weight", "scales", "biases")
    used = []

    def quantized(part: slice) -> dict[str, mx.array]:
        used.append(mx.default_stream(mx.default_device()))
        return dict(zip(names, mx.quantize(weight[part], 64, 4), strict=True))

    found = lazy.in_pieces(quantized(slice(len(weight))), quantized)
    assert len(used) > 3
    assert len({str(stream) for stream in used}) == streams.count()
    for name, array in zip(names, mx.quantize(weight, 64, 4), strict=True):
        assert mx.array_equal(found[name], array)


@pytest.mark.parametrize("name", sorted(file.parent.name for file in QUANTIZED.glob("*/golden.safetensors")))
def test_experts_one_by_one_become_what_all_at_once_do(name, monkeypatch):
    def parameters(piece: int):
        monkeypatch.setattr(lazy, "_PIECE", piece)
        model, config = load_model(QUANTIZED / name, lazy=True)
        return dict(tree_flatten(model.parameters())), config

    (whole, config), (pieces, other) = parameters(1 << 30), parameters(1)
    assert config == other
    assert whole.keys() == pieces.keys()
    for path, array in whole.items():
        assert pieces[path].dtype == array.dtype, path
        assert mx.array_equal(pieces[path], array, equal_nan=True), path


@pytest.mark.parametrize("ordered", [0, 1, 2])
def test_act_order_of_some_experts_makes_all_of_them_float(ordered, monkeypatch):
    """Whatever of them are decoded together."""
    monkeypatch.setattr(lazy, "_PIECE", 1)
    folder = QUANTIZED / "gptq-w4-actorder"
    weights = mx.load(str(folder / "model.safetensors"))
    config = load_config(folder)
    expected = Model(ModelArgs.from_dict(copy.deepcopy(config))).sanitize(weights)
    name = next(name for name in weights if name.endswith(f"experts.{ordered}.up_proj.g_idx"))
    size = config["quantization_config"]["group_size"]
    weights[name] = mx.arange(weights[name].size, dtype=mx.int32) // size
    found = Model(ModelArgs.from_dict(config)).sanitize(weights)
    path = next(name for name in found if name.endswith("switch_mlp.up_proj.weight"))
    assert found[path].dtype == expected[path].dtype
    others = [n for n in range(found[path].shape[0]) if n != ordered]
    assert mx.array_equal(found[path][mx.array(others)], expected[path][mx.array(others)])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_quantizes_its_own_weights(copied):
    model, config = load_model(TINY)
    other = copied(model)
    for module in quantized_ones(model).values():
        module.weight = mx.zeros_like(module.weight)
    expected, config = load_model(TINY)
    for each in (other, expected):
        quantize_model(each, config, 32, 4)
    for (path, found), (_, array) in zip(
        tree_flatten(other.parameters()), tree_flatten(expected.parameters()), strict=True
    ):
        assert mx.array_equal(found, array), path


def test_programs_see_the_parameters_of_the_hosts_method():
    """The host looks at the signature for ``global_scale``."""
    model, _ = load_model(TINY)
    for module in quantized_ones(model).values():
        own = inspect.signature(type(module).to_quantized.__get__(module))
        assert inspect.signature(module.to_quantized) == own
    assert type(model.layers[0].mlp.switch_mlp.up_proj) is SwitchLinear
