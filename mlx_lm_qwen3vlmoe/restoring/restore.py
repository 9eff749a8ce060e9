"""The way back: the checkpoint that a tuned text model came from, with the tuned text in it.

Each file of the original is copied, but for the bytes of its text tensors: these are made of the tuned model's, by the
inverse of `sanitize`, rows at a time. Names, shapes, dtypes, shards and vision tensors are those of the original by
construction, and no more than some rows of a layer is in memory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from ..config import SIZES
from ..errors import CheckpointError
from ..files.headers import whole_folder
from ..files.saving import copy_file
from ..files.tensors import FileTensor, all_finite, copy_bytes
from ..files.writing import check_empty, check_outside, new_folder, sync
from ..layouts.names import HEAD, as_stored, host_name
from ..layouts.stacking import Part
from .checkpoints import Original, Tuned, check_unquantized

logger = logging.getLogger(__name__)

_MEANING = ("rope_theta", "rope_scaling", "rms_norm_eps", "num_experts_per_tok")  # of the same tensors


def restore(tuned: str, original: str, save_path: str) -> dict[str, int]:
    """Write the original with the text of the tuned model.

    Args:
        tuned: a folder that ``mlx_lm.fuse`` or ``mlx_lm.convert`` wrote.
        original: the unquantized checkpoint that it came from: a folder, or a repository on the hub.
        save_path: a folder that is not there, or empty.

    Returns:
        How many tensors are ``text`` of the tuned model, and how many ``others`` the original's.

    Raises:
        CheckpointError: the two do not fit, or one of them is not what is expected of it. Nothing is written then.
    """
    tuned, original, save_path = map(os.path.expanduser, (tuned, original, save_path))
    if not Path(tuned).is_dir():
        remedy = "Name the folder of --save-path (fuse) or --mlx-path (convert)."
        raise CheckpointError(tuned, "a folder that mlx_lm.fuse or mlx_lm.convert wrote", "no such folder", remedy)
    check_empty(Path(save_path))  # before anything is downloaded
    folder = whole_folder(original, check_unquantized)
    _check_places(Path(tuned), folder, Path(save_path))
    text, target = Tuned(Path(tuned)), Original(folder, original)
    _compare(text, target)
    _give_notices(text, target)
    others = target.others()
    size = sum(path.stat().st_size for path in (*target.files, *others))
    with new_folder(Path(save_path), size) as out, tqdm(total=size, unit="B", unit_scale=True, disable=None) as bar:
        for file in target.files:
            for done in _write(file, out / file.name, target, text):
                bar.update(done)
        for file in sorted(others, key=lambda path: path.name == "config.json"):  # without it, nothing loads
            path = out / file.relative_to(folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            for done in copy_file(file, path):
                bar.update(done)
    return {"text": len(target.parts), "others": len(target.tensors) - len(target.parts)}


def _check_places(tuned: Path, original: Path, out: Path) -> None:
    if tuned.resolve() == original.resolve():
        remedy = "Use the checkpoint with the vision tower as the original."
        raise CheckpointError(tuned, "a tuned model and its original", "one folder for both", remedy)
    for inner, outer in ((out, tuned), (out, original), (tuned, original)):
        check_outside(inner, outer)


def _compare(text: Tuned, target: Original) -> None:
    """The two are of one shape."""
    for field in SIZES:
        wanted, found = (each.text_config[field] for each in (target, text))
        if found != wanted:
            raise CheckpointError(
                f"{text.folder}: config.json: {field}",
                f"{wanted}, as in the original",
                found,
                "Use the original that this model was tuned from. A model that has changed its sizes cannot go back.",
            )
    needed = {path for part in target.parts.values() for path in part.layers}
    if HEAD in text.layers and HEAD not in needed:
        text.check_tied()
        needed.add(HEAD)
    for path in sorted(needed ^ text.layers.keys()):
        one, other = (text.folder, target.folder) if path in text.layers else (target.folder, text.folder)
        with as_stored((text if path in text.layers else target).tensors):
            raise CheckpointError(
                f"{path}.weight",
                "this tensor in both checkpoints or in neither",
                f"one in {one} and none in {other}",
                "Use the original that this model was tuned from.",
            )


def _give_notices(text: Tuned, target: Original) -> None:
    """What the user may not expect."""
    if text.packed:
        logger.warning(
            "%s is quantized: %d of its layers are dequantized, and do not get back the precision that they lost. For "
            "full precision, fuse the adapters into the unquantized model (mlx_lm.fuse --model %s --adapter-path …) "
            "and restore the result.",
            text.folder,
            len(text.packed),
            target.folder,
        )
    dtypes = {
        (text.layers[path]["weight"].dtype, target.tensors[name].dtype)
        for name, part in target.parts.items()
        for path in part.layers
        if path not in text.packed
    }
    for new, old in sorted(pair for pair in dtypes if pair[0] not in ("F32", pair[1])):
        logger.warning(
            "Tensors in %s are written in the original's %s, but were rounded when they were converted or fused. To "
            "avoid that, convert with mlx_lm.convert --dtype.",
            new,
            old,
        )
    meant, stays = ({field: _meaning(each.text_config[field]) for field in _MEANING} for each in (text, target))
    changed = [field for field in _MEANING if meant[field] != stays[field]]
    if changed:
        logger.warning(
            "config.json is the original's, although the tuned model has another %s.", ", ".join(sorted(changed))
        )
    if any(host_name(name) is None for name in text.tensors):
        logger.warning("The vision tensors of %s are left out: the result has the original's.", text.folder)
    if len(target.parts) == len(target.tensors):
        logger.warning("%s has no vision tensors, so the restored checkpoint has none either.", target.folder)


def _meaning(value: Any) -> Any:
    """M-RoPE is plain RoPE where there is only text."""
    if isinstance(value, dict):
        return {key: item for key, item in value.items() if not key.startswith("mrope_")}
    return value


def _write(file: Path, path: Path, target: Original, text: Tuned) -> Iterator[int]:
    """Write a file of the original with the tuned text in it; yields the bytes written at a time."""
    with file.open("rb") as source, path.open("wb") as new:
        for name, tensor in sorted(target.tensors.items(), key=lambda item: item[1].begin):
            if tensor.file != file or name not in target.parts:
                continue
            yield from copy_bytes(source, new, tensor.begin - source.tell())
            for piece in _pieces(name, tensor, target.parts[name], text):
                new.write(memoryview(piece))  # type: ignore[arg-type]
                yield piece.nbytes
            source.seek(tensor.end)
        yield from copy_bytes(source, new, file.stat().st_size - source.tell())
        sync(new)


def _pieces(name: str, old: FileTensor, part: Part, text: Tuned) -> Iterator[mx.array]:
    """A stored tensor made of the tuned text, some rows at a time, as the bits that the file gets."""
    for first, last, piece in text.pieces(part, old.mlx_dtype, old.shape):
        if not all_finite(piece, old.dtype):  # which is no error in what is not tuned
            before = old.rows(first, last) if part.row is None else old.rows(0, old.shape[0])
            if not mx.array_equal(before.view(piece.dtype).flatten(), piece.flatten()).item():
                raise CheckpointError(
                    name,
                    f"finite numbers in {old.dtype}",
                    f"NaN or infinity in {part.layers[0]}.weight of {text.folder}",
                    f"Did the training diverge, or is a number too large for {old.dtype}?",
                )
        yield piece
