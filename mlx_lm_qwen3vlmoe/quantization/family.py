"""What every family of formats has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from typing import Any

from ..errors import check_block, check_kinds
from .fields import Part, objects
from .layer import Decoded, Layer, Tensors
from .patterns import pattern

Description = dict[str, Any]  # of a checkpoint, or what it says of one layer


def by_rules(description: Description, name: str) -> Description:
    """GPTQModel's ``dynamic``: rules for layers whose names match, ``"+:regex"`` (or without the sign) → other fields.

    ``"-:regex"`` names layers that are not quantized, as their tensors tell.
    """
    for rule, fields in (description.get("dynamic") or {}).items():
        counts = isinstance(fields, dict) and not rule.startswith("-:")
        if counts and pattern("dynamic", rule.removeprefix("+:")).match(name):
            return {**description, **fields}
    return description


def check_rules(description: Description) -> None:
    """Raise `CheckpointError` for rules that `by_rules` cannot look at."""
    check_kinds("", description, dynamic=dict)
    for rule, fields in (description.get("dynamic") or {}).items():
        pattern("dynamic", rule.removeprefix("+:").removeprefix("-:"))
        if isinstance(fields, dict):
            check_kinds(f"dynamic.{rule}.", fields, bits=int, group_size=int)
            check_block(f"dynamic.{rule}.", fields, "weight_block_size")


def rules(description: Description, known: Collection[str]) -> list[Part]:
    """The fields of a description, and of the rules in ``dynamic``."""
    return [("", description, {*known, "dynamic"}), *objects("dynamic", description.get("dynamic"), known)]


class Family(ABC):
    """The formats that are described by one ``quant_method``.

    Attributes:
        methods: the values of ``quant_method``.
        detail: the field of the description that tells the format, for `inspect`; empty if it is nested.
        marks: suffixes of tensors that mark a layer as quantized, whatever the description says: tools leave layers
            unquantized that their description names, and vice versa.
        formats: its rows of the table in docs/checkpoints.md: format, recognized by, becomes, in memory.
        fields: of its description, those that it reads, and those of its tools that do not change the weights; what
            `fields.HARMLESS` has is no field of them alone.
        undescribed: those of the marks that tell the family where there is no description.
        turned: suffixes of large tensors whose last two axes `decode` swaps; they are stacked that way at once.
    """

    methods: tuple[str, ...]
    detail: str
    marks: tuple[str, ...]
    formats: tuple[str, ...]
    fields: tuple[str, ...] = ()
    undescribed: tuple[str, ...] = ()
    turned: tuple[str, ...] = ()

    def __init_subclass__(cls) -> None:
        if missing := {"methods", "detail", "marks", "formats"} - vars(cls).keys():
            raise TypeError(f"{cls.__name__}: expected {', '.join(sorted(missing))}, found nothing")

    def check(self, description: Description) -> None:
        """Raise `CheckpointError` for a field that is not of the type that the other methods rely on."""
        return

    def parts(self, description: Description) -> Iterable[Part]:
        """The objects of a checked description that have fields, and which of these are known."""
        return [("", description, self.fields)]

    def settings(self, description: Description, name: str) -> Description:
        """What the description says of a layer; ``name`` as transformers has it, ``model.language_model.layers.…``."""
        return description

    def fused(self, layer: Layer, experts: int) -> tuple[Tensors, tuple[int, ...] | None]:
        """The tensors of fused experts, each with an axis for the experts in front, and the shape of the floats.

        Args:
            layer: the experts as they are stored, without such an axis; its ``host_shape`` is that of one expert.

        Returns:
            No shape where the weight is missing.
        """
        return layer.tensors, layer.tensors["weight"].shape if "weight" in layer.tensors else None

    def stacks(self, tensors: Tensors) -> bool:
        """Whether layers with such tensors, of the same shapes, can be decoded as one stack."""
        return True

    def halves(self, tensors: Tensors, axis: int, settings: Description) -> tuple[Tensors, Tensors] | None:
        """Fused experts cut in two along an axis of the weight, -1 or -2, if each half decodes by itself.

        None otherwise: then the whole is decoded first. Two halves in bytes wait in less memory than two in floats.
        """
        return None

    @abstractmethod
    def decode(self, layer: Layer) -> Decoded:
        """The tensors of one layer, or of a stack of alike ones, as MLX's packed tensors or a float weight."""
