"""What differs between the releases of mlx-lm that this package runs on.

Here and elsewhere, a comment ``Until`` names the release or pull request after which a workaround can go, once no older
one is supported. CONTRIBUTING.md lists them all.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import version
from types import CodeType
from typing import Any, NoReturn

from mlx_lm.models import qwen3_moe

from .. import __version__, registry
from ..errors import HostError

logger = logging.getLogger(__name__)

# Until: mlx-lm 0.28.3. Older ones take token ids only, and so do not compute in float32 (see `backend.widens`).
EMBEDDINGS = "input_embeddings" in inspect.signature(qwen3_moe.Model.__call__).parameters
# Until: mlx-lm 0.32.0. Older ones stay on one machine: `Model` has no such methods then.
SHARD = hasattr(qwen3_moe.Model, "shard")
PIPELINE = hasattr(getattr(qwen3_moe, "Qwen3MoeModel", None), "pipeline")  # without it, the model says what is missing


def only_with_embeddings(call: Callable[..., Any]) -> Callable[..., Any]:
    """The ``__call__`` of a model, without the parameter that the host lacks: programs look at the signature."""

    def without(self: Any, inputs: Any, cache: Any = None, **others: Any) -> Any:
        if others:
            raise TypeError(f"{', '.join(others)}: input_embeddings needs mlx-lm 0.28.3 or newer")
        return call(self, inputs, cache)

    return call if EMBEDDINGS else without


def only_with_shard(method: Callable[..., None]) -> Any:
    """A method that is not there for ``hasattr`` where the host lacks it: programs ask."""

    def missing(self: Any) -> NoReturn:
        raise AttributeError("shard: tensor parallelism needs mlx-lm 0.32.0 or newer")

    return method if SHARD else property(missing)


def unfit(what: str) -> HostError:
    """The error for a host that lacks what every release so far has, or wants more."""
    return HostError(
        f"mlx-lm {version('mlx-lm')} is not what mlx-lm-qwen3vlmoe {__version__} was made for: {what}. "
        "Update mlx-lm-qwen3vlmoe, or install an older mlx-lm."
    )


def check_fields(text: dict[str, Any]) -> None:
    """Raise `HostError` where the host wants a field that the normalized text config does not have."""
    for name, parameter in inspect.signature(qwen3_moe.ModelArgs).parameters.items():
        if parameter.default is parameter.empty and name not in text:
            raise unfit(f"its qwen3_moe needs the field {name}, which no Qwen3-VL-MoE config has")


def takes_images(model_type: str) -> bool:
    """Whether the host takes images for this type where no plug-in is in its place: no release so far does.

    It has a processor of images for the type then, or a class that names them, as `mlx_lm.models.muse_spark` does. The
    class is looked at, and not run.
    """
    try:
        processors = import_module("mlx_lm.processors").PROCESSORS
    except Exception:  # Until: mlx-lm 0.32.2. Older ones have none.
        processors = ()
    code = registry.hosts_code(model_type)
    names = _names(code) if code else ()
    return model_type in processors or any(re.search("(?i)pixel|image|vision|embed_inputs", name) for name in names)


def _names(code: CodeType) -> Iterator[str]:
    """What a module and all that it defines call things."""
    yield from (code.co_name, *code.co_names, *code.co_varnames)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def hidden_images(model_type: str) -> str:
    """What is to be said where `takes_images`."""
    return (
        f"mlx-lm's own {model_type} takes images, but mlx-lm-qwen3vlmoe, which serves in its place, is text-only. To "
        f"use images, set {registry.VARIABLE}=0."
    )


def warn_of_images(model_type: str) -> None:
    """Log that this package takes away what the host can do with images."""
    if isinstance(model_type, str) and takes_images(model_type):  # a config may have anything there
        logger.warning(hidden_images(model_type))
