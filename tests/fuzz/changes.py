"""What a change to a checkpoint is, and which ones nobody could notice."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from checkpoints import Array, Checkpoint


@dataclass
class Change:
    """One change.

    Attributes:
        kind: what was done, in the words of the report.
        target: the field or class of tensors it was done to, with ``N`` for numbers.
        detail: the field or tensor, and the value.
        excuse: why nobody could notice that the numbers are others; empty if somebody could.
    """

    kind: str
    target: str
    detail: str
    excuse: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


VALUES = "the values are others, their types and shapes the same"
ANOTHER = "the values are another checkpoint's"
TURNED = "one expert tensor is square, and the others of all layers are turned: another writer's layout"
LAST_FILE = "the host merges the files, and one of the two tensors is gone before the package is asked"
FITTING = "tensors and their description were both changed, and may fit each other"
TIED = "a checkpoint without a head whose config ties it"

# Fields whose other values are another model that is as good, or whose absence means a default.
MEANINGS = {
    "rope_theta": "another base of RoPE",
    "rope_scaling": "RoPE without YaRN, or with it",
    "rope_parameters": "RoPE of the default base, or with YaRN",
    "rope_type": "RoPE without YaRN, or with it",
    "type": "RoPE without YaRN, or with it",
    "factor": "YaRN of another length",
    "original_max_position_embeddings": "YaRN of another length",
    "max_position_embeddings": "the original length of YaRN where no other is given",
    "attention_factor": "another factor of YaRN",
    "beta_fast": "another ramp of YaRN",
    "beta_slow": "another ramp of YaRN",
    "mscale": "another factor of YaRN",
    "mscale_all_dim": "another factor of YaRN",
    "rms_norm_eps": "another epsilon",
    "num_experts_per_tok": "another number of experts for a token",
    "checkpoint_format": "gptq and gptq_v2 differ only in the zero points that the words mean",
    "weight_block_size": "blocks of another size, as many of them",
    "block_structure": "blocks of another size, as many of them",
}


def meaning(path: tuple[Any, ...], value: Any) -> str:
    """The excuse for a field's new value (None: gone), if it has one."""
    if "quantization_config" in path and (described := [name for name in path if name in DESCRIBED]):
        return DESCRIBED[described[-1]]
    if path[-1:] == ("dtype",) and path[1:-1] in ((), ("text_config",)):  # of one that is not known, bfloat16
        return "the type that floats are decoded to, and rounded"
    names = [name for name in path if name in MEANINGS]
    if not names or path[1:2] == ("vision_config",):
        return ""
    field = names[-1]
    if value is None or isinstance(value, dict):
        good = field != "num_experts_per_tok"
    elif field in ("rope_type", "type"):
        good = value in ("default", "yarn", "mrope")
    elif field == "checkpoint_format":
        good = value in ("gptq", "gptq_v2")
    else:
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
        good = good or (isinstance(value, list) and field in ("weight_block_size", "block_structure"))
    return MEANINGS[field] if good else ""


# The same of ``quantization_config``: what only the description can tell.
DESCRIBED = {
    "packing_format": "AutoRound's formats differ only in the zero points, or numbers, that the words mean",
    "data_type": "AutoRound's MXFP4 and MXINT4 look alike",
    "pack_method": "the order of the numbers in a word",
    "layer_quant_config": "Quark's types of one width look alike",
    "global_quant_config": "the same",
    "pre_quant_scale": "ModelOpt folds it into other weights, where it can",
    "quant_type": "torchao's integers of 4 and 8 bits look alike",
}

_CLASSES = {"F32": "float", "F16": "float", "BF16": "float", "U32": "I32", "F8_E4M3": "U8", "F8_E8M0": "U8"}


def signature(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What can be seen of tensors without their values: kind of type (any float for any other) and shape, if any."""
    return {
        name: (_CLASSES.get(d, d), array.shape if array.size > 1 else ())
        for name, (d, array) in checkpoint.tensors.items()
    }


def is_index(name: str, array: Array) -> bool:
    """Whether the values are places in another tensor, so that not all of them are as good."""
    return bool(re.search(r"g_idx|perm", name)) and array[1].ndim == 1 and array[1].size > 0


def class_of(name: str) -> str:
    """The name of a tensor without its numbers; one class for all of vision."""
    if "visual" in name or "vision_tower" in name:
        return "vision"
    return re.sub(r"\.\d+(?=\.|$)", ".N", name)


def layer_of(name: str) -> str:
    return name.rpartition(".")[0]
