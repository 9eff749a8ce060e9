"""Write the plain text model: tensors, config, and the files of the tokenizer."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import mlx.core as mx
from tqdm import tqdm

from ..errors import CheckpointError
from ..files.headers import AGAIN, read_any_config, read_config, whole_folder
from ..files.reading import read_json
from ..files.saving import Saved, copy_file, save_json, save_shards
from ..files.tensors import row_ranges
from ..files.writing import check_empty, check_outside, new_folder
from ..layouts.names import EMBEDDINGS
from ..layouts.stacking import Part
from ..restoring.checkpoints import check_is_file
from .config import TYPE, plain_config, plain_quantization, yarn_of
from .sources import Loaded, Source, open_source

logger = logging.getLogger(__name__)

_ALONG = (  # files of a text model, and its license
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "chat_template.*", "generation_config.json", "LICENSE*"),
)


def export(checkpoint: str, save_path: str, dequantize: bool = False, drop_yarn: bool = False) -> str:
    """Write the text model of a checkpoint as ``qwen3_moe``.

    Args:
        checkpoint: a folder, or a repository on the hub.
        save_path: a folder that is not there, or empty.
        dequantize: floats, whatever is packed.
        drop_yarn: leave YaRN out, for contexts within the original length.

    Returns:
        What was written, in a sentence.

    Raises:
        CheckpointError: the checkpoint does not load, or has no such form. Nothing is written then.
    """
    checkpoint, save_path = map(os.path.expanduser, (checkpoint, save_path))
    out = Path(save_path)
    check_empty(out)  # before anything is downloaded
    folder = whole_folder(checkpoint, _check_type)
    check_outside(out, folder)
    source = open_source(folder)
    if isinstance(source, Loaded):
        if not dequantize:
            source.check_packed()
        for note in source.notes:
            logger.warning("%s", note)
    packed = bool(source.packed) and not dequantize
    yarn = None if drop_yarn else yarn_of(source.text_config)
    if yarn:
        _tell_of_yarn(folder, yarn, packed)
    tensors = dict(_as_packed(source) if isinstance(source, Loaded) and packed else _as_floats(source))
    dtype = str(source.dtype(EMBEDDINGS)).removeprefix("mlx.core.")
    config = plain_config(source.config, source.text_config, dtype, source.tied, yarn)
    if packed:
        config["quantization"] = plain_quantization(source.loaded_config["quantization"])
        config["quantization_config"] = config["quantization"]  # as mlx-lm saves it
    size = sum(tensor.size for tensor in tensors.values())
    with new_folder(out, size) as stage, tqdm(total=size, unit="B", unit_scale=True, disable=None) as bar:
        for done in save_shards(stage, tensors, "mlx" if packed else "pt"):
            bar.update(done)
        _copy_along(folder, stage)
        save_json(stage / "config.json", config)  # the last: without it, nothing loads
    return f"{save_path}: a {TYPE} model, {len(tensors)} tensors {'packed by MLX' if packed else f'in {dtype}'}"


def _check_type(folder: Path, name: str) -> None:
    config = read_any_config(folder, name)
    if isinstance(config, dict) and config.get("model_type") == TYPE:
        raise CheckpointError(f"{name}: this is already a plain text model (model_type {TYPE}): use it as it is.")
    read_config(folder, name)


def _tell_of_yarn(folder: Path, yarn: dict[str, object], packed: bool) -> None:
    length = yarn["original_max_position_embeddings"]
    if packed:
        raise CheckpointError(
            f"{folder}: config.json: rope_scaling",
            f"plain RoPE for packed weights, as mlx-lm's {TYPE} ignores YaRN",
            "YaRN",
            f"Load this checkpoint as it is, or export it with --drop-yarn for contexts of up to {length} tokens.",
        )
    logger.warning(
        "The exported config.json keeps YaRN, which transformers applies and mlx-lm's %s ignores: for mlx-lm, export "
        "with --drop-yarn, for contexts of up to %s tokens.",
        TYPE,
        length,
    )


def _as_floats(source: Source) -> Iterator[tuple[str, Saved]]:
    """The layout of the official Qwen3-30B-A3B: an expert, a tensor."""
    for path, part in source.parts().items():
        (layer,) = part.layers
        shape, dtype = source.shape(layer)[part.row is not None :], source.dtype(layer)
        yield _name(path, "weight"), Saved(dtype, shape, partial(_pieces, source, part, dtype, shape))


def _pieces(source: Source, part: Part, dtype: mx.Dtype, shape: tuple[int, ...]) -> Iterator[mx.array]:
    return (piece for _, _, piece in source.pieces(part, dtype, shape))


def _as_packed(source: Loaded) -> Iterator[tuple[str, Saved]]:
    """What the host saves, by the names of a text model."""
    for path, tensors in source.weights.items():
        for suffix, array in tensors.items():
            yield _name(path, suffix), Saved(array.dtype, array.shape, partial(_rows, source, path, suffix))


def _rows(source: Loaded, path: str, suffix: str) -> Iterator[mx.array]:
    array = source.take(path)[suffix].reshape(-1)
    return (array[first:last] for first, last in row_ranges(array.size, array.nbytes))


def _name(path: str, suffix: str) -> str:
    return f"{path.removeprefix('language_model.')}.{suffix}"


def _copy_along(folder: Path, out: Path) -> None:
    """The tokenizer with its chat template, and how to generate; nothing of images."""
    for file in sorted(folder.iterdir()):
        if not any(fnmatchcase(file.name, pattern) for pattern in _ALONG):
            continue
        check_is_file(file)
        for _ in copy_file(file, out / file.name):
            pass
    tokenizer = out / "tokenizer_config.json"
    if tokenizer.exists():
        try:
            fields = dict(read_json(tokenizer))
        except (TypeError, ValueError) as e:
            raise CheckpointError(folder / tokenizer.name, "a JSON object", f"what cannot be read ({e})", AGAIN) from e
        fields.pop("processor_class", None)  # of a processor that is not there
        save_json(tokenizer, fields)
