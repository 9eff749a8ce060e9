"""The names that writers give to tensors ↔ those of the host.

| names                                                                     | writer                              |
|---------------------------------------------------------------------------|-------------------------------------|
| ``model.language_model.layers.…``, ``model.visual.…``, ``lm_head.…``      | official release, transformers 4.57 |
| ``language_model.model.…``, ``vision_tower.…``, ``language_model.lm_head``| MLX                                 |
| ``language_model.model.layers.…``, ``visual.…``                           | transformers before 4.57            |
| ``language_model.layers.…``, ``model.layers.…``, ``layers.…``             | a bare language model               |
| ``_orig_mod.…``, ``module.…``, ``base_model.model.…``, and others         | a wrapped model: `unwrapped`        |
| ``experts.w13_weight``, ``experts.w2_weight``                             | vLLM's sharded state                |

Numbers in names are decimals without leading zeros: ``experts.01`` would be a second ``experts.1``.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from functools import partial

from ..errors import CheckpointError, MissingTensorError
from .aliases import LAST_PARTS, known_suffix

MODEL_PREFIX = "language_model.model."
EMBEDDINGS = f"{MODEL_PREFIX}embed_tokens"
HEAD = "language_model.lm_head"
NUMBER = r"(?:0|[1-9][0-9]{0,30})"
_TEXT = re.compile(
    r"(?:model\.language_model\.|language_model\.model\.|language_model\.|model\.)?"
    rf"((?:layers\.{NUMBER}|embed_tokens|norm|lm_head)\..+)"
)
_VISION = re.compile(r"(?:model\.)?(?:visual|vision_tower)\.")
# Rotary frequencies are computed, and the router has no bias: some exports invent one. ComfyUI marks files in FP8.
_MEANINGLESS = (".rotary_emb.inv_freq", ".mlp.gate.bias")
_MARKER = "scaled_fp8"
# PyTorch's wrappers name themselves where they wrap; those of all the model stand in front, as does PEFT's.
_WRAPPERS = re.compile(r"_orig_mod\.|_checkpoint_wrapped_module\.|_fsdp_wrapped_module\.|_fpw_module\.")
_OUTER = re.compile(r"^(?:module\.)*(?:base_model\.model\.)?(?:module\.)*")
_REPEATED = re.compile(r"(?:language_model\.){2,}")
_UNMERGED = re.compile(r"\.base_layer\.|\.lora_|\.modules_to_save\.")
_PROJECTION_FIRST = re.compile(rf"\.experts\.((?:gate|up|down)_proj)\.({NUMBER})\.")
_PLURAL = re.compile(rf"\.experts\.(gate_up|down)_projs\.({NUMBER})\.")
_FUSED = re.compile(r"(.+\.mlp\.experts\.)(_?)(gate_up_proj|down_proj)(_[a-z_]+)?")
_NUMBERS = re.compile(rf"(?<=\.){NUMBER}(?=\.)")
_MAIN = ("weight", "qweight", "weight_packed", "_weight_qdata", "W_q")  # what the other tensors of a layer belong to
# What else files of checkpoints have: a pattern → what it is, and what to do. The last one fits any name.
_STRANGERS = {
    r"^base_model\.|\.(?:base_layer|modules_to_save)\.|\.lora_(?:\w*[A-Z]\b|magnitude)": (
        "part of a PEFT adapter that is not merged. Merge the adapter with PEFT (merge_and_unload), and save the model."
    ),
    r"\.lora_[ab]$": "part of an mlx_lm adapter that is not fused. Run mlx_lm.fuse.",
    r"(?:^|\.)v_head\.": "the value head of TRL. Save the wrapped model (pretrained_model) without its value head.",
    r"(?:^|\.)score\.": (
        "the head of a reward model or classifier. Such a model writes no text. Use the model that it was trained from."
    ),
    r"(?:^|\.)(?:mtp|midlayer)\.|^fc\.|^(?:d2t|t2d)$": (
        "part of a draft model for speculative decoding. Save a copy of the checkpoint without the draft model."
    ),
    r"(?:^|\.)(?:thinker|talker|code2wav|audio_tower)\.": (
        "part of Qwen3-Omni. This package cannot load that model type: use a Qwen3-VL-MoE checkpoint."
    ),
    r"\.bias$": (
        "a bias, which this model type does not have. Is config.json from this checkpoint? If so, the model was "
        "changed, and this package cannot load it."
    ),
    "": (
        "one that no known tool writes. Is config.json from this checkpoint? If so, and if the model does not need "
        "this tensor, save a copy without it."
    ),
}


def host_name(name: str) -> str | None:
    """The host's name for a tensor of any writer's; None for what a text model has no use for.

    Separate experts, which the host does not have, become ``experts.{e}.{p}_proj``. Raises `CheckpointError`.
    """
    wrapped = "_orig_mod." in name or "_module." in name
    match = None if wrapped else _TEXT.fullmatch(name)
    if not match and not (match := _TEXT.fullmatch(plain := unwrapped(name))):
        if _VISION.match(plain) or plain.endswith(_MEANINGLESS) or plain == _MARKER:
            return None
        raise stranger(name)
    text = match[1]
    if text.endswith(_MEANINGLESS):
        return None
    expert = text.partition(".experts.")[2]
    if expert and not expert[0].isdecimal():  # of a hundred thousand names, few need these
        text = _PLURAL.sub(r".experts.\2.\1_proj.", _PROJECTION_FIRST.sub(r".experts.\2.\1.", text))
        if expert.startswith("w"):
            text = text.replace(".w13_weight", ".gate_up_proj").replace(".w2_weight", ".down_proj")
    return f"language_model.{text}" if text.startswith("lm_head.") else MODEL_PREFIX + text


def unwrapped(name: str) -> str:
    """A name without those of the wrappers around the model and its modules, of torch.compile, FSDP, DDP and PEFT.

    ``base_model.model.`` is of a merged PEFT model; one that is not has other names, too, and keeps them all.
    """
    if _UNMERGED.search(name):
        return name
    return _REPEATED.sub("language_model.", _OUTER.sub("", _WRAPPERS.sub("", name), count=1))


def module_name(path: str) -> str:
    """The name that transformers, and so the descriptions of quantized checkpoints, have for a module of the host's."""
    if path.startswith(HEAD):
        return path.removeprefix("language_model.")
    return path.replace(MODEL_PREFIX, "model.language_model.", 1)


def layer_and_suffix(name: str) -> tuple[str, str]:
    """A tensor's name in two: the layer, and what it is of the layer (``weight``, ``scales``, ``weight.absmax``).

    Fused experts have no ``.weight``: ``gate_up_proj`` is their weight, ``gate_up_proj_scale_inv`` its
    ``weight_scale_inv``, ``_gate_up_proj_qdata`` its ``_weight_qdata``. What tools call otherwise is in `aliases`.
    """
    layer, _, suffix = name.rpartition(".")
    if layer.endswith(".mlp.experts") and (match := _FUSED.fullmatch(name)):
        return known_suffix(match[1] + match[3], f"{match[2]}weight{match[4] or ''}")
    if ".weight." in name:  # bitsandbytes
        layer, _, suffix = name.partition(".weight.")
        return layer, f"weight.{suffix}"
    return known_suffix(layer, suffix) if suffix in LAST_PARTS else (layer, suffix)


def tensor_name(path: str, suffix: str) -> str:
    """The inverse of `layer_and_suffix`."""
    if path.endswith((".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")):
        return path if suffix == "weight" else f"{path}_{suffix.removeprefix('weight_')}"
    return f"{path}.{suffix}"


def stranger(name: str) -> CheckpointError:
    """The error for a tensor that this model type does not have, by the tool that writes such tensors."""
    what, _, remedy = next(text for pattern, text in _STRANGERS.items() if re.search(pattern, name)).partition(". ")
    return CheckpointError(name, "a tensor of a Qwen3-VL-MoE model", what, remedy)


class StoredNames:
    """Names in a file, by the host's names in errors.

    Args:
        names: of the file's tensors.
    """

    def __init__(self, names: Iterable[str]):
        self._layers: dict[str, dict[str, str]] = {}  # path → suffix → name
        self._prefix = MODEL_PREFIX
        for name in names:
            with contextlib.suppress(CheckpointError):
                if host := host_name(name):
                    path, suffix = layer_and_suffix(host)
                    self._layers.setdefault(path, {})[suffix] = name
                    rest = host.removeprefix(MODEL_PREFIX)
                    if rest != host and name.endswith(rest):
                        self._prefix = name.removesuffix(rest)
        self._alike = {_NUMBERS.sub("0", path): names for path, names in self._layers.items()}  # of any layer

    def __call__(self, name: str, missing: bool = False) -> str:
        """The name of a tensor; of one that is missing, the name that it would have beside the others."""
        if not name.startswith((MODEL_PREFIX, f"{HEAD}.")):
            return name
        path, suffix = layer_and_suffix(name)
        paths = [path, *_unstacked(path)]
        if not missing and (names := next(filter(None, map(self._layers.get, paths)), None)):
            return next((names[end] for end in (suffix, *_MAIN) if end in names), next(iter(names.values())))
        if suffix == "weight":
            suffix = self._main(path)
        for each in paths:
            if alike := self._alike.get(_NUMBERS.sub("0", each)):
                numbers = iter(_NUMBERS.findall(each))
                stored = _NUMBERS.sub(lambda _: next(numbers), next(iter(alike.values())))  # noqa: B023
                return tensor_name(layer_and_suffix(stored)[0], suffix)
        if path == HEAD:
            return name if self._prefix == MODEL_PREFIX else name.removeprefix("language_model.")
        return self._prefix + tensor_name(path, suffix).removeprefix(MODEL_PREFIX)

    def _main(self, path: str) -> str:
        """What the weight of a layer is called, as in layers that have what is left of this one, or as in its likes."""
        left = self._layers.get(path, {}).keys()
        likes = [names for names in self._layers.values() if left and left < names.keys()]
        likes += [names for each in (path, *_unstacked(path)) if (names := self._alike.get(_NUMBERS.sub("0", each)))]
        return next((main for names in likes for main in _MAIN if main in names), "weight")


def _unstacked(path: str) -> list[str]:
    """What else the stacked experts at a path may be made of."""
    mlp, stacked, projection = path.partition(".switch_mlp.")
    fused = "down_proj" if projection == "down_proj" else "gate_up_proj"
    return [f"{mlp}.experts.{each}" for each in (fused, f"0.{projection}", f"0.{fused}")] if stacked else []


@contextlib.contextmanager
def as_stored(names: Iterable[str]) -> Iterator[None]:
    """Have errors name tensors as the file does; ``names`` are looked at only then."""
    try:
        yield
    except CheckpointError as error:
        error.rename(partial(StoredNames(names), missing=isinstance(error, MissingTensorError)))
        raise
