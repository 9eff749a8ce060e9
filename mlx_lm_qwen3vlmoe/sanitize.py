"""Tensors of any Qwen3-VL-MoE layout → the names, shapes and memory order of the host's ``qwen3_moe``.

E = num_experts, H = hidden_size, I = moe_intermediate_size. The host's ``SwitchGLU`` keeps one array a projection for
all experts of a layer, ``switch_mlp.{gate,up}_proj.weight [E, I, H]`` and ``switch_mlp.down_proj.weight [E, H, I]``:
the ``[out, in]`` of a linear layer with the experts in front. Checkpoints store, under ``….layers.N.mlp.``:

| tensors                                                                       | written by                        |
|-------------------------------------------------------------------------------|-----------------------------------|
| ``experts.gate_up_proj [E, H, 2I]``, ``experts.down_proj [E, I, H]``          | official release, transformers 4  |
| ``experts.gate_up_proj [E, 2I, H]``, ``experts.down_proj [E, H, I]``          | transformers ≥ 5.2                |
| ``experts.{e}.{gate,up}_proj.weight [H/2, 2I]``, ``….down_proj.weight [I, H]``| transformers 5.0, 5.1: `_stacked` |
| ``experts.{e}.{p}_proj.weight [out, in]``, or ``experts.{p}_proj.{e}.weight`` | per-expert exports                |
| ``switch_mlp.{p}_proj.weight``, ``.scales``, ``.biases``                      | mlx-lm, mlx-vlm: taken as it is   |

Every step is a function from a dict of lazy arrays to another; none evaluates an array, so that a checkpoint larger
than memory can be converted, or read in part by one machine of many.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from . import quantization
from .backend import device, takes_global_scale, turned
from .config import record_quantization
from .errors import CheckpointError, MissingTensorError

if TYPE_CHECKING:
    from .model import ModelArgs

Weights = dict[str, mx.array]
Packed = dict[str, quantization.Parameters]  # path of a layer that stays packed → its parameters
Part = tuple[str, Weights, quantization.Parameters | None]  # of a SwitchGLU: projection, tensors, parameters if packed
logger = logging.getLogger(__name__)

_DECODER = "language_model.model."
_EMBEDDINGS = f"{_DECODER}embed_tokens."
HEAD = "language_model.lm_head."
# What stands before the name of a text tensor: transformers ≥ 4.57, MLX and older transformers, a bare language model.
_TEXT = re.compile(
    r"(?:model\.language_model\.|language_model\.model\.|language_model\.|model\.)?"
    r"((?:layers\.\d+|embed_tokens|norm|lm_head)\..+)"
)
_VISION = re.compile(r"(?:model\.)?(?:visual|vision_tower)\.")
# Rotary frequencies are computed, and the router has no bias: some exports invent one.
_MEANINGLESS = re.compile(r".*\.rotary_emb\.inv_freq|.*\.mlp\.gate\.bias")
_LAYER = re.compile(re.escape(_DECODER) + r"layers\.(\d+)\.")
_FUSED = re.compile(r"(.+\.mlp\.experts\.(?:gate_up_proj|down_proj))((?:_scale_inv|_scale)?)")
_EXPERT = re.compile(r"(.+\.mlp)\.experts\.(\d+)\.(gate|up|down)_proj\.(weight|scales|biases|global_scale)")
_PROJECTION_FIRST = re.compile(r"\.experts\.((?:gate|up|down)_proj)\.(\d+)\.")
_TAKEN = re.compile(  # by the host: the layer, what only a sparse one has, what only a dense one has
    r"(?:lm_head|model\.embed_tokens|model\.norm|model\.layers\.(\d+)\."
    r"(?:input_layernorm|post_attention_layernorm|self_attn\.(?:[qkvo]_proj|[qk]_norm)|mlp\."
    r"(?:(gate|switch_mlp\.(?:gate|up|down)_proj)|((?:gate|up|down)_proj))))\.(?:weight|scales|biases|global_scale)"
)


def sanitize(weights: Weights, args: ModelArgs) -> Weights:
    """Rename, decode, gather and turn a checkpoint's tensors into those of `mlx_lm_qwen3vlmoe.model.Model`.

    Lazy and idempotent. Takes any part of a checkpoint, ``{}`` too; a whole one must be complete. Layers that stay
    packed are described under ``quantization`` in the live config, where the host looks next.

    Args:
        weights: names as any writer gives them → arrays; left as it is.
        args: the config, see `mlx_lm_qwen3vlmoe.model.ModelArgs`.

    Raises:
        CheckpointError: a tensor belongs to nothing, or is missing, ambiguous or of the wrong shape.
    """
    weights = rename(weights)
    present = {int(match[1]) for match in map(_LAYER.match, weights) if match}
    whole = present.issuperset(range(args.text_config["num_hidden_layers"]))
    weights, packed = decode(weights, args, whole)
    weights, packed = stack_experts(weights, packed, args.text_config, whole)
    weights, packed = settle_head(weights, packed, args.tie_word_embeddings, whole)
    check_names(weights, args.text_config)
    if packed:
        record_quantization(args.config, packed)
    return weights


def rename(weights: Weights) -> Weights:
    """Bring the names of all writers to those of the host, and leave out what a text model has no use for.

    Separate experts, which the host does not have, become ``experts.{e}.{p}_proj``.

    ``model.visual.…``, ``visual.…`` and ``vision_tower.…`` are the vision components, dropped by these names.
    """
    renamed: Weights = {}
    for name, array in weights.items():
        if (target := host_name(name)) is None:
            continue
        if target in renamed:
            raise CheckpointError(
                f"{name}: expected one tensor for {target}, found two under different names. "
                "Remove one, or the file that a second tool left in the folder."
            )
        renamed[target] = array
    return renamed


def host_name(name: str) -> str | None:
    """The host's name for a tensor of any writer's; None for what a text model has no use for."""
    if not (match := _TEXT.fullmatch(name)):
        if _VISION.match(name) or _MEANINGLESS.fullmatch(name):
            return None
        raise CheckpointError(
            f"{name}: expected a tensor of a Qwen3-VL-MoE model (model.language_model., lm_head., model.visual.), "
            "found another. Is this checkpoint of another model type, or an adapter?"
        )
    text = match[1]
    if _MEANINGLESS.fullmatch(text):
        return None
    if ".experts." in text:
        text = _PROJECTION_FIRST.sub(r".experts.\2.\1.", text)
    return f"language_model.{text}" if text.startswith("lm_head.") else _DECODER + text


def decode(weights: Weights, args: ModelArgs, whole: bool = True) -> tuple[Weights, Packed]:
    """Replace every layer that another tool quantized by MLX's packed tensors, or by a float weight.

    Fused experts are decoded as they are stored, whichever way they are turned: their scales are turned alike, and a
    block of them may lie on both sides of the border between gate and up.
    """
    layers: dict[str, Weights] = {}
    for name, array in weights.items():
        layer, _, suffix = name.rpartition(".")
        if layer.endswith(".mlp.experts") and (match := _FUSED.fullmatch(name)):
            layer, suffix = match[1], "weight" + match[2]
        layers.setdefault(layer, {})[suffix] = array
    decoded: Weights = {}
    packed: Packed = {}
    # On the CPU, experts are multiplied in float32 only, and all that follows them is float32 too.
    second_scale = takes_global_scale()
    dtype = mx.float32 if device() == mx.cpu else getattr(mx, str(args.text_config.get("dtype")), mx.bfloat16)
    before = after = 0
    for layer, tensors in layers.items():
        fused = layer.endswith(("experts.gate_up_proj", "experts.down_proj"))
        if quantization.is_foreign(tensors):
            source = sum(array.nbytes for array in tensors.values())
            global_scale = ".mlp.experts." in layer and second_scale
            try:
                tensors, parameters = quantization.decode(layer, tensors, args.quantization_config, dtype, global_scale)
            except MissingTensorError:
                if whole:
                    raise
                continue  # the file ends between a weight and its scales
            if parameters is not None:
                packed[layer] = parameters
            elif tensors:
                before, after = before + source, after + tensors["weight"].nbytes
        elif "scales" not in tensors:
            for suffix, array in tensors.items():
                if array is not None and not mx.issubdtype(array.dtype, mx.floating):  # the host's tests pass None
                    raise CheckpointError(
                        f"{layer}.{suffix}: expected floats, or scales beside it, found {array.dtype}. "
                        "Take the original checkpoint."
                    )
        for suffix, array in tensors.items():
            decoded[layer if fused and suffix == "weight" else f"{layer}.{suffix}"] = array
    if after:
        logger.warning(
            "MLX has no packed format for layers of this checkpoint: they are dequantized, and take %.2f GB of memory "
            "for %.2f GB in the file. mlx_lm.convert -q writes a smaller copy.",
            after / 1e9,
            before / 1e9,
        )
    return decoded, packed


def stack_experts(
    weights: Weights, packed: Packed, sizes: dict[str, Any], whole: bool = True
) -> tuple[Weights, Packed]:
    """Replace the experts of every layer, however stored, by the three arrays of the host's ``SwitchGLU``.

    An incomplete set of experts is an error in a whole checkpoint. In a part of one (a stage of a pipeline reads files,
    which end in the middle of a layer) it is left out.
    """
    others: Weights = {}
    fused: dict[str, Weights] = {}
    single: dict[str, dict[str, dict[int, Weights]]] = {}
    for name, array in weights.items():
        if ".mlp.experts." not in name:
            others[name] = array
        elif match := _EXPERT.fullmatch(name):
            mlp, expert, projection, suffix = match.groups()
            single.setdefault(mlp, {}).setdefault(projection, {}).setdefault(int(expert), {})[suffix] = array
        elif match := _FUSED.fullmatch(name):
            mlp, _, projection = match[1].rpartition(".experts.")
            fused.setdefault(mlp, {})[projection] = array
        else:
            raise CheckpointError(
                f"{name}: expected experts.gate_up_proj, experts.down_proj or experts.<e>.<p>_proj.weight, found "
                "a tensor of experts that belongs to nothing. Take the original checkpoint."
            )
    experts = {layer: parameters for layer, parameters in packed.items() if ".mlp.experts." in layer}
    packed = {layer: parameters for layer, parameters in packed.items() if layer not in experts}
    for mlp in [*fused, *single]:
        switch_mlp = f"{mlp}.switch_mlp"
        if (mlp in fused and mlp in single) or f"{switch_mlp}.down_proj.weight" in others:
            raise CheckpointError(
                f"{mlp}: expected its experts in one layout, found two (of experts.gate_up_proj, experts.0.gate_proj, "
                "switch_mlp.gate_proj). Remove the file that a second tool left in the folder."
            )
        missing = _missing(mlp, fused.get(mlp), single.get(mlp, {}), sizes["num_experts"])
        if missing and whole:
            raise CheckpointError(
                f"{missing}: expected with the other experts of its layer, found nothing. "
                "Is a file of the checkpoint missing, or num_experts wrong in config.json?"
            )
        if missing:
            logger.debug("%s is not in this part of the checkpoint: the layer's experts are left out", missing)
            continue
        parts = _split(mlp, fused[mlp], sizes) if mlp in fused else _stacked(mlp, single[mlp], experts, sizes)
        for projection, tensors, parameters in parts:
            for suffix, array in tensors.items():
                others[f"{switch_mlp}.{projection}_proj.{suffix}"] = array
            if parameters is not None:
                packed[f"{switch_mlp}.{projection}_proj"] = parameters
    return others, packed


def _missing(mlp: str, fused: Weights | None, single: dict[str, dict[int, Weights]], experts: int) -> str | None:
    """The name of the first tensor that the experts of a layer lack; an expert too many raises."""
    if fused is not None:
        return next((f"{mlp}.experts.{name}" for name in ("gate_up_proj", "down_proj") if name not in fused), None)
    for projection in ("gate", "up", "down"):
        found = single.get(projection, {})
        if beyond := [expert for expert in found if expert >= experts]:
            raise CheckpointError(
                f"{mlp}.experts.{min(beyond)}.{projection}_proj.weight: expected experts 0 to {experts - 1}, found it. "
                "Correct num_experts in config.json."
            )
        if len(found) < experts:
            expert = next(expert for expert in range(experts) if expert not in found)
            return f"{mlp}.experts.{expert}.{projection}_proj.weight"
    return None


def _split(mlp: str, fused: Weights, sizes: dict[str, Any]) -> Iterator[Part]:
    """Cut a layer's fused experts into gate, up and down, each ``[E, out, in]``.

    ``gate_up_proj`` holds two projections of every expert, first gate, then up, as the two halves of one axis (never
    interleaved): the origin multiplies once and cuts the product. The host multiplies twice, so the array is cut here.

    The official release stores ``[in, out]`` and multiplies ``x @ w``, so the halves lie on the last axis. The host
    keeps ``[out, in]``, as in every linear layer, and multiplies by the transpose, so the last two axes change places.
    transformers ≥ 5.2 stores ``[out, in]`` like the host: its halves lie on the axis before, and no axis moves.
    """
    e, h, i = sizes["num_experts"], sizes["hidden_size"], sizes["moe_intermediate_size"]
    gate_up, down = fused["gate_up_proj"], fused["down_proj"]
    # Only the shape tells the two orders apart. H = 2I makes one tensor square, H = I the other: one always tells.
    gate_up_in_out = _in_out(f"{mlp}.experts.gate_up_proj", gate_up.shape, (e, h, 2 * i))
    down_in_out = _in_out(f"{mlp}.experts.down_proj", down.shape, (e, i, h))
    if gate_up_in_out is None:
        gate_up_in_out = down_in_out
    if down_in_out is None:
        down_in_out = gate_up_in_out
    if gate_up_in_out:
        gate, up = turned(gate_up[..., :i]), turned(gate_up[..., i:])
    else:
        gate, up = gate_up[:, :i], gate_up[:, i:]
    if down_in_out:
        down = turned(down)
    for projection, weight in (("gate", gate), ("up", up), ("down", down)):
        yield projection, {"weight": weight}, None


def _in_out(name: str, found: tuple[int, ...], shape: tuple[int, ...]) -> bool | None:
    """Whether experts are stored as ``shape``, ``[E, in, out]``, or with the last two axes swapped; None if square."""
    swapped = (*shape[:-2], shape[-1], shape[-2])
    if found not in (shape, swapped):
        raise CheckpointError(
            f"{name}: expected the shape {list(shape)} or {list(swapped)}, found {list(found)}. Are num_experts, "
            "hidden_size and moe_intermediate_size in config.json those of this checkpoint?"
        )
    return None if shape == swapped else found == shape


def _stacked(mlp: str, single: dict[str, dict[int, Weights]], packed: Packed, sizes: dict[str, Any]) -> Iterator[Part]:
    """Stack a layer's separate experts, each a linear layer ``[out, in]``, to ``[E, out, in]``.

    transformers 5.0 and 5.1 save such names too, but took ``[E, H, 2I]`` for ``[E, 2I, H]``: they cut the wrong axis in
    two and turned nothing. Their "gate" is the upper half of an expert's ``gate_up [H, 2I]``, their "up" the lower,
    each ``[H/2, 2I]``, and "down" is still ``[I, H]``. Nothing is lost: rejoined, it is the official layout again (a
    packed one in float, as its groups run along the wrong axis). llm-compressor's ``model_free_ptq`` does the same.
    """
    e, h, i = sizes["num_experts"], sizes["hidden_size"], sizes["moe_intermediate_size"]
    good = {"gate": (i, h), "up": (i, h), "down": (h, i)}
    miscut = {"gate": (h // 2, 2 * i), "up": (h // 2, 2 * i), "down": (i, h)}
    shapes: dict[str, tuple[int, ...]] = {}
    kinds: dict[str, Any] = {}
    for projection, experts in single.items():
        for n in range(e):
            name = f"{mlp}.experts.{n}.{projection}_proj"
            parameters = packed.get(name)
            kind = (sorted(experts[n]), parameters)
            if kinds.setdefault(projection, kind) != kind:
                raise CheckpointError(
                    f"{name}: expected the format of the other experts, {_format(*kinds[projection])}, found "
                    f"{_format(*kind)}. MLX stacks experts, which needs one format for all: quantize all or none."
                )
            if "weight" not in experts[n]:
                raise CheckpointError(f"{name}.weight: expected beside {sorted(experts[n])}, found nothing.")
            shape = experts[n]["weight"].shape
            if parameters is not None:
                shape = (shape[0], shape[1] * 32 // parameters["bits"])
            if shapes.setdefault(projection, shape) != shape or shape not in (good[projection], miscut[projection]):
                raise CheckpointError(
                    f"{name}.weight: expected the shape {list(good[projection])}, found {list(shape)}. "
                    "Are hidden_size and moe_intermediate_size in config.json those of this checkpoint?"
                )
    # One of the two kinds of shapes may coincide (H = 2I or H = I), never both.
    if shapes == good:
        for projection, experts in single.items():
            suffixes, parameters = kinds[projection]
            yield projection, {s: mx.stack([experts[n][s] for n in range(e)]) for s in suffixes}, parameters
    elif shapes == miscut:
        arrays: dict[str, list[mx.array]] = {}
        for projection, experts in single.items():
            _, parameters = kinds[projection]
            arrays[projection] = [
                experts[n]["weight"]
                if parameters is None
                else quantization.dequantize(experts[n], parameters, mx.float32)
                for n in range(e)
            ]
        halves = zip(arrays["gate"], arrays["up"], strict=True)
        gate_up = mx.stack([mx.concatenate(list(pair)) for pair in halves])
        yield from _split(mlp, {"gate_up_proj": gate_up, "down_proj": mx.stack(arrays["down"])}, sizes)
    else:
        raise CheckpointError(
            f"{mlp}.experts.0: expected gate, up and down of the shapes {list(map(list, good.values()))}, found "
            f"{[list(shapes[projection]) for projection in good]}. Take the original checkpoint."
        )


def _format(suffixes: list[str], parameters: dict[str, Any] | None) -> str:
    return "float" if parameters is None and suffixes == ["weight"] else f"{' + '.join(suffixes)} with {parameters}"


def settle_head(weights: Weights, packed: Packed, tied: bool | None, whole: bool = True) -> tuple[Weights, Packed]:
    """Give every model a head of its own name: the stored one, or the embeddings themselves, shared and not copied.

    A head beside a config that ties it is a second copy, dropped with its scales and biases. A head beside a config
    that contradicts itself is real (transformers 5 writes such configs). No head where the config is clear that there
    is one is an error.
    """
    if tied:
        weights = {name: array for name, array in weights.items() if not name.startswith(HEAD)}
    embeddings = {name: array for name, array in weights.items() if name.startswith(_EMBEDDINGS)}
    if not embeddings or any(name.startswith(HEAD) for name in weights):
        return weights, packed
    if tied is False:
        if whole:
            raise CheckpointError(
                "lm_head.weight: expected in a model with tie_word_embeddings false, found nothing. Is a file of the "
                "checkpoint missing? If the head is the embedding matrix, set tie_word_embeddings to true."
            )
        return weights, packed
    shared = {HEAD + name.removeprefix(_EMBEDDINGS): array for name, array in embeddings.items()}
    if _EMBEDDINGS[:-1] in packed:
        packed = packed | {HEAD[:-1]: packed[_EMBEDDINGS[:-1]]}
    return weights | shared, packed


def check_names(weights: Iterable[str], sizes: dict[str, Any]) -> None:
    """Every tensor belongs to a layer that the config describes, sparse or dense."""
    layers, step, dense = sizes["num_hidden_layers"], sizes["decoder_sparse_step"], sizes["mlp_only_layers"]
    for name in weights:
        match = _TAKEN.fullmatch(name.removeprefix("language_model."))
        expected = "a tensor of the host's qwen3_moe"
        if match and match[1]:
            n = int(match[1])
            sparse = n not in dense and (n + 1) % step == 0
            if n >= layers:
                match, expected = None, f"layers 0 to {layers - 1} (num_hidden_layers)"
            elif match[2] and not sparse:
                match, expected = None, f"a dense MLP in layer {n} (mlp_only_layers, decoder_sparse_step)"
            elif match[3] and sparse:
                match, expected = None, f"experts in layer {n} (mlp_only_layers, decoder_sparse_step)"
        if not match:
            raise CheckpointError(
                f"{name}: expected {expected}, found a tensor that belongs to nothing. Is config.json that of this "
                "checkpoint?"
            )


def check_shapes(weights: Weights, shapes: dict[str, tuple[int, ...]]) -> None:
    """Every tensor has the shape of the host's parameter, or one that MLX packs it to.

    The host divides by the shapes of packed tensors before it compares any, which may end the process.
    """
    for name, array in weights.items():
        if array is None:  # names alone, as in the host's tests
            continue
        layer, _, suffix = name.rpartition(".")
        *lead, inputs = shape = shapes[f"{layer}.weight"]
        scales, size = weights.get(f"{layer}.scales"), array.shape[-1] if array.ndim == len(shape) and array.size else 0
        floating = mx.issubdtype(array.dtype, mx.floating)
        if scales is None or suffix == "global_scale":
            fits, expected = suffix != "weight" or (array.shape == shape and floating), "floats of the shape"
        elif f"{layer}.weight" not in weights:
            fits, expected = False, "a weight beside it, of the shape"
        elif suffix == "weight":
            fits, expected = size > 0 and size * 32 % inputs == 0 and array.dtype == mx.uint32, "uint32 words that pack"
        else:
            fits = size > 0 and inputs % size == 0 and array.shape == scales.shape
            fits = fits and (floating or (array.dtype == mx.uint8 and f"{layer}.biases" not in weights))
            expected = "one number for each group of inputs of"
        if not fits or (suffix != "global_scale" and list(array.shape[:-1]) != lead):
            raise CheckpointError(
                f"{name}: expected {expected} {list(shape)}, found {array.dtype} {list(array.shape)}. Are the sizes in "
                "config.json those of this checkpoint, and is no file of it missing?"
            )
