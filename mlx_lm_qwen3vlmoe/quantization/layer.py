"""One linear layer that another tool quantized, and what becomes of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx

from ..errors import DAMAGED, MISSING_FILE, CheckpointError, MissingTensorError, series, shown

Tensors = dict[str, mx.array]
Parameters = dict[str, Any]  # of mlx.nn.quantize: group_size, bits, mode, and global_scale for nvfp4

# Of activations or the key-value cache, or of no use here: weight_shape repeats what the shapes tell.
IGNORED = {
    *("input_scale", "input_scale_2", "input_scale_ub", "input_global_scale", "input_zero_point", "input_zero_point_2"),
    *("output_scale", "output_scale_2", "output_zero_point", "output_zero_point_2", "weight_shape", "kv_scale"),
    *("activation_scale", "weight_activation_scale"),  # the latter of fused experts
    *("k_scale", "v_scale", "q_scale", "prob_scale", "k_zero_point", "v_zero_point", "q_zero_point"),
    *("k_bias", "v_bias"),
}
_INDICES = ("g_idx", "weight_g_idx")


class Decoded(NamedTuple):
    """MLX's packed tensors and their parameters; or a float weight, None, and why MLX cannot hold it packed."""

    tensors: Tensors
    parameters: Parameters | None = None
    why_float: str | None = None


class Layer:
    """The tensors of a linear layer, taken one by one: what is left over in the end was not understood.

    Attributes:
        name: of the layer, for errors.
        tensors: suffix → array.
        settings: what the checkpoint's description says of this layer.
        dtype: of the float weight, where MLX cannot express the format.
        stack_shape: the axes in front of every tensor: ``()``, or ``(experts,)`` for a stack of alike layers. Formulas
            work along the last two axes, so that one serves both.
        takes_global_scale: whether the host's layer can hold NVFP4's second scale.
        planning: whether the tensors have no values yet (`inspect` reads headers only).
        host_shape: ``(out, in)`` by the config; None where the host has no such layer.
    """

    def __init__(
        self,
        name: str,
        tensors: Tensors,
        settings: dict[str, Any],
        dtype: mx.Dtype,
        stack_shape: tuple[int, ...] = (),
        takes_global_scale: bool = False,
        planning: bool = False,
        host_shape: tuple[int, int] | None = None,
    ):
        self.name, self.settings, self.dtype = name, settings, dtype
        self.tensors = {suffix: array for suffix, array in tensors.items() if suffix not in IGNORED}
        self.stack_shape, self.takes_global_scale, self.planning = stack_shape, takes_global_scale, planning
        self.host_shape = host_shape

    def error(self, suffix: str, expected: str, found: object) -> CheckpointError:
        """The error for a tensor that is not as the description has it: one of the two is wrong."""
        remedy = f"Is quantization_config from this checkpoint? {DAMAGED}"
        return CheckpointError(f"{self.name}.{suffix}", expected, found, remedy)

    def unsupported(self, suffix: str, expected: str, found: object) -> CheckpointError:
        """The error for a form of a format that is not known here, or that MLX cannot have."""
        remedy = (
            "Is quantization_config from this checkpoint? If so, this variant is not supported: use another quantized "
            "checkpoint, or the unquantized one with mlx_lm.convert -q."
        )
        return CheckpointError(f"{self.name}.{suffix}", expected, found, remedy)

    def setting(self, field: str, expected: str, *known: object, default: object = None) -> Any:
        """A field of the description, which has to be one of the known values."""
        value = self.settings.get(field, default)
        if value not in known:
            raise self.unsupported("weight", f"{expected} in quantization_config ({field})", shown(value))
        return value

    def shape(self, array: mx.array) -> tuple[int, ...]:
        """The shape of one layer's tensor."""
        return array.shape[len(self.stack_shape) :]

    def linear_shape(self, suffix: str) -> tuple[int, int]:
        """``(out, in)`` by the config, for a format whose tensors are flat, and of which there are no stacks."""
        if self.stack_shape or self.host_shape is None:
            raise self.unsupported(suffix, "a linear layer outside of the experts", "one of the experts")
        return self.host_shape

    def has(self, suffix: str, *dtypes: mx.Dtype) -> bool:
        """Whether there is such a tensor, of one of these dtypes if any are named."""
        return suffix in self.tensors and (not dtypes or self.tensors[suffix].dtype in dtypes)

    def take_optional(self, suffix: str, *ranks: int) -> mx.array | None:
        return self.take(suffix, *ranks) if suffix in self.tensors else None

    def take(self, suffix: str, *ranks: int) -> mx.array:
        """Remove a tensor and return it, as one of these ranks (of one layer), with the dtype that its name has."""
        if suffix not in self.tensors:
            name = f"{self.name}.{suffix}"
            raise MissingTensorError(name, "this tensor beside the others of its layer", "none", MISSING_FILE)
        array = self.tensors.pop(suffix)
        if array.shape[: len(self.stack_shape)] != self.stack_shape:
            expected = f"{self.stack_shape[0]} experts, according to num_experts in config.json"
            raise self.error(suffix, expected, f"the shape {list(array.shape)}")
        if not array.size:
            raise self.error(suffix, "values", f"none (its shape is {list(self.shape(array))})")
        if ranks and len(self.shape(array)) not in ranks:
            raise self.error(suffix, f"{series(ranks)} dimensions", f"the shape {list(self.shape(array))}")
        if suffix in _INDICES:
            if array.dtype not in (mx.int32, mx.uint32):
                raise self.error(suffix, "32-bit integers", array.dtype)
        elif "scale" in suffix and array.dtype != mx.uint8 and not mx.issubdtype(array.dtype, mx.floating):
            raise self.error(suffix, "floats", array.dtype)
        return array

    def words(self, suffix: str, *ranks: int) -> mx.array:
        """A tensor of packed integers, as ``uint32``."""
        return self.check_words(suffix, self.take(suffix, *ranks))

    def check_words(self, suffix: str, array: mx.array) -> mx.array:
        if array.dtype not in (mx.int32, mx.uint32):
            raise self.error(suffix, "32-bit integers", array.dtype)
        return array.view(mx.uint32)

    def floats(self, suffix: str, *ranks: int) -> mx.array:
        """A tensor of scales in floats."""
        array = self.take(suffix, *ranks)
        if not mx.issubdtype(array.dtype, mx.floating):
            raise self.error(suffix, "floats", array.dtype)
        return array

    def number(self, suffix: str) -> mx.array:
        """One float for the whole layer, as ``stack_shape + (1, 1)`` in float32."""
        array = self.floats(suffix)
        if any(axis != 1 for axis in self.shape(array)):
            raise self.error(suffix, "one number", f"the shape {list(self.shape(array))}")
        return array.astype(mx.float32).reshape(*self.stack_shape, 1, 1)

    def check(self, suffix: str, array: mx.array, *shapes: tuple[int, ...]) -> mx.array:
        if self.shape(array) not in shapes:
            expected = series([list(shape) for shape in shapes])
            raise self.error(suffix, f"the shape {expected}", list(self.shape(array)))
        return array
