"""GPTQ: ``w = (q - z) * s[g_idx]``; ``qweight`` is packed along *in*, as MLX packs, but transposed.

``qweight [in * bits / 32, out]`` int32, ``qzeros [groups, out * bits / 32]`` int32, ``scales [groups, out]``, ``g_idx
[in]`` int32, the group of each input. The tensors tell the bits: layers may have others than the description.

| ``checkpoint_format`` | zero point    | codes of 2, 4, 8 bits | of 3 bits | of 5, 6, 7 bits |
|-----------------------|---------------|-----------------------|-----------|-----------------|
| ``gptq``              | less one      | dense                 | dense     | as `gptq_p`     |
| ``gptq_v2``           | as it is      | dense                 | dense     | as `gptq_p`     |
| ``gptq_p``            | as it is      | dense                 | in planes | in planes       |

Source: ``gptqmodel/nn_modules/qlinear`` and ``gptqmodel/utils/planar_packing.py`` of GPTQModel 7.7.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import mlx.core as mx

from ..errors import check_kinds, series
from .affine import affine, group_size_of, ungrouped
from .family import Description, Family, by_rules, check_rules, rules
from .fields import Part
from .layer import Decoded, Layer
from .packing import pack, unpack, unpack_planes

ACT_ORDER = "act-order"  # why a layer is float


class Gptq(Family):
    methods = ("gptq",)
    detail = "checkpoint_format"
    marks = ("qweight", "qzeros", "g_idx")
    fields = (
        *("bits", "group_size", "sym", "desc_act", "checkpoint_format", "format", "damp_auto_increment"),
        *("act_group_aware", "model_name_or_path", "model_file_base_name", "is_marlin_format", "awq_gemm_checkpoint"),
        *("use_cuda_fp16", "use_exllama", "exllama_config", "disable_exllama", "max_input_length", "model_seqlen"),
        *("pad_token_id", "cache_block_outputs", "module_name_preceding_first_block", "batch_size", "data_type"),
        *("mse", "v2", "v2_alpha", "gptaq", "foem", "parallel_packing", "device", "offload_to_disk"),
    )
    formats = (
        "GPTQ, 2 to 8 bits: `gptq`, `gptq_v2`, `gptq_p` | `qweight`, by `quant_method` | affine; 7 bits as 8 | packed",
        "GPTQ in act-order | the same, and a `g_idx` that is out of order | float | 16 bits",
    )
    turned = ("qweight",)

    def check(self, description: Description) -> None:
        check_kinds("", description, group_size=int)
        check_rules(description)

    def parts(self, description: Description) -> Iterable[Part]:
        return rules(description, self.fields)

    def settings(self, description: Description, name: str) -> Description:
        return by_rules(description, name)

    def decode(self, layer: Layer) -> Decoded:
        known = ("gptq", "gptq_v2", "gptq_p")
        named = layer.settings.get("format", "gptq")
        form = layer.setting("checkpoint_format", series(known), *known, default=named)
        planes = (3, 5, 6, 7) if form == "gptq_p" else (5, 6, 7)
        described = {layer.settings.get("bits")}
        return words_along_inputs(layer, stored_less_one=form == "gptq", planes=planes, described=described)


def words_along_inputs(
    layer: Layer, stored_less_one: bool, planes: tuple[int, ...] = (), described: Collection[Any] = (None,)
) -> Decoded:
    """The layout of GPTQ, with zero points as they are or less one.

    Args:
        planes: numbers of bits that are stored in planes, with zero points as they are.
        described: the numbers of bits that the description has; None among them stands for any.
    """
    qweight, qzeros, scales = layer.words("qweight", 2), layer.words("qzeros", 2), layer.floats("scales", 2)
    g_idx = layer.take_optional("g_idx", 1)
    if g_idx is None and layer.settings.get("desc_act"):
        layer.take("g_idx")
    (rows, _), (groups, outputs) = layer.shape(qweight), layer.shape(scales)
    bits, rest = divmod(layer.shape(qzeros)[1] * 32, outputs)
    if rest or not 2 <= bits <= 8 or not {bits, None}.intersection(described):
        known = "2 to 8" if None in described else " or ".join(map(str, sorted(described, key=str)))
        what = f"{known} bits for each of {outputs} outputs"
        raise layer.error("qzeros", what, f"the shape {list(layer.shape(qzeros))}")
    layer.check("qweight", qweight, (rows, outputs))
    layer.check("qzeros", qzeros, (groups, outputs * bits // 32))
    inputs, rest = divmod(rows * 32, bits)
    if rest or (bits in planes and (inputs % 32 or outputs % 32)):
        what = f"{'a multiple of 32' if bits in planes else 'a whole number of'} codes of {bits} bits"
        raise layer.error("qweight", what, f"the shape {list(layer.shape(qweight))}")
    packed = mx.contiguous(qweight.swapaxes(-1, -2))
    if bits in planes:
        packed, zeros = pack(unpack_planes(packed, bits), bits), unpack_planes(qzeros, bits)
    elif stored_less_one:
        zeros = _one_more(qzeros, bits)
    else:
        zeros = unpack(qzeros, bits)
    scales, zeros = mx.contiguous(scales.swapaxes(-1, -2)), zeros.swapaxes(-1, -2)
    return in_order(layer, packed, scales, zeros, bits, layer.settings.get("group_size"), "g_idx", g_idx)


def in_order(
    layer: Layer,
    words: mx.array,
    scales: mx.array,
    zeros: mx.array | None,
    bits: int,
    group_size: int | None,
    suffix: str,
    indices: mx.array | None,
) -> Decoded:
    """`affine`, unless the inputs are out of order by ``indices [in]``, their groups: act-order becomes float."""
    inputs, groups = words.shape[-1] * 32 // bits, scales.shape[-1]
    if indices is not None:
        layer.check(suffix, indices, (inputs,))
        order = group_order(layer, suffix, indices, groups, group_size_of(layer, inputs, groups, group_size))
        if order is not None:
            return ungrouped(layer, words, scales, zeros, bits, order, ACT_ORDER)
    return affine(layer, words, scales, zeros, bits, group_size)


def _one_more(qzeros: mx.array, bits: int) -> mx.array:
    """Zero points that are stored less one. The tool subtracts from whole words: 1 comes back with the carries."""
    if 32 % bits == 0:
        return unpack(qzeros + sum(1 << i for i in range(0, 32, bits)), bits)
    return (unpack(qzeros, bits) + 1) & (2**bits - 1)


def group_order(layer: Layer, suffix: str, indices: mx.array, groups: int, size: int) -> mx.array | None:
    """The group of each input, or None where neighbors are in one; raises `CheckpointError` for one that is not there.

    The only values that loading looks at: a group that is not there would read memory of somebody else.
    """
    if layer.planning:
        return None if layer.settings.get("desc_act") is False else indices
    indices = indices.astype(mx.int32)
    ordered = indices == mx.arange(indices.shape[-1]) // size
    found: Any = mx.stack([indices.min(), indices.max(), ordered.all().astype(mx.int32)]).tolist()
    least, most, in_order = found
    if least < 0 or most >= groups:
        raise layer.error(suffix, f"groups from 0 to {groups - 1}", f"group {least if least < 0 else most}")
    return None if in_order else indices
