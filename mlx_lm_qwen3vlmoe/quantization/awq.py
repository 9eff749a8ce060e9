"""AWQ: ``w = (q - z) * s`` with 4 bits, whose ``version`` tells the layout.

| ``version``       | ``qweight``                  | ``qzeros``                  | ``scales``        | order of codes  |
|-------------------|------------------------------|-----------------------------|-------------------|-----------------|
| `gemm`, `exllama` | int32 ``[in, out / 8]``      | int32 ``[in / g, out / 8]`` | ``[in / g, out]`` | `packing.AWQ`   |
| `gemv`            | int32 ``[out, in / 8]``      | int32 ``[out, wide / 8]``   | ``[out, wide]``   | MLX's           |
| `gemv_fast`       | int16 ``[out / 4, in]``      | float ``[wide, out]``       | ``[wide, out]``   | `_fast_codes`   |
| `llm-awq`         | the same                     | the same, ``scaled_zeros``  | the same          | the same        |
| `marlin`          | int32 ``[in / 16, 2 * out]`` | none: 8                     | ``[in / g, out]`` | `_marlin_codes` |

``wide`` is in / g padded with zeros; the ``qzeros`` of `gemv_fast` are ``-z * s``, rounded. Source:
``awq/modules/linear`` and ``awq/utils/packing_utils.py`` of AutoAWQ 0.2.9; ``nn_modules/qlinear/llm_awq.py`` of
GPTQModel 7.7. llm-awq itself may call its version ``gemv``.
"""

from __future__ import annotations

import functools

import mlx.core as mx

from ..errors import check_kinds, series, shown
from .affine import affine, with_biases
from .family import Description, Family
from .layer import Decoded, Layer
from .packing import codes, pack, transpose_nibbles, transpose_stream, unpack, unpack_outputs


class Awq(Family):
    methods = ("awq",)
    detail = "version"
    marks = ("qweight", "qzeros", "scaled_zeros")
    fields = (
        *("bits", "group_size", "zero_point", "version", "checkpoint_format", "format", "sym", "desc_act", "data_type"),
        *("w_bit", "q_group_size", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config"),
    )
    formats = (
        (
            "AWQ `gemm`, `exllama`, `gemv`, `gemv_fast`, `marlin`, `llm-awq` | `qweight`, by `quant_method` | "
            "affine, 4 bits | packed"
        ),
    )

    def check(self, description: Description) -> None:
        check_kinds("", description, group_size=int, zero_point=bool)

    def decode(self, layer: Layer) -> Decoded:
        version = str(layer.settings.get("version") or layer.settings.get("checkpoint_format") or "gemm").lower()
        if layer.has("scaled_zeros") and version == "gemv":
            version = "llm-awq"
        if layer.settings.get("bits", 4) != 4 or version not in _VERSIONS:
            found = f"{layer.settings.get('bits', 4)} bits and version {version}"
            raise layer.unsupported("qweight", f"AWQ with 4 bits and version {series(_VERSIONS)}", found)
        symmetric = layer.settings.get("zero_point") is False
        if symmetric != (version == "marlin") and "zero_point" in layer.settings:
            expected = f"zero_point {'false' if version == 'marlin' else 'true'} in quantization_config"
            raise layer.error("qweight", f"{expected} with version {version}", shown(layer.settings["zero_point"]))
        return _VERSIONS[version](layer)


def _gemm(layer: Layer) -> Decoded:
    return words_along_outputs(layer, 4)


def words_along_outputs(layer: Layer, described: int | None = None) -> Decoded:
    """The layout of ``gemm``; with other bits than 4 the outputs are in the same order over a dense stream."""
    qweight, qzeros, scales = layer.words("qweight", 2), layer.words("qzeros", 2), layer.floats("scales", 2)
    (inputs, words), (groups, outputs) = layer.shape(qweight), layer.shape(scales)
    if described:
        layer.check("scales", scales, (groups, words * 32 // described))
        size = layer.settings.get("group_size") or -1
        if size > 0 and groups > 1 and size * groups != inputs:
            raise layer.error("scales", f"{inputs} inputs in groups of {size}", f"{groups} groups")
    bits, rest = divmod(words * 32, outputs)
    if rest or not 4 <= bits <= 7 or outputs % 8:
        raise layer.error(
            "qweight", f"4 to 7 bits for each of {outputs} outputs", f"the shape {list(layer.shape(qweight))}"
        )
    layer.check("qzeros", qzeros, (groups, words))
    if inputs % (8 if bits == 4 else 32):
        raise layer.unsupported("qweight", f"a multiple of {8 if bits == 4 else 32} inputs", inputs)
    zeros = unpack_outputs(qzeros, bits).swapaxes(-1, -2)
    packed = transpose_nibbles(qweight) if bits == 4 else transpose_stream(qweight, bits)
    scales = mx.contiguous(scales.swapaxes(-1, -2))
    return affine(layer, packed, scales, zeros, bits, layer.settings.get("group_size"))


def _gemv(layer: Layer) -> Decoded:
    qweight, qzeros, scales = layer.words("qweight", 2), layer.words("qzeros", 2), layer.floats("scales", 2)
    outputs, words = layer.shape(qweight)
    size, groups, wide = _groups(layer, words * 8)
    layer.check("scales", scales, (outputs, wide))
    layer.check("qzeros", qzeros, (outputs, wide // 8))
    scales, zeros = mx.contiguous(scales[..., :groups]), unpack(qzeros, 4)[..., :groups]
    return affine(layer, qweight, scales, zeros, 4, size)


def _gemv_fast(layer: Layer) -> Decoded:
    suffix = "scaled_zeros" if layer.has("scaled_zeros") else "qzeros"
    qweight, biases, scales = layer.take("qweight", 2), layer.floats(suffix, 2), layer.floats("scales", 2)
    rows, inputs = layer.shape(qweight)
    if qweight.dtype not in (mx.int16, mx.uint16) or inputs % 64:
        raise layer.error("qweight", "16-bit integers for a multiple of 64 inputs", f"{qweight.dtype}, {inputs} inputs")
    size, groups, wide = _groups(layer, inputs)
    layer.check("scales", scales, (wide, 4 * rows))
    layer.check(suffix, biases, (wide, 4 * rows))
    scales, biases = (mx.contiguous(array[..., :groups, :].swapaxes(-1, -2)) for array in (scales, biases))
    return with_biases(layer, pack(_fast_codes(qweight), 4), scales, biases, 4, size)


def _fast_codes(words: mx.array) -> mx.array:
    """``[…, out / 4, in]`` words of 16 bits, 64 inputs of four outputs a run → ``[…, out, in]`` codes."""
    *stack_shape, rows, inputs = words.shape
    runs = codes(words, 4).reshape(*stack_shape, rows, inputs // 64, 4, 64).swapaxes(-2, -3)
    # Of each 32 inputs, two by two: 0, 8, 16, 24, 2, …; of each eight that result, the even ones first.
    eights = runs.reshape(*stack_shape, 4 * rows, inputs // 32, 4, 2, 4).swapaxes(-1, -2)
    return eights.swapaxes(-2, -3).reshape(*stack_shape, 4 * rows, inputs)


def _groups(layer: Layer, inputs: int) -> tuple[int, int, int]:
    """Of `gemv` and `gemv_fast`: the size of groups, their number, and the number to which it is padded."""
    size = layer.settings.get("group_size")
    size = inputs if size == -1 else size
    if size is None or not (size in (32, 64) or (size >= 128 and size % 32 == 0)) or inputs % size:
        what = f"-1, 32, 64, or a multiple of 32 from 128 on (group_size in quantization_config) of {inputs} inputs"
        raise layer.error("qweight", what, shown(layer.settings.get("group_size")))
    multiple = {32: 4, 64: 2}.get(size, 1)
    words = -(-(inputs // size) // 8)
    return size, inputs // size, -(-words // multiple) * multiple * 8


def _marlin(layer: Layer) -> Decoded:
    qweight, scales = layer.words("qweight", 2), layer.floats("scales", 2)
    (tiles, _), (groups, outputs) = layer.shape(qweight), layer.shape(scales)
    layer.check("qweight", qweight, (tiles, 2 * outputs))
    if outputs % 64:
        raise layer.unsupported("qweight", "a multiple of 64 outputs", outputs)
    order = _MARLIN_SCALES if groups > 1 else _MARLIN_CHANNELS
    scales = _back(scales.reshape(*layer.stack_shape, -1, len(order)), order).reshape(scales.shape)
    words = pack(_marlin_codes(qweight), 4)
    return affine(layer, words, mx.contiguous(scales.swapaxes(-1, -2)), None, 4, layer.settings.get("group_size"))


def _marlin_codes(words: mx.array) -> mx.array:
    """``[…, in / 16, 2 * out]`` words of tiles of 16 by 16, four of them permuted as one → ``[…, out, in]`` codes."""
    *stack_shape, tiles, width = words.shape
    four = _back(codes(words, 4).reshape(*stack_shape, -1, 1024), _marlin_order())
    squares = four.reshape(*stack_shape, tiles, width // 32, 16, 16)  # in / 16, out / 16, in, out
    return squares.transpose(*range(len(stack_shape)), -3, -1, -4, -2).reshape(*stack_shape, width // 2, 16 * tiles)


def _back(array: mx.array, order: tuple[int, ...]) -> mx.array:
    """What was ``array`` before its last axis was taken in an order."""
    return mx.take(array, mx.array([order.index(n) for n in range(len(order))]), -1)


@functools.cache
def _marlin_order() -> tuple[int, ...]:
    """Of 1024 codes, as the threads of a GPU read them."""
    order = []
    for thread in range(32):
        rows = [2 * (thread % 4) + n for n in (0, 1, 8, 9)]
        eight = [16 * row + thread // 4 + 8 * block for block in (0, 1) for row in rows]
        order += [256 * tile + eight[n] for tile in range(4) for n in (0, 2, 4, 6, 1, 3, 5, 7)]
    return tuple(order)


_MARLIN_SCALES = tuple(i + 8 * j for i in range(8) for j in range(8))
_MARLIN_CHANNELS = tuple(2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25))
_VERSIONS = {"gemm": _gemm, "exllama": _gemm, "gemv": _gemv, "gemv_fast": _gemv_fast, "marlin": _marlin}
_VERSIONS["llm-awq"] = _gemv_fast
