"""Changes to tensors: their names, types, shapes, places and values."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable

import numpy as np
import shapes
from changes import ANOTHER, TURNED, VALUES, Change, class_of, is_index, layer_of, signature
from checkpoints import TYPES, Array, Checkpoint, cast, fixtures, tensors

Names = list[str]
Mutation = Callable[[random.Random, Checkpoint, str], "str | None"]
PREFIXES = ["model.language_model.", "language_model.model.", "language_model.", "model.", "", "base_model.model."]
NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
PROJECTIONS = ["gate_proj", "up_proj", "down_proj", "gate_up_proj", "q_proj", "k_proj", "v_proj", "o_proj"]


def mutate_tensor(rng: random.Random, checkpoint: Checkpoint, layer: str | None) -> Change | None:
    """Change one tensor, of a layer or of any, or all of its class; excused where types and shapes stay."""
    classes: dict[str, Names] = {}
    for key in checkpoint.tensors:
        if layer in (None, layer_of(key)):
            classes.setdefault(class_of(key), []).append(key)
    if not classes:  # the layer has lost its name, or the file its tensors
        return mutate_tensor(rng, checkpoint, None) if layer else None
    target = rng.choice(sorted(classes))
    everywhere = rng.random() < 0.15
    chosen = classes[target] if everywhere else [rng.choice(classes[target])]
    kinds = {**KINDS, **(INDEX if is_index(chosen[0], checkpoint.tensors[chosen[0]]) else {})}
    kind = rng.choice(sorted(kinds))
    if len(kinds) > len(KINDS) and rng.random() < 0.5:
        kind = rng.choice(sorted(INDEX))
    before, old = signature(checkpoint), dict(checkpoint.tensors)
    seed = rng.random()
    details = [kinds[kind](random.Random(seed), checkpoint, key) for key in chosen if key in checkpoint.tensors]
    details = [detail for detail in details if detail]
    if not details or _same(old, checkpoint.tensors):
        return None
    excuse = ANOTHER if kind == "format of another fixture" else ""
    indices = [key for key, array in checkpoint.tensors.items() if is_index(key, array) and array is not old.get(key)]
    if signature(checkpoint) == before and all(_in_range(checkpoint, key) for key in indices):
        excuse = VALUES
    h, i = (checkpoint.text.get(field) for field in ("hidden_size", "moe_intermediate_size"))
    if everywhere and ".experts." in target and (h == i or (isinstance(i, int) and h == 2 * i)):
        excuse = excuse or (TURNED if kind in ("transposed", "reshaped") else "")
    return Change(f"tensor {kind}{' everywhere' * everywhere}", target, "; ".join(details[:2]), excuse)


def _same(old: dict[str, Array], new: dict[str, Array]) -> bool:
    return old.keys() == new.keys() and all(
        old[key][0] == new[key][0]
        and old[key][1].shape == new[key][1].shape
        and (old[key] is new[key] or old[key][1].tobytes() == new[key][1].tobytes())
        for key in old
    )


def _in_range(checkpoint: Checkpoint, key: str) -> bool:
    """Whether all indices are groups that the layer has."""
    scales = [checkpoint.tensors.get(f"{layer_of(key)}.{suffix}") for suffix in ("scales", "weight_scale")]
    groups = [array[1].shape[axis] for axis, array in enumerate(scales) if array is not None and array[1].ndim == 2]
    values = checkpoint.tensors[key][1]
    return bool(groups) and values.dtype.kind in "iu" and int(values.min()) >= 0 and int(values.max()) < groups[0]


# Each takes random numbers, the checkpoint and the name of a tensor, and says what it did; None if it could not.


def remove(rng: random.Random, checkpoint: Checkpoint, name: str) -> str:
    del checkpoint.tensors[name]
    return name


def other_name(rng: random.Random, name: str) -> str:
    """A name that is nearly the same: another prefix, suffix, projection, or a slip of the pen."""
    bare = next(name.removeprefix(p) for p in PREFIXES if name.startswith(p))
    layer, at = layer_of(name), rng.randrange(len(name))
    names = [prefix + bare for prefix in PREFIXES]
    names += [f"{layer}.{other}" for other in rng.sample(suffixes_seen(), 6)]
    if found := [p for p in PROJECTIONS if p in name.split(".")]:
        names += [name.replace(f".{found[0]}", f".{p}") for p in rng.sample(PROJECTIONS, 3)]
    names += [name[:at] + name[at + 1 :], name.upper(), layer, f"{name}.weight", f"{name}_0", f"{name}."]
    return rng.choice([other for other in names if other != name])


def other_index(rng: random.Random, name: str) -> str:
    """The name with one of its numbers written in another way, or another number."""
    if not (found := list(NUMBER.finditer(name))):
        return name
    match = rng.choice(found)
    digits, n = match[0], int(match[0])
    foreign, wide = ("".join(chr(zero + int(digit)) for digit in digits) for zero in (0x660, 0xFF10))
    others = [f"0{digits}", f"0{digits}", f"00{digits}", foreign, wide, "9" * 5000, f"-{digits}", f"+{digits}", "²"]
    others += [f"{digits}_", f" {digits}", str(n + 1), str(n + 100), str(10**9), f"{digits}.0", "x", ""]
    return name[: match.start()] + rng.choice(others) + name[match.end() :]


def renamer(other: Callable[[random.Random, str], str], keep: bool) -> Mutation:
    """Another name for a tensor, or for all of its layer; or as many more tensors, of other values, of those names."""

    def change(rng: random.Random, checkpoint: Checkpoint, name: str) -> str | None:
        layer = [key for key in checkpoint.tensors if layer_of(key) == layer_of(name)]
        names = layer if other is other_index and rng.random() < 0.5 else [name]
        seed = rng.random()
        news = [other(random.Random(seed), key) for key in names]
        if not checkpoint.tensors.keys().isdisjoint(news):
            return None
        for key, new in zip(names, news, strict=True):
            dtype, array = checkpoint.tensors[key] if keep else checkpoint.tensors.pop(key)
            rolled = keep and not is_index(key, (dtype, array))
            checkpoint.tensors[new] = dtype, np.roll(array, 1) if rolled else array
        new = news[0] if len(news[0]) < 200 else f"{news[0][:80]}… of {len(news[0])} characters"
        return f"{names[0]} {'and' if keep else '→'} {new}{f', {len(names)} in all' if names[1:] else ''}"

    return change


def beside(rng: random.Random, checkpoint: Checkpoint, name: str) -> str | None:
    """One more tensor of the layer: ones for a scale, zeros for all else, so that nobody could want it."""
    suffix = rng.choice([*suffixes_seen(), "bias", "qbiases", "SCB", "absmax", "pre_quant_scale", "foo"])
    new = f"{layer_of(name)}.{suffix}"
    if new in checkpoint.tensors or not layer_of(name):
        return None
    shape = rng.choice([(), (1,), checkpoint.tensors[name][1].shape, checkpoint.tensors[name][1].shape[:1]])
    dtype = rng.choice(["F32", "BF16", "U8", "I32"])
    index, scale = re.search("g_idx|perm", suffix), re.search("scale|absmax|SCB", suffix)
    fill = 10**6 if index else 1.0 if scale else 0
    checkpoint.tensors[new] = cast(("F32", np.full(shape, fill, "f4")), "I32" if index else dtype)
    return f"{new} {dtype} {list(shape)}"


def swap(rng: random.Random, checkpoint: Checkpoint, name: str) -> str | None:
    dtype, array = checkpoint.tensors[name]
    like = [k for k, (d, a) in checkpoint.tensors.items() if (d, a.shape) == (dtype, array.shape) and k != name]
    if not like:
        return None
    other = rng.choice(like)
    checkpoint.tensors[name], checkpoint.tensors[other] = checkpoint.tensors[other], checkpoint.tensors[name]
    return f"{name} and {other}"


def recast(rng: random.Random, checkpoint: Checkpoint, name: str) -> str:
    dtype = rng.choice(sorted(set(TYPES) - {"F8_E4M3", "F8_E8M0", checkpoint.tensors[name][0]}))
    old = checkpoint.tensors[name][0]
    checkpoint.tensors[name] = cast(checkpoint.tensors[name], dtype)
    return f"{name} {old} → {dtype}"


def view(rng: random.Random, checkpoint: Checkpoint, name: str) -> str | None:
    old, array = checkpoint.tensors[name]
    sizes = {dtype: np.dtype(kind).itemsize for dtype, kind in TYPES.items()}
    others = [dtype for dtype in TYPES if dtype not in (old, "BOOL") and sizes[dtype] == array.itemsize]
    if rng.random() < 0.2 and array.ndim:
        others = [d for d in TYPES if d != "BOOL" and array.shape[-1] * array.itemsize % sizes[d] == 0]
    dtype = rng.choice(others)
    checkpoint.tensors[name] = dtype, array.view(TYPES[dtype])
    return f"{name} {old} → {dtype} {list(array.shape)} of the same bits"


def reshaper(function: Callable[[random.Random, np.ndarray], np.ndarray | None]) -> Mutation:
    """A change of the shape alone, as a change of a checkpoint."""

    def change(rng: random.Random, checkpoint: Checkpoint, name: str) -> str | None:
        dtype, array = checkpoint.tensors[name]
        new = function(rng, array)
        if new is None or (new.shape == array.shape and new.tobytes() == array.tobytes()):
            return None
        checkpoint.tensors[name] = dtype, np.ascontiguousarray(new).reshape(new.shape)
        return f"{name} {list(array.shape)} → {list(new.shape)}"

    return change


def noise(rng: random.Random, checkpoint: Checkpoint, name: str) -> str | None:
    dtype, array = checkpoint.tensors[name]
    if is_index(name, (dtype, array)):
        return None
    checkpoint.tensors[name] = dtype, np.roll(array, 1 + rng.randrange(max(array.size - 1, 1)))
    return name


def out_of_range(rng: random.Random, checkpoint: Checkpoint, name: str) -> str:
    """One index, or all of them, beyond what there is."""
    dtype, array = checkpoint.tensors[name]
    groups = int(array.max()) + 1
    value = rng.choice([-1, 5, 100, 10**6, groups, 2**31 - 1, -(2**31), groups - 1, 0])
    array = array.copy()
    at = slice(None) if rng.random() < 0.2 else rng.randrange(array.size)
    with np.errstate(all="ignore"):
        array[at] = np.array(value).astype(array.dtype)
    checkpoint.tensors[name] = dtype, array
    return f"{name}[{'all' if isinstance(at, slice) else at}] = {value}"


def layer_axis(rng: random.Random, checkpoint: Checkpoint, name: str) -> str | None:
    """All axes of one size, or their multiples, in all tensors of a layer: fewer groups, fewer inputs."""
    layer = {k: v for k, v in checkpoint.tensors.items() if layer_of(k) == layer_of(name)}
    sizes = sorted({size for _, array in layer.values() for size in array.shape if size > 1})
    if len(layer) < 2 or not sizes:
        return None
    size, how = rng.choice(sizes), rng.choice(["halved", "cut by one", "doubled"])
    index = range(size // 2) if how == "halved" else range(size - 1) if how == "cut by one" else [*range(size)] * 2
    for key, (dtype, array) in layer.items():
        for axis in range(array.ndim):
            if array.shape[axis] == size:
                array = array.take(index, axis)
        checkpoint.tensors[key] = dtype, array
    return f"{layer_of(name)}: every axis of {size} {how}"


def of_another(rng: random.Random, checkpoint: Checkpoint, name: str) -> str | None:
    """The tensor of the same layer in a fixture of another kind, with its name's suffix or without."""
    others = [f for f in fixtures() if name in tensors(f)]
    if not others or not re.search("scale|zero|biases|idx", name):
        return None
    other = rng.choice(others)
    checkpoint.tensors[name] = tensors(other)[name]
    return f"{name} of {other}"


def format_of_another(rng: random.Random, checkpoint: Checkpoint, name: str) -> str | None:
    """A layer, such as one projection of one expert, as another fixture has it."""
    layer = layer_of(name)
    mine = {key for key in checkpoint.tensors if layer_of(key) == layer}
    other = rng.choice([*fixtures()])
    theirs = {key: array for key, array in tensors(other).items() if layer_of(key) == layer}
    if theirs.keys() <= mine or not layer.endswith("_proj"):
        return None
    for key in mine:
        del checkpoint.tensors[key]
    checkpoint.tensors |= theirs
    return f"{layer} of {other}"


@functools.cache
def suffixes_seen() -> Names:
    found = {name.rpartition(".")[2] for fixture in fixtures() for name in tensors(fixture)}
    return sorted(found | {"qbiases", "weight_zero_point", "pre_quant_scale", "weight_scale_2", "perm"})


KINDS: dict[str, Mutation] = {
    "removed": remove,
    "renamed": renamer(other_name, keep=False),
    "of another index": renamer(other_index, keep=False),
    "doubled under another name": renamer(other_name, keep=True),
    "doubled under another index": renamer(other_index, keep=True),
    "beside others": beside,
    "swapped with a like one": swap,
    "cast": recast,
    "of other bits": view,
    "halved": reshaper(shapes.halved),
    "cut by one": reshaper(shapes.cut),
    "repeated": reshaper(shapes.doubled),
    "transposed": reshaper(shapes.transposed),
    "with one axis more": reshaper(shapes.with_an_axis),
    "with one axis less": reshaper(shapes.without_an_axis),
    "emptied": reshaper(shapes.emptied),
    "of one number": reshaper(shapes.one),
    "reshaped": reshaper(shapes.reshaped),
    "of other values": noise,
    "cut with its layer": layer_axis,
    "of another fixture": of_another,
    "format of another fixture": format_of_another,
}
INDEX: dict[str, Mutation] = {"index out of range": out_of_range}
