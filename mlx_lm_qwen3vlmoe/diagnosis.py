"""Whether plain ``mlx_lm`` commands reach this plug-in here and, if not, the one thing to do.

Importing this package installs no finder, so the one on ``sys.meta_path`` now is what an ``mlx_lm`` command has too.
"""

from __future__ import annotations

import inspect
import os
import platform
import shutil
import site
import sys
from collections.abc import Callable
from importlib import import_module, metadata
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from . import __version__, registry

_NAME = "mlx-lm-qwen3vlmoe"
_MODULE = f"{__package__}.model"
_TYPE = "qwen3_vl_moe"
_SUFFIXES = (".start", ".pth") if sys.version_info >= (3, 15) else (".pth",)  # of start-up files, see PEP 829
_PIP = f"{sys.executable} -m pip install"


def diagnose() -> dict[str, Any]:
    """What decides which module serves the model type, and ``remedy``: None if the plug-in's does in any process."""
    host, hostless = _attempt(_host)  # first, as the plug-ins' claims are compared with the host's modules
    finder, unfound = _attempt(registry.find)
    setting = os.environ.get(registry.VARIABLE)
    scan = finder.scan if isinstance(finder, registry.Finder) else registry.Scan(setting)
    off = None if scan.plugins else f"{registry.VARIABLE}={setting}"
    claims = [claim for claims in registry.Scan(None).plugins.values() for claim in claims]
    backend, unusable = _attempt(_backend)
    winner, error = _attempt(lambda: import_module(f"{registry.GROUP}.{_TYPE}").Model.__module__)
    report: dict[str, Any] = {
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "versions": {_NAME: __version__} | {name: _attempt(metadata.version, name)[0] for name in ("mlx-lm", "mlx")},
        "backend": backend,
        "hook": _hook(finder, unfound),
        "host": host,
        "winner": winner,
        "plugins": [vars(claim) | {"skipped": scan.skipped.get(claim.distribution, off)} for claim in claims],
        "skipped": scan.skipped,
        "conflicts": {name: [each.distribution for each in c] for name, c in scan.plugins.items() if len(c) > 1},
        "variable": setting,
        "command": _attempt(_command)[0],
        "error": unusable or error or hostless,
    }
    return report | {"remedy": _remedy(report)}


def _attempt(action: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None]:
    """The result, or the error in one line: nothing that is broken here may stop the report."""
    try:
        return action(*arguments), None
    except Exception as e:
        return None, f"{type(e).__name__}: {' '.join(str(e).split())}"


def _backend() -> str:
    import mlx.core as mx

    return "cpu" if mx.default_device() == mx.cpu else "metal" if mx.metal.is_available() else "cuda"


def _host() -> dict[str, bool]:
    """What mlx-lm has: the type itself, which the finder hides, and what the plug-in passes on."""
    own = PathFinder.find_spec(f"{registry.GROUP}.{_TYPE}", import_module(registry.GROUP).__path__)
    moe = import_module(f"{registry.GROUP}.qwen3_moe")
    can = {"shard": hasattr(moe.Model, "shard"), "pipeline": hasattr(getattr(moe, "Qwen3MoeModel", None), "pipeline")}
    can["input_embeddings"] = "input_embeddings" in inspect.signature(moe.Model.__call__).parameters
    return {"own_type": own is not None, **can}


def _hook(finder: object | None, unfound: str | None) -> dict[str, Any]:
    """The finder in force and the start-up file that installed it, or why there is none."""
    owner = type(finder).__module__ if finder else f"{__package__}.registry"
    folders = [] if sys.flags.no_site else site.getsitepackages()
    folders += [site.getusersitepackages()] if folders and site.ENABLE_USER_SITE else []
    files = [file for folder in folders for suffix in _SUFFIXES for file in sorted(Path(folder).glob(f"*{suffix}"))]
    found = [str(file) for file in files if owner in (_attempt(file.read_text)[0] or "")][:1]
    if finder:
        how = Path(found[0]).suffix if found else "by hand"
        return {"active": True, "how": how, "file": "".join(found) or None, "finder": owner, "reason": None}
    home = Path(__file__).parents[1]
    if unfound:
        reason = f"sys.meta_path has an object that fails ({unfound})"
    elif sys.flags.no_site:
        reason = "Python runs with -S, which reads no start-up files"
    elif found:
        reason = f"{found[0]} is there, but had no effect (a hidden file has none)"
    elif str(home) == site.getusersitepackages():
        reason = "the user's site-packages are off (PYTHONNOUSERSITE, -s, or a virtual environment)"
    elif str(home) not in folders and (not home.is_dir() or any(home.glob(f"{__package__}_startup.*"))):
        reason = f"{home} is on sys.path (PYTHONPATH, or a zip), but start-up files run in site-packages only"
    else:
        reason = f"{__package__}_startup{_SUFFIXES[0]} is missing from site-packages"
    return {"active": False, "how": None, "file": "".join(found) or None, "finder": None, "reason": reason}


def _command() -> dict[str, str] | None:
    """The ``mlx_lm.generate`` on the PATH, and the Python that its first line names."""
    path = shutil.which("mlx_lm.generate")
    python = Path(path).read_bytes().partition(b"\n")[0].decode()[2:].strip() if path else ""
    return {"path": path, "python": python} if path and Path(python).name.startswith("python") else None


def _remedy(report: dict[str, Any]) -> str | None:
    """The first thing to do, in one line."""
    hook, winner, error, command = (report[key] for key in ("hook", "winner", "error", "command"))
    ours = next((plugin for plugin in report["plugins"] if plugin["value"] == _MODULE), None)
    if registry.EVERYTHING in report["skipped"]:
        return f"mlx-lm's own models serve, as {report['skipped'][registry.EVERYTHING]}: repair what fails there"
    if report["host"] is None and "PluginError" in (error or ""):  # of another plug-in, whose module this one imports
        return f"{_TYPE} cannot be imported: {error}"
    if report["host"] is None:
        what = _NAME if sys.platform == "darwin" else f"'{_NAME}[cpu]' (or cuda12, cuda13)"
        return f"mlx-lm, or a backend of MLX, cannot be imported ({error}): {_PIP} {what}"
    if not hook["active"]:
        fix = "leave it out" if sys.flags.no_site else f"{_PIP} --force-reinstall --no-deps {_NAME}"
        return f"{hook['reason']}: {fix}, or {sys.executable} -m {__package__} run generate ..."
    if ours is None:
        return f"{__package__} is on sys.path, but not installed: {_PIP} {_NAME}"
    if ours["skipped"]:
        return f"{registry.VARIABLE}={report['variable']!r} turns the plug-in off: unset it, or add {_NAME} to it"
    if others := [name for name in report["conflicts"].get(_TYPE, ()) if name != _NAME]:
        return f"{' and '.join(others)} claims {_TYPE} too: uninstall it, or set {registry.VARIABLE}={_NAME}"
    if error:
        return f"{_TYPE} cannot be imported: {error}"
    if winner != _MODULE:
        return f"{_TYPE} is served by {winner}, with the finder of {hook['finder']} in force: update or uninstall that"
    if command and Path(command["python"]).parent.resolve() != Path(sys.executable).parent.resolve():
        return f"{command['path']} is of another environment: {command['python']} -m pip install {_NAME}"
    return None


def render(report: dict[str, Any]) -> str:
    """A report in lines for a reader."""
    lines = []
    for name, value in report.items():
        parts = value if isinstance(value, list) else [value]
        for number, part in enumerate(parts or [None]):
            if isinstance(part, dict):
                part = ", ".join(f"{key} {each}" for key, each in part.items() if each is not None)
            lines.append(f"{'' if number else name:<10} {part or 'none'}")
    return "\n".join(lines)
