"""Fields of a description: each is known, or there is a word about it.

A description says how numbers are stored, and new versions of tools say more in it. What is not looked at here may
change the numbers, and no tensor need show it: such as GPTQModel's ``weight_scale_semantics``, or the rotations of
AutoRound. So a family of formats knows the fields that it reads, and those that have no meaning for the weights. A
field that is neither is an error if its name speaks of numbers, else a warning.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ..errors import CheckpointError, shown

logger = logging.getLogger(__name__)

Part = tuple[str, Mapping[str, Any], Collection[str]]  # where it stands, its fields, and the known ones

# Of activations, the cache, calibration and kernels, or which modules are not quantized: their tensors tell that.
HARMLESS = frozenset(
    (
        *("quant_method", "method", "provider", "producer", "version", "meta", "quantization_status", "backend"),
        *("ignore", "ignored_layers", "exclude", "exclude_modules", "modules_to_not_convert", "skip_modules"),
        *("modules_to_convert", "modules_in_block_to_quantize", "block_name_to_quantize", "to_quant_block_names"),
        *("quant_block_list", "lm_head", "quant_lm_head", "ignored_quantization_config", "tokenizer", "dataset"),
        *("act_bits", "act_data_type", "act_dynamic", "act_group_size", "act_sym", "activation_scheme"),
        *("input_activations", "output_activations", "activation_scale_ub", "input_scale_ub", "static_attention_dtype"),
        *("kv_cache_scheme", "kv_cache_quant_algo", "kv_cache_quant_method", "static_kv_dtype"),
        *("autoround_version", "iters", "nsamples", "seqlen", "batch_size", "lr", "minmax_lr", "amp", "model_free"),
        *("gradient_accumulate_steps", "low_gpu_mem_usage", "enable_quanted_input", "enable_minmax_tuning"),
        *("enable_norm_bias_tuning", "enable_alg_ext", "enable_torch_compile", "seed", "nblocks", "momentum"),
        *("dequantize", "expert_dtype", "pack_dtype", "true_sequential", "damp_percent", "static_groups"),
        *("sparsity_config", "transform_config"),  # for which there are errors of their own
    )
)
_OF_NUMBERS = re.compile(
    r"rotat|hadamard|transform|smooth|codebook|(^|_)luts?(_|$)|semantic|scale|zero|offset|shift|permut|residual|"
    r"outlier|sparse|low_rank|lora|adapter|svd|lattice|trellis|quant_map|bias|sign|invers|normali"
)
_NOTHING: tuple[Any, ...] = (None, False, "", [], {})


def check_fields(parts: Iterable[Part]) -> None:
    """Raise `CheckpointError` for an unknown field of numbers; warn once of all others that say something."""
    strange = {}
    for where, fields, known in parts:
        for field in sorted(fields.keys() - HARMLESS - set(known)):
            if (value := fields[field]) in _NOTHING:
                continue
            if _OF_NUMBERS.search(field.lower()):
                raise CheckpointError(
                    f"quantization_config: {where}{field}",
                    "no unknown field that may change the weights",
                    shown(value),
                    "If it does not change them, remove it. If it does, use another quantized checkpoint, or the "
                    "unquantized one with mlx_lm.convert -q.",
                )
            strange[f"{where}{field}"] = value
    if strange:
        logger.warning(
            "quantization_config has fields that this package does not know, and ignores: %s. If the model answers "
            "nonsense, one of them may be why.",
            ", ".join(f"{field} ({shown(value)})" for field, value in strange.items()),
        )


def objects(where: str, container: Any, known: Collection[str]) -> list[Part]:
    """The objects that are the values of an object, or of a list."""
    items = (
        container.items()
        if isinstance(container, dict)
        else enumerate(container if isinstance(container, list) else ())
    )
    return [(f"{where}.{key}.".lstrip("."), fields, known) for key, fields in items if isinstance(fields, dict)]
