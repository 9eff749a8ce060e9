"""Changes to the fields of ``config.json`` and ``hf_quant_config.json``, at every depth."""

from __future__ import annotations

import copy
import functools
import random
from typing import Any

from changes import Change, class_of, meaning
from checkpoints import Checkpoint, documents, fixtures

Path = tuple[Any, ...]
WRONG = ["", "5", "foo", 0, 3, -1, 1.5, True, [], [1], {}, {"a": 1}, [[]]]


def mutate_config(rng: random.Random, checkpoint: Checkpoint, _layer: str | None) -> Change | None:
    """Change one field, drawn from classes of fields, so that long lists do not crowd out the others."""
    if rng.random() < 0.1:
        return _add(rng, checkpoint)
    classes: dict[str, list[Path]] = {}
    for path in walk(checkpoint.documents):
        classes.setdefault(_class(path), []).append(path)
    path = rng.choice(classes[rng.choice(sorted(classes))])
    home = checkpoint.documents
    for key in path[:-1]:
        home = home[key]
    field, value = path[-1], home[path[-1]]
    kind, new = rng.choice(_others(rng, path, value))
    detail = f"{'.'.join(map(str, path))} {_short(value)} → {_short(new)}"
    if kind == "removed":
        del home[field]
        new = None
    elif kind == "moved up":
        config = checkpoint.documents["config.json"]
        config[field] = home.pop(field)
        new = None
    else:
        home[field] = new
    return Change(f"field {kind}", _class(path), detail, meaning(path, new))


def walk(value: Any, start: Path = ()) -> list[Path]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, inner in items:
        if start:
            found.append((*start, key))
        found += walk(inner, (*start, key))
    return found


def _class(path: Path) -> str:
    if "vision_config" in path[:-1]:
        return "vision_config.*"
    names = [class_of(f".{key}")[1:] if isinstance(key, str) else "N" for key in path[1:]]
    return ".".join([*(["hf_quant_config"] if path[0] != "config.json" else []), *names])


def _others(rng: random.Random, path: Path, value: Any) -> list[tuple[str, Any]]:
    """All kinds of other values for a field, each with the name of the change."""
    field = path[-1]
    others = [("removed", ...), ("removed", ...), ("null", None)]
    others += [("of another type", rng.choice([w for w in WRONG if type(w) is not type(value)]))]
    others += [("in a list", [value]), ("in an object", {str(field): value})]
    if len(path) == 3 and path[1] == "text_config":
        others.append(("moved up", ...))
    if isinstance(value, bool):
        others += [("flipped", not value), ("flipped", not value), ("as a number", int(value)), ("as text", str(value))]
    elif isinstance(value, (int, float)):
        others += [("zero", 0), ("negative", -value), ("negative", -1), ("huge", 10**30), ("huge", 2**31)]
        others += [("off by one", value + 1), ("off by one", value - 1), ("doubled", 2 * value)]
        others += [("halved", value // 2 if isinstance(value, int) else value / 2), ("as text", str(value))]
        others += [("as a float", value + 0.5), ("huge", rng.choice([1e300, float("inf"), float("nan"), 2**62]))]
    elif isinstance(value, str):
        others += [("upper case", value.upper()), ("upper case", value.title()), ("cut", value[:-1])]
    elif isinstance(value, list):
        others += [("emptied", []), ("lengthened", [*value, value[-1] if value else 1]), ("cut", value[:-1])]
        others += [("reversed", value[::-1])]
    elif isinstance(value, dict):
        others += [("emptied", {}), ("with one key less", dict(list(value.items())[1:]))]
    seen = [v for v in values_seen().get(field, []) if repr(v) != repr(value)]
    if seen and isinstance(field, str) and not isinstance(value, dict):
        others += [("of another fixture", copy.deepcopy(rng.choice(seen))) for _ in range(3)]
    return [(kind, new) for kind, new in others if new is ... or repr(new) != repr(value)]


@functools.cache
def values_seen() -> dict[str, list[Any]]:
    """Name of a field → all values that the fixtures have there, at any depth but below vision."""
    found: dict[str, dict[str, Any]] = {}
    for name in fixtures():
        for path in walk(documents(name)):
            if "vision_config" not in path and isinstance(path[-1], str):
                value = documents(name)
                for key in path:
                    value = value[key]
                found.setdefault(path[-1], {})[repr(value)] = value
    return {field: [values[text] for text in sorted(values)] for field, values in found.items()}


@functools.cache
def homes_seen() -> dict[Path, list[str]]:
    """Where an object stands → names of all fields that the fixtures have in it."""
    found: dict[Path, set[str]] = {}
    for name in fixtures():
        for path in walk(documents(name)):
            if "vision_config" not in path and isinstance(path[-1], str):
                found.setdefault(path[:-1], set()).add(path[-1])
    return {home: sorted(fields) for home, fields in sorted(found.items(), key=repr)}


def _add(rng: random.Random, checkpoint: Checkpoint) -> Change | None:
    """A field that another fixture has in the same place."""
    home = rng.choice(list(homes_seen()))
    field = rng.choice(homes_seen()[home])
    place: Any = checkpoint.documents
    for key in home:
        place = place.get(key) if isinstance(place, dict) else None
    if not isinstance(place, dict) or field in place:
        return None
    value = place[field] = copy.deepcopy(rng.choice(values_seen()[field]))
    path = (*home, field)
    return Change("field added", _class(path), f"{'.'.join(map(str, path))} = {_short(value)}", meaning(path, value))


def _short(value: Any) -> str:
    text = "nothing" if value is ... else repr(value)
    return text if len(text) < 60 else f"{text[:57]}…"
