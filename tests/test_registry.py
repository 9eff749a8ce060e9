"""Discovery, in interpreters of its own, from an installed wheel and from an editable install."""

from __future__ import annotations

import shutil
import sys

import pytest
from support import OURS, ROOT, thorough
from support.commands import run
from support.environments import Environment

WHO = """
import importlib, logging
module = importlib.import_module("mlx_lm.models.qwen3_vl_moe")
print(module.Model.__module__)
"""
MODEL = """
class ModelArgs: pass
class Model: pass
"""


@pytest.fixture(scope="module", params=["wheel", *thorough("editable")])
def installed(request, tmp_path_factory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp(request.param) / "venv")
    if request.param == "wheel":
        environment.pip("install", "--no-deps", request.getfixturevalue("wheel"))
    else:
        environment.pip("install", "--no-deps", "--no-build-isolation", "-e", ROOT)
    return environment


@pytest.fixture
def fresh(wheel, tmp_path) -> Environment:
    """An environment to add other distributions to."""
    environment = Environment(tmp_path / "venv")
    shutil.unpack_archive(wheel, environment.site, "zip")
    return environment


def served_by(environment: Environment, *, model_type: str = "qwen3_vl_moe", **options) -> str:
    return environment.run(WHO.replace("qwen3_vl_moe", model_type), **options).stdout.strip()


def test_the_plugin_goes_before_the_hosts_own_module(installed):
    assert served_by(installed, fresh=True) == OURS


@pytest.mark.parametrize("setting", ["0", ""])
def test_the_variable_brings_the_hosts_own_module_back(installed, setting):
    assert served_by(installed, env={"MLX_LM_PLUGINS": setting}) == "mlx_lm.models.qwen3_vl_moe"


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("mlx-lm-qwen3vlmoe", OURS),
        ("other, MLX_LM.Qwen3VLMoE", OURS),  # names compare as in PEP 503
        ("other", "mlx_lm.models.qwen3_vl_moe"),
    ],
)
def test_the_variable_lists_the_distributions_to_use(installed, setting, expected):
    assert served_by(installed, env={"MLX_LM_PLUGINS": setting}) == expected


def test_a_listed_distribution_that_is_not_installed_is_reported(installed):
    done = installed.run(WHO, env={"MLX_LM_PLUGINS": "mlx-lm-qwen3vlmoe,nobody"})
    assert "MLX_LM_PLUGINS lists 'nobody', which is not installed" in done.stderr


def test_one_module_object_under_both_names_run_once(installed):
    """Pickling, isinstance and logging see one class; the module keeps its own name and spec."""
    done = installed.run(
        "import importlib, pickle, sys\n"
        "from mlx_lm.models import qwen3_vl_moe as alias\n"
        "import mlx_lm_qwen3vlmoe.model as own\n"
        "assert alias is own is sys.modules['mlx_lm.models.qwen3_vl_moe']\n"
        "assert own.__name__ == own.__spec__.name == 'mlx_lm_qwen3vlmoe.model'\n"
        "assert own.__package__ == 'mlx_lm_qwen3vlmoe'\n"
        "assert pickle.loads(pickle.dumps(own.Model)) is alias.Model\n"
        "assert importlib.reload(alias) is own\n"
        "print(importlib.util.find_spec('mlx_lm.models.qwen3_vl_moe').name)"
    )
    assert done.stdout.strip() == "mlx_lm_qwen3vlmoe.model"


@pytest.mark.thorough
def test_the_winner_is_logged(installed):
    done = installed.run("import logging; logging.basicConfig(level='INFO')\n" + WHO)
    assert "'qwen3_vl_moe' is served by qwen3_vl_moe = mlx_lm_qwen3vlmoe.model (mlx-lm-qwen3vlmoe " in done.stderr


def test_other_model_types_are_the_hosts(installed):
    assert served_by(installed, model_type="llama") == "mlx_lm.models.llama"


def test_an_unknown_model_type_is_still_the_hosts_error(installed):
    done = installed.run("from mlx_lm.utils import _get_classes; _get_classes({'model_type': 'no_such'})", check=False)
    assert "ValueError: Model type no_such not supported." in done.stderr


def test_no_file_of_the_host_is_changed_and_no_attribute_rebound(installed):
    """Every public and private attribute of the host's modules is what it is without the plug-in."""
    code = (
        "import hashlib, importlib, pathlib, sys\n"
        "import mlx_lm, mlx_lm.utils, mlx_lm.generate, mlx_lm.models.qwen3_moe, mlx_lm.models.rope_utils\n"
        "if len(sys.argv) > 1: importlib.import_module('mlx_lm.models.qwen3_vl_moe')\n"
        "for name in sorted(m for m in sys.modules if m.split('.')[0] == 'mlx_lm' and 'qwen3_vl' not in m):\n"
        "    for key, value in sorted(vars(sys.modules[name]).items()):\n"
        "        if key not in ('__builtins__', 'qwen3_vl_moe'):\n"
        "            home = getattr(value, '__module__', ''), getattr(value, '__qualname__', '')\n"
        "            print(name, key, type(value).__name__, *home)\n"
        "for file in sorted(pathlib.Path(mlx_lm.__file__).parent.rglob('*.py')):\n"
        "    print(file.name, hashlib.sha256(file.read_bytes()).hexdigest())\n"
    )
    without = installed.run(code, env={"MLX_LM_PLUGINS": "0"}).stdout
    assert installed.run(code, "resolve").stdout == without
    assert len(without.splitlines()) > 500


def test_start_up_imports_nothing_but_the_finder(installed):
    code = "import sys; print(*sorted(sys.modules))"
    with_plugin = set(installed.run(code, fresh=True).stdout.split())
    without = set(run(installed.python, "-S", "-c", "import sys, site; print(*sorted(sys.modules))").stdout.split())
    ours = {name for name in with_plugin if "qwen3vlmoe" in name}
    assert {name for name in ours if "editable" not in name} == {"mlx_lm_qwen3vlmoe", "mlx_lm_qwen3vlmoe.registry"}
    heavy = {"importlib.metadata", "importlib_metadata", "logging", "re", "typing", "mlx", "mlx_lm", "json"}
    assert not (with_plugin - without) & heavy


def test_install_is_idempotent_and_stands_back_before_another_copy(installed):
    """Of several copies of registry.py, of whatever version, the first one serves."""
    installed.run(
        "import sys, importlib.util, mlx_lm_qwen3vlmoe as package\n"
        "before = list(sys.meta_path)\n"
        "assert package.install() and package.install() and sys.meta_path == before\n"
        "import mlx_lm_qwen3vlmoe.registry as registry\n"
        "spec = importlib.util.spec_from_file_location('copy_of_registry', registry.__file__)\n"
        "copy = importlib.util.module_from_spec(spec); spec.loader.exec_module(copy)\n"
        "assert copy.install() and sys.meta_path == before\n"
        "assert sum(hasattr(finder, 'mlx_lm_models_finder') for finder in before) == 1\n"
    )


def test_without_site_the_plugin_can_be_installed_by_hand(installed):
    """`python -S` runs no .pth file: nothing happens there until install() is called."""
    paths = f"{ROOT}:{installed.site}:{installed.site.parents[2] / 'shared'}"
    options = {"env": {"PYTHONPATH": paths}}
    assert run(installed.python, "-S", "-c", WHO, **options).stdout.strip() == "mlx_lm.models.qwen3_vl_moe"
    by_hand = "import mlx_lm_qwen3vlmoe; mlx_lm_qwen3vlmoe.install()\n" + WHO
    assert run(installed.python, "-S", "-c", by_hand, **options).stdout.strip() == OURS


@pytest.mark.thorough
def test_a_spawned_child_process_has_it_too(installed, tmp_path):
    script = tmp_path / "spawn.py"
    script.write_text(
        "import importlib, multiprocessing\n"
        "def who(name): return importlib.import_module(name).Model.__module__\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.apply(who, ('mlx_lm.models.qwen3_vl_moe',)))\n"
    )
    assert run(installed.python, script).stdout.strip() == OURS


def test_get_model_classes_works_without_the_finder(installed):
    done = installed.run(
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if not hasattr(f, 'mlx_lm_models_finder')]\n"
        "from mlx_lm_qwen3vlmoe import get_model_classes\n"
        "print(get_model_classes({'model_type': 'qwen3_vl_moe'})[0].__module__)\n"
        "print(get_model_classes(config={'model_type': 'mistral'})[0].__module__)\n"
    )
    assert done.stdout.split() == [OURS, "mlx_lm.models.llama"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Environment:
    """Nothing of this package installed; it is found on PYTHONPATH."""
    return Environment(tmp_path_factory.mktemp("checkout") / "venv")


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, OURS),
        pytest.param("mlx-lm-qwen3vlmoe", OURS, marks=pytest.mark.thorough),
        ("0", "mlx_lm.models.qwen3_vl_moe"),
        pytest.param("other", "mlx_lm.models.qwen3_vl_moe", marks=pytest.mark.thorough),
    ],
)
def test_a_checkout_that_is_not_installed_serves_its_own_type_when_asked_by_name(checkout, setting, expected):
    env = {"PYTHONPATH": str(ROOT)} | ({} if setting is None else {"MLX_LM_PLUGINS": setting})
    asked = (
        "import mlx_lm_qwen3vlmoe as package\n"
        "print(package.get_model_classes({'model_type': 'qwen3_vl_moe'})[0].__module__)\n"
        "assert package.install() and package.install()\n"
    )
    done = checkout.run(asked + WHO, env=env)
    assert done.stdout.split() == [expected, expected]
    assert "'mlx-lm-qwen3vlmoe', which is not installed" not in done.stderr


def test_where_it_is_not_installed_the_finder_of_another_copy_makes_way(tmp_path):
    """That one knows installed distributions only, which are served as before."""
    environment = Environment(tmp_path / "venv")
    environment.add_distribution("other", "[mlx_lm.models]\nother_type = other_module\n", {"other_module": MODEL})
    (environment.site / "copy_of_registry.py").write_text((ROOT / "mlx_lm_qwen3vlmoe" / "registry.py").read_text())
    (environment.site / "copy.pth").write_text("import copy_of_registry; copy_of_registry.install()\n")
    code = (
        "import sys, mlx_lm_qwen3vlmoe\n"
        "def finders(): return [type(f).__module__ for f in sys.meta_path if hasattr(f, 'mlx_lm_models_finder')]\n"
        "before = finders(); mlx_lm_qwen3vlmoe.install(); print(*before, *finders())\n"
    )
    done = environment.run(code + WHO + WHO.replace("qwen3_vl_moe", "other_type"), env={"PYTHONPATH": str(ROOT)})
    assert done.stdout.split() == ["copy_of_registry", "mlx_lm_qwen3vlmoe.registry", OURS, "other_module"]


def test_a_rival_that_is_installed_and_a_checkout_that_is_not_are_a_conflict(tmp_path):
    environment = Environment(tmp_path / "venv")
    environment.add_distribution("rival", "[mlx_lm.models]\nqwen3_vl_moe = rival_module\n", {"rival_module": MODEL})
    code = "import mlx_lm_qwen3vlmoe; mlx_lm_qwen3vlmoe.install()\n" + WHO
    error = environment.run(code, env={"PYTHONPATH": str(ROOT)}, check=False).stderr
    assert "PluginError: 2 plug-ins claim the model type 'qwen3_vl_moe': " in error
    assert "(rival 1.0)" in error
    assert "(mlx-lm-qwen3vlmoe " in error


def test_a_host_that_reads_the_group_with_the_standard_library_gets_the_model(installed):
    done = installed.run(
        "from importlib.metadata import entry_points\n"
        "(found,) = entry_points(group='mlx_lm.models', name='qwen3_vl_moe')\n"
        "module = found.load(); print(module.Model.__module__, module.ModelArgs.__module__)\n",
        env={"MLX_LM_PLUGINS": "0"},
    )
    assert done.stdout.split() == [OURS, OURS]


def test_any_distribution_can_bring_a_model_type(fresh):
    fresh.add_distribution("plug-of-mine", "[mlx_lm.models]\nmy_type = my_module\n", {"my_module": MODEL})
    done = fresh.run(
        "from mlx_lm.utils import _get_classes; print(_get_classes({'model_type': 'my_type'})[0].__module__)"
    )
    assert done.stdout.strip() == "my_module"


@pytest.mark.thorough
def test_a_plugin_installed_while_the_interpreter_runs_is_found_after_invalidating_caches(fresh):
    fresh.add_distribution("later", "[mlx_lm.models]\nlate_type = late_module\n", {"late_module": MODEL})
    info = fresh.site / "later-1.0.dist-info"
    info.rename(fresh.site / "later.away")
    done = fresh.run(
        "import importlib, os, sys\n"
        "try: importlib.import_module('mlx_lm.models.late_type')\n"
        "except ImportError: os.rename(sys.argv[1], sys.argv[2])\n"
        "importlib.invalidate_caches()\n"
        "print(importlib.import_module('mlx_lm.models.late_type').__name__)",
        fresh.site / "later.away",
        info,
    )
    assert done.stdout.strip() == "late_module"


def test_a_plugin_may_extend_the_hosts_module_of_the_same_name(fresh):
    source = "from mlx_lm.models.llama import Model as Base, ModelArgs\nclass Model(Base): pass\n"
    fresh.add_distribution("llama-plus", "[mlx_lm.models]\nllama = llama_plus\n", {"llama_plus": source})
    done = fresh.run("from mlx_lm.models import llama; print(*(c.__module__ for c in llama.Model.__mro__[:2]))")
    assert done.stdout.split() == ["llama_plus", "mlx_lm.models.llama"]


def test_two_claimants_are_an_error_when_that_type_is_loaded_and_the_variable_decides(fresh):
    fresh.add_distribution("rival", "[mlx_lm.models]\nqwen3_vl_moe = rival_module\n", {"rival_module": MODEL})
    assert served_by(fresh, model_type="llama") == "mlx_lm.models.llama"
    error = fresh.run(WHO, check=False).stderr
    assert "PluginError: 2 plug-ins claim the model type 'qwen3_vl_moe'" in error
    assert "mlx-lm-qwen3vlmoe" in error
    assert "rival 1.0" in error
    assert "MLX_LM_PLUGINS=" in error
    assert served_by(fresh, env={"MLX_LM_PLUGINS": "rival"}) == "rival_module"
    assert served_by(fresh, env={"MLX_LM_PLUGINS": "mlx-lm-qwen3vlmoe"}) == OURS


def test_a_plugin_that_fails_to_import_shows_the_cause_and_costs_no_other_type(fresh):
    broken = {"broken_module": "import no_such_dependency"}
    fresh.add_distribution("broken", "[mlx_lm.models]\nbroken_type = broken_module\n", broken)
    error = fresh.run("from mlx_lm.utils import _get_classes; _get_classes({'model_type': 'broken_type'})", check=False)
    assert "PluginError: The plug-in broken_type = broken_module (broken 1.0) failed to import" in error.stderr
    assert "No module named 'no_such_dependency'" in error.stderr.splitlines()[-1]
    assert "not supported" not in error.stderr
    assert served_by(fresh, model_type="llama") == "mlx_lm.models.llama"
    assert served_by(fresh) == OURS


def test_a_module_without_the_two_classes_is_named(fresh):
    fresh.add_distribution("empty", "[mlx_lm.models]\nempty_type = empty_module\n", {"empty_module": "Model = 1"})
    error = fresh.run(WHO.replace("qwen3_vl_moe", "empty_type"), check=False).stderr
    assert "empty_module has no ModelArgs" in error


@pytest.mark.parametrize("content", ["[a]\nb\n[a]\nb\n", *thorough("[mlx_lm.models\nx =", "no section = 1\n", "\x00")])
def test_malformed_metadata_of_a_foreign_distribution_costs_that_one_only(fresh, content):
    fresh.add_distribution("malformed", content, {})
    (fresh.site / "nameless-1.0.dist-info").mkdir()
    assert served_by(fresh) == OURS
    assert served_by(fresh, model_type="llama") == "mlx_lm.models.llama"


@pytest.mark.thorough
def test_the_same_distribution_twice_on_the_path_is_no_conflict(fresh, wheel, tmp_path):
    run(sys.executable, "-m", "pip", "-q", "install", "--no-deps", "--target", tmp_path / "second", wheel)
    assert served_by(fresh, env={"PYTHONPATH": str(tmp_path / "second")}) == OURS


def test_uninstalling_leaves_no_trace_and_no_word(wheel, tmp_path):
    environment = Environment(tmp_path / "venv")
    before = sorted(path.relative_to(environment.site) for path in environment.site.rglob("*"))
    environment.pip("install", "--no-deps", wheel)
    assert served_by(environment) == OURS
    environment.pip("uninstall", "-y", "mlx-lm-qwen3vlmoe")
    after = sorted(path.relative_to(environment.site) for path in environment.site.rglob("*"))
    assert [path for path in after if "qwen3vlmoe" in str(path)] == []
    assert set(after) - set(before) == {path for path in after if "__pycache__" in path.parts} - set(before)
    done = environment.run(WHO)
    assert done.stdout.strip() == "mlx_lm.models.qwen3_vl_moe"
    assert done.stderr == ""


def test_start_up_survives_anything_on_the_meta_path(installed):
    """install() answers False, and nothing is raised or printed."""
    code = (
        "import sys, mlx_lm_qwen3vlmoe.registry as registry\n"
        "class Strange:\n"
        "    def __getattribute__(self, name): raise RuntimeError(name)\n"
        "sys.meta_path[:] = [Strange()]\n"
        "print(registry.install())"
    )
    done = installed.run(code)
    assert (done.stdout.strip(), done.stderr) == ("False", "")
