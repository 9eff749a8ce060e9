"""The floors of the package: what may import what."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT

PACKAGE = ROOT / "mlx_lm_qwen3vlmoe"
FLOORS = (  # from the ground: a folder, or a module of the root, imports from the floors below its own alone
    ("__init__", "registry", "terminal"),
    ("errors",),
    ("runtime",),
    ("discovery", "fields", "quantization"),
    ("config",),
    ("layouts",),
    ("files", "sanitize"),
    ("model",),
    ("adapters", "inspection"),
    ("restoring",),
    ("exporting",),
    ("__main__",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
ROOMS = {path.stem: path for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}


def imported(file: Path) -> Iterator[str]:
    """What a file imports of the package, by its full name, wherever in the file."""
    folder = file.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*folder[: len(folder) + 1 - node.level], node.module] if node.level else [node.module]
            yield from (".".join(filter(None, [*base, alias.name])) for alias in node.names)


def test_every_folder_and_module_of_the_root_has_a_floor():
    """A new folder has to be given one, and a floor holds nothing that is gone."""
    assert ROOMS.keys() == FLOOR.keys()


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_imports_go_down(room):
    """No arrow goes up or sideways, so that no two rooms can stand in a circle."""
    files = sorted(ROOMS[room].rglob("*.py")) or [ROOMS[room]]
    for file in files:
        for name in imported(file):
            package, _, below = name.partition(".")
            target = below.partition(".")[0]
            target = target if target in FLOOR else "__init__"
            if package == PACKAGE.name and target != room:
                assert FLOOR[target] < FLOOR[room], f"{file.relative_to(ROOT)} imports {name}"
