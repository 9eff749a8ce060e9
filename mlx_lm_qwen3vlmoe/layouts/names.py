"""The names that writers give to tensors ↔ those of the host.

| names                                                                     | writer                              |
|---------------------------------------------------------------------------|-------------------------------------|
| ``model.language_model.layers.…``, ``model.visual.…``, ``lm_head.…``      | official release, transformers 4.57 |
| ``language_model.model.…``, ``vision_tower.…``, ``language_model.lm_head``| MLX                                 |
| ``language_model.model.layers.…``, ``visual.…``                           | transformers before 4.57            |
| ``language_model.layers.…``, ``model.layers.…``, ``layers.…``             | a bare language model               |
| ``_orig_mod.…``, ``module.…``, ``base_model.model.…``, and others         | a wrapped model: `unwrapped`        |
| ``experts.w13_weight``, ``experts.w2_weight``                             | vLLM's sharded state                |

Numbers in names are decimals without leading zeros: ``experts.01`` would be a second ``experts.1``.
"""

from __future__ import annotations

import re

from ..errors import CheckpointError
from .aliases import known_suffix

MODEL_PREFIX = "language_model.model."
EMBEDDINGS = f"{MODEL_PREFIX}embed_tokens"
HEAD = "language_model.lm_head"
NUMBER = r"(?:0|[1-9][0-9]{0,30})"
_TEXT = re.compile(
    r"(?:model\.language_model\.|language_model\.model\.|language_model\.|model\.)?"
    rf"((?:layers\.{NUMBER}|embed_tokens|norm|lm_head)\..+)"
)
_VISION = re.compile(r"(?:model\.)?(?:visual|vision_tower)\.")
# Rotary frequencies are computed, and the router has no bias: some exports invent one. ComfyUI marks files in FP8.
_MEANINGLESS = re.compile(r".*\.rotary_emb\.inv_freq|.*\.mlp\.gate\.bias|scaled_fp8")
# PyTorch's wrappers name themselves where they wrap; those of all the model stand in front, as does PEFT's.
_WRAPPERS = re.compile(r"_orig_mod\.|_checkpoint_wrapped_module\.|_fsdp_wrapped_module\.|_fpw_module\.")
_OUTER = re.compile(r"^(?:module\.)*(?:base_model\.model\.)?(?:module\.)*")
_REPEATED = re.compile(r"(?:language_model\.){2,}")
_UNMERGED = re.compile(r"\.base_layer\.|\.lora_|\.modules_to_save\.")
_PROJECTION_FIRST = re.compile(rf"\.experts\.((?:gate|up|down)_proj)\.({NUMBER})\.")
_PLURAL = re.compile(rf"\.experts\.(gate_up|down)_projs\.({NUMBER})\.")
_FUSED = re.compile(r"(.+\.mlp\.experts\.)(_?)(gate_up_proj|down_proj)(_[a-z_]+)?")


def host_name(name: str) -> str | None:
    """The host's name for a tensor of any writer's; None for what a text model has no use for.

    Separate experts, which the host does not have, become ``experts.{e}.{p}_proj``. Raises `CheckpointError`.
    """
    match = None if "_mod" in name else _TEXT.fullmatch(name)  # no name of a module without a wrapper has that
    if not match and not (match := _TEXT.fullmatch(plain := unwrapped(name))):
        if _VISION.match(plain) or _MEANINGLESS.fullmatch(plain):
            return None
        raise CheckpointError(
            f"{shortened(name)}: expected a tensor of a Qwen3-VL-MoE model (model.language_model., lm_head., "
            "model.visual.), found another. Is this checkpoint of another model type, or an adapter?"
        )
    text = match[1]
    if _MEANINGLESS.fullmatch(text):
        return None
    if ".experts." in text:
        text = _PLURAL.sub(r".experts.\2.\1_proj.", _PROJECTION_FIRST.sub(r".experts.\2.\1.", text))
        if ".experts.w" in text:
            text = text.replace(".w13_weight", ".gate_up_proj").replace(".w2_weight", ".down_proj")
    return f"language_model.{text}" if text.startswith("lm_head.") else MODEL_PREFIX + text


def unwrapped(name: str) -> str:
    """A name without those of the wrappers around the model and its modules, of torch.compile, FSDP, DDP and PEFT.

    ``base_model.model.`` is of a merged PEFT model; one that is not has other names, too, and keeps them all.
    """
    if _UNMERGED.search(name):
        return name
    return _REPEATED.sub("language_model.", _OUTER.sub("", _WRAPPERS.sub("", name), count=1))


def module_name(path: str) -> str:
    """The name that transformers, and so the descriptions of quantized checkpoints, have for a module of the host's."""
    if path.startswith(HEAD):
        return path.removeprefix("language_model.")
    return path.replace(MODEL_PREFIX, "model.language_model.", 1)


def layer_and_suffix(name: str) -> tuple[str, str]:
    """A tensor's name in two: the layer, and what it is of the layer (``weight``, ``scales``, ``weight.absmax``).

    Fused experts have no ``.weight``: ``gate_up_proj`` is their weight, ``gate_up_proj_scale_inv`` its
    ``weight_scale_inv``, ``_gate_up_proj_qdata`` its ``_weight_qdata``. What tools call otherwise is in `aliases`.
    """
    layer, _, suffix = name.rpartition(".")
    if layer.endswith(".mlp.experts") and (match := _FUSED.fullmatch(name)):
        return known_suffix(match[1] + match[3], f"{match[2]}weight{match[4] or ''}")
    if ".weight." in name:  # bitsandbytes
        layer, _, suffix = name.partition(".weight.")
        return layer, f"weight.{suffix}"
    return known_suffix(layer, suffix)


def shortened(name: str) -> str:
    return name if len(name) < 200 else f"{name[:100]}…{name[-60:]}"
