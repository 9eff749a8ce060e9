"""An error names a tensor as it is in the file, in every layout and format."""

from __future__ import annotations

import pickle
import re

import numpy as np
import pytest
from support import FIXTURES, QUANTIZED, thorough
from support.changes import check_sentence
from support.checkpoints import Checkpoint, refusal

from mlx_lm_qwen3vlmoe.errors import CheckpointError, MissingTensorError
from mlx_lm_qwen3vlmoe.layouts.names import StoredNames, as_stored, layer_and_suffix
from mlx_lm_qwen3vlmoe.quantization import IGNORED

LAYOUTS = sorted(path.parent.name for path in FIXTURES.glob("*/golden.safetensors"))
FORMATS = sorted(path.parent.name for path in QUANTIZED.glob("*/golden.safetensors"))
FEW = ("awq-g32-bf16", "gptq-w4-actorder", "fp8-perexpert", "fp8-fused-official", "ct-nvfp4", "bnb-nf4-double")


# What is missing is named by another tool's suffix for it.
ALIASED = {"angelslim-fp8-static", "torchao-experts-int8"}
MIXED = {"autoround-mixed-experts", "ct-experts-float", "autoround-widths-sym", "autoround-widths-asym"}


def some(checkpoint: Checkpoint) -> list[str]:
    """A tensor of each kind that a layer cannot be without."""
    kinds: dict[str, str] = {}
    for name, (_, array) in checkpoint.tensors.items():
        if "vis" in name or array.ndim == 0 or name.endswith((*IGNORED, "pre_quant_scale", "lm_head.weight")):
            continue
        if name.endswith(("weight", "_proj", "packed", "scales", "scale", "inv")):
            kinds.setdefault(re.sub(r"\d+", "N", re.sub("(?:gate|up|[qvo])_proj", "down_proj", name)), name)
    return list(kinds.values())


@pytest.mark.parametrize("name", [*LAYOUTS, *FEW, *thorough(*(name for name in FORMATS if name not in FEW))])
def test_a_tensor_that_is_missing_or_broken_is_named_as_in_the_file(name, tmp_path):
    for tensor in some(Checkpoint(name)):
        checkpoint = Checkpoint(name)
        dtype, array = checkpoint.tensors.pop(tensor)
        message = refusal(checkpoint.save(tmp_path))
        check_sentence(message)
        where = message.partition(": expected ")[0]
        mixed = name in MIXED and path(where) == path(tensor)
        aliased = name in ALIASED and where.rpartition(".")[0] == tensor.rpartition(".")[0]
        assert where == tensor or mixed or aliased, message
        checkpoint.tensors[tensor] = dtype, np.tile(array, (3, *[1] * array.ndim))  # one axis more
        message = refusal(checkpoint.save(tmp_path))
        check_sentence(message)
        where = message.partition(": expected ")[0]
        assert where in checkpoint.tensors, message
        assert path(where) == path(tensor), message


def path(name: str) -> str:
    """The layer that a tensor is of."""
    return layer_and_suffix(name)[0]


def test_names_are_looked_up_after_an_error_alone():
    """Not one of 100000 names is looked at where a checkpoint is right."""

    class Names(dict):
        def __iter__(self):
            raise AssertionError

    with as_stored(Names()):
        pass


@pytest.mark.parametrize(
    ("host", "missing", "stored"),
    [
        ("layers.0.self_attn.q_proj.weight", False, "model.language_model.layers.0.self_attn.q_proj.qweight"),
        ("layers.7.self_attn.q_proj.scales", True, "model.language_model.layers.7.self_attn.q_proj.scales"),
        ("layers.0.mlp.switch_mlp.up_proj.weight", False, "model.language_model.layers.0.mlp.experts.up_proj.0.weight"),
        ("layers.3.mlp.experts.5.up_proj.weight", True, "model.language_model.layers.3.mlp.experts.up_proj.5.weight"),
        ("layers.3.mlp.experts.5.up_proj.scales", True, "model.language_model.layers.3.mlp.experts.up_proj.5.scales"),
        ("layers.0.mlp.experts.gate_up_proj.weight", True, "model.language_model.layers.0.mlp.experts.gate_up_proj"),
        ("norm.weight", True, "model.language_model.norm.weight"),
        ("lm_head.weight", True, "lm_head.weight"),
    ],
)
def test_a_name_of_the_hosts_becomes_that_of_the_file(host, missing, stored):
    """Of a tensor that is missing, the one that it would have beside the others."""
    prefix = "model.language_model.layers.0"
    names = StoredNames([f"{prefix}.self_attn.q_proj.qweight", f"{prefix}.mlp.experts.up_proj.0.weight"])
    prefix = "language_model." if host.startswith("lm_head") else "language_model.model."
    assert names(prefix + host, missing) == stored


def test_an_error_keeps_its_parts_and_survives_pickling():
    with pytest.raises(MissingTensorError) as caught, as_stored(["model.layers.0.self_attn.q_proj.weight"]):
        raise MissingTensorError("language_model.model.norm.weight", "here", "nothing", "Look elsewhere.")
    error = pickle.loads(pickle.dumps(caught.value))
    assert type(error) is MissingTensorError
    assert str(error) == "model.norm.weight: expected here, found nothing. Look elsewhere."
    assert str(CheckpointError("a sentence alone")) == "a sentence alone"
