"""The ``adapter_config.json`` of PEFT: what of it changes the numbers, and what is refused.

``target_modules``, ``exclude_modules``, ``layers_to_transform`` and ``layers_pattern`` say where training put adapters:
the tensors tell that as well, and these fields are not looked at.

Source: ``tuners/lora/config.py`` of PEFT 0.17.0 to 0.21.2.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, series
from ..quantization.patterns import Pattern, pattern
from .fields import Fields
from .files import read_config
from .lora import MERGE

_INITIAL = ("gaussian", "eva", "orthogonal")  # which leave the base model as it is
_REFUSED = {  # fields that have to be empty, and why
    "modules_to_save": "whole layers are no adapter",
    "trainable_token_indices": "rows of the embeddings are no LoRA",
    "layer_replication": "the model would have other layers",
    "alora_invocation_tokens": "the adapter would have to be switched on by tokens",
    "use_qalora": "inputs would have to be pooled",
    "use_bdlora": "the matrices would be in blocks",
    "arrow_config": "the adapter would be a router of others",
    "monteclora_config": "the matrices would be drawn at random",
    "kasa_config": "the weights would be cut beforehand",
    "fan_in_fan_out": "this model has no layers stored by inputs",
    "lora_bias": "LoRA in mlx_lm has no biases",
    "ensure_weight_tying": "in mlx_lm, head and embeddings are adapted apart",
}
_LAYOUTS = ("rank_major", "grouped_by_expert")


class PeftConfig(Fields):
    """A LoRA config of PEFT; raises `CheckpointError` for what no adapter of mlx_lm can hold."""

    def __init__(self, folder: Path):
        super().__init__(read_config(folder))
        kind = self.text("peft_type")
        if kind.upper() != "LORA":
            raise self.error("peft_type", "LORA, the only type that mlx_lm has", kind, MERGE)
        for field, reason in _REFUSED.items():
            if self.values.get(field) not in (None, False, [], {}, ""):
                raise self.error(field, f"nothing ({reason})", self.values[field], MERGE)
        if (bias := self.text("bias", "none")) != "none":
            raise self.error("bias", "none (the model has no biases)", bias, MERGE)
        initial = self.values.get("init_lora_weights", True)
        if not isinstance(initial, bool) and initial is not None and initial not in _INITIAL:
            raise self.error(
                "init_lora_weights",
                f"{series(['true', 'false', *_INITIAL])} (others change the base model as well)",
                initial,
                "Save the adapter with PEFT's path_initial_model_for_weight_conversion.",
            )
        self.dora, self.rslora = self.flag("use_dora"), self.flag("use_rslora")
        self.rank, self.alpha = self.integer("r"), self.number("lora_alpha", 8)
        self.dropout = self.number("lora_dropout", 0.0)
        self.parameters = self.texts("target_parameters")
        self.ranks = self._patterns("rank_pattern", Fields.integer)
        self.alphas = self._patterns("alpha_pattern", Fields.number)

    def _patterns(self, field: str, read: Any) -> list[tuple[Pattern, Any]]:
        values = Fields(self.object(field, {}), f"{field}.")
        patterns = []
        for text in values.values:
            try:
                found = pattern(field, rf"(.*\.)?({text})$")  # as PEFT matches it
            except CheckpointError:
                raise self.error(field, "names of modules, or simple regular expressions", text) from None
            patterns.append((found, read(values, text)))
        return patterns

    def targets(self, parameter: str) -> bool:
        """Whether ``target_parameters`` names a parameter, by its whole name or by the end of it."""
        return any(parameter == name or parameter.endswith(f".{name}") for name in self.parameters)

    def rank_and_scale(self, name: str) -> tuple[int, float]:
        """Of the module or parameter of this name in the model that was trained."""
        rank, alpha = _matching(self.ranks, name, self.rank), _matching(self.alphas, name, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)

    @property
    def in_blocks(self) -> bool | None:
        """Whether the experts are blocks of B's columns; None where only the trainer, Unsloth, could tell.

        From February to September 2026 Unsloth trained fused experts so, and PEFT read them otherwise. Since then it
        writes ``lora_B_layout`` (unsloth-zoo, pull requests 450, 1232 and 1269).
        """
        layout = self.text("lora_B_layout", "")
        if layout and layout not in _LAYOUTS:
            raise self.error("lora_B_layout", " or ".join(_LAYOUTS), layout)
        mapping = self.object("auto_mapping", {})
        return layout == _LAYOUTS[1] if layout else None if mapping.get("unsloth_fixed") else False


def _matching(patterns: list[tuple[Pattern, Any]], name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a name, or all of it."""
    return next((value for found, value in patterns if found.match(name)), default)


def write_config(base: str | None, dropout: float, dora: bool, **fields: Any) -> dict[str, Any]:
    return {
        "alpha_pattern": {},
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "rank_pattern": {},
        "task_type": "CAUSAL_LM",
        "use_dora": dora,
        "use_rslora": False,
        **fields,
    }
