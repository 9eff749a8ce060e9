"""Every way to install, each into a clean environment. Some resolve dependencies, so these tests need PyPI."""

from __future__ import annotations

import re
import shutil
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from support import OURS, ROOT, TINY
from support.commands import run
from support.environments import Environment, build
from support.installing import MLX_LM, NAME, VERSION, WHO, files, files_of_wheel, served_by, version

HOSTS = "mlx_lm.models.qwen3_vl_moe"
NEWER = "mlx_lm_qwen3vlmoe.newer"


class Interpreter(Environment):
    """An environment that somebody else made."""

    def __init__(self, python: Path):
        self.python = python
        self.bin = python.parent
        self.site = Path(self.run("import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())


def answer(*command: object, question: dict[str, str], **options) -> str:
    arguments = ["--model", TINY, "--prompt", question["question"], "--temp", 0, "--max-tokens", 64]
    return run(*command, *arguments, **options).stdout.split("==========")[1].strip()


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    return build("sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def newer(tmp_path_factory) -> Path:
    """The wheel of a later version, in which another module serves the model type."""
    tree = tmp_path_factory.mktemp("newer") / "tree"
    tree.mkdir()
    for name in ("mlx_lm_qwen3vlmoe", "startup"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tree)
    package = tree / "mlx_lm_qwen3vlmoe"
    edit(package / "__init__.py", r'(?m)^__version__ = ".*"$', '__version__ = "99.0"')
    edit(tree / "pyproject.toml", r'(?m)^qwen3_vl_moe = ".*"$', f'qwen3_vl_moe = "{NEWER}"')
    (package / "newer.py").write_text(
        "from . import model\nfrom .model import ModelArgs\nclass Model(model.Model): pass\n"
    )
    built = build("wheel", tree / "dist", tree)
    assert "-99.0-" in built.name
    return built


def edit(file: Path, pattern: str, text: str) -> None:
    edited, times = re.subn(pattern, text, file.read_text())
    assert times == 1
    file.write_text(edited)


@pytest.fixture(scope="module")
def releases(wheel, newer, tmp_path_factory) -> Path:
    """A folder with both versions, as an index has them."""
    folder = tmp_path_factory.mktemp("releases")
    for each in (wheel, newer):
        shutil.copy(each, folder)
    return folder


@pytest.fixture
def clean(tmp_path) -> Environment:
    return Environment(tmp_path / "venv")


# --- one environment ------------------------------------------------------------------------------------------------

WAYS = ["pip wheel", "pip sdist", "pip editable", "uv wheel", "uv sdist", "uv editable"]


@pytest.fixture(params=WAYS)
def installed(request, clean, wheel, sdist) -> Environment:
    """A clean environment with the plug-in; sdist and editable installs fetch their build requirements themselves."""
    tool, kind = request.param.split()
    what = {"wheel": [wheel], "sdist": [sdist], "editable": ["-e", ROOT]}[kind]
    if tool == "pip":
        clean.pip("install", "--no-deps", *what)
        clean.uninstall = lambda: clean.pip("uninstall", "-y", NAME)
    else:
        uv = request.getfixturevalue("uv")
        uv("pip", "install", "--python", clean.python, "--no-deps", *what)
        clean.uninstall = lambda: uv("pip", "uninstall", "--python", clean.python, NAME)
    return clean


def test_the_plugin_serves_the_model_type(installed):
    assert served_by(installed) == OURS


def test_uninstalling_leaves_no_file_and_the_hosts_own_module(installed):
    assert served_by(installed) == OURS
    installed.uninstall()
    assert served_by(installed) == HOSTS
    assert list(installed.bin.parent.rglob("*qwen3*vl*moe*")) == [] == list(installed.bin.rglob(f"*{NAME}*"))


@pytest.mark.parametrize("tool", ["pip", "uv"])
def test_one_command_in_an_empty_environment_installs_all_that_is_needed(tool, wheel, uv, tmp_path, tiny_questions):
    """The README's: the plug-in with an extra brings mlx-lm and a backend."""
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    what = wheel if sys.platform == "darwin" else f"{wheel}[cpu]"
    if tool == "pip":
        run(sys.executable, "-m", "pip", "-q", "--python", python, "install", what)
    else:
        uv("pip", "install", "--python", python, what)
    assert answer(python.parent / "mlx_lm.generate", question=tiny_questions[0]) == tiny_questions[0]["answer"]
    assert served_by(Interpreter(python)) == OURS


# --- upgrade and downgrade ------------------------------------------------------------------------------------------


@pytest.fixture(params=["pip", "uv"])
def install(request, clean, releases):
    """Run `install` with one of two tools, in an environment without the plug-in, from an index with two versions."""
    source = ("--no-index", "--find-links", releases, "--no-deps")
    if request.param == "pip":
        return lambda *arguments: clean.pip("install", *source, *arguments)
    uv = request.getfixturevalue("uv")
    return lambda *arguments: uv("pip", "install", "--python", clean.python, *source, *arguments)


def test_after_an_upgrade_the_newer_version_serves_at_once_and_nothing_of_the_older_stays(clean, install, wheel, newer):
    install(f"{NAME}=={version(wheel)}")
    assert served_by(clean) == OURS
    install("--upgrade", NAME)
    assert served_by(clean) == NEWER
    assert clean.run(VERSION).stdout.strip() == "99.0"
    assert files(clean) == files_of_wheel(newer)


def test_after_a_downgrade_the_older_version_serves_at_once_and_nothing_of_the_newer_stays(
    clean, install, wheel, newer
):
    install(NAME)
    assert served_by(clean) == NEWER
    install(f"{NAME}=={version(wheel)}")
    assert served_by(clean) == OURS
    assert clean.run(VERSION).stdout.strip() == version(wheel)
    assert files(clean) == files_of_wheel(wheel)


# --- environments of tools ------------------------------------------------------------------------------------------


def test_uv_tool_install_with_the_plugin_and_its_command(uv, wheel, tiny_questions):
    uv("tool", "install", MLX_LM, "--with-executables-from", f"{NAME} @ {wheel.as_uri()}")
    assert answer(uv.home / "bin" / "mlx_lm.generate", question=tiny_questions[0]) == tiny_questions[0]["answer"]
    assert served_by(Interpreter(uv.home / "tools" / "mlx-lm" / "bin" / "python")) == OURS
    assert "qwen3_vl_moe" in run(uv.home / "bin" / NAME, "doctor", check=False).stdout


def test_uv_tool_install_again_without_the_plugin_takes_it_and_its_command_away(uv, wheel):
    uv("tool", "install", MLX_LM, "--with-executables-from", f"{NAME} @ {wheel.as_uri()}")
    assert (uv.home / "bin" / NAME).exists()
    uv("tool", "install", MLX_LM)
    assert served_by(Interpreter(uv.home / "tools" / "mlx-lm" / "bin" / "python")) == HOSTS
    assert not (uv.home / "bin" / NAME).exists()


def test_uvx_with_the_plugin(uv, wheel, tiny_questions):
    """uvx and `uv run` make an environment for one command, and read the start-up files of it."""

    def uvx(*arguments: object, **options):
        return answer(*arguments, question=tiny_questions[0], **options)

    home = {name: str(uv.home / place) for name, place in (("UV_CACHE_DIR", "cache"), ("UV_TOOL_DIR", "tools"))}
    command = [uv.home / "venv" / "bin" / "uvx", "--python", sys.executable, "--from", MLX_LM, "--with", wheel]
    assert uvx(*command, "mlx_lm.generate", env=home) == tiny_questions[0]["answer"]


def test_uv_run_with_the_plugin(uv, wheel):
    done = uv("run", "--no-project", "--with", MLX_LM, "--with", wheel, "python", "-c", WHO)
    assert done.stdout.split()[0] == OURS


def test_pipx_inject_brings_the_plugin_and_its_command_and_uninject_takes_them_away(pipx, wheel, tiny_questions):
    pipx("install", MLX_LM)
    environment = Interpreter(pipx.home / "home" / "venvs" / "mlx-lm" / "bin" / "python")
    assert served_by(environment) == HOSTS
    pipx("inject", "--include-apps", "mlx-lm", wheel)
    assert "qwen3_vl_moe" in run(pipx.home / "bin" / NAME, "doctor", check=False).stdout
    assert answer(pipx.home / "bin" / "mlx_lm.generate", question=tiny_questions[0]) == tiny_questions[0]["answer"]
    assert served_by(environment) == OURS
    pipx("uninject", "mlx-lm", NAME)
    assert served_by(environment) == HOSTS
    assert not (pipx.home / "bin" / NAME).exists()


# --- a virtual environment with system site-packages ----------------------------------------------------------------


@pytest.fixture
def system(clean, tmp_path) -> Interpreter:
    """A Python of its own, as the one of a system, with mlx-lm in its site-packages."""
    base = Path(sys._base_executable).resolve()
    library = Path(sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix}))
    mine = tmp_path / "lib" / library.name
    mine.mkdir(parents=True)
    for entry in library.iterdir():
        if entry.name not in ("site-packages", "dist-packages", "EXTERNALLY-MANAGED"):
            (mine / entry.name).symlink_to(entry)
    (tmp_path / "bin").mkdir()
    shutil.copy(base, tmp_path / "bin")
    interpreter = Interpreter(tmp_path / "bin" / base.name)
    assert interpreter.site.is_relative_to(tmp_path)
    interpreter.site.mkdir(exist_ok=True)
    shutil.copy(clean.site / "shared.pth", interpreter.site)
    return interpreter


@pytest.fixture
def inner(system, tmp_path) -> Interpreter:
    """A virtual environment that sees the packages of the system."""
    run(system.python, "-m", "venv", "--system-site-packages", "--without-pip", tmp_path / "inner")
    interpreter = Interpreter(tmp_path / "inner" / "bin" / "python")
    interpreter.bin = system.bin  # where its mlx_lm is
    return interpreter


def test_a_plugin_of_the_system_serves_a_virtual_environment_that_sees_the_systems_packages(system, inner, wheel):
    system.pip("install", "--no-deps", wheel)
    assert served_by(inner) == OURS


def test_a_plugin_of_the_virtual_environment_serves_the_host_of_the_system_in_there_only(system, inner, wheel):
    inner.pip("install", "--no-deps", wheel)
    assert served_by(inner) == OURS
    assert served_by(system) == HOSTS


@pytest.mark.parametrize("inner_is_newer", [True, False])
def test_of_two_versions_the_one_of_the_virtual_environment_serves(system, inner, wheel, newer, inner_is_newer):
    """They are one distribution, so no conflict."""
    system.pip("install", "--no-deps", wheel if inner_is_newer else newer)
    inner.pip("install", "--no-deps", "--ignore-installed", newer if inner_is_newer else wheel)
    assert served_by(inner) == (NEWER if inner_is_newer else OURS)
    assert served_by(system) == (OURS if inner_is_newer else NEWER)


# --- the start-up file of Python 3.15 (PEP 829) ---------------------------------------------------------------------

# The rules of `site`: UTF-8; blank lines and comments count for nothing; every other line is pkg.mod:callable, which
# `pkgutil.resolve_name` resolves and which is called without arguments, after the paths of all .pth files. Only a .pth
# of the same name loses its import lines.
START = "mlx_lm_qwen3vlmoe_startup.start"
PEP_829 = f"""
import pathlib, pkgutil, sysconfig
for line in pathlib.Path(sysconfig.get_path("purelib"), {START!r}).read_text(encoding="utf-8-sig").splitlines():
    if line.strip() and not line.strip().startswith("#"):
        pkgutil.resolve_name(line.strip())()
"""
COUNT = """
import sys
print(sum(hasattr(finder, "mlx_lm_models_finder") for finder in sys.meta_path))
"""


@pytest.fixture
def with_wheel(clean, wheel) -> Environment:
    clean.pip("install", "--no-deps", wheel)
    return clean


def test_the_start_file_names_callables_in_the_form_that_python_3_15_takes(with_wheel):
    lines = (with_wheel.site / START).read_bytes().decode("utf-8-sig").splitlines()
    calls = [line for line in lines if line.strip() and not line.startswith("#")]
    assert calls
    for line in calls:
        module, _, function = line.partition(":")
        assert all(name.isidentifier() for name in (*module.split("."), *function.split(".")))


def test_the_start_file_has_the_name_of_the_pth_file_so_that_python_3_15_runs_one_of_them(with_wheel):
    names = sorted(path.name for path in with_wheel.site.glob("*startup*"))
    assert names == [START.replace(".start", ".pth"), START]


def test_the_start_file_alone_is_enough(with_wheel):
    """As in Python 3.15, which ignores the import line of the .pth file beside it."""
    (with_wheel.site / START).with_suffix(".pth").unlink()
    assert served_by(with_wheel) == HOSTS
    assert with_wheel.run(PEP_829 + WHO).stdout.split()[0] == OURS


def test_the_start_file_after_the_pth_file_and_twice_leaves_one_finder_and_no_word(with_wheel):
    done = with_wheel.run(PEP_829 + PEP_829 + COUNT)
    assert (done.stdout.strip(), done.stderr) == ("1", "")
