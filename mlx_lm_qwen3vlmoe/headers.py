"""The headers of a checkpoint's safetensors files, without their data.

A safetensors file begins with eight bytes, little-endian: the length of the JSON object that follows
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .config import MODEL_TYPES
from .errors import CheckpointError

CONFIGS = ["config.json", "hf_quant_config.json"]
Header = dict[str, dict[str, Any]]  # tensor → dtype, shape and data_offsets, as the format has them


def local_headers(folder: Path, notes: list[str]) -> dict[str, Header]:
    """The headers of the files that the host would load; a file that is cut short is worth a note."""
    headers = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(min(length, 100_000_000))  # the format's own limit
        try:
            header = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
            end = 8 + length + _data_size(header)
            complete = all(isinstance(entry["shape"], list) and entry["dtype"] for entry in header.values())
        except (ValueError, AttributeError, KeyError, TypeError, IndexError):
            complete = False
        if not complete:
            raise CheckpointError(
                f"{path}: expected the header of a safetensors file, found none. Download the file again."
            )
        headers[path.name] = header
        if (size := path.stat().st_size) < end:
            notes.append(f"{path.name}: {end - size} of its {end} bytes are missing: it will not load as it is")
    if not headers:
        raise CheckpointError(f"{folder}: expected model*.safetensors, found none. Is the download complete?")
    return headers


def _data_size(header: Header) -> int:
    """The bytes of a file that follow its header."""
    return max((entry["data_offsets"][1] for entry in header.values()), default=0)


def hub_headers(repository: str) -> tuple[Path, dict[str, Header]]:
    """The small files of a repository, and the headers of its large ones, by range requests."""
    from huggingface_hub import get_safetensors_metadata

    folder = hub_folder(repository, CONFIGS)
    with _reaching(repository):
        files = get_safetensors_metadata(repository).files_metadata
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
        reason = str(e).partition("\n")[0]
        raise CheckpointError(
            f"{repository}: expected a folder or a reachable repository, found {type(e).__name__}: {reason}"
        ) from e


def read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
        if "quantization_config" not in config and (folder / "hf_quant_config.json").exists():  # as the host does
            config["quantization_config"] = json.loads((folder / "hf_quant_config.json").read_text())
    except (OSError, ValueError, TypeError) as e:
        raise CheckpointError(f"{folder}: expected config.json, found {e}. Take it from the original model.") from e
    if (found := config.get("model_type") if isinstance(config, dict) else config) not in MODEL_TYPES:
        raise CheckpointError(f"{folder}: model_type: expected {' or '.join(map(repr, MODEL_TYPES))}, found {found!r}.")
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
