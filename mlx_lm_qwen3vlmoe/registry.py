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
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

GROUP = "mlx_lm.models"
VARIABLE = "MLX_LM_PLUGINS"
MARKER = "mlx_lm_models_finder"  # every copy of this file looks for it; the value is the version of the protocol


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

        try:
            module = importlib.import_module(self.value.strip())
        except Exception as e:
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

    Attributes:
        plugins: model type → the claims on it, one a distribution, in the order of their names.
        skipped: distribution → why its entry points are not used.
    """

    def __init__(self, setting: "str | None") -> None:
        self.plugins: dict[str, list[Plugin]] = {}
        self.skipped: dict[str, str] = {}
        if setting is not None and setting.strip() in ("", "0"):
            return
        try:
            import importlib_metadata as metadata
        except ImportError:  # installed without dependencies
            from importlib import metadata  # type: ignore[no-redef]

        allowed = None if setting is None else {_normalized(name) for name in setting.split(",") if name.strip()}
        seen: set[str] = set()
        try:
            distributions = list(metadata.distributions())
        except Exception as e:  # a broken finder of somebody else's
            self.skipped["sys.path"] = f"distributions cannot be listed: {type(e).__name__}: {e}"
            return
        for distribution in distributions:
            try:
                name = distribution.metadata["Name"]
                # As for imports, the first of two installations on sys.path is the one in force.
                if not name or _normalized(name) in seen:
                    continue
                seen.add(_normalized(name))
                claims = [(ep.name, ep.value) for ep in distribution.entry_points if ep.group == GROUP]
                version = distribution.version
            except Exception as e:  # malformed metadata of one distribution must not cost the others
                where = str(getattr(distribution, "_path", distribution))
                self.skipped[where] = f"unreadable metadata: {type(e).__name__}: {e}"
                continue
            if not claims:
                continue
            if allowed is not None and _normalized(name) not in allowed:
                self.skipped[name] = f"not listed in {VARIABLE}"
                continue
            for model_type, value in sorted(set(claims)):
                self.plugins.setdefault(model_type, []).append(Plugin(model_type, name, version, value))
        for claimants in self.plugins.values():
            claimants.sort(key=lambda plugin: (_normalized(plugin.distribution), plugin.value))
        for name in sorted((allowed or set()) - seen):
            import logging

            self.skipped[name] = f"listed in {VARIABLE}, but not installed"
            logging.getLogger(__name__).warning("%s lists %r, which is not installed", VARIABLE, name)


class Finder:
    """A meta path finder for the model types of installed plug-ins (see PEP 451)."""

    def __init__(self) -> None:
        setattr(self, MARKER, 1)
        self._scan: Scan | None = None
        self._resolving: set[str] = set()

    @property
    def scan(self) -> Scan:
        """The entry points, read on first use."""
        if self._scan is None:
            self._scan = Scan(os.environ.get(VARIABLE))
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

        return ModuleSpec(fullname, Alias(plugin, fullname, self._resolving), origin=plugin.value)  # type: ignore[arg-type]


class Alias:
    """A loader that puts a plug-in's own module under the host's name for it: one module object, run once."""

    def __init__(self, plugin: Plugin, fullname: str, resolving: set[str]):
        self.plugin = plugin
        self.fullname = fullname
        self.resolving = resolving

    own_spec: "ModuleSpec | None" = None

    def create_module(self, spec: "ModuleSpec") -> "ModuleType":
        # A plug-in that extends the host's module of the same name imports that one, not itself.
        self.resolving.add(self.fullname)
        try:
            module = self.plugin.load()
        finally:
            self.resolving.discard(self.fullname)
        self.own_spec = module.__spec__
        return module

    def exec_module(self, module: "ModuleType") -> None:
        # The import system has just put the alias's spec on the module, which was loaded under its own.
        module.__spec__ = self.own_spec


def _normalized(name: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    import re

    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def find() -> object | None:
    """The finder in force in this interpreter, of this copy or another, or None."""
    for finder in sys.meta_path:
        if hasattr(finder, MARKER):
            return finder
    return None


def install() -> bool:
    """Put a finder first on ``sys.meta_path``, unless one is there. Never raises; True if one is in force."""
    try:
        if find() is None:
            sys.meta_path.insert(0, Finder())
        return True
    except Exception:  # this runs at the start of every interpreter
        return False


def get_model_classes(config: "dict[str, Any]") -> tuple[type, type]:
    """``(Model, ModelArgs)`` for a config, for ``mlx_lm.utils.load_model(get_model_classes=...)``.

    The plug-in that claims ``config["model_type"]`` as it stands, with or without the finder in force; else the host's
    own answer, under the name that the host gives the type.
    Raises `PluginError` when a plug-in claims the type and cannot serve it, `ValueError` for an unknown type.
    """
    plugin = Finder().plugin(config["model_type"])
    if plugin is not None:
        module = plugin.load()
        return module.Model, module.ModelArgs
    from mlx_lm import utils

    return utils._get_classes(config=config)
