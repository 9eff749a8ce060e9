"""LoRA and DoRA of PEFT → those of ``mlx_lm``, and the reverse, with the same merged weights.

Data flows from files to a form of its own (`lora.Adapter`), and from there to files: `mlx` knows one format, `peft` and
`peft_writing` the other.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import CheckpointError, series
from ..files.writing import new_folder
from . import mlx, peft, peft_writing
from .base import Base
from .files import CONFIG, as_in_file, read_config, write
from .lora import check, layer_order


def convert(adapter: str, save_path: str, model: str | None = None) -> str:
    """Write an adapter of one format in the other; which it is of, its files tell.

    Args:
        adapter: a folder, or a repository on the hub.
        save_path: a new folder. It is there only once it is complete.
        model: the base model, a folder or a repository, where the adapter does not name the right one. Its config alone
            is read.

    Returns:
        What was written, in a sentence.

    Raises:
        CheckpointError: the adapter is broken, or there is something in it that the other format cannot hold.
    """
    save_path = os.path.expanduser(save_path)
    folder = _found(os.path.expanduser(adapter))
    from_peft = _is_peft(folder)
    named = os.path.expanduser(model) if model else None
    base = Base(named or _named(folder, "base_model_name_or_path" if from_peft else "model"))
    found = peft.read(folder, base) if from_peft else mlx.read(folder)
    found.base = base.name
    found.modules = {path: found.modules[path] for path in sorted(found.modules, key=layer_order)}
    with as_in_file(found.names):
        check(found, base.shapes("--model" if model else None))
    done = f"{'DoRA' if found.dora else 'LoRA'} of {len(found.modules)} modules"
    with new_folder(Path(save_path), 0) as stage:
        if from_peft:
            write(stage, mlx.FILE, *mlx.write(found))
        else:
            write(stage, peft.FILE, *peft_writing.write(found, mlx.read(folder)))
    return f"Wrote {save_path} for {'mlx_lm' if from_peft else 'PEFT'}: {done}"


def _found(adapter: str) -> Path:
    """The folder of an adapter; of a repository on the hub, its files for an adapter are fetched."""
    if Path(adapter).exists():
        return Path(adapter)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(adapter, allow_patterns=[CONFIG, peft.FILE, mlx.FILE]))
    except Exception as e:  # its own kinds, by version, and those of its transport
        reason = str(e).partition("\n")[0]
        remedy = "Is the name of the folder or repository right? A private one needs a login (hf auth login)."
        found = f"neither ({type(e).__name__}: {reason.rstrip('.')})"
        raise CheckpointError(adapter, "an adapter's folder or a reachable repository", found, remedy) from e


def _is_peft(folder: Path) -> bool:
    found = [name for name in (peft.FILE, mlx.FILE) if (folder / name).exists()]
    if len(found) == 1:
        return found[0] == peft.FILE
    if found:
        raise CheckpointError(folder, f"{peft.FILE} or {mlx.FILE}", "both", f"Remove one of them, and its {CONFIG}.")
    others = sorted(path.name for path in folder.glob("adapter*") if path.name != CONFIG)
    remedy = "Is this the folder of an adapter?"
    if others:
        remedy = "Pickled files (.bin, .pt) are not read: load them with PEFT, and save_pretrained writes safetensors."
    expected = f"{peft.FILE} (PEFT) or {mlx.FILE} (mlx_lm)"
    raise CheckpointError(folder, expected, series(others or ["neither"], "and"), remedy)


def _named(folder: Path, field: str) -> str | None:
    """The base model as the adapter names it."""
    name = read_config(folder).get(field)
    return name if isinstance(name, str) and name else None
