"""What a release installs, and how it is made."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import conftest
import pytest
import yaml
from markdown_it import MarkdownIt
from support import ROOT
from support.commands import run
from support.environments import build

import mlx_lm_qwen3vlmoe
from mlx_lm_qwen3vlmoe.discovery.claims import MODEL_TYPES

STARTUP = "import mlx_lm_qwen3vlmoe.registry; mlx_lm_qwen3vlmoe.registry.install()\n"
START = "mlx_lm_qwen3vlmoe.registry:install\n"
INSTALLED = [
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "mlx_lm_qwen3vlmoe").rglob("*.py")),
    *"""\
mlx_lm_qwen3vlmoe/py.typed
mlx_lm_qwen3vlmoe_startup.pth
mlx_lm_qwen3vlmoe_startup.start
DIST-INFO/METADATA
DIST-INFO/RECORD
DIST-INFO/WHEEL
DIST-INFO/entry_points.txt
DIST-INFO/licenses/LICENSE
""".splitlines(),
]
ENTRY_POINTS = """[console_scripts]
mlx-lm-qwen3vlmoe = mlx_lm_qwen3vlmoe.__main__:main

[mlx_lm.models]
qwen3_vl_moe = mlx_lm_qwen3vlmoe.model
qwen3_vl_moe_text = mlx_lm_qwen3vlmoe.model
"""
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture(scope="module")
def content(wheel) -> dict[str, bytes]:
    """File → content of the wheel."""
    info = f"mlx_lm_qwen3vlmoe-{mlx_lm_qwen3vlmoe.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        return {name.replace(info, "DIST-INFO"): archive.read(name) for name in archive.namelist()}


# --- the wheel ------------------------------------------------------------------------------------------------------


def test_the_wheel_installs_these_files_and_no_others(content):
    assert sorted(content) == sorted(INSTALLED)


def test_the_start_up_files_are_of_one_line_each(content):
    assert content["mlx_lm_qwen3vlmoe_startup.pth"].decode() == STARTUP
    assert content["mlx_lm_qwen3vlmoe_startup.start"].decode() == START


def test_the_document_on_security_quotes_the_start_up_file():
    assert f"```text\n{STARTUP}```" in (ROOT / "SECURITY.md").read_text()


def test_the_entry_points_are_one_command_and_two_model_types(content):
    assert content["DIST-INFO/entry_points.txt"].decode() == ENTRY_POINTS
    claims = "".join(f"{model_type} = {module}\n" for model_type, module in sorted(MODEL_TYPES.items()))
    assert ENTRY_POINTS.endswith(f"[mlx_lm.models]\n{claims}")


def test_the_metadata_says_what_is_needed(content):
    metadata = Parser().parsestr(content["DIST-INFO/METADATA"].decode())
    assert metadata["Version"] == mlx_lm_qwen3vlmoe.__version__
    needed = {line.split(";")[0].split(">")[0].strip() for line in metadata.get_all("Requires-Dist") if ";" not in line}
    assert needed == {"mlx", "mlx-lm", "importlib-metadata"}
    assert set(metadata.get_all("Provides-Extra")) == {"cpu", "cuda12", "cuda13", "test", "bench", "dev"}


def test_the_license_is_mit_and_comes_along(content):
    metadata = Parser().parsestr(content["DIST-INFO/METADATA"].decode())
    assert (metadata["License-Expression"], metadata.get_all("License-File")) == ("MIT", ["LICENSE"])
    assert content["DIST-INFO/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()


# --- the page of a registry -----------------------------------------------------------------------------------------

ADDRESS = "https://github.com/someone/some-name"
EMPTY = 'repository = ""\n'
PARTS = """\
[a](b.md "t") ![p](x/y.svg 't') [![q](q.svg)](docs/q.md#r) [![q](https://h/q.svg)](docs/q.md) `[c](d)` [`x`](../e/)
[t](#top)
[brackets [in] text](<r.md>) [ok](https://e.f/g) [m](mailto:x@y) ![far](https://h/far.svg)
<picture><source srcset="a.svg"><img alt="z" src='b.svg'></picture> <a href="c.md" title="u"><img src="d.png"> hi</a>

```text
[x](y)
```
"""


def with_address(path: Path, address: str) -> Path:
    """A copy of what a build reads, with the address of a repository filled in."""
    copy = tree(path, 1_500_000_000)
    text = (copy / "pyproject.toml").read_text()
    assert text.count(EMPTY) == 1
    (copy / "pyproject.toml").write_text(text.replace(EMPTY, f'repository = "{address}"\n'))
    return copy


def targets(markdown: str) -> list[str]:
    """Every target that a reader of this Markdown can follow or sees, by a parser that knows nothing of ours."""
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(markdown)
    tokens = [token for each in tokens for token in (each, *(each.children or []))]
    html = "".join(token.content for token in tokens if token.type in ("html_inline", "html_block"))
    written = [token.attrs.get("href") or token.attrs.get("src") for token in tokens if token.attrs]
    return [*filter(None, written), *re.findall(r"""(?:src|srcset|href)=["']([^"']*)""", html)]


def dead(markdown: str) -> list[str]:
    return [target for target in targets(markdown) if not target.startswith(("https://", "http://", "mailto:"))]


@pytest.fixture(scope="module")
def addressed(tmp_path_factory) -> Message:
    """The metadata of a wheel of a repository with an address."""
    path = tmp_path_factory.mktemp("addressed")
    built = build("wheel", path / "dist", with_address(path / "tree", ADDRESS))
    with zipfile.ZipFile(built) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="module")
def released(content) -> Message:
    return Parser().parsestr(content["DIST-INFO/METADATA"].decode())


def test_no_link_or_picture_of_the_page_is_dead(released):
    """README.md has some that are, away from the repository."""
    assert released["Description-Content-Type"] == "text/markdown"
    assert len(dead((ROOT / "README.md").read_text())) >= 10
    assert dead(released.get_payload()) == []


def test_an_address_makes_every_link_absolute_and_loses_none(addressed):
    readme, shown = targets((ROOT / "README.md").read_text()), targets(addressed.get_payload())
    assert len(shown) == len(readme)
    version = f"v{mlx_lm_qwen3vlmoe.__version__}"
    for before, after in zip(readme, shown, strict=True):
        if before == after:
            assert after.startswith("https://")
            continue
        base, view, tag, path = re.fullmatch(rf"({ADDRESS})/(\w+)/([^/]+)/(.+)", after).groups()
        assert (base, tag, path) == (ADDRESS, version, before if before[0] != "#" else f"README.md{before}")
        assert view == ("raw" if path.endswith((".svg", ".png")) else "blob")
        assert (ROOT / path.partition("#")[0]).exists()


def test_the_words_of_the_page_are_those_of_the_readme_without_an_address(released):
    def words(markdown: str) -> list[str]:
        return re.findall(r"\w+", re.sub(r"!\[[^\]]*\]\([^)]*\)|\]\([^)]*\)|<[^>]*>", "", markdown))

    assert words(released.get_payload()) == words((ROOT / "README.md").read_text())


def test_the_addresses_beside_the_page_are_made_from_the_same_place(released, addressed):
    assert released.get_all("Project-URL") is None
    urls = dict(url.split(", ") for url in addressed.get_all("Project-URL"))
    assert urls.keys() == {"Source", "Documentation", "Changelog", "Issues"}
    assert all(url == ADDRESS or url.startswith(f"{ADDRESS}/") for url in urls.values())


def test_links_in_every_form_are_found_and_code_is_left_alone():
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    hatch_build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hatch_build)
    assert len(dead(PARTS)) == 12
    for address in ("", ADDRESS):
        shown = hatch_build.page(PARTS, address, "v1")
        assert dead(shown) == []
        assert "`[c](d)`" in shown
        assert "\n```text\n[x](y)\n```\n" in shown
    assert {target for target in targets(shown) if target.startswith(ADDRESS)} >= {
        f"{ADDRESS}/blob/v1/b.md",
        f"{ADDRESS}/raw/v1/x/y.svg",
        f"{ADDRESS}/blob/v1/docs/q.md#r",
        f"{ADDRESS}/blob/v1/README.md#top",
        f"{ADDRESS}/raw/v1/a.svg",
    }
    with pytest.raises(ValueError, match=r"expected \[text\]\(docs/a.md\), found a reference"):
        hatch_build.page("[a]\n\n[a]: docs/a.md\n", "", "v1")


def test_an_address_of_another_kind_is_refused(tmp_path):
    with pytest.raises(AssertionError, match=r"repository in pyproject.toml: expected https://..., found git@"):
        build("wheel", tmp_path / "dist", with_address(tmp_path / "tree", "git@github.com:someone/some-name"))


@pytest.mark.parametrize(
    ("address", "refused"), [("", True), ("https://github.com/a/stranger", True), (ADDRESS, False)]
)
def test_the_release_workflow_refuses_any_other_address_than_its_own(address, refused, tmp_path):
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]["build"]["steps"]
    (check,) = (step["run"] for step in steps if "Refuse" in step.get("name", ""))
    assert check.split(" = ")[0].removeprefix('test "$(')[:-2] in (ROOT / "SECURITY.md").read_text()
    server, _, repository = ADDRESS.rpartition("/someone")
    env = {"GITHUB_SERVER_URL": server, "GITHUB_REPOSITORY": f"someone{repository}"}
    path = with_address(tmp_path / "tree", address)
    assert run("bash", "-ec", check, cwd=path, env=env, check=False).returncode == refused


def test_the_newest_version_of_the_changelog_is_this_one_and_every_version_has_a_date():
    headings = re.findall(r"(?m)^## (.*)$", (ROOT / "CHANGELOG.md").read_text())
    found = [re.fullmatch(r"\[(.+)\] - (20\d\d-\d\d-\d\d)", each) for each in headings if each != "[Unreleased]"]
    assert found[0][1] == mlx_lm_qwen3vlmoe.__version__
    dates = [each[2] for each in found]
    assert dates == sorted(dates, reverse=True)


# --- the build ------------------------------------------------------------------------------------------------------


def tree(path: Path, time: int) -> Path:
    """A copy of what a build reads, with other times, and with the modes that the umask in force gives."""
    path.mkdir(parents=True)
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", "CHANGELOG.md", ".gitignore"):
        shutil.copyfile(ROOT / name, path / name)
    for name in ("mlx_lm_qwen3vlmoe", "startup"):
        shutil.copytree(
            ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__"), copy_function=shutil.copyfile
        )
    for file in path.rglob("*"):
        os.utime(file, (time, time))
    return path


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_a_build_elsewhere_at_another_time_by_another_user_gives_the_same_bytes(kind, tmp_path, monkeypatch):
    first = build(kind, tmp_path / "first", tree(tmp_path / "here", 1_500_000_000))
    monkeypatch.setitem(conftest.CLEAN, "TZ", "Asia/Tokyo")
    monkeypatch.setitem(conftest.CLEAN, "LC_ALL", "C")
    before = os.umask(0o077)
    try:
        second = build(kind, tmp_path / "second", tree(tmp_path / "some" / "where else", 1_700_000_000))
    finally:
        os.umask(before)
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()


def test_a_tree_that_was_used_builds_the_same_wheel(wheel, tmp_path):
    used = tree(tmp_path / "used", 1_600_000_000)
    for leftover in ("mlx_lm_qwen3vlmoe/__pycache__/model.cpython-313.pyc", "dist/old.whl", ".venv/bin/python"):
        (used / leftover).parent.mkdir(parents=True)
        (used / leftover).touch()
    assert build("wheel", tmp_path / "built", used).read_bytes() == wheel.read_bytes()


@pytest.mark.thorough
def test_the_sdist_builds_the_same_wheel(wheel, tmp_path):
    with tarfile.open(build("sdist", tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert build("wheel", tmp_path / "built", unpacked).read_bytes() == wheel.read_bytes()


def test_no_file_of_the_wheel_is_executable_or_writable_by_others(wheel):
    with zipfile.ZipFile(wheel) as archive:
        assert {entry.external_attr >> 16 & 0o777 for entry in archive.infolist()} == {0o644}


# --- the workflows --------------------------------------------------------------------------------------------------


@pytest.fixture(params=WORKFLOWS, ids=lambda file: file.stem)
def workflow(request) -> Path:
    return request.param


def test_every_action_is_pinned_to_a_commit(workflow):
    used = re.findall(r"uses: *(.*)", workflow.read_text())
    assert used
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", each) for each in used)


def test_one_action_has_one_commit_in_all_workflows():
    used = {each for file in WORKFLOWS for each in re.findall(r"uses: *(.*)", file.read_text())}
    assert len(used) == len({each.partition("@")[0] for each in used})


def test_a_workflow_may_only_read_the_repository(workflow):
    assert yaml.safe_load(workflow.read_text())["permissions"] == {"contents": "read"}


def test_only_the_job_that_publishes_has_another_permission(workflow):
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    others = {name: job["permissions"] for name, job in jobs.items() if "permissions" in job}
    assert others == ({"publish": {"id-token": "write"}} if workflow.stem == "release" else {})


def test_no_checkout_leaves_the_token_behind(workflow):
    text = workflow.read_text()
    assert text.count("actions/checkout@") == text.count("persist-credentials: false")


def test_no_script_has_text_of_an_event_in_it(workflow):
    steps = [step for job in yaml.safe_load(workflow.read_text())["jobs"].values() for step in job["steps"]]
    assert not [step["run"] for step in steps if "${{" in step.get("run", "")]


def test_what_is_published_is_what_was_built_and_tested():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]
    assert [jobs[name].get("needs") for name in ("build", "test", "publish")] == [None, "build", "test"]
    assert jobs["publish"]["environment"] == "pypi"
    assert ["run" in step for step in jobs["publish"]["steps"]] == [False, False]  # a download, and the upload
