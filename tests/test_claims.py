"""Plug-ins that claim names of mlx-lm's own modules, or that cannot serve what they claim."""

from __future__ import annotations

import shutil

import pytest
from support import OURS, TINY, thorough
from support.environments import Environment

MODEL = "class ModelArgs: pass\nclass Model: pass\n"
WHO = """
import sys
from mlx_lm.utils import _get_classes
for model_type in sys.argv[1:]:
    print(_get_classes({"model_type": model_type})[0].__module__)
"""


@pytest.fixture
def fresh(wheel, tmp_path) -> Environment:
    """As a user has it, to add other plug-ins to."""
    environment = Environment(tmp_path / "venv")
    shutil.unpack_archive(wheel, environment.site, "zip")
    return environment


def claim(environment: Environment, model_type: str, source: str = MODEL, name: str = "rival") -> None:
    module = name.replace("-", "_")
    environment.add_distribution(name, f"[mlx_lm.models]\n{model_type} = {module}\n", {module: source})


def last_line(environment: Environment, *model_types: str) -> str:
    return environment.run(WHO, *model_types, check=False).stderr.splitlines()[-1]


# --- helper modules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("helper", ["base", *thorough("cache", "switch_layers", "rope_utils")])
def test_a_claim_on_a_helper_module_of_the_hosts_breaks_no_model_and_one_warning_names_the_claimant(fresh, helper):
    claim(fresh, helper)
    done = fresh.run(WHO, "qwen3_vl_moe", "llama")
    assert done.stdout.split() == [OURS, "mlx_lm.models.llama"]
    assert done.stderr.count(f"The plug-in {helper} = rival (rival 1.0) is not used") == 1


def test_a_model_loads_beside_a_claim_on_a_helper_module(fresh, tiny_questions):
    claim(fresh, "cache")
    code = (
        "import sys; from mlx_lm import generate, load; from mlx_lm.models import cache\n"
        "assert cache.__name__ == 'mlx_lm.models.cache'\n"
        "model, tokenizer = load(sys.argv[1])\n"
        "chat = [{'role': 'user', 'content': sys.argv[2]}]\n"
        "prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)\n"
        "print(generate(model, tokenizer, prompt, max_tokens=64))"
    )
    answer = fresh.run(code, TINY, tiny_questions[0]["question"]).stdout.strip()
    assert answer == tiny_questions[0]["answer"]


def test_two_claims_on_one_helper_module_are_no_conflict(fresh):
    claim(fresh, "base", name="one")
    claim(fresh, "base", name="two")
    assert fresh.run(WHO, "qwen3_vl_moe").stdout.strip() == OURS


def test_the_other_claims_of_its_distribution_are_served(fresh):
    entry_points = "[mlx_lm.models]\nbase = rival\nmy_type = rival\n"
    fresh.add_distribution("rival", entry_points, {"rival": MODEL})
    assert fresh.run(WHO, "my_type").stdout.strip() == "rival"


def test_a_helper_module_is_known_where_the_host_has_bytecode_alone(fresh):
    """As some installers of applications leave it."""
    shared = fresh.site.parents[2] / "shared"
    host = (shared / "mlx_lm").resolve()
    (shared / "mlx_lm").unlink()
    shutil.copytree(host, shared / "mlx_lm", ignore=shutil.ignore_patterns("__pycache__"))
    fresh.run("import compileall, sys; compileall.compile_dir(sys.argv[1], legacy=True, quiet=1)", shared / "mlx_lm")
    for source in (shared / "mlx_lm").rglob("*.py"):
        source.unlink()
    claim(fresh, "base")
    assert fresh.run(WHO, "qwen3_vl_moe", "llama").stdout.split() == [OURS, "mlx_lm.models.llama"]


def test_every_module_of_the_host_is_told_a_model_or_a_helper_without_running_it(fresh):
    """As reading its attributes tells once it runs; olmo is left out, which ends a process without ai2-olmo."""
    code = (
        "import importlib, pkgutil, mlx_lm.models\n"
        "from mlx_lm_qwen3vlmoe.registry import _is_helper\n"
        "names = {info.name for info in pkgutil.iter_modules(mlx_lm.models.__path__)} - {'olmo'}\n"
        "told = {name for name in names if _is_helper(name)}\n"
        "modules = {name: importlib.import_module(f'mlx_lm.models.{name}') for name in names}\n"
        "true = {name for name, m in modules.items() if not (hasattr(m, 'Model') and hasattr(m, 'ModelArgs'))}\n"
        "assert told == true and len(names) > 80, told ^ true\n"
        "print(*sorted(told))"
    )
    helpers = fresh.run(code).stdout.split()
    assert {"base", "cache", "rope_utils", "switch_layers"} <= {*helpers}


# --- model types that the host has too ------------------------------------------------------------------------------


def test_a_plugin_for_a_type_of_the_hosts_serves_the_hosts_models_that_build_on_it_too(fresh):
    """One name is one module, for a checkpoint and for `from . import llama` alike."""
    claim(fresh, "llama", "from mlx_lm.models.llama import *\nfrom mlx_lm.models.llama import Model, ModelArgs\n")
    code = "from mlx_lm.models import llama, mistral3; print(llama.__name__, mistral3.llama.__name__)"
    assert fresh.run(code).stdout.split() == ["rival", "rival"]


def test_a_model_of_the_hosts_that_misses_something_in_a_plugins_module_gets_an_error_that_names_the_plugin(fresh):
    """Not "not supported", which is what mlx-lm makes of an ImportError."""
    claim(fresh, "deepseek_v3")  # kimi_vl imports DeepseekV3Model from it
    error = last_line(fresh, "kimi_vl")
    assert "PluginError: The plug-in deepseek_v3 = rival (rival 1.0) stands for mlx-lm's own" in error
    assert "DeepseekV3Model" in error


def test_what_a_plugins_module_lacks_stays_an_attribute_that_it_lacks(fresh):
    claim(fresh, "llama")
    code = "from mlx_lm.models import llama; print(hasattr(llama, 'TransformerBlock'), hasattr(llama, 'no_such'))"
    assert fresh.run(code).stdout.split() == ["False", "False"]


@pytest.mark.parametrize("source", [MODEL, "import no_such_dependency"])
def test_a_plugin_that_spoils_the_hosts_qwen3_moe_is_named_when_this_package_builds_on_it(fresh, source):
    claim(fresh, "qwen3_moe", source)
    assert "PluginError: The plug-in qwen3_moe = rival (rival 1.0)" in last_line(fresh, "qwen3_vl_moe")


# --- what cannot be served ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["rival:Model", *thorough("rival [extra]", "rival-module", ".rival", "rival.")])
def test_a_value_that_is_no_module_is_an_error_that_names_plugin_and_value(fresh, value):
    fresh.add_distribution("rival", f"[mlx_lm.models]\nmy_type = {value}\n", {"rival": MODEL})
    error = last_line(fresh, "my_type")
    assert "PluginError: The plug-in my_type = " in error
    assert f"must name a module, such as 'package.module', and nothing after it, but names {value!r}" in error


@pytest.mark.parametrize("module", ["rival", *thorough("mlx_lm_qwen3vlmoe.model")])
def test_none_in_sys_modules_for_a_plugins_module_is_an_error_with_the_cause(fresh, module):
    claim(fresh, "my_type")
    model_type = "my_type" if module == "rival" else "qwen3_vl_moe"
    done = fresh.run(f"import sys; sys.modules[{module!r}] = None\n{WHO}", model_type, check=False)
    error = done.stderr.splitlines()[-1]
    assert "PluginError" in error
    assert f"import of {module} halted; None in sys.modules" in error


def test_a_plugin_that_ends_the_process_when_imported_is_an_error_with_the_cause(fresh):
    claim(fresh, "my_type", "raise SystemExit('install something')")
    assert "failed to import: SystemExit: install something" in last_line(fresh, "my_type")


def test_a_plugins_module_may_put_another_object_in_its_place(fresh):
    source = (
        f"{MODEL}class Lazy:\n    Model, ModelArgs = Model, ModelArgs\nimport sys; sys.modules[__name__] = Lazy()\n"
    )
    claim(fresh, "my_type", source)
    assert fresh.run(WHO, "my_type").stdout.strip() == "rival"


def test_where_distributions_cannot_be_listed_one_warning_says_that_the_hosts_own_models_serve(fresh):
    broken = (
        "class Broken:\n"
        "    def find_spec(self, *_): return None\n"
        "    def find_distributions(self, *_): raise OSError('no disk')\n"
        "import sys; sys.meta_path.append(Broken())\n"
    )
    for setting in ({}, {"MLX_LM_PLUGINS": "mlx-lm-qwen3vlmoe"}):
        done = fresh.run(broken + WHO + "import importlib; importlib.invalidate_caches()\n" + WHO, "llama", env=setting)
        (warning,) = done.stderr.splitlines()
        assert warning == (
            "No plug-in is found, and mlx-lm's own models serve: distributions cannot be listed: OSError: no disk"
        )


@pytest.mark.parametrize(
    "source",
    [
        "raise ValueError('broken')",
        *thorough("raise SystemExit('broken')", "# has no distributions()", "import nothing"),
    ],
)
def test_a_broken_importlib_metadata_costs_nothing(fresh, source):
    """The standard library's lists the same distributions."""
    (fresh.site / "importlib_metadata.py").write_text(source)
    done = fresh.run(WHO, "qwen3_vl_moe", "llama")
    assert done.stdout.split() == [OURS, "mlx_lm.models.llama"]
    assert done.stderr == ""


# --- plug-ins that extend the host's module -------------------------------------------------------------------------

EXTENDS = "from mlx_lm.models import llama\nModelArgs = llama.ModelArgs\nclass Model(llama.Model): pass\n"
SAME = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
module = importlib.import_module("mlx_lm.models.llama")
from mlx_lm.models import llama, mistral3
assert llama is module is mistral3.llama
print(*(each.__module__ for each in module.Model.__mro__[:2]))
"""


@pytest.mark.parametrize("first", [["better_llama"], *thorough([], ["mlx_lm.models.llama", "better_llama"])])
def test_a_plugin_that_extends_the_host_serves_whichever_of_its_names_is_imported_first(fresh, first):
    claim(fresh, "llama", EXTENDS, "better-llama")
    assert fresh.run(SAME, *first).stdout.split() == ["better_llama", "mlx_lm.models.llama"]


def package(environment: Environment) -> None:
    """A plug-in of three modules, one of which extends the host's."""
    folder = environment.site / "better"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "base.py").write_text(EXTENDS)
    (folder / "other.py").write_text("from mlx_lm.models import llama\n")
    (folder / "model.py").write_text(
        "from mlx_lm.models.llama import Model as Host\n"
        "from .base import Model, ModelArgs\n"
        "assert Model.__mro__[1] is Host\n"
    )
    environment.add_distribution("better", "[mlx_lm.models]\nllama = better.model\n", {})


@pytest.mark.parametrize(
    "first", [["better.base"], *thorough(["better.model"], ["better.other"], ["better.other", "better.base"], [])]
)
def test_any_module_of_a_plugin_may_be_imported_first_and_the_hosts_runs_once(fresh, first):
    package(fresh)
    assert fresh.run(SAME, *first).stdout.split() == ["better.base", "mlx_lm.models.llama"]


def test_a_class_of_a_plugin_that_extends_the_host_is_unpickled_in_a_new_process(fresh):
    claim(fresh, "llama", EXTENDS, "better-llama")
    save = (
        "import pickle, sys; from mlx_lm.models.llama import Model; sys.stdout.write(pickle.dumps(Model, 0).decode())"
    )
    load = "import pickle, sys; print(pickle.loads(sys.argv[1].encode()).__mro__[1].__module__)"
    assert fresh.run(load, fresh.run(save).stdout).stdout.strip() == "mlx_lm.models.llama"


def test_a_plugin_that_extends_the_host_and_fails_does_so_each_time_it_is_asked_for(fresh):
    """What it has imported of the host's before that does not serve in its place."""
    claim(fresh, "llama", f"{EXTENDS}raise OSError('no disk')", "better-llama")
    code = (
        "from mlx_lm.utils import _get_classes\n"
        "for _ in range(2):\n"
        "    try: _get_classes({'model_type': 'llama'})\n"
        "    except RuntimeError as e: print(str(e)[:40])\n"
    )
    assert fresh.run(code).stdout.splitlines() == ["The plug-in llama = better_llama (better"] * 2


def test_a_plugin_that_fails_when_it_is_imported_by_its_own_name_leaves_nothing_of_the_hosts_in_its_place(fresh):
    claim(fresh, "llama", f"{EXTENDS}raise OSError('no disk')", "better-llama")
    code = "try: import better_llama\nexcept OSError as e: print(e)\n" + WHO
    done = fresh.run(code, "llama", check=False)
    assert done.stdout == "no disk\n"
    assert "PluginError: The plug-in llama = better_llama" in done.stderr.splitlines()[-1]
