"""Tensors of any Qwen3-VL-MoE layout → the names, shapes and memory order of the host's ``qwen3_moe``.

E = num_experts, H = hidden_size, I = moe_intermediate_size. The host's ``SwitchGLU`` keeps one array a projection for
all experts of a layer, ``switch_mlp.{gate,up}_proj.weight [E, I, H]`` and ``switch_mlp.down_proj.weight [E, H, I]``:
the ``[out, in]`` of a linear layer with the experts in front. What checkpoints store instead is listed once, in
`layouts.experts.LAYOUTS`; `layouts.stacking` says how each is cut, turned and stacked, and why.

Every step is a function from a dict of lazy arrays to another; none evaluates an array, so that a checkpoint larger
than memory can be converted, or read in part by one machine of many.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterable
from typing import Any, TypeVar

import mlx.core as mx

from .config import ModelArgs, axes
from .errors import MISSING_FILE, CheckpointError, MissingTensorError, beyond, differing, shape_error
from .layouts.decoder import ROUTER_BIAS, Decoder
from .layouts.experts import check_orientations, gather
from .layouts.guests import guests
from .layouts.merged import cut_merged, refuse_merged
from .layouts.names import EMBEDDINGS, HEAD, MODEL_PREFIX, NUMBER, as_stored, host_name, layer_and_suffix, stranger
from .layouts.stacking import Layers, Part
from .quantization import CAST, IGNORED, Decoded, Parameters, is_cast
from .quantization.checks import check_packed
from .quantization.description import record_quantization

Weights = dict[str, mx.array]
T = TypeVar("T")  # an array, or where one is stored

_LAYER = re.compile(rf"{re.escape(MODEL_PREFIX)}layers\.({NUMBER})\.")
_TAKEN = re.compile(  # by the host: the layer, what only a sparse one has, what only a dense one has
    rf"(?:lm_head|model\.embed_tokens|model\.norm|model\.layers\.({NUMBER})\."
    r"(?:input_layernorm|post_attention_layernorm|self_attn\.(?:[qkvo]_proj|[qk]_norm)|mlp\."
    r"(?:(gate|switch_mlp\.(?:gate|up|down)_proj)|((?:gate|up|down)_proj))))\.(?:weight|scales|biases|global_scale)"
)


def sanitize(weights: Weights, args: ModelArgs) -> Weights:
    """Rename, decode, gather and turn a checkpoint's tensors into those of `mlx_lm_qwen3vlmoe.model.Model`.

    Lazy and idempotent: no array is evaluated but the order of inputs in act-order, of which a wrong number would read
    memory of somebody else, and a bias of the router's choices, which has to be zero. Takes any part of a checkpoint,
    ``{}`` too; one with all layers must be complete. Layers that stay packed are described under ``quantization`` in
    the live config, where the host looks next. Layers of other programs are handed on as they are, see
    `layouts.guests`.

    Args:
        weights: names as any writer gives them → arrays; left as it is.
        args: the config, see `mlx_lm_qwen3vlmoe.config.ModelArgs`.

    Raises:
        CheckpointError: a tensor belongs to nothing, or is missing, ambiguous or of the wrong shape.
    """
    own, others = sanitize_beside(weights, args, set())
    return own | others


def sanitize_beside(weights: Weights, args: ModelArgs, replaced: set[str]) -> tuple[Weights, Weights]:
    """As `sanitize`: the tensors of the host's layers, and those of other programs' layers.

    Args:
        replaced: the paths of layers that the model has of another program already.
    """
    renamed = rename(weights)
    layers = by_layer(renamed)
    left = guests(layers, args.quantization_config, args.config.get("quantization") or {}) | (layers.keys() & replaced)
    present = {int(match[1]) for match in (_LAYER.match(f"{path}.") for path in layers) if match}
    complete = present.issuperset(range(args.text_config["num_hidden_layers"]))
    with as_stored(weights):
        decoded = decode_layers({path: layers[path] for path in layers if path not in left}, args, complete)
        if left.isdisjoint((HEAD, EMBEDDINGS)):
            decoded = with_head(decoded, args.tie_word_embeddings, complete)
        hosts = {f"{path}.{suffix}": array for path, each in decoded.items() for suffix, array in each.tensors.items()}
        check_names(hosts, args.text_config)
        check_names((f"{path}.weight" for path in left if ".mlp.experts." not in path), args.text_config)
    packed: dict[str, Parameters] = {path: each.parameters for path, each in decoded.items() if each.parameters}
    if packed:
        record_quantization(args.config, packed)
    return hosts, {name: array for name, array in renamed.items() if layer_and_suffix(name)[0] in left}


def unsanitize(stored: dict[str, Any], args: ModelArgs) -> dict[str, Part]:
    """The inverse of `sanitize`: what of the host's each stored tensor is made of, by its name.

    What a text model has no use for is left out. A tied checkpoint has no part that is made of the host's head.

    Args:
        stored: names → what has a shape, of a complete and unquantized checkpoint that loads.
        args: its config.
    """
    others, found = gather(by_layer(rename(stored)))
    refuse_merged(others)
    parts = {path: Part((path,)) for path in others}
    for experts in found:
        parts |= experts.parts(args.text_config)
    return restore_names(parts, stored)


def rename(weights: dict[str, T]) -> dict[str, T]:
    """Bring the names of all writers to those of the host, and leave out what a text model has no use for.

    ``model.visual.…``, ``visual.…`` and ``vision_tower.…`` are the vision components, dropped by these names.
    """
    renamed: dict[str, T] = {}
    for name, array in weights.items():
        if (target := host_name(name)) is None:
            continue
        if target in renamed:
            other = next(each for each in weights if host_name(each) == target)
            raise CheckpointError(
                (other, name),
                "one of these, as they are the same tensor",
                "both",
                "Remove one of them, or the file that a second tool left in the folder.",
            )
        renamed[target] = array
    return renamed


def restore_names(parts: dict[str, Part], names: Iterable[str]) -> dict[str, Part]:
    """The inverse of `rename`, by the names that were there: parts by the host's paths → by stored names."""
    targets = {name: host_name(name) for name in names}
    found = {name: layer_and_suffix(target) for name, target in targets.items() if target is not None}
    return {name: parts[path] for name, (path, suffix) in found.items() if suffix not in (ROUTER_BIAS, *IGNORED)}


def by_layer(weights: dict[str, T]) -> dict[str, dict[str, T]]:
    """Tensors by the layer that they are of, and what they are of it."""
    layers: dict[str, dict[str, T]] = {}
    for name, array in weights.items():
        path, suffix = layer_and_suffix(name)
        layers.setdefault(path, {})[suffix] = array
    return layers


def decode_layers(layers: Layers, args: ModelArgs, complete: bool = True) -> dict[str, Decoded]:
    """Every layer as MLX has it: decoded if another tool quantized it, the experts of a layer in three arrays.

    A layer without all of its tensors is an error in a complete checkpoint. In a part of one (a stage of a pipeline
    reads files, which end in the middle of a layer) it is left out.
    """
    own = args.config.get("quantization") or {}
    description = args.quantization_config
    if not description and not own and is_cast(layers):
        description = CAST
    decoder = Decoder(description, own, args.text_config)
    others, found = gather(cut_merged(layers, args.text_config))
    excused = () if complete else (MissingTensorError,)
    for experts in found:
        with contextlib.suppress(*excused):
            experts.unfold(args.text_config["num_experts"], decoder)
    check_orientations(found, args.text_config)
    decoded: dict[str, Decoded] = {}
    for path, tensors in others.items():
        with contextlib.suppress(*excused):
            decoded[path] = decoder(path, tensors)
    for experts in found:
        experts.check(args.text_config["num_experts"], others)
        with contextlib.suppress(*excused):
            parts = experts.decoded(args.text_config, decoder)
            decoded |= {f"{experts.mlp}.switch_mlp.{projection}": part for projection, part in parts.items()}
    decoder.report()
    return decoded


def with_head(decoded: dict[str, Decoded], tied: bool | None, complete: bool = True) -> dict[str, Decoded]:
    """Give every model a head of its own name: the stored one, or the embeddings themselves, shared and not copied.

    A head that is stored counts, whatever the config says: transformers 5 does not tie two different matrices either.
    Without one, the embeddings are the head only where the config says so.
    """
    if HEAD in decoded or EMBEDDINGS not in decoded:
        return decoded
    if tied:
        return decoded | {HEAD: decoded[EMBEDDINGS]}
    if complete:
        flag = "has tie_word_embeddings false"
        if tied is None:
            flag = "has no tie_word_embeddings (true says nothing in a backbone that transformers 5 saved)"
        raise MissingTensorError(
            f"{HEAD}.weight",
            f"a head, as config.json {flag}",
            "nothing",
            "Is a file of the checkpoint missing, or is this a backbone without a head? Take lm_head.weight from the "
            "whole model. If the head is the embedding matrix, set tie_word_embeddings to true in config.json, and "
            "remove architectures.",
        )
    return decoded


def check_names(weights: Iterable[str], sizes: dict[str, Any]) -> None:
    """Every tensor belongs to a layer that the config describes, sparse or dense."""
    layers, step, dense = sizes["num_hidden_layers"], sizes["decoder_sparse_step"], sizes["mlp_only_layers"]
    for name in weights:
        match = _TAKEN.fullmatch(name.removeprefix("language_model."))
        if not match:
            raise stranger(name)
        if not match[1]:
            continue
        n = int(match[1])
        sparse = n not in dense and (n + 1) % step == 0
        fields, remedy = "mlp_only_layers and decoder_sparse_step", "Are these fields right for this checkpoint?"
        if n >= layers:
            raise beyond(name, "layer", n, layers, "num_hidden_layers")
        if match[2] and not sparse:
            raise CheckpointError(
                name, f"a dense MLP in layer {n}, according to {fields} in config.json", "experts", remedy
            )
        if match[3] and sparse:
            raise CheckpointError(
                name, f"experts in layer {n}, according to {fields} in config.json", "a dense MLP", remedy
            )


def check_shapes(weights: Weights, shapes: dict[str, tuple[int, ...]], quantization: dict[str, Any]) -> None:
    """Every tensor has the shape of the host's parameter, or the one that MLX packs it to by its description.

    The host divides by the shapes of packed tensors before it compares any, which may end the process, or finds a
    format that they have by accident.

    Args:
        shapes: of the host's parameters.
        quantization: MLX's description, with an entry a path where a layer has parameters of its own.
    """
    for path, tensors in by_layer(weights).items():
        expected = shapes[f"{path}.weight"]
        if "scales" in tensors:
            entry = quantization.get(path)
            check_packed(path, tensors, expected, axes(path), entry if isinstance(entry, dict) else quantization)
            continue
        for suffix, array in tensors.items():
            if array is None:  # names alone, as in the host's tests
                continue
            if suffix != "weight":
                raise MissingTensorError(f"{path}.scales", f"this tensor beside {suffix}", "none", MISSING_FILE)
            if isinstance(quantization.get(path), dict):  # the host would quantize the layer, and then miss its scales
                raise CheckpointError(
                    f"{path}.weight",
                    "packed integers and scales, as quantization in config.json lists this layer",
                    "floats",
                    "Is quantization in config.json from this checkpoint? If not, use the config.json that was saved "
                    "with it.",
                )
            if array.shape != expected:
                fields = differing(axes(path), expected, array.shape)
                raise shape_error(f"{path}.weight", f"the shape {list(expected)}", list(array.shape), fields)


def check_complete(found: Collection[str], parameters: Iterable[str]) -> None:
    """All of the host's parameters are there."""
    missing = [name for name in parameters if name not in found]
    if not missing:
        return
    layer = (match := _LAYER.match(missing[0])) and match[0]
    whole = layer and not any(name.startswith(layer) for name in found)
    remedy = MISSING_FILE
    if whole:
        remedy = "Is a file of the checkpoint missing, or is num_hidden_layers in config.json too large?"
    others = f", and {len(missing) - 1} more are missing" if len(missing) > 1 else ""
    raise MissingTensorError(missing[0], "this tensor in a complete checkpoint", f"none{others}", remedy)
