"""The config of any writer → the text config that the host's ``qwen3_moe.ModelArgs`` takes.

The config is normalized **in place**: mlx-lm saves that very dict with ``convert`` and ``fuse``, so what it saves loads
in a host without this package.

| field              | official release, transformers 4.57           | transformers ≥ 5            | normalized      |
|--------------------|-----------------------------------------------|-----------------------------|-----------------|
| text fields        | in ``text_config``; some trainers: at the top | in ``text_config``          | ``text_config`` |
| text model alone   | at the top; its type: ``qwen3_vl_moe_text``   | the same                    | as all others   |
| experts            | ``num_experts``                               | ``num_local_experts``       | ``num_experts`` |
| RoPE               | ``rope_theta``, ``rope_scaling``              | both in ``rope_parameters`` | as 4.57         |
| no theta means     | 5000000                                       | 500000                      | the number      |
| ``norm_topk_prob`` | written, but ignored: always true             | not written: always true    | true            |
| tied embeddings    | ``tie_word_embeddings`` at the top, in ``text_config``, both or neither     | false: `tied`   |

Sources: ``configuration_qwen3_vl_moe.py`` and ``modeling_rope_utils.py`` of transformers 4.57.6 and 5.23.0.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from typing import Any

from mlx_lm.models.base import BaseModelArgs

from . import quantization
from .errors import CORRECT, LARGEST, UNSUPPORTED, USE_ITS_MODELS, check_positive, config_error
from .fields.nesting import DEFAULTS, REQUIRED, nested
from .fields.unread import report_unread
from .quantization.description import foreign_quantization, settle_quantization

logger = logging.getLogger(__name__)

_MOST_LAYERS = 1000  # making a layer takes half a millisecond, before any tensor can contradict the number
_HEADLESS = "Qwen3VLMoeTextModel"  # the class of the backbone, the only one of its type in transformers
_OF_EXPERTS = ("moe_intermediate_size", "num_experts", "num_experts_per_tok")
SIZES = (*(field for field in REQUIRED if field != "num_experts_per_tok"), "head_dim")  # of tensors


@dataclasses.dataclass
class ModelArgs(BaseModelArgs):
    """What the model needs of a config.

    Attributes:
        model_type: ``qwen3_vl_moe``.
        text_config: the language model's fields as the host's ``qwen3_moe.ModelArgs`` takes them, and others.
        tie_word_embeddings: whether the head is the embedding matrix; None where only the tensors can tell.
        quantization_config: how another tool quantized the checkpoint, in its own terms.
        config: the live config, in which the host looks for ``quantization`` after ``sanitize``.
    """

    model_type: str
    text_config: dict[str, Any]
    tie_word_embeddings: bool | None = None
    quantization_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        normalize({"text_config": self.text_config})

    @classmethod
    def from_dict(cls, params: dict[str, Any]) -> ModelArgs:
        """Normalize a config **in place** and take what the model needs of it; raises `CheckpointError`."""
        tie = tied(params)
        text_config = normalize(params)
        report_unread(text_config)
        foreign = foreign_quantization(params)
        settle_quantization(params)
        return cls(
            params.get("model_type", "qwen3_vl_moe"),
            text_config,
            tie,
            quantization.read_description(foreign) if foreign is not None else {},
            params,
        )


def normalize(config: dict[str, Any]) -> dict[str, Any]:
    """Rewrite a Qwen3-VL-MoE config in place so that ``config["text_config"]`` is what the host's ``qwen3_moe`` takes.

    Returns the text config. Idempotent. Raises `CheckpointError` for a field that is missing or of no use here.
    """
    text = nested(config)
    _name_experts(text)
    for field, default in DEFAULTS.items():
        if text.get(field) is None:
            text[field] = list(default) if isinstance(default, list) else default
    _check_sizes(text)
    _check_supported(text)
    _normalize_rope(text, _transformers(config))
    _name_dtype(config, text)
    # The head is always a tensor of its own (shared with the embeddings, not copied, in a tied model): what is saved
    # then loads in every host, none of which can load a Qwen3-VL-MoE checkpoint without a head. Until: none known.
    text["tie_word_embeddings"] = False
    return text


def _name_experts(text: dict[str, Any]) -> None:
    """``num_local_experts`` of transformers 5 → ``num_experts``."""
    if "num_local_experts" in text:
        experts = text.pop("num_local_experts")
        if text.setdefault("num_experts", experts) != experts:
            remedy = "Remove the field that is wrong."
            raise config_error("num_experts", f"{experts}, as in num_local_experts", text["num_experts"], remedy)


def _check_sizes(text: dict[str, Any]) -> None:
    """Every size is one that an axis can have, and they fit each other."""
    for field in (*REQUIRED, "head_dim", "decoder_sparse_step", "max_position_embeddings"):
        if field == "head_dim" and text.get(field) is None:  # the sizes before it have been checked
            text[field] = text["hidden_size"] // text["num_attention_heads"]
        most = _MOST_LAYERS if field == "num_hidden_layers" else LARGEST
        dense = f"A dense Qwen3-VL has the model_type qwen3_vl. If this model has experts, {USE_ITS_MODELS}"
        check_positive(field, text.get(field), int, most, dense if field in _OF_EXPERTS else CORRECT)
    heads = text["num_attention_heads"]
    if heads * text["head_dim"] > LARGEST:
        raise config_error("head_dim", f"at most {LARGEST // heads}, as there are {heads} heads", text["head_dim"])
    if text["head_dim"] % 2:  # rotary embeddings turn pairs
        raise config_error("head_dim", "an even number", text["head_dim"])
    if heads % text["num_key_value_heads"]:
        raise config_error(
            "num_key_value_heads", f"a divisor of num_attention_heads ({heads})", text["num_key_value_heads"]
        )
    if text["num_experts_per_tok"] > text["num_experts"]:
        raise config_error(
            "num_experts_per_tok", f"at most num_experts ({text['num_experts']})", text["num_experts_per_tok"]
        )
    dense = text["mlp_only_layers"]
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise config_error("mlp_only_layers", "a list of integers", dense)
    check_positive("rms_norm_eps", text["rms_norm_eps"])


def _check_supported(text: dict[str, Any]) -> None:
    """What the host's ``qwen3_moe`` has no field for is what it does."""
    if text["attention_bias"]:
        raise config_error("attention_bias", "false", text["attention_bias"], UNSUPPORTED)
    if text["hidden_act"] not in ("silu", "swish"):
        raise config_error("hidden_act", '"silu"', text["hidden_act"], UNSUPPORTED)
    if layers := text.get("per_layer_config"):
        raise config_error("per_layer_config", "no such field, as all layers are alike", layers, UNSUPPORTED)
    if text.get("norm_topk_prob") is False:
        logger.warning(
            "config.json: norm_topk_prob: false has no effect: this model type always normalizes, as in transformers"
        )
    text["norm_topk_prob"] = True


def _name_dtype(config: dict[str, Any], text: dict[str, Any]) -> None:
    """`mlx_lm.convert` looks for the dtype in one of two places, by its version; transformers 5 has it elsewhere."""
    dtypes = (text.pop("dtype", None), config.get("dtype"), config.get("torch_dtype"))
    if dtype := next((dtype for dtype in dtypes if dtype in ("bfloat16", "float16", "float32")), None):
        text["dtype"] = config["torch_dtype"] = dtype


def linear_shape(path: str, text: dict[str, Any]) -> tuple[int, int] | None:
    """``(out, in)`` of a layer by its path, from the normalized text config; None for what is no matrix of the host's.

    Some tools store weights flat, so that only the config can tell their shape before any value is read.
    """
    one = path.replace("gate_up_proj", "up_proj")  # which has twice the outputs
    outputs, *inputs = (math.prod(text[field] for field in axis.split(" * ")) for axis in axes(one) or ("head_dim",))
    return (outputs * (1 + (one != path)), inputs[0]) if len(inputs) == 1 else None


def axes(path: str) -> tuple[str, ...]:
    """The fields of the config, or products of them, that are the axes of the host's weight at a path."""
    hidden, queries, keys = "hidden_size", "num_attention_heads * head_dim", "num_key_value_heads * head_dim"
    stacked = ("num_experts",) if ".switch_mlp." in path else ()
    width = "moe_intermediate_size" if stacked or ".experts." in path else "intermediate_size"
    own: tuple[str, ...] = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate": ("num_experts", hidden),
        "gate_proj": (width, hidden),
        "up_proj": (width, hidden),
        "down_proj": (hidden, width),
        "embed_tokens": ("vocab_size", hidden),
        "lm_head": ("vocab_size", hidden),
        "q_norm": ("head_dim",),
        "k_norm": ("head_dim",),
        "norm": (hidden,),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }.get(path.rpartition(".")[2], ())
    return (*stacked, *own)


def tied(config: dict[str, Any]) -> bool | None:
    """Whether a config says that the output head, where none is stored, is the embedding matrix; None: it says nothing.

    To be asked before `normalize`. transformers 4.57 obeys ``text_config``, 5 the top level, where ``text_config`` says
    true by a class default. So does, for the same reason, what 5 saves of the backbone of any model.
    """
    text = config.get("text_config")
    flags = [config.get("tie_word_embeddings"), text.get("tie_word_embeddings") if isinstance(text, dict) else None]
    for value in flags:
        if value is not None and not isinstance(value, bool):
            raise config_error("tie_word_embeddings", "true or false", value)
    if (_transformers(config) or 0) >= 5:
        if flags[0] is False:
            return False
        classes = config.get("architectures")
        if isinstance(classes, list) and _HEADLESS in classes:
            return None
    return True if True in flags else False if False in flags else None


def _transformers(config: dict[str, Any]) -> int | None:
    """The major version of transformers that wrote a config, if it says."""
    match = re.match(r"\d{1,3}", str(config.get("transformers_version")))
    return int(match[0]) if match else None


def _normalize_rope(text: dict[str, Any], version: int | None) -> None:
    """Settle ``rope_theta`` and ``rope_scaling``: plain RoPE or YaRN.

    ``rope_scaling`` takes the place of ``rope_parameters``, of which nothing is left, as in transformers 5. With text
    only, all three position axes of (interleaved) M-RoPE are equal, which is plain RoPE.
    """
    older, newer = text.pop("rope_scaling", None), text.pop("rope_parameters", None)
    for field, value in (("rope_scaling", older), ("rope_parameters", newer)):
        if value is not None and not isinstance(value, dict):
            raise config_error(field, "an object", value)
    text["rope_theta"] = _theta([text, older or {}, newer or {}], version)
    rope = {field: value for field, value in (older or newer or {}).items() if value is not None}
    rope.pop("rope_theta", None)
    rope_type = rope.pop("type", "default")  # the older name of the next
    rope_type = rope.pop("rope_type", rope_type)
    if rope_type == "mrope":
        rope_type = "default"
    if rope_type not in ("default", "yarn"):
        raise config_error("rope_type", '"default" or "yarn"', rope_type, UNSUPPORTED)
    for where in (text, rope):
        if where.get("partial_rotary_factor", 1.0) not in (None, 1.0):
            raise config_error("partial_rotary_factor", "1.0", where["partial_rotary_factor"], UNSUPPORTED)
    if rope_type == "yarn":
        _normalize_yarn(rope, text)
    text["rope_scaling"] = {**rope, "rope_type": rope_type}


def _theta(places: list[dict[str, Any]], version: int | None) -> float:
    """The one ``rope_theta``: it is the weights', whatever scales it, and so counts wherever it stands."""
    thetas = [place["rope_theta"] for place in places if place.get("rope_theta") is not None]
    if not thetas and version is None:
        raise config_error("rope_theta", "a number (5000000 in official models)", None)
    thetas = thetas or [500000 if version and version >= 5 else 5000000]
    for theta in thetas:
        check_positive("rope_theta", theta)
    if len(set(thetas)) > 1:
        raise config_error("rope_theta", "the same value in every field that has it", thetas)
    return thetas[0]


def _normalize_yarn(yarn: dict[str, Any], text: dict[str, Any]) -> None:
    """Fill in and check the fields of YaRN, so that the host's means what transformers' does."""
    yarn.setdefault("original_max_position_embeddings", text["max_position_embeddings"])
    if yarn.pop("truncate", True) is not True:
        raise config_error("truncate of YaRN", "true", False, UNSUPPORTED)
    # transformers uses the pair or neither; the host would fill in the other.
    if not (yarn.get("mscale") and yarn.get("mscale_all_dim")):
        yarn.pop("mscale", None)
        yarn.pop("mscale_all_dim", None)
    optional = {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"} & yarn.keys()
    for field in ("factor", "original_max_position_embeddings", *sorted(optional)):
        check_positive(f"{field} of YaRN", yarn.get(field))
    if text["rope_theta"] < 2:  # its logarithm is divided by
        raise config_error("rope_theta", "at least 2 with YaRN", text["rope_theta"])
