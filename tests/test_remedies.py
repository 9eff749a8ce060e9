"""Every error of this package says what to do, or is one of a few verdicts after which there is nothing to do."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT

from mlx_lm_qwen3vlmoe import errors
from mlx_lm_qwen3vlmoe.layouts import names

PACKAGE = ROOT / "mlx_lm_qwen3vlmoe"
FILES = sorted(PACKAGE.rglob("*.py"))
VERDICTS = {  # the remedy is elsewhere
    errors.UNSUPPORTED,  # in docs/troubleshooting.md: another model
    "… does not load: …",  # in the error that follows
    "…: no such folder; ….",  # in the hub's answer that follows
}
# What makes an error, and which argument says what to do; without that one, it is a sentence or has a default.
MAKERS = {"CheckpointError": 3, "MissingTensorError": 3, "config_error": 3, "HostError": 0, "PluginError": 0}
VERBS = (
    *("Add", "Choose", "Convert", "Copy", "Correct", "Download", "Free", "Install", "Launch", "Load", "Merge", "Move"),
    *("Name", "Remove", "Rename", "Repair", "Run", "Save", "Set", "Tune", "Uninstall", "Update", "Use", "pass", "swap"),
    *("If you mean a", "Is", "Are", "Was", "Did"),  # a question, of which the answer tells where to look
)
SAYS_WHAT_TO_DO = re.compile(rf"(?:^|[.:?,;] |or )(?:{'|'.join(VERBS)}) .*[.?…]$", re.IGNORECASE)
TAKEN_APART = {"__init__", "stranger"}  # of the class itself, and that whose remedies are in a table


def written(node: ast.AST | None, known: dict[str, list[ast.AST]]) -> Iterator[str]:
    """The texts that an expression can be, with … for whatever is filled in."""
    if isinstance(node, ast.Constant):
        yield str(node.value)
    elif isinstance(node, ast.JoinedStr):
        texts = [""]
        for part in node.values:
            filled = part.value if isinstance(part, ast.FormattedValue) else part
            options = list(written(filled, known)) if isinstance(filled, (ast.Constant, ast.Name)) else ["…"]
            texts = [text + option for text in texts for option in options]
        yield from texts
    elif isinstance(node, ast.IfExp):
        yield from written(node.body, known)
        yield from written(node.orelse, known)
    elif isinstance(node, ast.Name) and node.id in known:
        for value in known[node.id]:
            yield from written(value, known)
    else:
        yield "…"


def assigned(nodes: ast.AST) -> dict[str, list[ast.AST]]:
    found: dict[str, list[ast.AST]] = {}
    for node in ast.walk(nodes):
        for target in node.targets if isinstance(node, ast.Assign) else ():
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for name, value in zip(target.elts, node.value.elts, strict=True):
                    found.setdefault(ast.unparse(name), []).append(value)
            else:
                found.setdefault(ast.unparse(target), []).append(node.value)
    return found


CONSTANTS = {
    target.id: [node.value]
    for file in FILES
    for node in ast.parse(file.read_text()).body
    if isinstance(node, ast.Assign)
    for target in node.targets
    if isinstance(target, ast.Name) and target.id.isupper()
}


def remedies(file: Path) -> Iterator[tuple[int, str]]:
    """Line and text of all that the errors of a file say about what to do."""
    for function in ast.walk(ast.parse(file.read_text())):
        if not isinstance(function, ast.FunctionDef) or function.name in TAKEN_APART:
            continue
        parameters = {argument.arg for argument in function.args.args}
        known = CONSTANTS | assigned(function)
        named = [argument.arg for argument in function.args.args][::-1]
        defaults = dict(zip(named, function.args.defaults[::-1], strict=False))
        if "remedy" in defaults:
            yield from ((function.lineno, text) for text in written(defaults["remedy"], known))
        for call in ast.walk(function):
            name = getattr(call.func, "id", getattr(call.func, "attr", None)) if isinstance(call, ast.Call) else None
            if name not in MAKERS:
                continue
            at = MAKERS[name] if len(call.args) > 1 else 0  # an error of one part is a sentence
            if at >= len(call.args) or (isinstance(call.args[at], ast.Name) and call.args[at].id in parameters):
                continue  # what the caller of a maker gives, or its default, is looked at where it stands
            yield from ((call.lineno, text) for text in written(call.args[at], known))


def test_errors_are_found_in_the_sources():
    assert sum(len(list(remedies(file))) for file in FILES) > 100


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_every_error_says_what_to_do(file):
    silent = {f"{line}: {text}" for line, text in remedies(file) if not SAYS_WHAT_TO_DO.search(text)}
    assert {each for each in silent if each.partition(": ")[2] not in VERDICTS} == set()


def test_every_known_stranger_has_a_remedy():
    for text in names._STRANGERS.values():
        assert SAYS_WHAT_TO_DO.search(text.partition(". ")[2]), text
