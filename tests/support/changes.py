"""Changes that break a checkpoint, as functions of one."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from mlx_lm_qwen3vlmoe import CheckpointError

from .checkpoints import TYPES, Checkpoint, bfloat16, refusal

LAYERS = "model.language_model.layers"
FUSED, EXPERT, MLX = f"{LAYERS}.0.mlp.experts", f"{LAYERS}.2.mlp.experts.1", "language_model.model.layers"


def drop(*keys):
    return lambda c: [c.tensors.pop(key) for key in keys]


def rename(key, new):
    return lambda c: c.tensors.update({new: c.tensors.pop(key)})


def add(key, array):
    return lambda c: c.tensors.update({key: array})


def cut(key, *size):
    return lambda c: c.change(key, lambda array: array[tuple(map(slice, size))])


def turn(key):
    return lambda c: c.change(key, lambda array: np.ascontiguousarray(array.swapaxes(-1, -2)))


def reshape(key, *shape):
    return lambda c: c.change(key, lambda array: array.reshape(shape))


def text(**fields):
    return lambda c: c.text.update(fields)


def top(**fields):
    return lambda c: c.config.update(fields)


def quantization(**fields):
    return lambda c: c.config["quantization_config"].update(fields)


def without(*fields):
    return lambda c: [(c.text if field in c.text else c.config).pop(field) for field in fields]


def prefixed(prefix):
    def change(c):
        c.tensors = {prefix + key.removeprefix("model.language_model."): array for key, array in c.tensors.items()}

    return change


def float_expert(name):
    """One projection of one expert left unquantized."""

    def change(c):
        for key in [key for key in c.tensors if key.startswith(name)]:
            del c.tensors[key]
        c.tensors[f"{name}.weight"] = bfloat16(np.ones((64, 96)))

    return change


def dense(c):
    """A dense Qwen3-VL model: no field of experts, and an MLP in every layer."""
    for field in ("moe_intermediate_size", "num_experts", "num_experts_per_tok", "mlp_only_layers"):
        del c.text[field]
    c.tensors = {key: array for key, array in c.tensors.items() if ".experts." not in key and ".mlp.gate." not in key}


def omni(c):
    c.config = {"model_type": "qwen3_vl_moe", "thinker_config": {"text_config": c.text}}


def scheme(**fields):
    return lambda c: c.config["quantization_config"]["config_groups"]["group_0"]["weights"].update(fields)


ONE = bfloat16(np.ones(1))
FOUND_BOTH = "found both"
MORE_LAYOUTS = "found more than one"
UP, Q = f"{EXPERT}.up_proj", f"{LAYERS}.0.self_attn.q_proj"


def recast(key, dtype):
    """A tensor's values in another type, cut to integers where that has none but integers."""

    def change(c):
        old, array = c.tensors[key]
        values = (array.astype("u4") << 16).view("f4") if old == "BF16" else array
        c.tensors[key] = bfloat16(values) if dtype == "BF16" else (dtype, values.astype(TYPES[dtype]))

    return change


def group(**fields):
    return lambda c: c.config["quantization_config"]["config_groups"]["group_0"].update(fields)


def check_refusal(
    name: str, change, expected: list[str], folder: Path, kind: type[Exception] = CheckpointError
) -> None:
    """A fixture with one change gives one error: a sentence with all of these parts, in the words of the file."""
    checkpoint = Checkpoint(name)
    before = set(checkpoint.tensors)
    change(checkpoint)
    message = refusal(checkpoint.save(folder), kind)
    check_sentence(message)
    check_names(message, before | checkpoint.tensors.keys())
    for part in expected:
        assert part in message


def check_sentence(message: str) -> None:
    """Every value that is filled in reads as a part of a sentence."""
    assert re.fullmatch(r"\S.*: expected \S.*, found \S.*[.?]", message), message
    for odd in ("  ", "\n", "None", "found it", "True", "False", ",,", "mlx.core", "found ."):
        assert odd not in message.replace("…", ""), message


def check_names(message: str, names: set[str]) -> None:
    """What is named first is a tensor of the file, or of one that is whole: another layer's if it has none such."""
    where = message.partition(": expected ")[0]
    if where.startswith(("config.json: ", "quantization_config: ")):
        return
    alike = {re.sub(r"\.\d+\.", ".N.", name) for name in names}
    for name in where.split(", "):
        assert name in names or re.sub(r"\.\d+\.", ".N.", name) in alike, message
