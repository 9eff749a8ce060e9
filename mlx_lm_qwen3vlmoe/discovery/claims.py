"""The model types of this package, for a caller that asks for them by name, and those that the host has itself.

An ``mlx_lm`` command finds them through the entry points in the metadata of the installed distribution. A checkout on
``PYTHONPATH``, a zip of sources and a frozen application have no metadata.
"""

from __future__ import annotations

from importlib.machinery import PathFinder
from typing import Any

from .. import __version__, registry
from ..errors import config_error

NAME = "mlx-lm-qwen3vlmoe"
PACKAGE = __package__.rpartition(".")[0]
_MODULE = f"{PACKAGE}.model"
MODEL_TYPES = {"qwen3_vl_moe": _MODULE, "qwen3_vl_moe_text": _MODULE}  # as in pyproject.toml
OWN = tuple(registry.Plugin(model_type, NAME, __version__, module) for model_type, module in MODEL_TYPES.items())


def install() -> bool:
    """Serve this package's types, and those of installed plug-ins, to all that this process imports from mlx-lm.

    Never raises; True if a finder is in force. ``MLX_LM_PLUGINS`` is heeded.
    """
    return registry.install(*OWN)


def get_model_classes(config: dict[str, Any]) -> tuple[type, type]:
    """``(Model, ModelArgs)`` for a config, for ``mlx_lm.utils.load_model(get_model_classes=...)``, without a finder.

    Raises `PluginError` when a plug-in claims the type and cannot serve it, `ValueError` for an unknown type.
    """
    return registry.get_model_classes(config, OWN)


def own_module(model_type: object, architectures: object = None) -> str | None:
    """The module of the host's own for a model type, which a plug-in may hide, or None."""
    import mlx_lm.models

    if not isinstance(model_type, str) or not model_type.isidentifier():
        return None
    classes = [architectures] if isinstance(architectures, str) else architectures
    by_class = renamed_by_class(model_type)
    found = [by_class[name] for name in classes if name in by_class] if isinstance(classes, list) else []
    name = (found or [renamed(model_type)])[0]
    return name if PathFinder.find_spec(f"{registry.GROUP}.{name}", mlx_lm.models.__path__) else None


def renamed(model_type: str) -> str:
    """The name under which the host imports a type, and so asks for a plug-in."""
    from mlx_lm import utils

    return str(getattr(utils, "MODEL_REMAPPING", {}).get(model_type, model_type))


def renamed_by_class(model_type: str) -> dict[str, str]:
    """The same for checkpoints whose ``architectures`` name a class: class → name. mlx-lm 0.32.2 and newer."""
    from mlx_lm import utils

    remapping = getattr(utils, "MODEL_ARCHITECTURE_REMAPPING", {})
    return {name: module for (of, name), module in remapping.items() if of == model_type}


def check_classes(config: dict[str, Any]) -> None:
    """Raise `CheckpointError` for ``architectures`` that the host cannot read, or by which it loads another type."""
    from mlx_lm import utils

    classes = config.get("architectures")
    try:
        utils._get_classes({"model_type": "qwen3_moe", "architectures": classes})
    except TypeError:
        raise config_error("architectures", "a list of names", classes) from None
    by_class = renamed_by_class(config["model_type"])
    for name in [classes] if isinstance(classes, str) else classes or ():
        if other := by_class.get(name):
            raise config_error("architectures", f"no class that mlx-lm loads as {other}", classes)
