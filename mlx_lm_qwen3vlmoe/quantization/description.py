"""How a config describes quantization: another tool's way, taken out, and MLX's, put in."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..errors import check_kinds, check_positive, config_error


def take_quantization(config: dict[str, Any]) -> dict[str, Any] | None:
    """Take another tool's ``quantization_config`` out of a config, from wherever it stands; None if there is none.

    Without it, the host leaves alone what is decoded here. MLX's own description, which names no method, stays.
    Raises `CheckpointError` where the host could not read that.
    """
    homes = [config, text] if isinstance(text := config.get("text_config"), dict) else [config]
    found = None
    for home in homes:
        for field in ("quantization_config", "compression_config"):
            value = home.get(field)
            if not value:
                continue
            if not isinstance(value, dict):
                raise config_error(field, "an object", value)
            described = config.get("quantization") is not None
            if "quant_method" not in value and "quantization" not in value:  # MLX's own
                config["quantization"] = config["quantization"] if described else value
                continue
            del home[field]
            if value.get("packing_format") == "mlx":  # of AutoRound
                config["quantization"] = config["quantization"] if described else _of_auto_round(value)
            elif not described:
                found = found or value
    own = config.get("quantization")
    if own is not None and not (isinstance(own, dict) and {"group_size", "bits"} <= own.keys()):
        raise config_error("quantization", "an object with group_size and bits", own)
    for path, parameters in {"": own, **(own or {})}.items():
        for field in ("group_size", "bits"):
            if isinstance(parameters, dict) and parameters.get(field) is not None:
                check_positive(": ".join(filter(None, ("quantization", path, field))), parameters[field], int)
    return found


def _of_auto_round(description: dict[str, Any]) -> dict[str, Any]:
    """AutoRound's description of what it packed as MLX does, in MLX's terms."""
    fields = {name: description.get(name) for name in ("group_size", "bits")}
    check_kinds("", description, extra_config=dict)
    extra = description.get("extra_config") or {}
    return fields | {name: {**fields, **own} for name, own in extra.items() if isinstance(own, dict)}


def record_quantization(config: dict[str, Any], packed: dict[str, dict[str, Any]]) -> None:
    """Describe packed layers in MLX's way: the commonest parameters for all, and an entry a path for the others.

    Args:
        packed: path of a layer → ``group_size``, ``bits`` and, unless it is affine, ``mode``.
    """
    ((parameters, _),) = Counter(tuple(sorted(parameters.items())) for parameters in packed.values()).most_common(1)
    common = {field: value for field, value in parameters if field != "global_scale"}
    # What MLX has described of other layers stays, but for names that the host does not have.
    own = {
        name: value
        for name, value in (config.get("quantization") or {}).items()
        if not isinstance(value, (bool, dict)) or name.startswith("language_model.")
    }
    common = {field: own[field] for field in ("group_size", "bits", "mode") if field in own} or common
    config["quantization"] = {**own, **common}
    config["quantization"] |= {path: parameters for path, parameters in packed.items() if parameters != common}
