"""The headers of a checkpoint's safetensors files, without their data.

A safetensors file begins with eight bytes, little-endian: the length of the JSON object that follows
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..discovery.claims import MODEL_TYPES, own_module
from ..errors import LARGEST, CheckpointError, series, shown
from .reading import check_file, read_json

CONFIGS = ["config.json", "generation_config.json", "hf_quant_config.json"]  # which the host reads
BESIDE = ["jang_config.json"]  # what tells of a tensor that it is not what it seems
INDEX = "model.safetensors.index.json"
LOADED = "model*.safetensors"  # what the host looks for
AGAIN = "Download the file again."
_LONGEST = 1000  # no tensor's name has a third of that
_FARTHEST = 1 << 43  # 9 TB, and within what a file system takes for the size of a file
Header = dict[str, dict[str, Any]]  # tensor → dtype, shape and data_offsets, as the format has them


def local_headers(folder: Path, notes: list[str]) -> dict[str, Header]:
    """The headers of the files that the host would load; a file that is cut short is worth a note."""
    headers = {}
    for name in sorted(os.listdir(folder)):
        if not fnmatchcase(name, LOADED):
            continue
        path = folder / name
        headers[name], end = read_header(path)
        if (size := path.stat().st_size) < end:
            notes.append(f"{path.name}: {end - size} of its {end} bytes are missing: it will not load as it is")
    if not headers:
        others = [name for name in sorted(os.listdir(folder)) if name.endswith(".safetensors")]
        if others:
            remedy = "mlx-lm reads no others. If they belong to a checkpoint and not to an adapter, rename them."
            raise CheckpointError(folder, LOADED, series(others[:5], "and"), remedy)
        raise CheckpointError(folder, LOADED, "no such file", "Is the download complete? If not, download it again.")
    return headers


def read_header(path: Path) -> tuple[Header, int]:
    """The header of a file, and how many bytes the whole file has by it; raises `CheckpointError`."""
    check_file(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(min(length, 100_000_000))  # the format's own limit
    try:
        header = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
    except (ValueError, AttributeError, RecursionError):
        raise CheckpointError(path, "the header of a safetensors file", "something else", AGAIN) from None
    for name, entry in header.items():
        if len(name) > _LONGEST:
            raise CheckpointError(f"{path}: {name}", f"a name of at most {_LONGEST} characters", len(name), AGAIN)
        _check_entry(f"{path}: {name}", entry)
    return header, 8 + length + _data_size(header)


def _check_entry(where: str, entry: Any) -> None:
    """A tensor's description is of the types and within the sizes that a file can have."""
    found: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = found.get("dtype"), found.get("shape"), found.get("data_offsets", [])
    if not isinstance(dtype, str):
        raise CheckpointError(f"{where}: dtype", "a string", shown(dtype), AGAIN)
    if not _are_sizes(shape, LARGEST):
        raise CheckpointError(f"{where}: shape", f"a list of sizes up to {LARGEST}", shown(shape), AGAIN)
    if not _are_sizes(offsets, _FARTHEST) or len(offsets) != 2 or offsets != sorted(offsets):
        expected = f"two positions up to {_FARTHEST}, the first one first"
        raise CheckpointError(f"{where}: data_offsets", expected, shown(offsets), AGAIN)


def _are_sizes(found: Any, most: int) -> bool:
    return isinstance(found, list) and all(type(n) is int and 0 <= n <= most for n in found)


def _data_size(header: Header) -> int:
    """The bytes of a file that follow its header."""
    return max((entry["data_offsets"][1] for entry in header.values()), default=0)


def find(checkpoint: str, notes: list[str]) -> tuple[Path, dict[str, Header], list[str]]:
    """The folder of a checkpoint's config, the headers of its files, and the names of all that lies beside them.

    Args:
        checkpoint: a folder, or a repository on the hub or in the hub's cache on this machine.
        notes: to add to, about files that are cut short.
    """
    folder = Path(os.path.expanduser(checkpoint))
    if folder.is_dir():
        return folder, local_headers(folder, notes), sorted(os.listdir(folder))
    if folder.exists():
        raise CheckpointError(checkpoint, "a folder", "a file", "Name the folder that it is in.")
    if checkpoint[:1] in (".", "~", "/") or checkpoint.count("/") > 1 or checkpoint.endswith("/"):
        raise CheckpointError(
            f"{checkpoint}: no such folder. If you mean a repository on the hub, its name has the form owner/model."
        )
    return _hub_headers(checkpoint, notes)


def _hub_headers(repository: str, notes: list[str]) -> tuple[Path, dict[str, Header], list[str]]:
    """The small files of a repository, and the headers of its large ones, by range requests if they are not cached."""
    from huggingface_hub import get_safetensors_metadata, model_info

    folder = hub_folder(repository, [*CONFIGS, INDEX, *BESIDE])
    if _is_whole(folder):
        return folder, local_headers(folder, notes), sorted(os.listdir(folder))
    with _reaching(repository):
        files = get_safetensors_metadata(repository).files_metadata
        names = [file.rfilename for file in model_info(repository).siblings or []]
    headers: dict[str, Header] = {}
    for name, file in files.items():
        headers[name] = {}
        for tensor, info in file.tensors.items():
            entry = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": list(info.data_offsets)}
            _check_entry(f"{name}: {tensor}", entry)
            headers[name][tensor] = entry
    return folder, headers, sorted(names)


def whole_folder(checkpoint: str, check: Callable[[Path, str], Any]) -> Path:
    """Where a checkpoint is, or has been downloaded to.

    Args:
        checkpoint: a folder, or a repository on the hub.
        check: takes the folder of the config, and the name; raises for what is not worth downloading the rest of.
    """
    folder = Path(checkpoint)
    check(folder if folder.is_dir() else hub_folder(checkpoint, CONFIGS), checkpoint)
    return folder if folder.is_dir() else hub_folder(checkpoint)


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
        return "the name of a repository on the hub has the form owner/model"
    if "GatedRepoError" in kinds:
        return "the hub asks for a login (hf auth login), and to accept the terms on the page of that repository"
    if "RepositoryNotFoundError" in kinds:
        return "the hub has no such repository, or shows it only after a login (hf auth login)"
    if "NotASafetensorsRepoError" in kinds:
        return "the repository of that name on the hub has no safetensors files"
    reason = str(error.__cause__ or error).partition("\n")[0].rstrip(".")
    return f"the hub's cache on this machine does not have all of it, and the hub cannot be reached ({reason})"


def _is_whole(folder: Path) -> bool:
    """Whether a folder of the hub's cache has every file with tensors."""
    if not (folder / INDEX).exists():
        return (folder / "model.safetensors").exists()
    return all((folder / name).exists() for name in set(read_index(folder).values()))


def read_index(folder: Path) -> dict[str, str]:
    """Tensor → the file that it is in, by the index of a folder; raises `CheckpointError`."""
    index = folder / INDEX
    try:
        files: dict[str, str] = dict(read_json(index)["weight_map"])
        if all(isinstance(file, str) for file in files.values()):
            return files
        what = "one whose values are not all file names"
    except (OSError, ValueError, TypeError, KeyError) as e:
        what = f"a file that cannot be read ({type(e).__name__}: {e})"
    raise CheckpointError(index, "a weight_map from tensors to files", what, AGAIN)


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """The config as the host reads it, of a type of this package; errors have the name of the checkpoint."""
    config = read_any_config(folder, name)
    found = config.get("model_type") if isinstance(config, dict) else config
    if not isinstance(found, str) or found not in MODEL_TYPES:
        if own_module(found, config.get("architectures") if isinstance(config, dict) else None):
            raise CheckpointError(
                f"{name}: mlx-lm has its own model for {found}. Load it with mlx_lm: this command is not needed."
            )
        remedy = "Is this a Qwen3-VL-MoE checkpoint? This command supports no others."
        raise CheckpointError(f"{name}: config.json: model_type", series(MODEL_TYPES), shown(found), remedy)
    return config


def read_any_config(folder: Path, name: str) -> Any:
    """What config.json has, as the host reads it; errors as of `read_config`."""
    try:
        config = read_json(folder / "config.json")
        if "quantization_config" not in config and (folder / "hf_quant_config.json").exists():  # as the host does
            config["quantization_config"] = read_json(folder / "hf_quant_config.json")
    except CheckpointError:
        raise
    except (OSError, ValueError, TypeError) as e:
        what = "no such file" if isinstance(e, FileNotFoundError) else f"a file that cannot be read ({e})"
        remedy = "Is this the folder of a checkpoint? If so, download the file again."
        raise CheckpointError(name, "config.json", what, remedy) from e
    return config


def write_hollow(folder: Path, headers: dict[str, Header], target: Path) -> None:
    """The checkpoint with holes in place of its tensors' data, which take no space on a disk."""
    for name in CONFIGS:
        if (folder / name).exists():
            check_file(folder / name)
            shutil.copy(folder / name, target)
    for name, header in headers.items():
        text = json.dumps(header).encode()
        with (target / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + _data_size(header))
