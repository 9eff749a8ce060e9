"""Qwen3-VL-MoE as a text model: a text-only wrapper of the host's ``mlx_lm.models.qwen3_moe``.

It loads a Qwen3-VL-MoE checkpoint, discards the vision components, and reshapes the expert weights into what the host's
``SwitchGLU`` takes (see `mlx_lm_qwen3vlmoe.sanitize`). Images are not supported, by design. The parameter tree,
``language_model.model.…`` and ``language_model.lm_head.…``, is that of the host's own ``qwen3_vl_moe``: what is
converted or fine-tuned with one loads in the other.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3_moe
from mlx_lm.models.qwen3_moe import Qwen3MoeModel
from mlx_lm.models.rope_utils import initialize_rope

from .config import ModelArgs
from .layouts.guests import check_taken, is_guest
from .layouts.names import as_stored
from .runtime import backend, cpu, host, images, lazy, parallel
from .sanitize import check_complete, check_shapes, sanitize_beside

logger = logging.getLogger(__name__)
__all__ = ["Model", "ModelArgs"]  # what the entry point promises
ModelArgs.__module__ = __name__  # where programs that look at classes find it in mlx-lm's own models


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
        Until: none known.
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

    def __reduce__(self) -> tuple[Any, ...]:  # by which it is copied, too
        return Pipeline, (self.decoder(), self.widens)


class Model(nn.Module):
    """The host's ``qwen3_moe.Model`` as ``language_model``, with YaRN where the config asks for it."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self._others: set[str] = set()  # names of tensors that `sanitize` handed on to another program's layers
        text = args.text_config
        host.check_fields(text)
        host.warn_of_images(args.model_type)
        self.language_model = qwen3_moe.Model(qwen3_moe.ModelArgs.from_dict(text))
        if text["rope_scaling"]["rope_type"] == "yarn":  # Until: none known. The host's qwen3_moe ignores it.
            rope = initialize_rope(
                text["head_dim"], text["rope_theta"], False, text["rope_scaling"], text["max_position_embeddings"]
            )
            rope.mscale = text["rope_scaling"].get("attention_factor", rope.mscale)
            for layer in self.language_model.model.layers:
                layer.self_attn.rope = rope
        cpu.adapt(self.language_model)
        lazy.quantize_in_turn(self.language_model)
        if host.PIPELINE:
            self.model.pipeline = Pipeline(self.model)

    @host.only_with_embeddings
    def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
        """Logits ``[batch, length, vocab]`` of token ids ``[batch, length]``, or of embeddings in their place.

        They are float32 where the model computes in it: see `backend.widens`.
        """
        decoder: Any = self.model
        if input_embeddings is None:
            self._look_for_images(inputs, cache)
        wide = backend.widens(decoder) or getattr(getattr(decoder, "pipeline", None), "widens", False)
        if wide and host.EMBEDDINGS:
            h = decoder.embed_tokens(inputs) if input_embeddings is None else input_embeddings
            input_embeddings = h.astype(mx.float32)  # and so is all that follows
        embeddings = {} if input_embeddings is None else {"input_embeddings": input_embeddings}
        return cpu.spread(self.language_model)(inputs, cache=cache, **embeddings)

    def train(self, mode: bool = True) -> Model:
        """As the host's; images in the training data are told of."""
        images.tell(self)
        if mode:
            images.watch(self)
        return super().train(mode)

    def trainable_parameters(self) -> Any:
        """As the host's; a trainer asks for them to save an adapter, when images are told of."""
        images.tell(self)
        return super().trainable_parameters()

    def _look_for_images(self, inputs: mx.array, cache: Any) -> None:
        """Raise `ValueError` for a prompt with an image: ``<|vision_start|>`` and a placeholder after it.

        The embedding of a placeholder means nothing by itself. One that stands alone may be a random token of a
        benchmark, and an error in one request of a batch would end the server's thread, and so all: both are logged. In
        training the text around an image may be worth learning.
        """
        if inputs.shape[-1] == 1:  # while decoding, a look at the token would cost time
            return
        if type(self.model.embed_tokens).__module__.partition(".")[0] not in ("mlx", "mlx_lm"):
            return  # another program put its own in their place, which may know images
        found = [self.args.config.get(f"{name}_token_id") for name in ("image", "video", "vision_start")]
        image, video, start = (token if isinstance(token, int) and abs(token) < 2**31 else -1 for token in found)
        marks = (inputs == image) | (inputs == video)
        if self.training:
            images.note(self, marks, f"{image} or {video}")
            return
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

    @host.only_with_shard
    def shard(self, group: mx.distributed.Group | None = None) -> None:
        """Keep this rank's part of every layer, for tensor parallelism, by the host's own implementation.

        Raises `CheckpointError`, on every rank, where the ranks do not divide what is cut.
        """
        group = group or mx.distributed.init()
        parallel.check(group.size(), "tensor", parallel.pieces(self.args.text_config, self.named_modules()))
        parallel.cut(self.language_model, group)
        for layer in self.layers:  # so that only one layer's tensors are in memory whole
            mx.eval(layer.parameters())

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The tensors of a checkpoint, lazily, under the names and in the shapes of this model."""
        modules = dict(self.named_modules())
        replaced = {path for path, module in modules.items() if is_guest(module)}
        found, others = sanitize_beside(weights, self.args, replaced)
        for name in found:
            if (path := name.rpartition(".")[0]) not in modules:
                raise host.unfit(f"its qwen3_moe has no {path}")
        shapes = {name: array.shape for name, array in dict(tree_flatten(self.parameters())).items()}
        with as_stored(weights):
            check_shapes(found, shapes, self.args.config.get("quantization") or {})
        found |= others
        self._others.update(others)
        if others or shapes.keys() - found.keys():  # `load_weights` says what is missing, unless this is a part
            self.__dict__["_stored"] = tuple(weights)
        return found

    def load_weights(self, file_or_weights: Any, strict: bool = True) -> Any:
        """As the host's, with one error that names what a checkpoint lacks, or what is of another program's layers."""
        stored = self.__dict__.pop("_stored", ())
        if isinstance(file_or_weights, list):
            others = [(name, array) for name, array in file_or_weights if name in self._others]
            with as_stored(stored):
                check_taken(others, self, self.args.config.get("quantization") or {})
                if strict:
                    check_complete({name for name, _ in file_or_weights}, dict(tree_flatten(self.parameters())))
        return super().load_weights(file_or_weights, strict=strict)

    @property
    def model(self) -> nn.Module:
        """The decoder, where `mlx_lm.utils.sharded_load` looks for ``pipeline``."""
        return self.language_model.model

    @property
    def lm_head(self) -> nn.Module:
        """The head. Programs take a model with a ``model`` and no ``lm_head`` for one whose head is the embeddings."""
        return self.language_model.lm_head

    def __setattr__(self, name: str, value: Any) -> None:
        """``model.lm_head = …`` replaces the head, as in the host's ``qwen3_moe``, where it is stored."""
        if name in ("model", "lm_head"):
            setattr(self.language_model, name, value)
        else:
            super().__setattr__(name, value)

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
