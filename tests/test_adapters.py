"""Adapters of PEFT and of mlx_lm, each as real tools wrote them, in the other's format: the same logits, both ways."""

from __future__ import annotations

import json
import re
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_unflatten
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model
from support import HOST
from support.adapters import ADAPTERS, BASE, LAYER, PEFT, TRAINED, config, converted, copied, equal, refusal, tensors

# Their ranks and scales are the same everywhere, and experts are as today's PEFT has them: nothing has to change.
AS_IT_IS = ["attention", "experts", "experts_transformers4_peft017", "gate_up_alone", "rslora_layers", "vision_too"]


def adapted(adapter: Path, fuse: bool = False):
    """The base model in float32, with an adapter by the host's own functions."""
    if HOST < (0, 28, 3) and any(".switch_mlp." in path for path in tensors(adapter)):
        pytest.skip("mlx-lm 0.28.2 runs no adapters of experts, of any model")
    model, _ = load_model(BASE)
    model.set_dtype(mx.float32)
    load_adapters(model, str(adapter)).eval()
    if fuse:  # as mlx_lm.fuse does
        model.update_modules(tree_unflatten([(n, m.fuse()) for n, m in model.named_modules() if hasattr(m, "fuse")]))
    return model


def error(model, golden: Path) -> float:
    expected = mx.load(str(golden / "golden.safetensors"))
    return mx.abs(model(expected["ids"]) - expected["logits"]).max().item()


# --- PEFT → mlx_lm --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fuse", [False, True], ids=["beside", "fused"])
@pytest.mark.parametrize("name", PEFT)
def test_an_adapter_of_peft_gives_the_logits_that_peft_merges(name, fuse, tmp_path):
    out = converted(ADAPTERS / name, tmp_path)
    assert error(adapted(out, fuse), ADAPTERS / name) < 1e-4


@pytest.mark.parametrize("name", PEFT)
def test_it_is_what_the_host_trains_itself(name, tmp_path):
    """Float32, one rank and one scale, and no tensor beside those of the modules that are listed."""
    out = converted(ADAPTERS / name, tmp_path)
    parameters = config(out)["lora_parameters"]
    assert {array.dtype for array in tensors(out).values()} == {mx.float32}
    assert {path.rpartition(".")[0] for path in tensors(out)} == set(parameters["keys"])
    for path, array in tensors(out).items():
        if path.endswith("lora_a"):
            assert array.shape[1] == parameters["rank"]


def test_a_scale_that_all_share_stays_one(tmp_path):
    out = converted(ADAPTERS / "experts", tmp_path)
    assert config(out)["lora_parameters"] | {"keys": None} == {"rank": 2, "scale": 1.5, "dropout": 0.0, "keys": None}
    out = converted(ADAPTERS / "rslora_layers", tmp_path)
    assert config(out)["lora_parameters"]["scale"] == pytest.approx(3 / 4**0.5)


def test_layers_without_an_adapter_get_none(tmp_path):
    keys = config(converted(ADAPTERS / "rslora_layers", tmp_path))["lora_parameters"]["keys"]
    assert {key.split(".")[3] for key in keys} == {"0", "2"}


def test_dropout_and_the_base_model_are_kept_for_further_training(tmp_path):
    folder = copied(tmp_path, "attention", lora_dropout=0.1, base_model_name_or_path="Qwen/Qwen3-VL-30B-A3B-Instruct")
    out = converted(folder, tmp_path, None)
    assert config(out)["model"] == "Qwen/Qwen3-VL-30B-A3B-Instruct"
    assert config(out)["lora_parameters"]["dropout"] == 0.1
    assert config(converted(out, tmp_path, None))["lora_dropout"] == 0.1


def test_adapters_of_vision_layers_are_left_out_with_a_notice(tmp_path, caplog):
    converted(ADAPTERS / "vision_too", tmp_path)
    assert "the adapters of 8 vision layers" in caplog.text


def test_copies_of_base_weights_are_left_out_with_a_notice(tmp_path, caplog):
    converted(ADAPTERS / "dora", tmp_path)
    assert "lm_head.base_layer.weight" in caplog.text


def test_16_bit_adapters_are_the_same_numbers_in_float32(tmp_path):
    narrow = copied(tmp_path, change=lambda found: {name: a.astype(mx.bfloat16) for name, a in found.items()})
    out = converted(narrow, tmp_path)
    wide = copied(tmp_path / "wide", change=lambda _: {n: a.astype(mx.float32) for n, a in tensors(narrow).items()})
    assert equal(tensors(out), tensors(converted(wide, tmp_path)))


# --- and back -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PEFT)
def test_there_and_back_is_the_same_adapter(name, tmp_path):
    there = converted(ADAPTERS / name, tmp_path)
    back = converted(there, tmp_path)
    assert error(adapted(converted(back, tmp_path)), ADAPTERS / name) < 1e-4
    original, returned = tensors(ADAPTERS / name), tensors(back)
    if name in AS_IT_IS:
        assert equal({n: a for n, a in original.items() if ".visual." not in n}, returned)
    for tensor in original.keys() & returned.keys():  # ranks that were filled up are cut again
        if "transformers5_peft018" not in name and "peft019" not in name:  # the others of the two orders
            assert original[tensor].shape == returned[tensor].shape


@pytest.mark.parametrize("name", TRAINED)
def test_an_adapter_of_mlx_lm_becomes_the_files_that_peft_has_loaded(name, tmp_path):
    """The golden logits are those of real PEFT with these files, with transformers 5 and 4.57."""
    out = converted(ADAPTERS / name / "mlx", tmp_path)
    assert equal(tensors(out), tensors(ADAPTERS / name / "peft"))
    assert config(out) | {"base_model_name_or_path": "official"} == config(ADAPTERS / name / "peft")
    assert error(adapted(ADAPTERS / name / "mlx"), ADAPTERS / name) < 1e-4


@pytest.mark.parametrize("name", TRAINED)
def test_an_adapter_of_mlx_lm_comes_back_from_peft_as_it_was(name, tmp_path):
    original = tensors(ADAPTERS / name / "mlx")
    back = tensors(converted(ADAPTERS / name / "peft", tmp_path))
    up_alone = {path for path in back if ".gate_proj." in path and path not in original}
    assert equal(original, {path: array for path, array in back.items() if path not in up_alone})
    assert not any(back[path].any().item() for path in up_alone if path.endswith("lora_b"))


def test_experts_as_mlx_lm_0_28_2_stored_them(tmp_path):
    def flatten(found):
        for path, array in found.items():
            if "switch_mlp" in path and path.endswith("lora_a"):
                found[path] = array.flatten(0, 1)

    folder = copied(tmp_path, "trained_lora/mlx", flatten)
    assert equal(tensors(converted(folder, tmp_path)), tensors(ADAPTERS / "trained_lora" / "peft"))


# --- names and layouts of trainers ----------------------------------------------------------------------------------

NAMES = {
    "ms-swift": lambda n: re.sub(r"(lora_\w+)((\.weight)?)$", r"\1.default\2", n.removeprefix("base_model.model.")),
    "a training state": lambda n: re.sub(r"(lora_\w+)((\.weight)?)$", r"\1.default\2", n),
    "a text model": lambda n: n.replace("model.language_model.layers", "model.layers"),
    "transformers before 4.52": lambda n: n.replace("model.language_model.layers", "language_model.model.layers"),
    "twice wrapped": lambda n: f"base_model.model.{n}",
}


@pytest.mark.parametrize("writer", NAMES)
@pytest.mark.parametrize("name", ["attention", "experts", "everything"])
def test_names_of_other_writers_are_understood(name, writer, tmp_path):
    folder = copied(tmp_path, name, lambda found: {NAMES[writer](n): a for n, a in found.items()})
    assert equal(tensors(converted(folder, tmp_path)), tensors(converted(ADAPTERS / name, tmp_path)))


def grouped(found: dict[str, mx.array]) -> None:
    """Put the columns of B as Unsloth trained them for some months: all of an expert side by side."""
    for name, array in found.items():
        if ".experts." in name and ".lora_B." in name:
            found[name] = array.reshape(array.shape[0], -1, 5).swapaxes(1, 2).reshape(array.shape)


@pytest.mark.parametrize("layout", ["grouped_by_expert", "rank_major", None])
def test_experts_of_unsloth_are_read_by_their_layout(layout, tmp_path, caplog):
    marks = {"auto_mapping": {"unsloth_fixed": True}} | ({"lora_B_layout": layout} if layout else {})
    folder = copied(tmp_path, change=grouped if layout == "grouped_by_expert" else None, **marks)
    assert equal(tensors(converted(folder, tmp_path)), tensors(converted(ADAPTERS / "experts", tmp_path)))
    assert ("lora_B_layout" in caplog.text) == (layout is None)


def test_an_attention_adapter_of_unsloth_is_no_question(tmp_path, caplog):
    converted(copied(tmp_path, "attention", auto_mapping={"unsloth_fixed": True}), tmp_path)
    assert not caplog.text


# --- which way the experts lie --------------------------------------------------------------------------------------


def test_one_parameter_alone_takes_the_hidden_size_of_the_base_model(tmp_path):
    message = refusal(ADAPTERS / "gate_up_alone", tmp_path, None)
    assert message.startswith(
        "base_model.model.model.language_model.layers.0.mlp.experts: expected the base model's config.json"
    )
    assert "--model" in message
    named = copied(tmp_path, "gate_up_alone", base_model_name_or_path=str(BASE))
    assert error(adapted(converted(named, tmp_path, None)), ADAPTERS / "gate_up_alone") < 1e-4


def pair(rank: int, experts: int, x: int, y: int, end: str) -> dict[str, mx.array]:
    name = LAYER.format(0) + f"mlp.experts{end}."
    return {
        f"{name}lora_A.weight": mx.random.normal((rank * experts, x)),
        f"{name}lora_B.weight": mx.random.normal((y, rank * experts)),
    }


@pytest.mark.parametrize(("h", "i"), [(16, 8), (8, 8), (12, 5)], ids=["H = 2I", "H = I", "no two equal"])
@pytest.mark.parametrize("over_in", [True, False])
def test_a_square_parameter_lies_as_the_other_does(h, i, over_in, tmp_path):
    mx.random.seed(h + over_in)
    found = {}
    for end, (inputs, outputs) in {".base_layer": (h, 2 * i), "": (i, h)}.items():
        found |= pair(3, 4, *((inputs, outputs) if over_in else (outputs, inputs)), end)
    folder = copied(tmp_path, change=lambda _: found, r=3, lora_alpha=3)
    out = tensors(converted(folder, tmp_path, None))
    a, b = found.values().__iter__().__next__().reshape(4, 3, -1), list(found.values())[1].reshape(-1, 3, 4)
    expected = mx.einsum("yre,erx->exy" if not over_in else "yre,erx->eyx", b, a)
    path = "language_model.model.layers.0.mlp.switch_mlp."
    parts = [out[f"{path}{p}_proj.lora_b"] @ out[f"{path}{p}_proj.lora_a"] for p in ("gate", "up")]
    assert mx.allclose(mx.concatenate(parts, axis=1), expected, atol=1e-5).item()


def test_a_square_parameter_alone_is_refused(tmp_path):
    folder = copied(tmp_path, change=lambda _: pair(2, 4, 16, 16, ""), target_parameters=["mlp.experts.gate_up_proj"])
    (tmp_path / "base").mkdir()
    text = json.loads((BASE / "config.json").read_text())
    text["text_config"] |= {"hidden_size": 16, "moe_intermediate_size": 8}
    (tmp_path / "base" / "config.json").write_text(json.dumps(text))
    assert "found equal numbers of inputs and outputs" in refusal(folder, tmp_path, tmp_path / "base")


def test_layers_that_contradict_each_other_are_refused(tmp_path):
    def turn(found):
        for end in (".base_layer", ""):
            a, b = (LAYER.format(2) + f"mlp.experts{end}.lora_{part}.weight" for part in "AB")
            found[a], found[b] = found[b].T, found[a].T

    assert "in all layers or in none" in refusal(copied(tmp_path, change=turn), tmp_path)


# --- memory ---------------------------------------------------------------------------------------------------------


def test_a_layer_at_a_time_is_in_memory(tmp_path):
    """Of 12, both ways."""

    def layers(_):
        found = {}
        for layer in range(12):
            for end, (x, y) in {".base_layer": (768, 512), "": (256, 768)}.items():
                found |= {n.replace("layers.0", f"layers.{layer}"): a for n, a in pair(8, 16, x, y, end).items()}
        return found

    folder = copied(tmp_path, change=layers, r=8)
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert size > 14_000_000
    for source in (folder, tmp_path / "out0"):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        converted(source, tmp_path, None)
        assert mx.get_peak_memory() - before < size / 3


# --- an axis for the experts ----------------------------------------------------------------------------------------


def with_axis(found: dict[str, mx.array], last: bool, renamed: bool, rank: int = 2) -> dict[str, mx.array]:
    """PEFT's matrices of fused experts as trainers on Megatron have them: with an axis for the experts.

    Args:
        last: whether it is the last one of B.
        renamed: whether the tensors go by the names of parameters.
    """
    changed = {}
    for name, array in found.items():
        if ".mlp.experts." in name:
            experts = array.shape["lora_B" in name] // rank
            if "lora_A" in name:
                array = array.reshape(experts, rank, -1)
            else:
                array = array.reshape(-1, rank, experts)
                array = array if last else array.transpose(2, 0, 1)
            if renamed:
                name = name.replace("experts.lora", "experts.down_proj.lora")
                name = name.replace("experts.base_layer.lora", "experts.gate_up_proj.lora")
        changed[name] = mx.contiguous(array)
    return changed


@pytest.mark.parametrize("renamed", [False, True], ids=["wrapped", "by-parameter"])
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_an_adapter_with_an_axis_for_the_experts_is_converted_exactly(last, renamed, tmp_path):
    folder = copied(tmp_path, change=lambda found: with_axis(found, last, renamed))
    out = converted(folder, tmp_path, None)
    assert equal(tensors(out), tensors(converted(ADAPTERS / "experts", tmp_path, None)))
    if HOST >= (0, 28, 3):
        assert error(adapted(out), ADAPTERS / "experts") < 1e-4


def test_projections_of_all_experts_may_be_apart(tmp_path):
    def change(found):
        changed = {}
        for name, array in with_axis(found, False, True).items():
            if ".gate_up_proj." not in name:
                changed[name] = array
                continue
            halves = mx.split(array, 2, axis=1) if "lora_B" in name else (array, array)
            for half, part in zip(("gate_proj", "up_proj"), halves, strict=True):
                changed[name.replace("gate_up_proj", half)] = mx.contiguous(part)
        return changed

    out = converted(copied(tmp_path, change=change), tmp_path, None)
    assert equal(tensors(out), tensors(converted(ADAPTERS / "experts", tmp_path, None)))


@pytest.mark.parametrize(
    "change",
    [
        lambda a, b: (a, b[:-1]),
        lambda a, b: (a[:-1], b),
        lambda a, b: (a, b[..., :-1]),
        lambda a, b: (a[:, :-1], b),
        lambda a, b: (a[0], b),
        lambda a, b: (a, b[0]),
        lambda a, b: (a[:1], b),
    ],
)
@pytest.mark.parametrize("renamed", [False, True])
def test_matrices_with_such_an_axis_have_to_belong_together(renamed, change, tmp_path):
    def changed(found):
        found = with_axis(found, False, renamed)
        names = [
            name for name in found if ".layers.0.mlp.experts." in name and ("base_layer" in name or "gate_up" in name)
        ]
        pair = change(*(found[name] for name in sorted(names)))
        return found | dict(zip(sorted(names), map(mx.contiguous, pair), strict=True))

    message = refusal(copied(tmp_path, change=changed), tmp_path)
    assert "expected lora_A [experts, 2, in] and lora_B [experts, out, 2] or [out, 2, experts]" in message


def test_which_axis_has_the_experts_is_not_guessed(tmp_path):
    shape = {"lora_A": (2, 2, 40), "lora_B": (2, 2, 2)}
    folder = copied(
        tmp_path,
        change=lambda found: {
            f"{LAYER.format(0)}mlp.experts.down_proj.{kind}.weight": mx.ones(each) for kind, each in shape.items()
        },
    )
    assert "[experts, out, 2] or [out, 2, experts]" in refusal(folder, tmp_path, None)
