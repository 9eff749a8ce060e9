"""How a config describes quantization: in another tool's way, or in MLX's.

MLX's own description goes before another tool's, which a conversion has left behind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from ..errors import check_kinds, check_positive, config_error

_FIELDS = ("quantization_config", "compression_config")  # of any tool, at the top or in ``text_config``
_DEFAULTS = {  # of MLX's modes, for a field that is null or missing
    "affine": {"group_size": 64, "bits": 4},
    "mxfp4": {"group_size": 32, "bits": 4},
    "mxfp8": {"group_size": 32, "bits": 8},
    "nvfp4": {"group_size": 16, "bits": 4},
}


def foreign_quantization(config: dict[str, Any]) -> dict[str, Any] | None:
    """Another tool's description, wherever it stands; None if there is none that counts."""
    foreign = (value for _, _, value in _described(config) if _in_mlx_terms(value) is None)
    return next(foreign, None) if own_quantization(config) is None else None


def own_quantization(config: dict[str, Any]) -> dict[str, Any] | None:
    """MLX's description, wherever it stands, with MLX's defaults for what is null or missing in it.

    `mlx_lm.convert` writes such entries, for recipes of mixed bits and for predicates that name the bits alone. What
    another program describes, by a mode of its own, is left as it is. Raises `CheckpointError` where the host could not
    read the description.
    """
    own = config.get("quantization")
    if own is None:
        own = next(filter(None, (_in_mlx_terms(value) for _, _, value in _described(config))), None)
    if own is None:
        return None
    if isinstance(own, dict) and not is_mlx_mode(own.get("mode", "affine")):
        return own
    if not (isinstance(own, dict) and {"group_size", "bits"} <= own.keys()):
        raise config_error("quantization", "an object with group_size and bits", own)
    for path, parameters in {"": own, **own}.items():
        for field in ("group_size", "bits"):
            if isinstance(parameters, dict) and parameters.get(field) is not None:
                check_positive(": ".join(filter(None, ("quantization", path, field))), parameters[field], int)
    entries = {path: _filled(entry) if isinstance(entry, dict) else entry for path, entry in own.items()}
    return _filled(entries)


def is_mlx_mode(mode: object) -> bool:
    """Whether MLX has a mode of quantization; what is no text is for MLX to refuse."""
    if not isinstance(mode, str) or mode in _DEFAULTS:
        return True
    try:  # one that is newer than this package
        mx.quantize(mx.zeros((32, 512)), mode=mode)
    except (TypeError, ValueError):
        return False
    return True


def _filled(parameters: dict[str, Any]) -> dict[str, Any]:
    """A description of all layers or of one, with the defaults of its mode; another mode than MLX's has none."""
    given = {field: value for field, value in parameters.items() if field != "mode" or value is not None}
    mode = given.get("mode", "affine")
    defaults = _DEFAULTS.get(mode, {}) if isinstance(mode, str) else {}
    return given | {field: value for field, value in defaults.items() if given.get(field) is None}


def settle_quantization(config: dict[str, Any]) -> None:
    """Leave what the host looks at: MLX's description, under ``quantization``.

    Without another tool's, the host leaves alone what is decoded here.
    """
    if (own := own_quantization(config)) is not None:
        config["quantization"] = own
    for home, field, value in list(_described(config)):
        if _in_mlx_terms(value) is not value:
            del home[field]


def _described(config: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, dict[str, Any]]]:
    """Where descriptions stand: an object, its field, and what that has."""
    homes = [config, text] if isinstance(text := config.get("text_config"), dict) else [config]
    for home in homes:
        for field in _FIELDS:
            if value := home.get(field):
                if not isinstance(value, dict):
                    raise config_error(field, "an object", value)
                yield home, field, value


def _in_mlx_terms(description: dict[str, Any]) -> dict[str, Any] | None:
    """MLX's own description, which names no method, or AutoRound's of what it packed as MLX does; else None."""
    if "quant_method" not in description and "quantization" not in description:
        return description
    if description.get("packing_format") != "mlx":
        return None
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
