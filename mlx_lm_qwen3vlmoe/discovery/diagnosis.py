"""Whether plain ``mlx_lm`` commands reach a plug-in here and, if not, why not, and the one thing to do.

Importing this package installs no finder, so the one on ``sys.meta_path`` now is what an ``mlx_lm`` command has too.
"""

from __future__ import annotations

import os
import platform
import shutil
import site
import sys
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from .. import __version__, registry
from .claims import MODEL_TYPES, NAME, PACKAGE, own_module, renamed, renamed_by_class

_SUFFIXES = (".start", ".pth") if sys.version_info >= (3, 15) else (".pth",)  # of start-up files, see PEP 829
_FOLDER = Path(__file__).parents[1]  # of the package
_PIP = f"{sys.executable} -m pip install"
_RUN = f"{sys.executable} -m {PACKAGE} run generate ..."

Verdict = tuple[str, str] | None  # a reason why not, and a remedy


def diagnose(model_type: str = "qwen3_vl_moe") -> dict[str, Any]:
    """What decides which module serves a model type.

    ``reason`` is None if any process gets the plug-in that claims it (or the host's own model, where none does);
    else it says why not, and ``remedy`` what to do.
    """
    host, hostless = _attempt(_host, model_type)  # first, as the plug-ins' claims are compared with the host's modules
    finder, unfound = _attempt(registry.find)
    setting = os.environ.get(registry.VARIABLE)
    scan = finder.scan if isinstance(finder, registry.Finder) else registry.Scan(setting)
    off = None if scan.plugins else f"{registry.VARIABLE}={setting}"
    claims = [claim for claims in registry.Scan(None).plugins.values() for claim in claims]
    backend, unusable = _attempt(_backend)
    module, error = _attempt(_import, host["module"] if host else model_type)
    report: dict[str, Any] = {
        "type": model_type,
        "package": str(_FOLDER),
        "installed": _attempt(metadata.version, NAME)[0],
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "versions": {NAME: __version__} | {name: _attempt(metadata.version, name)[0] for name in ("mlx-lm", "mlx")},
        "backend": backend,
        "hook": _hook(finder, unfound),
        "host": host,
        "winner": module and module.__name__,
        "file": module and getattr(module, "__file__", None),
        "plugins": [vars(claim) | {"skipped": scan.skipped.get(claim.distribution, off)} for claim in claims],
        "skipped": scan.skipped,
        "conflicts": {name: [each.distribution for each in c] for name, c in scan.plugins.items() if len(c) > 1},
        "variable": setting,
        "command": _attempt(_command)[0],
        "error": unusable or error or hostless,
        "notes": _attempt(_notes, model_type, module and module.__name__)[0] or [],
    }
    reason, remedy = _verdict(report) or (None, None)
    return report | {"reason": reason, "remedy": remedy}


def why_no_host() -> str | None:
    """Why no command of mlx-lm can run here, and what to do, in one line; None where one can."""
    _, error = _attempt(lambda: (import_module("mlx.core"), import_module("mlx_lm")))
    return error and ". Do: ".join(_no_host(error))


def _attempt(action: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None]:
    """The result, or the error in one line: nothing that is broken here may stop the report."""
    try:
        return action(*arguments), None
    except Exception as e:
        return None, f"{type(e).__name__}: {' '.join(str(e).split())}"


def _backend() -> str:
    import mlx.core as mx

    return "cpu" if mx.default_device() == mx.cpu else "metal" if mx.metal.is_available() else "cuda"


def _host(model_type: str) -> dict[str, Any]:
    """What mlx-lm has: the type itself, the module it takes it for, and what this package's model passes on."""
    from ..runtime import host

    can = {"shard": host.SHARD, "pipeline": host.PIPELINE, "input_embeddings": host.EMBEDDINGS}
    return {"module": renamed(model_type), "own_type": own_module(model_type) is not None, **can}


def _notes(model_type: str, winner: str | None) -> list[str]:
    """What a user of the type has to know, even if the plug-in is in use."""
    from ..runtime import host

    notes = [
        f"mlx-lm takes {model_type} of the class {name} for {module} before it asks for a plug-in"
        for name, module in renamed_by_class(model_type).items()
    ]
    ours = winner is not None and winner == MODEL_TYPES.get(model_type)
    return [*notes, *([host.hidden_images(model_type)] if ours and host.takes_images(model_type) else [])]


def _import(name: str) -> Any:
    """The module that mlx-lm would take the model from, which has to have one."""
    module = import_module(f"{registry.GROUP}.{name}")
    module.Model  # noqa: B018
    return module


def _hook(finder: object | None, unfound: str | None) -> dict[str, Any]:
    """The finder in force and the start-up file that installed it, or why there is none."""
    owner = type(finder).__module__ if finder else f"{PACKAGE}.registry"
    folders = [] if sys.flags.no_site else site.getsitepackages()
    folders += [site.getusersitepackages()] if folders and site.ENABLE_USER_SITE else []
    files = [file for folder in folders for suffix in _SUFFIXES for file in sorted(Path(folder).glob(f"*{suffix}"))]
    found = [str(file) for file in files if owner in (_attempt(file.read_text)[0] or "")][:1]
    if finder:
        how = Path(found[0]).suffix if found else "by hand"
        return {"active": True, "how": how, "file": "".join(found) or None, "finder": owner, "reason": None}
    home = _FOLDER.parent
    if unfound:
        reason = f"sys.meta_path has an object that fails ({unfound})"
    elif sys.flags.no_site:
        reason = "Python runs with -S, which reads no start-up files"
    elif found:
        reason = f"{found[0]} is there, but had no effect (a hidden file has none)"
    elif str(home) == site.getusersitepackages():
        reason = "the user's site-packages are off (PYTHONNOUSERSITE, -s, or a virtual environment)"
    elif str(home) not in folders and (not home.is_dir() or any(home.glob(f"{PACKAGE}_startup.*"))):
        reason = f"{home} is on sys.path (PYTHONPATH, or a zip), but start-up files run in site-packages only"
    else:
        reason = f"{PACKAGE}_startup{_SUFFIXES[0]} is missing from site-packages"
    return {"active": False, "how": None, "file": "".join(found) or None, "finder": None, "reason": reason}


def _command() -> dict[str, str] | None:
    """The ``mlx_lm.generate`` on the PATH, and the Python that its first line names."""
    path = shutil.which("mlx_lm.generate")
    python = Path(path).read_bytes().partition(b"\n")[0].decode()[2:].strip() if path else ""
    return {"path": path, "python": python} if path and Path(python).name.startswith("python") else None


def _verdict(report: dict[str, Any]) -> Verdict:
    """Why the plug-in is not in use, the first reason that counts; None if it is."""
    claims = [plugin for plugin in report["plugins"] if plugin["model_type"] == report["type"]]
    plugin = min(claims, key=lambda each: each["distribution"] != NAME, default=None)  # this package's goes first
    missing = _host_is_missing(report) or _package_is_missing(report, plugin is not None)
    if missing or plugin is None:
        return missing or _unclaimed(report)
    return _out_of_reach(report, plugin) or _outdone(report, plugin) or _command_is_elsewhere(report, plugin)


def _host_is_missing(report: dict[str, Any]) -> Verdict:
    if everything := report["skipped"].get(registry.EVERYTHING):
        return f"mlx-lm's own models serve, as {everything}", "repair what fails there"
    if report["host"] is None:
        error = report["error"]
        return _broken(report["type"], error) if "PluginError" in error else _no_host(error)
    return None


def _package_is_missing(report: dict[str, Any], claimed: bool) -> Verdict:
    """Whether the metadata that make this package's types known are not there, or are those of another version."""
    name, installed = report["type"], report["installed"]
    if name not in MODEL_TYPES or (installed and claimed):
        return None
    if installed:
        what = f"{NAME} {installed}, as it is installed, does not claim {name}, which {__version__} would"
        return what, f"{_PIP} --force-reinstall --no-deps {NAME}"
    home = _FOLDER.parent
    what = f"-e {home}" if (home / "pyproject.toml").exists() else NAME
    return f"{NAME} is not installed: {home} is on sys.path, and no more than that", f"{_PIP} {what}, or {_RUN}"


def _unclaimed(report: dict[str, Any]) -> Verdict:
    name = report["type"]
    if not report["host"]["own_type"]:
        what = f"no installed plug-in claims {name}, and mlx-lm {report['versions']['mlx-lm']} has no such type"
        return what, f"install one that names it in its entry points, group {registry.GROUP}"
    return _broken(name, report["error"]) if report["error"] else None


def _out_of_reach(report: dict[str, Any], plugin: dict[str, Any]) -> Verdict:
    """Whether no finder looks for the plug-in, or the variable leaves it out."""
    if not report["hook"]["active"]:
        fix = "leave it out" if sys.flags.no_site else f"{_PIP} --force-reinstall --no-deps {NAME}"
        return report["hook"]["reason"], f"{fix}, or {_RUN}"
    if not plugin["skipped"]:
        return None
    setting, who = f"{registry.VARIABLE}={report['variable']}", plugin["distribution"]
    if (report["variable"] or "").strip() in ("", "0"):
        return f"{setting} turns every plug-in off", f"unset {registry.VARIABLE}"
    return f"{setting} leaves {who} out", f"unset it, or export {setting},{who}"


def _outdone(report: dict[str, Any], plugin: dict[str, Any]) -> Verdict:
    """Whether the finder has another module for the type, or none."""
    name, winner, module, who = report["type"], report["winner"], report["host"]["module"], plugin["distribution"]
    if others := [each for each in report["conflicts"].get(name, ()) if each != who]:
        fix = f"{sys.executable} -m pip uninstall {others[0]}, or export {registry.VARIABLE}={who}"
        return f"{' and '.join(others)} {'claims' if len(others) == 1 else 'claim'} {name} too", fix
    if report["error"]:
        return _broken(name, report["error"])
    if module != name:
        fix = f"claim {module} in the plug-in's entry points"
        return f"mlx-lm takes {name} for {module} before it asks for a plug-in", fix
    if winner != plugin["value"].strip():
        what = f"{winner} serves it, with the finder of {report['hook']['finder']} in force"
        return what, "update or uninstall that one"
    return None


def _command_is_elsewhere(report: dict[str, Any], plugin: dict[str, Any]) -> Verdict:
    command = report["command"]
    if command and Path(command["python"]).parent.resolve() != Path(sys.executable).parent.resolve():
        fix = f"{command['python']} -m pip install {plugin['distribution']}"
        return f"{command['path']} is of another environment", fix
    return None


def _no_host(error: str) -> tuple[str, str]:
    what = NAME if sys.platform == "darwin" else f"'{NAME}[cpu]' (or cuda12, cuda13)"
    return f"mlx-lm, or a backend of MLX, cannot be imported ({error})", f"{_PIP} {what}"


def _broken(model_type: str, error: str) -> tuple[str, str]:
    """The errors of plug-ins end with a sentence on what to do."""
    what, _, remedy = error.rpartition(". ") if "PluginError" in error else (error, "", "")
    return f"{model_type} cannot be imported: {what}", remedy or "repair what is named there"


def render(report: dict[str, Any], verbose: bool = False) -> str:
    """The verdict in a line or three and, if asked for, everything that it comes from."""
    package = f"{NAME} {report['versions'][NAME]}"
    claim = next((each for each in report["plugins"] if each["value"].strip() == report["winner"]), None)
    if report["reason"]:
        lines = [f"NOT IN USE: {report['reason']}", f"Do: {report['remedy']}"]
        lines.append(f"This is {package}, imported from {report['package']}")
    elif claim:
        version = report["versions"].get(claim["distribution"], claim["version"])
        who = f"{claim['distribution']} {version} ({report['file']})"
        lines = [f"OK: mlx_lm.generate runs {report['type']} through {who}"]
    else:
        who = f"mlx-lm {report['versions']['mlx-lm']} ({report['file']})"
        lines = [f"OK: mlx_lm.generate runs {report['type']} through {who}; no plug-in claims it"]
    lines += [f"Note: {note}" for note in report["notes"]]
    return "\n".join([*lines, *(["", *_details(report, package)] if verbose else [])])


def _details(report: dict[str, Any], package: str) -> list[str]:
    """Line by line, what a report has."""
    hook, host, command = report["hook"], report["host"], report["command"]
    start = f"{hook['file'] or 'a finder installed by hand'}, the finder of {hook['finder']}"
    can = [f"{'' if able else 'no '}{what}" for what, able in (host or {}).items() if isinstance(able, bool)]
    rows = [
        ("package", f"{package}, imported from {report['package']}; installed: {report['installed'] or 'no'}"),
        ("Python", f"{report['python']['version']}, {report['python']['executable']}"),
        ("mlx-lm", f"{report['versions']['mlx-lm']}: {', '.join(can).replace('_', ' ') or 'cannot be imported'}"),
        ("MLX", f"{report['versions']['mlx']}, backend: {report['backend'] or 'none'}"),
        ("start-up", start if hook["active"] else f"not active: {hook['reason']}"),
        (registry.VARIABLE, "not set" if report["variable"] is None else repr(report["variable"])),
        ("served by", f"{report['winner']} ({report['file']})" if report["winner"] else "nothing"),
        *(
            ("plug-in", f"{each['distribution']} {each['version']}: {each['model_type']} = {each['value']}")
            if not each["skipped"]
            else ("plug-in", f"{each['distribution']} {each['version']}: not used: {each['skipped']}")
            for each in report["plugins"]
        ),
        *(("conflict", f"{name}: {', '.join(all_)}") for name, all_ in report["conflicts"].items()),
        *(("not used", f"{what}: {why}") for what, why in report["skipped"].items()),
        ("command", f"{command['path']}, of {command['python']}" if command else "no mlx_lm.generate on the PATH"),
        ("error", report["error"] or "none"),
    ]
    return [f"{name:<14}  {text}" for name, text in rows]
