"""Fields of a text config that nobody reads in this model type."""

from __future__ import annotations

import logging
import re
from typing import Any

from ..errors import shortened
from .nesting import DEFAULTS, TEXT_FIELDS

logger = logging.getLogger(__name__)

# Of all model types in transformers 5.24, of training, or looked at elsewhere.
_HARMLESS = {
    *("chunk_size_feed_forward", "experts_implementation", "max_window_layers", "mrope_interleaved", "mrope_section"),
    *("output_attentions", "output_router_logits", "partial_rotary_factor", "rope_type", "router_jitter_noise"),
}
_MEANINGFUL = re.compile(  # names of fields that change the numbers of other models
    r"scal|cap|sliding|window|chunk|rout|expert|topk|top_k|bias|norm|multiplier|activation|_act$|temperature|residual|"
    r"rotary|rope|layer_types|attention|softmax|sink|per_layer|share"
)


def report_unread(text: dict[str, Any]) -> None:
    """Log once which fields sound like changing the numbers, although nobody reads them in this model type."""
    unread = []
    for field in sorted(text.keys() - TEXT_FIELDS - DEFAULTS.keys() - _HARMLESS):
        value = text[field]
        neutral = value in (None, 0, [], {}, "") or (type(value) is float and value == 1)
        if field == "layer_types" and isinstance(value, list):
            neutral = all(each == "full_attention" for each in value)
        if _MEANINGFUL.search(field) and not neutral and not field.startswith("_"):
            unread.append(field)
    if unread:
        names = ", ".join(map(shortened, unread[:20]))
        logger.warning(
            "config.json: %s: has no effect, as neither transformers nor this package reads it for this model type",
            names,
        )
