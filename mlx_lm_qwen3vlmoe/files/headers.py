"""The headers of a checkpoint's safetensors files, without their data.

A safetensors file begins with eight bytes, little-endian: the length of the JSON object that follows
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..discovery.claims import MODEL_TYPES, own_module
from ..errors import CheckpointError, series, shown

CONFIGS = ["config.json", "hf_quant_config.json"]
_INDEX = "model.safetensors.index.json"
Header = dict[str, dict[str, Any]]  # tensor → dtype, shape and data_offsets, as the format has them


def local_headers(folder: Path, notes: list[str]) -> dict[str, Header]:
    """The headers of the files that the host would load; a file that is cut short is worth a note."""
    headers = {}
    for path in sorted(folder.glob("model*.safetensors")):
        headers[path.name], end = read_header(path)
        if (size := path.stat().st_size) < end:
            notes.append(f"{path.name}: {end - size} of its {end} bytes are missing: it will not load as it is")
    if not headers:
        raise CheckpointError(folder, "model*.safetensors", "no such file", "Is the download complete?")
    return headers


def read_header(path: Path) -> tuple[Header, int]:
    """The header of a file, and how many bytes the whole file has by it; raises `CheckpointError`."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(min(length, 100_000_000))  # the format's own limit
    try:
        header = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        end = 8 + length + _data_size(header)
        complete = all(isinstance(entry["shape"], list) and entry["dtype"] for entry in header.values())
    except (ValueError, AttributeError, KeyError, TypeError, IndexError, RecursionError):
        complete = False
    if not complete:
        raise CheckpointError(path, "the header of a safetensors file", "something else", "Download the file again.")
    return header, end


def _data_size(header: Header) -> int:
    """The bytes of a file that follow its header."""
    return max((entry["data_offsets"][1] for entry in header.values()), default=0)


def find(checkpoint: str, notes: list[str]) -> tuple[Path, dict[str, Header]]:
    """The folder of a checkpoint's config, and the headers of its files.

    Args:
        checkpoint: a folder, or a repository on the hub or in the hub's cache on this machine.
        notes: to add to, about files that are cut short.
    """
    folder = Path(os.path.expanduser(checkpoint))
    if folder.is_dir():
        return folder, local_headers(folder, notes)
    if folder.exists():
        raise CheckpointError(checkpoint, "a folder", "a file", "Name the folder that it is in.")
    if checkpoint[:1] in (".", "~", "/") or checkpoint.count("/") > 1 or checkpoint.endswith("/"):
        raise CheckpointError(f"{checkpoint}: no such folder. A repository on the hub has a name like owner/model.")
    return _hub_headers(checkpoint, notes)


def _hub_headers(repository: str, notes: list[str]) -> tuple[Path, dict[str, Header]]:
    """The small files of a repository, and the headers of its large ones, by range requests if they are not cached."""
    from huggingface_hub import get_safetensors_metadata

    folder = hub_folder(repository, [*CONFIGS, _INDEX])
    with _reaching(repository):
        files = {} if _is_whole(folder) else get_safetensors_metadata(repository).files_metadata
    if not files:
        return folder, local_headers(folder, notes)
    return folder, {
        name: {
            tensor: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
            for tensor, info in file.tensors.items()
        }
        for name, file in files.items()
    }


def hub_folder(repository: str, names: list[str] | None = None) -> Path:
    """Files of a repository, or all of them, which are downloaded unless the cache has them."""
    from huggingface_hub import snapshot_download

    with _reaching(repository):
        return Path(snapshot_download(repository, allow_patterns=names))


@contextlib.contextmanager
def _reaching(repository: str) -> Iterator[None]:
    """One error for all that can go wrong on the way to a hub."""
    try:
        yield
    except Exception as e:  # of huggingface_hub by its version, and of its transport
        raise CheckpointError(f"{repository}: no such folder; {_why_not(e)}.") from e


def _why_not(error: Exception) -> str:
    """An error of the hub's library in words."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "HFValidationError" in kinds:
        return "a repository on the hub has a name like owner/model"
    if "GatedRepoError" in kinds:
        return "the hub wants a login (hf auth login), and the terms on the page of that repository accepted"
    if "RepositoryNotFoundError" in kinds:
        return "the hub has no such repository, or shows it after a login only (hf auth login)"
    if "NotASafetensorsRepoError" in kinds:
        return "the repository of that name on the hub has no safetensors files"
    reason = str(error.__cause__ or error).partition("\n")[0].rstrip(".")
    return f"the hub's cache on this machine does not have all of it, and the hub is not reached ({reason})"


def _is_whole(folder: Path) -> bool:
    """Whether a folder of the hub's cache has every file with tensors."""
    if not (folder / _INDEX).exists():
        return (folder / "model.safetensors").exists()
    names = json.loads((folder / _INDEX).read_text())["weight_map"].values()
    return all((folder / name).exists() for name in names)


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """The config as the host reads it, of a type of this package; errors have the name of the checkpoint."""
    try:
        config = json.loads((folder / "config.json").read_text())
        if "quantization_config" not in config and (folder / "hf_quant_config.json").exists():  # as the host does
            config["quantization_config"] = json.loads((folder / "hf_quant_config.json").read_text())
    except (OSError, ValueError, TypeError) as e:
        what = "no such file" if isinstance(e, FileNotFoundError) else f"what cannot be read ({e})"
        remedy = "Is this the folder of a checkpoint? If so, download the file again."
        raise CheckpointError(name, "config.json", what, remedy) from e
    found = config.get("model_type") if isinstance(config, dict) else config
    if not isinstance(found, str) or found not in MODEL_TYPES:
        if own_module(found, config.get("architectures") if isinstance(config, dict) else None):
            raise CheckpointError(f"{name}: {found} is mlx-lm's own type: load it as it is.")
        remedy = "Is this a Qwen3-VL-MoE checkpoint? This command knows no others."
        raise CheckpointError(f"{name}: config.json: model_type", series(MODEL_TYPES), shown(found), remedy)
    return config


def write_hollow(folder: Path, headers: dict[str, Header], target: Path) -> None:
    """The checkpoint with holes in place of its tensors' data, which take no space on a disk."""
    for name in CONFIGS:
        if (folder / name).exists():
            shutil.copy(folder / name, target)
    for name, header in headers.items():
        text = json.dumps(header).encode()
        with (target / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + _data_size(header))
