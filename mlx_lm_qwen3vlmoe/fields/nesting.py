"""The fields of the language model, wherever they stand in a config → ``text_config``.

| where                                                               | what becomes of it                            |
|---------------------------------------------------------------------|-----------------------------------------------|
| in ``text_config``                                                  | it stays                                      |
| all at the top                                                      | gathered; what ``text_config`` has goes first |
| one at the top that ``text_config`` lacks                           | moved                                         |
| one at the top that differs, and that no tensor depends on (`_FREE`)| it counts: ``load(…, model_config={…})``, or  |
|                                                                     | a user who added it; a warning says so        |
| another one at the top that differs                                 | not used; a warning says so                   |
| ``rope_parameters`` at the top                                      | not used: GPTQModel writes some that are not  |
|                                                                     | the model's                                   |
"""

from __future__ import annotations

import logging
from typing import Any

from ..errors import USE_ITS_MODELS, config_error, series, shown

logger = logging.getLogger(__name__)

REQUIRED = (  # sizes without a default that every writer shares
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts",
    "num_experts_per_tok",
    "vocab_size",
)
DEFAULTS = {  # the same in transformers 4.57 and 5
    "model_type": "qwen3_vl_moe_text",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 128000,
    "mlp_only_layers": [],
    "rms_norm_eps": 1e-6,
}
_ROPE = ("rope_theta", "rope_scaling")
_FREE = ("max_position_embeddings", "norm_topk_prob", "num_experts_per_tok", "rms_norm_eps", *_ROPE)
_USED = {*REQUIRED, *DEFAULTS, *_FREE, "head_dim", "num_local_experts", "rope_parameters"} - {"model_type"}
TEXT_FIELDS = _USED | {
    "attention_dropout",
    "initializer_range",
    "per_layer_config",
    "router_aux_loss_coef",
    "use_cache",
}
_OF_TRANSFORMERS = {"rope_theta": 10000.0, "rope_type": "default"}  # what its class fills in for any model


def nested(config: dict[str, Any]) -> dict[str, Any]:
    """``config["text_config"]``, with what the top level has of it. Changes the config in place."""
    if config.get("model_type") == "qwen3_vl_moe_text":  # the text model alone, a type that the host does not have
        config["model_type"] = "qwen3_vl_moe"
    text = config.get("text_config")
    if (text is None or _is_partial(text)) and "hidden_size" in config:
        gathered = {field: config.pop(field) for field in sorted(TEXT_FIELDS & config.keys())}
        text = config["text_config"] = gathered | (text or {})
    if not isinstance(text, dict):
        expected = "an object with the fields of the language model"
        raise config_error("text_config", expected, text, f"Is this a Qwen3-VL-MoE checkpoint? If so, {USE_ITS_MODELS}")
    if text and _is_partial(text):
        raise config_error(
            "text_config",
            "every field of the language model",
            text,
            "If you passed text_config in model_config, it has replaced the whole text_config of config.json: pass the "
            f"fields themselves in model_config instead ({series(text, 'and')}).",
        )
    _settle_others(config, text)
    return text


def _is_partial(text: object) -> bool:
    """Whether this is no text config, but a few fields for one."""
    return isinstance(text, dict) and sum(field in text for field in REQUIRED) < len(REQUIRED) / 2


def _settle_others(config: dict[str, Any], text: dict[str, Any]) -> None:
    """Let fields of the language model at the top count where their meaning is clear, and say which do."""
    found = {field: config[field] for field in sorted(_USED & config.keys()) if config[field] not in (None, {})}
    if found.get("rope_parameters") in (_OF_TRANSFORMERS, text.get("rope_parameters")):
        found.pop("rope_parameters", None)
    unclear = _ROPE if "rope_parameters" in found else ()  # one of them is not the model's
    used, unused = [], []
    for field, value in found.items():
        before = _value(text, field)
        if _comparable(field, value) == _comparable(field, before):
            continue
        clear = field in _FREE or (before is None and field != "rope_parameters")
        if not clear or field in unclear:
            unused.append(f"{field} {shown(value)}")
            continue
        _replace(text, field, config.pop(field))
        if before is not None:
            used.append(f"{field} {shown(value)} in place of {shown(before)}")
    if used or unused:
        logger.warning(
            "config.json, or model_config, has fields of the language model at the top level.%s%s",
            f" Used: {series(used, 'and')}." if used else "",
            f" Not used, as they belong in text_config: {series(unused, 'and')}." if unused else "",
        )


def _value(text: dict[str, Any], field: str) -> Any:
    """What the text config says of a field, by whatever name; None if nothing."""
    places = [text, *(text[name] for name in ("rope_scaling", "rope_parameters") if isinstance(text.get(name), dict))]
    if field == "rope_theta":
        return next((place["rope_theta"] for place in places if place.get("rope_theta") is not None), None)
    if field == "rope_scaling":
        return text.get("rope_scaling") or text.get("rope_parameters")
    if field in ("num_experts", "num_local_experts"):
        return text.get("num_experts", text.get("num_local_experts"))
    value = text.get(field)
    return DEFAULTS.get(field) if value is None else value


def _comparable(field: str, value: Any) -> Any:
    """A value without what makes no difference: with text only, M-RoPE is plain RoPE, and ``type`` is ``rope_type``."""
    if field != "rope_scaling" or not isinstance(value, dict):
        return value
    kind = value.get("rope_type", value.get("type", "default"))
    others = ("type", "rope_type", "rope_theta", "mrope_section", "mrope_interleaved")
    return kind not in ("default", "mrope") and (kind, {key: value[key] for key in value if key not in others})


def _replace(text: dict[str, Any], field: str, value: Any) -> None:
    """Put a field into the text config, and take out what says the same by another name."""
    theta = _value(text, "rope_theta")
    if field == "rope_scaling" and isinstance(value, dict):
        text.pop("rope_parameters", None)
        text["rope_theta"] = value.get("rope_theta", theta)
        value = {key: each for key, each in value.items() if key != "rope_theta"}
    elif field == "rope_theta":
        for name in ("rope_scaling", "rope_parameters"):
            if isinstance(text.get(name), dict):
                text[name] = {key: each for key, each in text[name].items() if key != "rope_theta"}
    text[field] = value
