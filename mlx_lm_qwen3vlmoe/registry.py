"""Resolve ``mlx_lm.models.<model_type>`` through the ``mlx_lm.models`` entry-point group.

mlx-lm has no plug-in registry: it imports ``mlx_lm.models.<model_type>`` and takes ``Model`` and ``ModelArgs`` from
that module. A finder at the front of ``sys.meta_path`` answers exactly those imports for the model types that an
installed distribution declares, and leaves every other import alone after one comparison. No file of the host is
edited and no attribute of it is rebound.

    [project.entry-points."mlx_lm.models"]
    some_model_type = "some_package.module"     # a module that has Model and ModelArgs

``MLX_LM_PLUGINS`` chooses: unset, every installed plug-in; ``0`` or empty, none; ``name,name``, only these
distributions. This file names no model and imports nothing of its package, so another plug-in may ship a copy: the
first finder installed in an interpreter serves the whole group, and the others stand back.
"""

import os
import sys

TYPE_CHECKING = False  # this runs at every interpreter start: not even typing or __future__ is imported
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from importlib.machinery import ModuleSpec
    from types import CodeType, ModuleType
    from typing import Any

GROUP = "mlx_lm.models"
VARIABLE = "MLX_LM_PLUGINS"
EVERYTHING = "sys.path"  # in `Scan.skipped`, when no distribution can be read
MARKER = "mlx_lm_models_finder"  # every copy of this file looks for it; the value is the version of the protocol
_warned: "set[str]" = set()


class PluginError(RuntimeError):
    """A plug-in that claims the requested model type cannot serve it.

    Not an ``ImportError``: mlx-lm reports those as "model type not supported" and hides the cause. Raised by the copy
    of this file that serves, whose class it is: a caller with another copy catches ``RuntimeError``.
    """


class Plugin:
    """One claim of one distribution on one model type."""

    def __init__(self, model_type: str, distribution: str, version: str, value: str):
        self.model_type = model_type
        self.distribution = distribution
        self.version = version
        self.value = value

    def __repr__(self) -> str:
        return f"{self.model_type} = {self.value} ({self.distribution} {self.version})"

    def load(self) -> "ModuleType":
        """Import the plug-in's module under its own name; raise `PluginError` with the cause if that fails."""
        import importlib
        import logging

        if not all(part.isidentifier() for part in self.value.strip().split(".")):
            raise PluginError(
                f"The plug-in {self!r} must name a module, such as 'package.module', and nothing after it, but names "
                f"{self.value!r}. Update or uninstall {self.distribution}."
            )
        try:
            module = importlib.import_module(self.value.strip())
        except PluginError:  # of another plug-in, whose module this one imports
            raise
        except (Exception, SystemExit) as e:
            raise PluginError(
                f"The plug-in {self!r} failed to import: {type(e).__name__}: {e}. Repair or uninstall "
                f"{self.distribution}, or set {VARIABLE}=0 to use mlx-lm's own models."
            ) from e
        missing = [name for name in ("Model", "ModelArgs") if not hasattr(module, name)]
        if missing:
            raise PluginError(
                f"The plug-in {self!r} must name a module with Model and ModelArgs, but {module.__name__} has no "
                f"{' and no '.join(missing)}. Update or uninstall {self.distribution}."
            )
        logging.getLogger(__name__).info("Model type %r is served by %r", self.model_type, self)
        return module


class Scan:
    """The claims found in one environment: the entry points of every distribution, filtered by the variable's value.

    Args:
        setting: the variable's value, or None.
        own: claims of a caller that may not be installed. They count as those of an installed distribution.

    Attributes:
        plugins: model type → the claims on it, one a distribution, in the order of their names.
        skipped: distribution, file or claim → why its entry points are not used.
    """

    def __init__(self, setting: "str | None", own: "tuple[Plugin, ...]" = ()) -> None:
        self.plugins: dict[str, list[Plugin]] = {}
        self.skipped: dict[str, str] = {}
        if setting is not None and setting.strip() in ("", "0"):
            return
        self._allowed = None if setting is None else {_normalized(name) for name in setting.split(",") if name.strip()}
        self._seen: set[str] = set()
        for distribution in self._distributions():
            for plugin in self._claims(distribution):
                self.plugins.setdefault(plugin.model_type, []).append(plugin)
        for plugin in own:
            self._bring(plugin)
        for claimants in self.plugins.values():
            claimants.sort(key=lambda plugin: (_normalized(plugin.distribution), plugin.value))
        self._leave_helpers()
        unseen = set() if self._allowed is None or EVERYTHING in self.skipped else self._allowed - self._seen
        for name in sorted(unseen):
            self.skipped[name] = f"listed in {VARIABLE}, but not installed"
            _warn(f"{VARIABLE} lists {name!r}, which is not installed")

    def _distributions(self) -> "list[Any]":
        """All that is installed; nothing, with a warning, where that cannot be listed."""
        import importlib

        why = ""
        for name in ("importlib_metadata", "importlib.metadata"):  # the first may be missing, or broken
            try:
                return list(importlib.import_module(name).distributions())
            except (Exception, SystemExit) as e:  # noqa: PERF203 - of both: a broken finder of another package
                why = f"distributions cannot be listed: {type(e).__name__}: {e}"
        self.skipped[EVERYTHING] = why
        _warn(f"No plug-in is found, and mlx-lm's own models serve: {why}")
        return []

    def _claims(self, distribution: "Any") -> "Iterator[Plugin]":
        """The claims of one distribution, unless it is unreadable, not allowed, or behind another of its name."""
        try:
            name = distribution.metadata["Name"]
            # As for imports, the first of two installations on sys.path is the one in force.
            if not name or _normalized(name) in self._seen:
                return
            self._seen.add(_normalized(name))
            claims = {(ep.name, ep.value) for ep in distribution.entry_points if ep.group == GROUP}
            version = distribution.version
        except Exception as e:  # malformed metadata of one distribution must not cost the others
            where = str(getattr(distribution, "_path", distribution))
            self.skipped[where] = f"unreadable metadata: {type(e).__name__}: {e}"
            return
        if claims and self._allowed is not None and _normalized(name) not in self._allowed:
            self.skipped[name] = f"not listed in {VARIABLE}"
            return
        for model_type, value in sorted(claims):
            yield Plugin(model_type, name, version, value)

    def _bring(self, plugin: Plugin) -> None:
        """Add a claim that no distribution of its name makes, unless it is not allowed."""
        name = _normalized(plugin.distribution)
        if self._allowed is not None and name not in self._allowed:
            self.skipped[plugin.distribution] = f"not listed in {VARIABLE}"
            return
        self._seen.add(name)
        claimants = self.plugins.setdefault(plugin.model_type, [])
        if name not in {_normalized(claimant.distribution) for claimant in claimants}:
            claimants.append(plugin)

    def _leave_helpers(self) -> None:
        """Drop claims on names of the host's helper modules, which every model imports."""
        for name in list(self.plugins):
            for plugin in self.plugins.pop(name) if _is_helper(name) else ():
                self.skipped[repr(plugin)] = f"{name} is no model type, but a module that mlx-lm's models import"
                _warn(f"The plug-in {plugin!r} is not used: {self.skipped[repr(plugin)]}")


class Finder:
    """A meta path finder for the model types of installed plug-ins (see PEP 451)."""

    def __init__(self, own: "tuple[Plugin, ...]" = ()) -> None:
        setattr(self, MARKER, 1)
        self.own = own
        self._scan: Scan | None = None
        self._resolving: set[str] = set()
        self._hosts: dict[str, ModuleType] = {}  # modules of the host's that plug-ins extend, by the name they had

    @property
    def scan(self) -> Scan:
        """The entry points, read on first use."""
        if self._scan is None:
            self._scan = Scan(os.environ.get(VARIABLE), self.own)
        return self._scan

    def invalidate_caches(self) -> None:
        """Read the entry points again: `importlib.invalidate_caches` says that something was installed."""
        self._scan = None

    def plugin(self, model_type: str) -> Plugin | None:
        """The plug-in that serves a model type, or None; raise `PluginError` when more than one claims it."""
        claimants = self.scan.plugins.get(model_type)
        if not claimants:
            return None
        if len(claimants) > 1:
            raise PluginError(
                f"{len(claimants)} plug-ins claim the model type {model_type!r}: {', '.join(map(repr, claimants))}. "
                f"Uninstall one, or name the distribution to use: {VARIABLE}={claimants[0].distribution}"
            )
        return claimants[0]

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> "ModuleSpec | None":
        if not fullname.startswith("mlx_lm.models.") or fullname in self._resolving:
            return None
        plugin = self.plugin(fullname[len(GROUP) + 1 :])
        if plugin is None:
            return None
        from importlib.machinery import ModuleSpec

        return ModuleSpec(fullname, Alias(lambda: self._load(plugin, fullname)), origin=plugin.value)  # type: ignore[arg-type]

    def _load(self, plugin: Plugin, fullname: str) -> "ModuleType":
        """The plug-in's module. It may extend the host's of the same name: meanwhile, the name means the host's."""
        import importlib

        if fullname in self._hosts:
            sys.modules[fullname] = self._hosts[fullname]
        self._resolving.add(fullname)
        try:
            module = plugin.load()
        except PluginError:
            importing = _importing(plugin.value.strip().partition(".")[0])
            if importing is None or len(self._resolving) > 1 or hosts_code(plugin.model_type) is None:
                self._set_aside(fullname)
                raise
            # The plug-in is being imported by its own name, and half of it is there: it extends the host's.
            _when_imported(importing, lambda: self._set_aside(fullname))
            return importlib.import_module(fullname)
        finally:
            self._resolving.discard(fullname)
        code = hosts_code(plugin.model_type)
        if code and "__getattr__" not in vars(module):
            self._name_the_plugin(plugin, module, code.co_names)
        return module

    def _set_aside(self, fullname: str) -> None:
        """Take the host's module off a name that is a plug-in's, and keep it for that one to extend."""
        host, parent = sys.modules.pop(fullname, None), sys.modules.get(GROUP)
        if host is not None:
            self._hosts[fullname] = host
            if getattr(parent, fullname[len(GROUP) + 1 :], None) is host:
                delattr(parent, fullname[len(GROUP) + 1 :])

    def _name_the_plugin(self, plugin: Plugin, module: "ModuleType", hosts: "tuple[str, ...]") -> None:
        """Let other models of the host that import what only the host's own module has end in an error that says so.

        The host takes the ``ImportError`` of ``from .llama import Attention`` for a type that it does not support.
        """

        def __getattr__(name: str) -> object:  # noqa: N807 (PEP 562)
            if name in hosts and (self._resolving or _host_is_importing()):
                raise PluginError(
                    f"The plug-in {plugin!r} stands for mlx-lm's own {GROUP}.{plugin.model_type}, from which another "
                    f"model imports {name}, but it has no {name}. Update or uninstall {plugin.distribution}, or leave "
                    f"it out of {VARIABLE}."
                )
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__dict__["__getattr__"] = __getattr__


class Alias:
    """A loader that puts a module under another name: one module object, run once."""

    def __init__(self, load: "Callable[[], ModuleType]"):
        self.load = load

    own_spec: "ModuleSpec | None" = None

    def create_module(self, spec: "ModuleSpec") -> "ModuleType":
        module = self.load()
        self.own_spec = getattr(module, "__spec__", None)
        return module

    def exec_module(self, module: "ModuleType") -> None:
        # The import system has just put the alias's spec on the module, which was loaded under its own.
        module.__spec__ = self.own_spec


def _normalized(name: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    import re

    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _warn(message: str) -> None:
    """Log a warning, once in a process."""
    if message not in _warned:
        import logging

        _warned.add(message)
        logging.getLogger(__name__).warning(message)


def hosts_code(model_type: str) -> "CodeType | None":
    """What the host's own module of a name would run, which is not run: read from its source, bytecode or zip.

    None where the host has no such module, shows no code of it (a frozen application), or is not imported yet.
    """
    from importlib.machinery import PathFinder

    path = getattr(sys.modules.get(GROUP), "__path__", None)
    try:
        spec = PathFinder.find_spec(f"{GROUP}.{model_type}", path) if path else None
        # A folder without files of Python, which has no location, is no module of the host's.
        return spec.loader.get_code(spec.name) if spec and spec.has_location else None  # type: ignore[union-attr]
    except Exception:
        return None


def _is_helper(name: str) -> bool:
    """Whether the host has a module of this name that is no model, as it defines and imports no such classes."""
    code = hosts_code(name)
    return code is not None and not {"Model", "ModelArgs"} <= {*code.co_names} and ("*",) not in code.co_consts


def _host_is_importing() -> bool:
    """Whether a model module of the host is being executed."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(f"{GROUP}.")]
    return any(getattr(getattr(module, "__spec__", None), "_initializing", False) for module in modules)


def _importing(package: str) -> "Any":
    """The spec of the first module of a package that this thread is importing, or None."""
    found, frame = None, sys._getframe()
    while frame is not None:
        spec = frame.f_globals.get("__spec__")
        if getattr(spec, "_initializing", False) and getattr(spec, "name", "").partition(".")[0] == package:
            found = spec
        frame = frame.f_back  # type: ignore[assignment]
    return found


def _when_imported(spec: "Any", action: "Callable[[], None]") -> None:
    """Do something as soon as the import of a module is over, of which its spec is told."""

    def over(self: "Any", value: bool) -> None:
        self.__class__ = kind
        self._initializing = value
        action()

    kind = type(spec)
    spec.__class__ = type(kind.__name__, (kind,), {"_initializing": property(lambda self: True, over)})


def find() -> object | None:
    """The finder in force in this interpreter, of this copy or another, or None."""
    for finder in sys.meta_path:
        if hasattr(finder, MARKER):
            return finder
    return None


def install(*own: Plugin) -> bool:
    """Put a finder first on ``sys.meta_path``, unless one is there. Never raises; True if one is in force.

    Args:
        own: claims to serve in this process though no installed distribution makes them, of a caller that may be a
            checkout on ``PYTHONPATH`` or part of a frozen application.
    """
    try:
        finder = find()
        if finder is None:
            sys.meta_path.insert(0, Finder(own))
        elif own and isinstance(finder, Finder):
            finder.own += own
            finder.invalidate_caches()
        elif any(plugin.model_type not in Scan(None).plugins for plugin in own):
            # The finder of another copy, of whatever version, knows nothing but what is installed.
            sys.meta_path[sys.meta_path.index(finder)] = Finder(own)  # type: ignore[arg-type]
        return True
    except Exception:  # this runs at the start of every interpreter
        return False


def get_model_classes(config: "dict[str, Any]", own: "tuple[Plugin, ...]" = ()) -> tuple[type, type]:
    """``(Model, ModelArgs)`` for a config, for ``mlx_lm.utils.load_model(get_model_classes=...)``.

    The plug-in that claims ``config["model_type"]`` as it stands, with or without the finder in force; else the host's
    own answer, under the name that the host gives the type. ``own`` are claims as for `install`.
    Raises `PluginError` when a plug-in claims the type and cannot serve it, `ValueError` for an unknown type.
    """
    plugin = Finder(own).plugin(config["model_type"])
    if plugin is not None:
        module = plugin.load()
        return module.Model, module.ModelArgs
    from mlx_lm import utils

    return utils._get_classes(config=config)
