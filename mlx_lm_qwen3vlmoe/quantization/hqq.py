"""HQQ: ``w = (q - zero) * scale``, with float zero points, and groups of a flat weight that is reshaped.

The weight as ``[n / g, g]`` with ``scale`` and ``zero [n / g, 1]`` (axis 1), or as ``[g, n / g]`` with ``[1, n / g]``
(axis 0), n = out * in, is cut along its rows into as many parts as codes fit in an integer, which are packed together,
the first in the highest bits:

| ``W_q``                              | bits of a code                                    |
|--------------------------------------|---------------------------------------------------|
| uint8 ``[rows, …]``                  | 8, 6 and 5: packed as 8                           |
| uint8 ``[rows / 2, …]``, ``/ 4, …``  | 4, or 2 and 1.58; ``/ 8`` would be 1              |
| int32 ``[⌈rows / 10⌉, …]``           | 3, the last ones padded                           |

``shape``, ``nbits``, ``axis`` and ``group_size`` only repeat what the config and the shapes tell. Source:
``core/quantize.py`` and ``core/bitpack.py`` of HQQ 0.2.8.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import mlx.core as mx

from ..errors import series
from .affine import affine, regroup
from .family import Description, Family
from .fields import Part, objects
from .layer import Decoded, Layer
from .packing import pack

_NUMBERS = ("shape", "axis", "group_size", "nbits")
_OF_NO_USE = (
    *("channel_wise", "compute_dtype", "encoded_state_dict", "offload_meta", "optimize", "packing", "quant_scale"),
    *("quant_zero", "round_zero", "stores_quant_config", "unpack_view_dtype", "view_as_float"),
)
_OF_WEIGHTS = ("nbits", "channel_wise", "group_size", "optimize", "round_zero", "axis", "view_as_float")
_STORED_AS = {8: (8, 6, 5), 4: (4,), 3: (3,), 2: (2, 1.58)}


class Hqq(Family):
    methods = ("hqq",)
    detail = ""  # its description is nested
    marks = ("W_q", "scale", "zero", *_NUMBERS, *_OF_NO_USE)
    fields = ("quant_config", "bits", "group_size")
    formats = (
        "HQQ, 2, 3, 4, 5, 6 or 8 bits | `W_q` | affine | packed",
        "HQQ along the other axis, or in groups of 8 or 16 | the same, with `axis` 0 | float | 16 bits",
    )

    def parts(self, description: Description) -> Iterable[Part]:
        nested = objects("quant_config", description.get("quant_config"), _OF_WEIGHTS)
        own = objects("", {"quant_config": description.get("quant_config")}, ("weight_quant_params", "offload_meta"))
        return [("", description, self.fields), *own, *nested]

    def decode(self, layer: Layer) -> Decoded:
        outputs, inputs = layer.linear_shape("W_q")
        described = {suffix: layer.tensors.pop(suffix, None) for suffix in (*_NUMBERS, *_OF_NO_USE)}
        codes, scales, zeros = layer.take("W_q", 2), layer.floats("scale", 2), layer.floats("zero", 2)
        size, groups = outputs * inputs, scales.size
        group, rest = divmod(size, groups)
        along = layer.shape(scales) == (groups, 1)  # axis 1
        if rest:
            raise layer.error("scale", f"as many scales as divide {size} values", groups)
        layer.check("scale", scales, (groups, 1), (1, groups))
        layer.check("zero", zeros, layer.shape(scales))
        if along and groups == 1 and layer.shape(codes)[1] == 1:  # one group is either
            along = False
        values, bits = _unpacked(layer, codes, (groups, group) if along else (group, groups))
        if not layer.planning:
            _check_described(layer, described, [outputs, inputs], 1 if along else 0, group, bits)
        step = math.gcd(group, inputs)
        if along and step % 32 == 0:
            words = pack(values.reshape(outputs, inputs), bits)
            # In float32: the product of a scale and any zero point needs the digits.
            scales, zeros = (
                regroup(array.astype(mx.float32).flatten(), size, group, step).reshape(outputs, -1)
                for array in (scales, zeros)
            )
            return affine(layer, words, scales, zeros, bits, step)
        weight = (values.astype(mx.float32) - zeros.astype(mx.float32)) * scales.astype(mx.float32)
        why = f"groups of {group}" if along else "groups that are no neighbors"
        return Decoded({"weight": weight.reshape(outputs, inputs).astype(layer.dtype)}, None, why)


def _unpacked(layer: Layer, codes: mx.array, shape: tuple[int, int]) -> tuple[mx.array, int]:
    """``W_q`` as the integers of that shape, and the bits that hold them."""
    rows, columns = shape
    if codes.dtype == mx.int32:
        layer.check("W_q", codes, (math.ceil(rows / 10), columns))
        planes = [(codes.view(mx.uint32) >> shift) & 7 for shift in range(27, -1, -3)]
        return mx.concatenate(planes)[:rows], 3
    if codes.dtype != mx.uint8:  # view_as_float
        raise layer.error("W_q", "uint8, or int32 for 3 bits", codes.dtype)
    found = layer.shape(codes)[0]
    bits = next((bits for bits in (8, 4, 2) if found * 8 == rows * bits), None)
    if bits is None:
        what = f"{rows} rows of 8 bits, in halves of 4 or quarters of 2"
        raise layer.error("W_q", what, f"the shape {list(layer.shape(codes))}")
    layer.check("W_q", codes, (found, columns))
    planes = [(codes >> shift) & (2**bits - 1) for shift in range(8 - bits, -1, -bits)]
    return mx.concatenate(planes), bits


def _check_described(
    layer: Layer, described: dict[str, Any], shape: list[int], axis: int, group: int, bits: int
) -> None:
    """What the layer says of itself, in a few numbers, is what its shapes tell."""
    fitting = {"shape": (shape,), "axis": (axis,), "group_size": (group,), "nbits": _STORED_AS[bits]}
    mx.eval([described[suffix] for suffix in fitting if described[suffix] is not None])
    for suffix, values in fitting.items():
        array = described[suffix]
        if array is None:
            continue
        found = array.tolist() if array.size <= 2 else list(array.shape)
        found = round(found, 2) if isinstance(found, float) else found
        if found not in values:
            raise layer.error(suffix, f"{series(values)}, according to the shape of W_q and config.json", found)
