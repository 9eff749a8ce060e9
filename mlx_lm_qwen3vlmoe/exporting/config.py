"""The config of a text model, ``qwen3_moe``, as that of the official Qwen3-30B-A3B."""

from __future__ import annotations

from typing import Any

from ..fields.nesting import TEXT_FIELDS

TYPE = "qwen3_moe"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SETTLED = {"num_local_experts", "rope_parameters", "rope_scaling", "per_layer_config"}  # of which nothing is left


def plain_config(
    config: dict[str, Any], text: dict[str, Any], dtype: str, tied: bool, yarn: dict[str, Any] | None
) -> dict[str, Any]:
    """All at the top, by the names that transformers 4.57, 5 and the host read.

    Args:
        config: as it is stored, for the ids of tokens.
        text: the normalized text config.
        yarn: as `yarn_of`; without it, the context has the original length.
    """
    plain = {field: text[field] for field in sorted(TEXT_FIELDS - _SETTLED) if field in text}
    plain |= {field: value for field in _IDS if (value := config.get(field, text.get(field))) is not None}
    if yarn is None and (dropped := yarn_of(text)):
        plain["max_position_embeddings"] = dropped["original_max_position_embeddings"]
    plain |= {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": TYPE,
        "rope_scaling": yarn,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        "use_sliding_window": False,
    }
    return plain


def yarn_of(text: dict[str, Any]) -> dict[str, Any] | None:
    """YaRN of a normalized text config, without what M-RoPE has, which is plain RoPE where there is only text."""
    rope = {field: value for field, value in text["rope_scaling"].items() if not field.startswith("mrope_")}
    return rope if rope["rope_type"] == "yarn" else None


def plain_quantization(own: dict[str, Any]) -> dict[str, Any]:
    """MLX's description, by the names of a text model; what it says of other modules is left out."""
    return {
        name.removeprefix("language_model."): value
        for name, value in own.items()
        if name.startswith("language_model.") or not isinstance(value, (bool, dict))
    }
