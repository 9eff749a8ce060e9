"""Run Qwen3-VL-MoE checkpoints as text models with unchanged mlx-lm.

Importing this package is cheap: neither mlx nor mlx_lm is imported until a model is asked for.
"""

__version__ = "0.3.0"

_HOMES = {
    "CheckpointError": "errors",
    "HostError": "errors",
    "Model": "model",
    "ModelArgs": "model",
    "PluginError": "registry",
    "get_model_classes": "discovery.claims",
    "install": "discovery.claims",
}
__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
