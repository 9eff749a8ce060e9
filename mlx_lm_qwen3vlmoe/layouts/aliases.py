"""What tools call the tensors of a quantized layer → the suffixes that the families of formats know.

A suffix is what follows the path of a layer, ``weight`` in ``….q_proj.weight``. Fused experts have no ``.weight``:
`names.layer_and_suffix` reads ``gate_up_proj_X`` as ``weight_X`` and ``_gate_up_proj_X`` as ``_weight_X`` first.
"""

from __future__ import annotations

_QUANTIZERS = ("weight", "input", "output", "bias")
_NESTED = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_STATES = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")

ALIASES: dict[str, str] = {
    # AMD Quark 0.11: its modules' own names; of two levels, the second is the scale of scales
    **{f"{of}_quantizer.{what}": f"{of}_{what}" for of in _QUANTIZERS for what in ("scale", "zero_point")},
    **{f"{of}_quantizer.0.{what}": f"{of}_{what}" for of in _QUANTIZERS for what in ("scale", "zero_point")},
    **{f"{of}_quantizer.1.{what}": f"{of}_{what}_2" for of in _QUANTIZERS for what in ("scale", "zero_point")},
    # AngelSlim 0.5: experts fused in FP8, and a suffix of two parts
    "weight_weight_scale": "weight_scale",
    "weight_input_scale": "input_scale",
    "weight_scale.int4": "weight_scale.int4",
    # bitsandbytes 0.50: fused experts
    **{name: f"weight.{name}" for name in (*_NESTED, *_STATES)},
    # GPTQModel 7.7: bitsandbytes' tensors
    **{f"weight_{name}": f"weight.{name}" for name in (*_NESTED, "quant_state")},
    "weight_scb": "SCB",
    # ComfyUI; its scale of weights is a name of its own, which needs no description
    "scale_input": "input_scale",
}

LAST_PARTS: dict[str, list[str]] = {}  # of a suffix, where a name is cut at its last period → aliases
for _alias in ALIASES:
    LAST_PARTS.setdefault(_alias.rpartition(".")[2], []).append(_alias)


def known_suffix(layer: str, suffix: str) -> tuple[str, str]:
    """A tensor's path and suffix, cut at the last period → those that the families know; the same for all others."""
    for alias in LAST_PARTS.get(suffix, ()):
        rest = alias[: -len(suffix) - 1]  # what the cut left with the path
        if not rest:
            return layer, ALIASES[alias]
        if layer.endswith(f".{rest}"):
            return layer[: -len(rest) - 1], ALIASES[alias]
    return layer, suffix
