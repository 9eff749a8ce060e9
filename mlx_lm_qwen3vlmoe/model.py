"""Qwen3-VL-MoE as a text model: a text-only wrapper of the host's ``mlx_lm.models.qwen3_moe``.

It loads a Qwen3-VL-MoE checkpoint, discards the vision components, and reshapes the expert weights into what the host's
``SwitchGLU`` takes (see `mlx_lm_qwen3vlmoe.sanitize`). Images are not supported, by design. The parameter tree,
``language_model.model.…`` and ``language_model.lm_head.…``, is that of the host's own ``qwen3_vl_moe``: what is
converted or fine-tuned with one loads in the other.
"""

from __future__ import annotations

import copy
import inspect
import logging
import weakref
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3_moe
from mlx_lm.models.qwen3_moe import Qwen3MoeModel
from mlx_lm.models.rope_utils import initialize_rope

from . import __version__
from .config import ModelArgs
from .errors import CheckpointError, HostError
from .runtime import backend, cpu, lazy, parallel
from .sanitize import check_shapes, sanitize

logger = logging.getLogger(__name__)
__all__ = ["Model", "ModelArgs"]  # what the entry point promises
ModelArgs.__module__ = __name__  # where programs that look at classes find it in mlx-lm's own models


def _host_error(what: str) -> HostError:
    return HostError(
        f"mlx-lm {version('mlx-lm')} is not what mlx-lm-qwen3vlmoe {__version__} was made for: {what}. "
        "Update mlx-lm-qwen3vlmoe, or install an older mlx-lm."
    )


class Pipeline:
    """The method ``pipeline`` of the host's decoder, with what a stage needs of this model type.

    Attributes:
        widens: whether this stage computes in float32 because another one does.
    """

    def __init__(self, decoder: nn.Module, widens: bool = False):
        self.decoder = weakref.ref(decoder)  # which has this: a model that is let go is freed at once
        self.widens = widens

    def __call__(self, group: mx.distributed.Group, *arguments: Any, **options: Any) -> None:
        """Keep this rank's layers; raises `CheckpointError`, on every rank, for more ranks than layers.

        The host receives hidden states in the dtype of the embeddings. But on the CPU, or after scales in float32, they
        are float32: if they are on any rank, then the stages agree to send nothing else.
        """
        decoder: Any = self.decoder()
        parallel.check(group.size(), "pipeline", {"num_hidden_layers": decoder.num_hidden_layers})
        Qwen3MoeModel.pipeline(decoder, group, *arguments, **options)
        with backend.planned():  # not computed: only the dtype is looked at
            h = decoder.embed_tokens(mx.array([[0]]))
            for layer in decoder.pipeline_layers:
                h = layer(h)
        wide = backend.widens(decoder) or h.dtype == mx.float32
        anywhere = bool(mx.distributed.all_sum(mx.array(wide, mx.int32), group=group, stream=mx.cpu).item())
        first = decoder.pipeline_rank == decoder.pipeline_size - 1
        self.widens = anywhere and not (wide and first)  # the first stage computes as one machine would

    def __deepcopy__(self, memo: dict[int, Any]) -> Pipeline:
        return Pipeline(copy.deepcopy(self.decoder(), memo), self.widens)

    def __reduce__(self) -> tuple[Any, ...]:
        return Pipeline, (self.decoder(), self.widens)


class Model(nn.Module):
    """The host's ``qwen3_moe.Model`` as ``language_model``, with YaRN where the config asks for it."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        text = args.text_config
        for name, parameter in inspect.signature(qwen3_moe.ModelArgs).parameters.items():
            if parameter.default is parameter.empty and name not in text:
                raise _host_error(f"its qwen3_moe needs the field {name}, which no Qwen3-VL-MoE config has")
        self.language_model = qwen3_moe.Model(qwen3_moe.ModelArgs.from_dict(text))
        if text["rope_scaling"]["rope_type"] == "yarn":  # the host's qwen3_moe ignores rope_scaling
            rope = initialize_rope(
                text["head_dim"], text["rope_theta"], False, text["rope_scaling"], text["max_position_embeddings"]
            )
            rope.mscale = text["rope_scaling"].get("attention_factor", rope.mscale)
            for layer in self.language_model.model.layers:
                layer.self_attn.rope = rope
        cpu.adapt(self.language_model)
        lazy.Turns().take(self.language_model)
        if hasattr(self.model, "pipeline"):
            self.model.pipeline = Pipeline(self.model)

    if "input_embeddings" in inspect.signature(qwen3_moe.Model.__call__).parameters:

        def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
            """Logits ``[batch, length, vocab]`` of token ids ``[batch, length]``, or of embeddings in their place.

            They are float32 where the model computes in it: see `backend.widens`.
            """
            decoder: Any = self.model
            if input_embeddings is None:
                self._refuse_images(inputs, cache)
            if backend.widens(decoder) or getattr(getattr(decoder, "pipeline", None), "widens", False):
                h = decoder.embed_tokens(inputs) if input_embeddings is None else input_embeddings
                input_embeddings = h.astype(mx.float32)  # and so is all that follows
            return cpu.spread(self.language_model)(inputs, cache=cache, input_embeddings=input_embeddings)

    else:

        def __call__(self, inputs: mx.array, cache: Any = None, **others: Any) -> mx.array:  # type: ignore[misc]
            """Logits ``[batch, length, vocab]`` of token ids ``[batch, length]``."""
            if others:
                raise TypeError(f"{', '.join(others)}: input_embeddings needs mlx-lm 0.28.3 or newer")
            self._refuse_images(inputs, cache)
            return cpu.spread(self.language_model)(inputs, cache=cache)

    def _refuse_images(self, inputs: mx.array, cache: Any) -> None:
        """Raise `ValueError` for a prompt with an image: ``<|vision_start|>`` and a placeholder after it.

        The embedding of a placeholder means nothing by itself. One that stands alone may be a random token of a
        benchmark, and an error in one request of a batch would end the server's thread, and so all: both are logged.
        """
        if self.training or inputs.shape[-1] == 1:  # while decoding, a look at the token would cost time
            return
        if type(self.model.embed_tokens).__module__.partition(".")[0] not in ("mlx", "mlx_lm"):
            return  # another program put its own in their place, which may know images
        found = [self.args.config.get(f"{name}_token_id") for name in ("image", "video", "vision_start")]
        image, video, start = (token if isinstance(token, int) and abs(token) < 2**31 else -1 for token in found)
        marks = (inputs == image) | (inputs == video)
        try:
            if not marks.any().item():
                return
        except ValueError:  # traced by mx.compile: there are no values
            return
        message = (
            f"The prompt has placeholders of images (token {image} or {video}), but this is a text-only model that "
            "drops the vision tower. For images use mlx-vlm (https://github.com/Blaizzy/mlx-vlm)."
        )
        if ((inputs[:, :-1] == start) & marks[:, 1:]).any().item() and not (
            cache and hasattr(cache[0], "left_padding")
        ):
            raise ValueError(message)
        logger.error(message)

    if hasattr(qwen3_moe.Model, "shard"):

        def shard(self, group: mx.distributed.Group | None = None) -> None:
            """Keep this rank's part of every layer, for tensor parallelism, by the host's own implementation.

            Raises `CheckpointError`, on every rank, where the ranks do not divide what is cut.
            """
            group = group or mx.distributed.init()
            parallel.check(group.size(), "tensor", parallel.pieces(self.args.text_config, self.named_modules()))
            parallel.cut(self.language_model, group)
            for layer in self.layers:  # so that only one layer's tensors are in memory whole
                mx.eval(layer.parameters())

    else:

        def __getattr__(self, name: str) -> Any:
            if name == "shard":
                raise AttributeError("shard: tensor parallelism needs mlx-lm 0.32.0 or newer")
            return super().__getattr__(name)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The tensors of a checkpoint, lazily, under the names and in the shapes of this model."""
        weights = sanitize(weights, self.args)
        modules = {path for path, _ in self.named_modules()}
        for name in weights:
            if (path := name.rpartition(".")[0]) not in modules:
                raise _host_error(f"its qwen3_moe has no {path}")
        shapes = {name: array.shape for name, array in dict(tree_flatten(self.parameters())).items()}
        check_shapes(weights, shapes, self.args.config.get("quantization") or {})
        return weights

    def load_weights(self, file_or_weights: Any, strict: bool = True) -> Any:
        """As the host's, with one error that names what a checkpoint lacks."""
        if strict and isinstance(file_or_weights, list):
            found = {name for name, _ in file_or_weights}
            if missing := [name for name in dict(tree_flatten(self.parameters())) if name not in found]:
                names = ", ".join(missing[:5])
                raise CheckpointError(
                    f"{names}: expected in a complete checkpoint, found nothing ({len(missing)} are missing). "
                    "Is a file of the checkpoint missing, or num_hidden_layers wrong in config.json?"
                )
        return super().load_weights(file_or_weights, strict=strict)

    @property
    def model(self) -> nn.Module:
        """The decoder, where `mlx_lm.utils.sharded_load` looks for ``pipeline``."""
        return self.language_model.model

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers of this process: the decoder's own list, or one stage of a pipeline."""
        whole = getattr(self.model, "pipeline_size", 1) == 1
        return self.model.layers if whole else self.language_model.layers

    @property
    def cast_predicate(self) -> Callable[[str], bool]:
        """What `mlx_lm.convert` may cast to the checkpoint's dtype: all but exact zero points, which are in float32."""
        exact = {
            path
            for path, array in dict(tree_flatten(self.parameters())).items()
            if path.endswith((".scales", ".biases")) and array.dtype == mx.float32
        }
        return lambda path: path not in exact

    @property
    def quant_predicate(self) -> Any:
        """What the host quantizes and how: the router at 8 bits."""
        return self.language_model.quant_predicate
