"""What README.md, SECURITY.md and docs say, tried out: commands in their order, links, and tables.

Commands run as they stand, in a folder where the names that they use are the tiny model and what earlier ones wrote.
Those that take long are run by slow/test_docs_slow.py.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from support import ROOT, thorough
from support.commands import run
from support.documents import (
    DOCUMENTS,
    LISTED,
    PARSED,
    blocks,
    commands,
    folder_for,
    is_definition,
    is_slow,
    parsed_by,
    run_step,
    steps,
)

import mlx_lm_qwen3vlmoe
from mlx_lm_qwen3vlmoe import quantization
from mlx_lm_qwen3vlmoe.layouts.experts import LAYOUTS

BIN = Path(sys.executable).parent


# --- the commands ---------------------------------------------------------------------------------------------------


RUN = [name for name in DOCUMENTS if any(not is_slow(name, text) for _, text in steps(name))]


LONG = [name for name in RUN if any("--train" in text for _, text in steps(name))]  # as does test_commands.py


@pytest.mark.parametrize("document", [name for name in RUN if name not in LONG] + thorough(*LONG))
def test_the_commands_of_a_document_run_in_its_order(document, tmp_path, tiny_questions):
    folder = folder_for(tmp_path / "folder", tiny_questions)
    if document == "commands.md":  # its commands are slow, and its Python is not
        assert {language for language, text in steps(document) if not is_slow(document, text)} == {"python"}
    for language, text in steps(document):
        if not is_slow(document, text) and not is_definition(text):
            run_step(language, text, folder, tiny_questions)


def printed(document: str) -> list[str]:
    """The commands of a document."""
    return [text for language, block in blocks(document) if language == "shell" for text in commands(block)]


@pytest.mark.parametrize("beginning", LISTED)
def test_a_listed_command_is_in_a_document_and_done_elsewhere(beginning):
    assert any(text.startswith(beginning) for name in DOCUMENTS for text in printed(name))
    assert (ROOT / LISTED[beginning]).exists()


@pytest.mark.parametrize(("document", "program"), PARSED)
def test_a_command_that_is_not_run_has_options_of_its_program(document, program):
    found = [text for text in printed(document) if parsed_by(document, text) == program]
    assert found
    command, *words = program.split()
    command = sys.executable if command.endswith("python") else BIN / command
    told = run(command, *words, "--help", cwd=ROOT).stdout
    for text in found:
        for option in re.findall(r"(?<=\s)--?[a-z][\w-]*", text.partition(words[-1] if words else program)[2]):
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", told), option


def test_no_block_of_commands_goes_by_another_name():
    """A block in a language that is not run is none that a reader would run."""
    languages = {language for name in DOCUMENTS for language, _ in blocks(name)}
    assert languages <= {"shell", "python", "toml", "json", "text"}
    fences = {name: len(re.findall(r"(?m)^ *```", file.read_text())) for name, file in DOCUMENTS.items()}
    assert fences == {name: 2 * len(blocks(name)) for name in DOCUMENTS}  # none without a language


def test_the_report_in_the_document_is_what_inspect_prints(tmp_path, tiny_questions):
    folder = folder_for(tmp_path / "folder", tiny_questions)
    shown = blocks("checkpoints.md")
    assert [language for language, _ in shown[:2]] == ["shell", "text"]
    (command,) = commands(shown[0][1])
    printed = run_step("shell", command, folder, tiny_questions)
    shown_here, printed = (re.sub(r"(?<=this machine has )[\d.]+", "…", text) for text in (shown[1][1], printed))
    assert printed == shown_here


# --- links ----------------------------------------------------------------------------------------------------------


PAGES = [*DOCUMENTS.values(), *sorted((ROOT / "tests").rglob("README.md"))]
LINK = re.compile(
    r"""\]\((?P<inline>[^)\s]+)[^)]*\)  # [text](target "title"), and pictures
    | ^\ *\[[^]]+\]:\ *(?P<reference>\S+)  # [name]: target
    | (?:src|srcset|href)="(?P<html>[^"\s]+)\"""",
    re.MULTILINE | re.VERBOSE,
)


def without_code(text: str) -> str:
    return re.sub(r"(?ms)^ *```.*?^ *```$", "", text)


def anchors(file: Path) -> set[str]:
    """The anchors that GitHub gives to headings: a second heading of a name gets a number."""
    found: list[str] = []
    for heading in re.findall(r"(?m)^#+ (.*)$", without_code(file.read_text())):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{anchor}-{count}" if (count := found.count(anchor)) else anchor)
    return set(found)


@pytest.mark.parametrize("file", PAGES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(file):
    """In README, CONTRIBUTING, CHANGELOG, SECURITY, docs and the READMEs of the fixtures."""
    for match in LINK.finditer(without_code(file.read_text())):
        target = next(filter(None, match.groups()))
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        linked = (file.parent / path).resolve() if path else file
        if path.endswith("benchmarks.svg"):  # written by `make bench`
            continue
        assert linked.exists(), target
        assert linked.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize(
    ("template", "asked"),
    [
        ("ISSUE_TEMPLATE/bug.md", ["mlx-lm-qwen3vlmoe doctor --verbose", "mlx-lm-qwen3vlmoe inspect"]),
        ("ISSUE_TEMPLATE/checkpoint.md", ["public repository", "mlx-lm-qwen3vlmoe inspect", '"Add a format"']),
        ("pull_request_template.md", ["CHANGELOG.md", "make lint", "make test", '"Make a fixture"']),
    ],
)
def test_a_template_asks_for_what_is_needed(template, asked):
    text = (ROOT / ".github" / template).read_text()
    assert all(part in text for part in asked)
    assert not LINK.search(text)  # GitHub does not resolve those of an issue
    headings = re.findall(r"(?m)^## (.+)$", DOCUMENTS["CONTRIBUTING.md"].read_text())
    assert set(re.findall(r'"(.+?)" in CONTRIBUTING.md', text)) <= set(headings)
    assert not template.startswith("ISSUE") or re.match(r"---\nname: .+\nabout: .+\nlabels: .+\n---\n", text)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_and_tests_that_are_named_exist(document):
    text = DOCUMENTS[document].read_text()
    for path in re.findall(r"`((?:tests|docs|examples|benchmarks)/[\w./-]+)`", text):
        assert (ROOT / path).exists() or path.startswith("benchmarks/results"), path


# --- tables -----------------------------------------------------------------------------------------------------------


def test_the_table_of_workarounds_is_that_of_the_code():
    """Each has a comment that says when it can go."""
    folder = Path(mlx_lm_qwen3vlmoe.__file__).parent
    files = sorted(folder.rglob("*.py"))
    until = re.compile(r"\bUntil: (MLX #\d+|(?:MLX|mlx-lm) \d+\.\d+\.\d+|none known)\b")
    found = [(end, str(file.relative_to(folder))) for file in files for end in until.findall(file.read_text())]
    assert len(found) == sum(file.read_text().count("Until: ") for file in files)  # no other spelling
    section = DOCUMENTS["CONTRIBUTING.md"].read_text().partition("\n## Workarounds\n")[2].partition("\n## ")[0]
    rows = re.findall(r"(?m)^\| (MLX|mlx-lm|none) \[?([^]`|]+)\]?(?:\(.+\))? \| `(.+?)` \| .+ \|$", section)
    assert sorted(found) == sorted((f"{program} {end.strip()}", file) for program, end, file in rows)


def test_the_table_of_formats_is_that_of_the_code():
    """Each family of `quantization` has its rows, in order."""
    text = DOCUMENTS["checkpoints.md"].read_text().partition("| format | recognized by |")[2]
    found = re.findall(r"(?m)^\| (.+?) \|$", text.partition("\n\n")[0])
    assert found == [row for family in quantization.FAMILIES for row in family.formats]


def test_the_table_of_layouts_is_that_of_the_code():
    """By the names that `inspect` prints."""
    text = DOCUMENTS["checkpoints.md"].read_text().partition("| `inspect` says | tensors |")[2]
    found = re.findall(r"(?m)^\| (.+?) \| (.+?) \| .+? \| .+? \|$", text.partition("\n\n")[0])
    assert [tuple(row) for row in found] == list(LAYOUTS)
