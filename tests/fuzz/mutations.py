"""Mutants by their id, ``fixture:seed:number``: the same id is the same mutant on every machine."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator

import numpy as np
from changes import DESCRIBED, FITTING, LAST_FILE, MEANINGS, TIED, VALUES, Change, class_of, layer_of, signature
from checkpoints import Checkpoint, documents, fixtures, original
from config_mutations import mutate_config, walk
from tensor_mutations import mutate_tensor

FILES = ("config.json", "model.safetensors")
GONE = ("tensor removed", "tensor renamed", "tensor of another index")  # and one of other values in its place
UNDESCRIBED = ("described as another fixture", "not described")
TIE = "tie_word_embeddings"


def mutant(identifier: str, only: int | None = None) -> tuple[Checkpoint, list[Change]]:
    """The mutant of an id, and what was changed in its fixture: one thing, or two in a fifth of the cases.

    Half of the pairs are in one layer, as far as they are tensors.

    Args:
        only: the number of the one change to be made.
    """
    name = identifier.split(":")[0]
    checkpoint, changes = original(name), []
    head = any("lm_head" in key for key in checkpoint.tensors)
    rng = random.Random(identifier)  # by SHA-512 of the text, whatever the machine
    count = 2 if rng.random() < 0.2 else 1
    layers = sorted({layer_of(key) for key in checkpoint.tensors if class_of(key) != "vision"})
    layer = rng.choice(layers) if count == 2 and rng.random() < 0.5 else None
    for n in range(count):
        if only not in (None, n):
            continue
        rng = random.Random(f"{identifier}:{n}")
        change = None
        while change is None:
            mutate = rng.choices([mutate_tensor, mutate_config, mutate_whole], [50, 40, 10])[0]
            change = mutate(rng, checkpoint, layer)
        changes.append(change)
    if head and not any("lm_head" in key for key in checkpoint.tensors) and True in flags(checkpoint).values():
        changes[-1].excuse = TIED
    described = [c.target.startswith(("quantization", "hf_quant")) or c.kind in UNDESCRIBED for c in changes]
    shaped = [c.kind.startswith("tensor ") and "index" not in c.kind for c in changes]
    if any(described) and any(shaped):
        changes[-1].excuse = changes[-1].excuse or FITTING
    if len(changes) == 2 and all(shaped) and signature(checkpoint) == signature(original(name)):
        changes[-1].excuse = changes[-1].excuse or VALUES  # the second put back what the first took
    for change in changes:
        if change.kind.startswith(GONE) and change.target.endswith(".pre_quant_scale"):
            change.excuse = DESCRIBED["pre_quant_scale"]
    kinds = [change.kind for change in changes]
    if any("doubled" in kind for kind in kinds) and any(kind.startswith(GONE) for kind in kinds):
        changes[-1].excuse = changes[-1].excuse or VALUES
    return checkpoint, changes


def flags(checkpoint: Checkpoint) -> dict[tuple[str, ...], object]:
    """Where a config says whether the head is tied, and what."""
    found = {}
    for path in walk(checkpoint.documents):
        if path[-1] == TIE:
            value = checkpoint.documents
            for key in path:
                value = value[key]
            found[path] = value
    return found


def mutate_whole(rng: random.Random, checkpoint: Checkpoint, _layer: str | None) -> Change | None:
    """Change files, or what goes together in them."""
    kind = rng.choice(sorted(WHOLE))
    return next((Change(kind, "files", *what) for what in WHOLE[kind](rng, checkpoint)), None)


# Each yields what it did and the excuse, or nothing where it cannot be done.


def shard_missing(rng: random.Random, checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """The file is cut in two, and one of them is gone."""
    names = list(checkpoint.tensors)
    at = rng.randint(1, max(len(names) - 1, 1))
    lost = rng.choice([names[:at], names[at:]])
    for key in lost:
        del checkpoint.tensors[key]
    yield f"{len(lost)} of {len(names)} tensors", ""


def layer_missing(rng: random.Random, checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    yield from missing(checkpoint, f".layers.{rng.randrange(3)}.")


def expert_missing(rng: random.Random, checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    yield from missing(checkpoint, f".experts.{rng.randrange(3)}.")


def missing(checkpoint: Checkpoint, part: str) -> Iterator[tuple[str, str]]:
    """All tensors with this in their names, if there are any."""
    if lost := [key for key in checkpoint.tensors if part in key]:
        for key in lost:
            del checkpoint.tensors[key]
        yield part, ""


def headless(rng: random.Random, checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """No head, and every flag gone or of one value."""
    for key in [key for key in checkpoint.tensors if "lm_head" in key]:
        del checkpoint.tensors[key]
    flag = rng.choice([..., ..., None, False, True])
    for path in flags(checkpoint):
        home = checkpoint.documents
        for key in path[:-1]:
            home = home[key]
        home[TIE] = flag
        if flag is ...:
            del home[TIE]
    yield f"no head, {TIE} {'gone' if flag is ... else flag}", ""


def in_two_files(rng: random.Random, checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    names = list(checkpoint.tensors)
    for key in names[rng.randrange(len(names)) :]:
        checkpoint.second[key] = checkpoint.tensors.pop(key)
    yield f"{len(checkpoint.second)} of {len(names)} tensors in the second", ""


def in_both_files(rng: random.Random, checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """A tensor is in two files, with the same values or others."""
    key = rng.choice(list(checkpoint.tensors))
    dtype, array = checkpoint.tensors[key]
    others = rng.random() < 0.5
    checkpoint.second[key] = dtype, np.roll(array, 1) if others else array
    yield key, LAST_FILE if others else ""


def described_as_another(rng: random.Random, checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """The whole description of how another fixture is quantized."""
    other = rng.choice([*fixtures()])
    config, theirs = checkpoint.documents["config.json"], documents(other)["config.json"]
    for field in ("quantization", "quantization_config"):
        mine = config.pop(field, None) or {}
        if field in theirs:
            config[field] = copy.deepcopy(theirs[field])
    forms = {repr((c or {}).get("checkpoint_format")) for c in (mine, theirs.get("quantization_config"))}
    yield other, MEANINGS["checkpoint_format"] if len(forms) > 1 else ""


def undescribed(rng: random.Random, checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    checkpoint.documents = {"config.json": checkpoint.documents["config.json"]}
    found = [checkpoint.documents["config.json"].pop(f, None) for f in ("quantization_config", "quantization")]
    if any(found):
        yield "no hf_quant_config.json, quantization_config or quantization", ""


def damage(checkpoint: Checkpoint, file: str, change: Callable[[bytes], bytes | None]) -> None:
    """Change the bytes of a file, or remove it."""

    def damaged(files: dict[str, bytes]) -> None:
        if file in files and (content := change(files.pop(file))) is not None:
            files[file] = content

    checkpoint.damage.append(damaged)


def cut_short(rng: random.Random, checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    file, part = rng.choice(FILES), rng.random()
    damage(checkpoint, file, lambda content: content[: int(part * len(content))])
    yield f"{file} after {part:.0%}", ""


def garbage(rng: random.Random, checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """A byte of the header, or of the config, is another."""
    file, at, byte = rng.choice(FILES), rng.randrange(1000), rng.randbytes(1)
    damage(checkpoint, file, lambda content: content[:at] + byte + content[at + 1 :])
    yield f"byte {at} of {file} is {byte!r}", "another byte in a number or an offset is as good"


def file_missing(rng: random.Random, checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    file = rng.choice(FILES)
    damage(checkpoint, file, lambda content: None)
    yield file, ""


WHOLE = {
    "file of a split checkpoint missing": shard_missing,
    "layer missing": layer_missing,
    "expert missing": expert_missing,
    "head missing": headless,
    "split over two files": in_two_files,
    "tensor in two files": in_both_files,
    "described as another fixture": described_as_another,
    "not described": undescribed,
    "file cut short": cut_short,
    "byte of a file changed": garbage,
    "file missing": file_missing,
}
