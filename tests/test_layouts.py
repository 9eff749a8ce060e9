"""Checkpoints as real tools wrote them (see make_fixtures/README.md) give torch's logits."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model
from support import FIXTURES, OURS, QUANTIZED

from mlx_lm_qwen3vlmoe.inspection.report import inspect
from mlx_lm_qwen3vlmoe.layouts.experts import GATE_UP, IN_OUT, MISCUT, OUT_IN, SINGLE, STACKED

NAMES = sorted(path.parent.name for path in FIXTURES.glob("*/golden.safetensors"))
TOLERANCE = 1e-4  # of the largest logit, in float32


def relative_error(model, golden) -> float:
    found = model(golden["ids"]).astype(mx.float32)
    return (mx.abs(found - golden["logits"]).max() / mx.abs(golden["logits"]).max()).item()


def load(name_or_path):
    path = FIXTURES / name_or_path
    model, config = load_model(path, lazy=True)
    assert type(model).__module__ == OURS
    model.set_dtype(mx.float32)  # the goldens are float32 on the stored weights
    return model, config


def test_there_are_fixtures_of_every_layout():
    assert len(NAMES) >= 20


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_torchs(name):
    model, _ = load(name)
    assert relative_error(model, mx.load(str(FIXTURES / name / "golden.safetensors"))) < TOLERANCE


@pytest.mark.parametrize("name", ["official", "resave_5_23_0", "per_expert", "tied"])
def test_logits_token_by_token_through_the_cache_equal_torchs(name):
    from mlx_lm.models.cache import make_prompt_cache

    model, _ = load(name)
    golden = mx.load(str(FIXTURES / name / "golden.safetensors"))
    cache = make_prompt_cache(model)
    steps = [model(golden["ids"][:, n : n + 1], cache=cache) for n in range(golden["ids"].shape[1])]
    found = mx.concatenate(steps, axis=1)
    assert (mx.abs(found - golden["logits"]).max() / mx.abs(golden["logits"]).max()).item() < TOLERANCE


def test_input_embeddings_stand_in_for_token_ids():
    model, _ = load("official")
    golden = mx.load(str(FIXTURES / "official" / "golden.safetensors"))
    embeddings = model.model.embed_tokens(golden["ids"])
    found = model(golden["ids"], input_embeddings=embeddings)
    assert mx.array_equal(found, model(golden["ids"]))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "yarn"])
def test_what_convert_saves_gives_the_same_logits_in_the_unchanged_host(name, tmp_path, error_in_the_unchanged_host):
    """The whole way: load, normalize, save as mlx-lm does, load with MLX_LM_PLUGINS=0 in another process."""
    from mlx_lm.utils import save_config, save_model

    model, config = load(name)
    save_model(tmp_path, model)
    save_config(config, tmp_path / "config.json")
    assert error_in_the_unchanged_host(tmp_path, FIXTURES / name / "golden.safetensors") < TOLERANCE


def test_a_saved_config_is_normalized_once(tmp_path):
    """Loading what was saved changes nothing any more."""
    from mlx_lm.utils import save_config, save_model

    model, config = load("resave_5_23_0")
    save_model(tmp_path, model, donate_model=False)
    save_config(config, tmp_path / "config.json")
    saved = json.loads((tmp_path / "config.json").read_text())
    _, config = load(tmp_path)
    assert config == saved


def test_yarn_changes_the_logits_beyond_what_plain_rope_gives(tmp_path):
    """The golden is longer than the original context, so that YaRN ignored would show."""
    shutil.copytree(FIXTURES / "yarn", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["rope_scaling"]["rope_type"] = "default"
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, _ = load(tmp_path)
    assert relative_error(model, mx.load(str(tmp_path / "golden.safetensors"))) > 100 * TOLERANCE


def test_a_tied_head_shares_the_embeddings_and_is_not_a_copy():
    model, _ = load_model(FIXTURES / "tied", lazy=True)
    mx.eval(model.parameters())
    rows = model.language_model.model.embed_tokens.weight
    assert model.language_model.lm_head.weight is rows


@pytest.mark.parametrize("name", ["mlx_vlm_4bit", "mlx_lm_4bit"])
def test_a_quantized_checkpoint_stays_packed(name):
    model, config = load_model(FIXTURES / name)
    assert config["quantization"]["bits"] == 4
    experts = next(layer.mlp.switch_mlp for layer in model.layers if "switch_mlp" in layer.mlp)
    assert type(experts.up_proj).__name__ == "QuantizedSwitchLinear"
    assert experts.up_proj.weight.dtype == mx.uint32


@pytest.mark.parametrize(
    ("folder", "layout"),
    [
        (FIXTURES / "official", IN_OUT),
        (FIXTURES / "resave_5_23_0", OUT_IN),
        (FIXTURES / "square_gate", IN_OUT),
        (FIXTURES / "per_expert", SINGLE),
        (FIXTURES / "mlx_lm_4bit", STACKED),
        (QUANTIZED / "ct-modelfree-fp8-block", MISCUT),
        (QUANTIZED / "modelopt-int4-awq", SINGLE),  # whose packed shapes are those of a wrong cut of another size
        (QUANTIZED / "autoround-gate-up-projs", GATE_UP),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_inspect_names_the_layout(folder, layout):
    assert inspect(str(folder))["layout"] == layout.name
