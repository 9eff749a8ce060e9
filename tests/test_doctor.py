"""`mlx-lm-qwen3vlmoe doctor`, in environments that are well and in each of those in which mlx_lm misses the plug-in."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlx_lm import utils
from support import OURS, ROOT, TINY, thorough
from support.commands import run
from support.environments import Environment

from mlx_lm_qwen3vlmoe import __version__
from mlx_lm_qwen3vlmoe.discovery import diagnosis
from mlx_lm_qwen3vlmoe.discovery.claims import own_module

HOSTS = "mlx_lm.models.qwen3_vl_moe"
STARTUP = "mlx_lm_qwen3vlmoe_startup.pth"
CLAIM = "[mlx_lm.models]\nqwen3_vl_moe = rival_module\n"
MODEL = "class ModelArgs: pass\nclass Model: pass\n"
WITH_BACKEND = "mlx-lm-qwen3vlmoe" if sys.platform == "darwin" else "'mlx-lm-qwen3vlmoe[cpu]' (or cuda12, cuda13)"


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Environment:
    """As a user has it. Not to be changed."""
    environment = Environment(tmp_path_factory.mktemp("installed") / "venv")
    environment.pip("install", "--no-deps", wheel)
    return environment


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Environment:
    """mlx-lm alone. Not to be changed."""
    return Environment(tmp_path_factory.mktemp("bare") / "venv")


@pytest.fixture
def fresh(wheel, tmp_path) -> Environment:
    """As a user has it, to break."""
    environment = Environment(tmp_path / "venv")
    shutil.unpack_archive(wheel, environment.site, "zip")
    return environment


def command(
    environment: Environment, *arguments: str, env: dict | None = None, options: tuple = (), traceback: bool = False
):
    """`mlx-lm-qwen3vlmoe` with arguments, and its exit status; it ends in no traceback but a command's of mlx-lm."""
    variables = {"PATH": f"{environment.bin}:/usr/bin:/bin"} | (env or {})
    line = (environment.python, *options, "-m", "mlx_lm_qwen3vlmoe", *arguments)
    done = run(*line, check=False, cwd=environment.bin, env=variables)
    assert ("Traceback" in done.stderr) == traceback
    return done


def doctor(
    environment: Environment, *options: str, model_type: str = "qwen3_vl_moe", env: dict[str, str] | None = None
) -> dict:
    """What it reports. It never fails itself, and its exit status is 1 with a reason and a remedy of one line each."""
    done = command(environment, "doctor", "--json", model_type, env=env, options=options)
    report = json.loads(done.stdout)
    assert done.returncode == (report["reason"] is not None) == (report["remedy"] is not None)
    assert "\n" not in f"{report['reason']}{report['remedy']}"
    return report


# --- all is well ----------------------------------------------------------------------------------------------------


def test_in_a_plain_environment_the_start_up_file_is_active_and_the_plugin_serves(installed):
    report = doctor(installed)
    assert report["hook"] == {
        "active": True,
        "how": ".pth",
        "file": str(installed.site / STARTUP),
        "finder": "mlx_lm_qwen3vlmoe.registry",
        "reason": None,
    }
    assert (report["winner"], report["remedy"]) == (OURS, None)


def test_the_keys_of_the_report_are_these(installed):
    keys = (
        "type package installed python versions backend hook host winner file plugins skipped conflicts variable "
        "command error notes reason remedy"
    )
    assert list(doctor(installed)) == keys.split()


def test_the_report_tells_versions_backend_and_what_the_host_can_do(installed):
    import mlx.core as mx
    from mlx_lm import __version__

    report = doctor(installed)
    assert report["versions"]["mlx-lm"] == __version__
    assert report["versions"]["mlx"] == mx.__version__
    assert report["backend"] in ("cpu", "cuda", "metal")
    assert set(report["host"]) == {"module", "own_type", "shard", "pipeline", "input_embeddings"}
    assert (
        report["host"]["own_type"] == (Path(sys.modules["mlx_lm"].__file__).parent / "models/qwen3_vl_moe.py").exists()
    )


def test_the_verdict_is_one_line_with_the_file_that_serves(installed):
    done = run(installed.bin / "mlx-lm-qwen3vlmoe", "doctor", env={"PATH": "/usr/bin:/bin"})
    file = installed.site / "mlx_lm_qwen3vlmoe" / "model.py"
    assert done.stdout == (f"OK: mlx_lm.generate runs qwen3_vl_moe through mlx-lm-qwen3vlmoe {__version__} ({file})\n")


def test_verbose_adds_aligned_lines_of_what_the_verdict_comes_from(installed):
    done = command(installed, "doctor", "--verbose", env={"MLX_LM_PLUGINS": "mlx-lm-qwen3vlmoe"})
    verdict, empty, *lines = done.stdout.splitlines()
    assert verdict.startswith("OK: ")
    assert empty == ""
    assert all(line[14:16] == "  " and line[16] != " " for line in lines)
    details = {line[:14].strip(): line[16:] for line in lines}
    package = installed.site / "mlx_lm_qwen3vlmoe"
    assert details["package"] == (f"mlx-lm-qwen3vlmoe {__version__}, imported from {package}; installed: {__version__}")
    assert details["start-up"] == f"{installed.site / STARTUP}, the finder of mlx_lm_qwen3vlmoe.registry"
    assert details["MLX_LM_PLUGINS"] == "'mlx-lm-qwen3vlmoe'"
    assert details["served by"] == f"mlx_lm_qwen3vlmoe.model ({package / 'model.py'})"
    for model_type in ("qwen3_vl_moe", "qwen3_vl_moe_text"):
        claim = f"{'plug-in':<14}  mlx-lm-qwen3vlmoe {__version__}: {model_type} = mlx_lm_qwen3vlmoe.model"
        assert claim in lines
    assert details["error"] == "none"


def test_an_editable_install_is_active(tmp_path):
    environment = Environment(tmp_path / "venv")
    environment.pip("install", "--no-deps", "--no-build-isolation", "-e", ROOT)
    report = doctor(environment)
    assert (report["hook"]["how"], report["winner"], report["remedy"]) == (".pth", OURS, None)


@pytest.mark.thorough
def test_isolated_mode_is_fine(installed):
    assert doctor(installed, "-I")["remedy"] is None


@pytest.mark.thorough
def test_a_finder_that_other_code_installed_is_one_by_hand(fresh):
    (fresh.site / STARTUP).unlink()
    (fresh.site / "sitecustomize.py").write_text("import mlx_lm_qwen3vlmoe; mlx_lm_qwen3vlmoe.install()\n")
    report = doctor(fresh)
    assert (report["hook"]["how"], report["hook"]["file"], report["remedy"]) == ("by hand", None, None)


@pytest.mark.thorough
def test_the_start_file_is_what_python_3_15_reads(fresh):
    (fresh.site / STARTUP).unlink()
    done = fresh.run(
        "from mlx_lm_qwen3vlmoe import registry; registry.install()\n"
        "from mlx_lm_qwen3vlmoe.discovery import diagnosis\n"
        "diagnosis._SUFFIXES = ('.start', '.pth')\n"
        "print(diagnosis.diagnose()['hook']['how'])"
    )
    assert done.stdout.strip() == ".start"


def test_the_finder_of_another_package_serves_as_well_and_is_named(fresh):
    package = fresh.site / "another_plugin"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(ROOT / "mlx_lm_qwen3vlmoe" / "registry.py", package)
    startup = (ROOT / "startup" / STARTUP).read_text().replace("mlx_lm_qwen3vlmoe", "another_plugin")
    (fresh.site / "another_plugin_startup.pth").write_text(startup)
    report = doctor(fresh)
    assert report["hook"]["finder"] == "another_plugin.registry"
    assert report["hook"]["file"] == str(fresh.site / "another_plugin_startup.pth")
    assert (report["winner"], report["remedy"]) == (OURS, None)


# --- the start-up file is not active --------------------------------------------------------------------------------


def test_without_site_the_reason_is_the_option(installed):
    paths = f"{installed.site}:{installed.site.parents[2] / 'shared'}"
    report = doctor(installed, "-S", env={"PYTHONPATH": paths})
    assert report["reason"] == "Python runs with -S, which reads no start-up files"
    assert report["remedy"].startswith("leave it out, or ")
    assert report["winner"] != OURS


def test_a_deleted_start_up_file_is_missed_by_name(fresh):
    (fresh.site / STARTUP).unlink()
    report = doctor(fresh)
    assert report["hook"]["reason"] == f"{STARTUP} is missing from site-packages"
    assert "--force-reinstall --no-deps mlx-lm-qwen3vlmoe" in report["remedy"]


@pytest.mark.thorough
def test_a_start_up_file_without_effect_is_named(fresh):
    (fresh.site / STARTUP).write_text("# import mlx_lm_qwen3vlmoe.registry\n")
    assert doctor(fresh)["hook"]["reason"].startswith(f"{fresh.site / STARTUP} is there, but had no effect")


def test_a_folder_on_the_path_is_no_place_for_start_up_files(bare, wheel, tmp_path):
    run(sys.executable, "-m", "pip", "-q", "install", "--no-deps", "--target", tmp_path / "folder", wheel)
    reason = doctor(bare, env={"PYTHONPATH": str(tmp_path / "folder")})["hook"]["reason"]
    assert reason.startswith(f"{tmp_path / 'folder'} is on sys.path (PYTHONPATH, or a zip), but start-up files run in")


@pytest.mark.thorough
def test_a_zip_is_no_place_for_start_up_files(bare, wheel, tmp_path):
    shutil.copy(wheel, tmp_path / "application.zip")
    reason = doctor(bare, env={"PYTHONPATH": str(tmp_path / "application.zip")})["hook"]["reason"]
    assert reason.startswith(
        f"{tmp_path / 'application.zip'} is on sys.path (PYTHONPATH, or a zip), but start-up files"
    )


@pytest.mark.thorough
def test_the_users_site_packages_may_be_off(bare, wheel, tmp_path):
    base = {"PYTHONUSERBASE": str(tmp_path)}
    users = bare.run("import site; print(site.getusersitepackages())", env=base).stdout.strip()
    run(sys.executable, "-m", "pip", "-q", "install", "--no-deps", "--target", users, wheel)
    reason = doctor(bare, env=base | {"PYTHONPATH": users})["hook"]["reason"]
    assert reason == "the user's site-packages are off (PYTHONNOUSERSITE, -s, or a virtual environment)"


@pytest.mark.parametrize("finder", [False, *thorough(True)])
def test_a_checkout_on_the_path_is_not_installed(bare, tmp_path, finder):
    """Whether or not the finder of another package is in force."""
    if finder:
        (tmp_path / "sitecustomize.py").write_text("import mlx_lm_qwen3vlmoe.registry as r; r.install()\n")
    done = command(bare, "doctor", env={"PYTHONPATH": f"{ROOT}:{tmp_path}"})
    assert done.returncode == 1
    why, remedy, where = done.stdout.splitlines()
    assert why == f"NOT IN USE: mlx-lm-qwen3vlmoe is not installed: {ROOT} is on sys.path, and no more than that"
    python = bare.python
    assert remedy == f"Do: {python} -m pip install -e {ROOT}, or {python} -m mlx_lm_qwen3vlmoe run generate ..."
    assert where == f"This is mlx-lm-qwen3vlmoe {__version__}, imported from {ROOT / 'mlx_lm_qwen3vlmoe'}"


@pytest.mark.thorough
def test_an_object_on_the_meta_path_that_fails_costs_no_report(fresh):
    strange = (
        "class Strange:\n"
        "    def find_spec(self, *_): return None\n"
        "    @property\n"
        "    def mlx_lm_models_finder(self): raise AssertionError('strange')\n"
    )
    (fresh.site / STARTUP).unlink()
    (fresh.site / "sitecustomize.py").write_text(f"import sys\n{strange}sys.meta_path.append(Strange())\n")
    assert doctor(fresh)["reason"] == "sys.meta_path has an object that fails (AssertionError: strange)"


# --- the finder is there, and the plug-in is not the one ------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "reason", "remedy"),
    [
        ("0", "MLX_LM_PLUGINS=0 turns every plug-in off", "unset MLX_LM_PLUGINS"),
        pytest.param("", "MLX_LM_PLUGINS= turns every plug-in off", "unset MLX_LM_PLUGINS", marks=pytest.mark.thorough),
        (
            "another",
            "MLX_LM_PLUGINS=another leaves mlx-lm-qwen3vlmoe out",
            "unset it, or export MLX_LM_PLUGINS=another,mlx-lm-qwen3vlmoe",
        ),
    ],
)
def test_the_variable_that_turns_the_plugin_off_is_named(installed, setting, reason, remedy):
    report = doctor(installed, env={"MLX_LM_PLUGINS": setting})
    assert report["variable"] == setting
    assert report["plugins"][0]["skipped"]
    assert (report["reason"], report["remedy"]) == (reason, remedy)


def test_every_plugin_is_listed_and_a_skipped_one_with_the_reason(fresh):
    fresh.add_distribution("plug-of-mine", "[mlx_lm.models]\nmy_type = my_module\n", {})
    report = doctor(fresh, env={"MLX_LM_PLUGINS": "mlx-lm-qwen3vlmoe"})
    assert [(plugin["distribution"], plugin["version"], plugin["skipped"]) for plugin in report["plugins"]] == [
        *[("mlx-lm-qwen3vlmoe", report["versions"]["mlx-lm-qwen3vlmoe"], None)] * 2,  # two types
        ("plug-of-mine", "1.0", "not listed in MLX_LM_PLUGINS"),
    ]
    assert report["remedy"] is None


@pytest.mark.thorough
def test_unreadable_metadata_is_listed_with_the_reason(fresh):
    fresh.add_distribution("malformed", "[a]\nb\n[a]\nb\n", {})
    (fresh.site / "malformed-1.0.dist-info" / "METADATA").write_bytes(b"\xff\xfe")
    report = doctor(fresh)
    assert report["remedy"] is None
    assert all("unreadable metadata" in reason for reason in report["skipped"].values())


@pytest.mark.thorough
def test_a_claim_on_a_helper_module_of_the_hosts_is_listed_with_the_reason_and_needs_no_remedy(fresh):
    fresh.add_distribution("rival", CLAIM.replace("qwen3_vl_moe", "base"), {"rival_module": MODEL})
    report = doctor(fresh)
    assert report["skipped"] == {
        "base = rival_module (rival 1.0)": "base is no model type, but a module that mlx-lm's models import"
    }
    assert (report["winner"], report["remedy"]) == (OURS, None)


@pytest.mark.thorough
def test_distributions_that_cannot_be_listed_are_the_reason_why_the_hosts_own_model_serves(fresh):
    broken = (
        "import sys\n"
        "class Broken:\n"
        "    def find_spec(self, *_): return None\n"
        "    def find_distributions(self, *_): raise OSError('no disk')\n"
        "sys.meta_path.append(Broken())\n"
    )
    (fresh.site / "sitecustomize.py").write_text(broken)
    report = doctor(fresh)
    assert report["winner"] != OURS
    assert report["reason"] == "mlx-lm's own models serve, as distributions cannot be listed: OSError: no disk"


@pytest.mark.thorough
def test_a_plugin_that_spoils_what_this_package_builds_on_is_named(fresh):
    fresh.add_distribution("rival", CLAIM.replace("qwen3_vl_moe", "qwen3_moe"), {"rival_module": MODEL})
    report = doctor(fresh)
    assert report["reason"].startswith(
        "qwen3_vl_moe cannot be imported: PluginError: The plug-in qwen3_moe = rival_module"
    )
    assert report["remedy"].startswith("Update or uninstall rival")


def test_two_claimants_are_a_conflict_which_the_variable_ends(fresh):
    fresh.add_distribution("rival", CLAIM, {"rival_module": MODEL})
    report = doctor(fresh)
    assert report["conflicts"] == {"qwen3_vl_moe": ["mlx-lm-qwen3vlmoe", "rival"]}
    assert report["reason"] == "rival claims qwen3_vl_moe too"
    uninstall = f"{fresh.python} -m pip uninstall rival"
    assert report["remedy"] == f"{uninstall}, or export MLX_LM_PLUGINS=mlx-lm-qwen3vlmoe"
    assert doctor(fresh, env={"MLX_LM_PLUGINS": "mlx-lm-qwen3vlmoe"})["remedy"] is None


@pytest.mark.thorough
def test_a_conflict_over_another_type_is_listed_and_needs_no_remedy(fresh):
    for name in ("one", "two"):
        fresh.add_distribution(name, CLAIM.replace("qwen3_vl_moe", "other_type"), {})
    report = doctor(fresh)
    assert (report["conflicts"], report["remedy"]) == ({"other_type": ["one", "two"]}, None)


def test_a_finder_of_another_package_that_does_not_know_the_plugin_is_named(fresh):
    (fresh.site / "old_plugin.py").write_text(
        "import sys\n"
        "class Finder:\n"
        "    mlx_lm_models_finder = 0\n"
        "    def find_spec(self, *_): return None\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    (fresh.site / "a_startup.pth").write_text("import old_plugin\n")
    report = doctor(fresh)
    assert report["hook"]["finder"] == "old_plugin"
    assert report["winner"] != OURS
    assert report["remedy"]
    if report["host"]["own_type"]:
        assert report["reason"] == f"{HOSTS} serves it, with the finder of old_plugin in force"


def test_a_plugin_that_fails_to_import_is_reported_with_the_cause(fresh):
    (fresh.site / "mlx_lm_qwen3vlmoe" / "model.py").write_text("import no_such_dependency\n")
    report = doctor(fresh)
    assert report["winner"] is None
    assert report["reason"].startswith("qwen3_vl_moe cannot be imported: PluginError: ")
    assert "No module named 'no_such_dependency'" in report["reason"]
    assert report["remedy"].startswith("Repair or uninstall mlx-lm-qwen3vlmoe")


@pytest.mark.thorough
def test_mlx_without_a_backend_is_reported_with_the_extra_that_brings_one(fresh):
    shared = fresh.site.parents[2] / "shared"
    original = (shared / "mlx").resolve()
    (shared / "mlx").unlink()
    shutil.copytree(original, shared / "mlx", ignore=shutil.ignore_patterns("lib", "include", "share", "*.so"))
    report = doctor(fresh)
    assert report["backend"] is None
    assert report["reason"].startswith("mlx-lm, or a backend of MLX, cannot be imported (")
    assert report["remedy"] == f"{fresh.python} -m pip install {WITH_BACKEND}"


@pytest.mark.parametrize("missing", ["mlx_lm", *thorough("mlx")])
def test_without_mlx_lm_or_mlx_every_command_is_one_line(fresh, missing):
    for entry in (fresh.site.parents[2] / "shared").iterdir():
        if entry.name == missing or entry.name.startswith(f"{missing}-"):
            entry.unlink()
    why = f"mlx-lm, or a backend of MLX, cannot be imported (ModuleNotFoundError: No module named '{missing}"
    what = f"{fresh.python} -m pip install {WITH_BACKEND}"
    report = doctor(fresh)
    assert report["versions"][missing.replace("_", "-")] is None
    assert report["reason"].startswith(why)
    assert report["remedy"] == what
    for arguments in (("inspect", str(TINY)), ("run", "generate", "--model", str(TINY))):
        done = command(fresh, *arguments)
        (line,) = done.stderr.splitlines()
        assert done.returncode == 1
        assert line.startswith(why)
        assert line.endswith(f"). Do: {what}")
    assert command(fresh, "--version").stdout.startswith(f"mlx-lm-qwen3vlmoe {__version__} from {fresh.site}")


def test_a_command_of_another_environment_is_named_with_its_python(installed, tmp_path):
    script = tmp_path / "mlx_lm.generate"
    script.write_text("#!/elsewhere/bin/python3\n")
    script.chmod(0o755)
    report = doctor(installed, env={"PATH": str(tmp_path)})
    assert report["reason"] == f"{script} is of another environment"
    assert report["remedy"] == "/elsewhere/bin/python3 -m pip install mlx-lm-qwen3vlmoe"


@pytest.mark.thorough
def test_a_command_of_this_environment_is_no_other(installed, tmp_path):
    """Also through a link, as tools of their own are installed."""
    script = installed.bin.parent / "mlx_lm.generate"
    script.write_text(f"#!{installed.python}\n")
    script.chmod(0o755)
    (tmp_path / "mlx_lm.generate").symlink_to(script)
    report = doctor(installed, env={"PATH": str(tmp_path)})
    assert report["command"] == {"path": str(tmp_path / "mlx_lm.generate"), "python": str(installed.python)}
    assert report["remedy"] is None


# --- the types of other plug-ins ------------------------------------------------------------------------------------


def test_the_type_of_another_plugin_has_its_own_verdict(fresh):
    fresh.add_distribution("plug-of-mine", "[mlx_lm.models]\nmy_type = my_module\n", {"my_module": MODEL})
    done = command(fresh, "doctor", "my_type")
    file = fresh.site / "my_module.py"
    assert done.stdout == f"OK: mlx_lm.generate runs my_type through plug-of-mine 1.0 ({file})\n"
    assert doctor(fresh, model_type="my_type", env={"MLX_LM_PLUGINS": "mlx-lm-qwen3vlmoe"})["remedy"] == (
        "unset it, or export MLX_LM_PLUGINS=mlx-lm-qwen3vlmoe,plug-of-mine"
    )


def test_a_type_that_no_plugin_claims_is_the_hosts(installed):
    from mlx_lm.models import llama

    file = installed.site.parents[2] / "shared" / "mlx_lm" / "models" / "llama.py"
    for model_type in ("llama", "mistral"):  # which the host takes for llama
        report = doctor(installed, model_type=model_type)
        assert (report["winner"], report["file"]) == (llama.__name__, str(file))
    line = command(installed, "doctor", "llama").stdout
    assert line.startswith("OK: mlx_lm.generate runs llama through mlx-lm ")
    assert line.endswith("; no plug-in claims it\n")


@pytest.mark.parametrize("model_type", ["no_such_type", *thorough("no such type", "../x")])
def test_a_type_that_nobody_has_is_not_in_use(installed, model_type):
    report = doctor(installed, model_type=model_type)
    assert report["reason"].startswith(f"no installed plug-in claims {model_type}, and mlx-lm ")
    assert report["remedy"] == "install one that names it in its entry points, group mlx_lm.models"


@pytest.mark.thorough
def test_a_claim_on_a_name_that_the_host_takes_for_another_is_told(fresh):
    fresh.add_distribution("plug-of-mine", "[mlx_lm.models]\nmistral = my_module\n", {"my_module": MODEL})
    report = doctor(fresh, model_type="mistral")
    assert report["reason"] == "mlx-lm takes mistral for llama before it asks for a plug-in"
    assert report["remedy"] == "claim llama in the plug-in's entry points"


# --- the other commands ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [None, *thorough("mlx-lm-qwen3vlmoe")])
def test_run_serves_this_packages_type_from_a_checkout_that_is_not_installed(bare, setting, tiny_questions):
    env = {"PYTHONPATH": str(ROOT)} | ({"MLX_LM_PLUGINS": setting} if setting else {})
    asked = ("--model", str(TINY), "--prompt", tiny_questions[0]["question"], "--temp", "0", "--max-tokens", "64")
    done = command(bare, "run", "generate", *asked, env=env)
    assert tiny_questions[0]["answer"] in done.stdout
    assert "which is not installed" not in done.stderr


def test_run_heeds_the_variable(installed):
    if not doctor(installed)["host"]["own_type"]:
        pytest.skip("this mlx-lm has no such type of its own")
    done = command(installed, "run", "generate", "--model", str(TINY), env={"MLX_LM_PLUGINS": "0"}, traceback=True)
    assert "tie_word_embeddings" in done.stderr  # which its own module misses in an official config


def test_the_help_of_every_command_has_an_example_and_the_exit_status(installed):
    for arguments in ((), ("inspect",), ("doctor",), ("run",)):
        text = command(installed, *arguments, "--help").stdout
        assert re.search(r"(?m)^examples?:\n  mlx-lm-qwen3vlmoe ", text)
        assert re.search(r"(?m)^exit status: .*\b1\b.*\b2 for a wrong command line$", text)
    done = command(installed, "no_such_command")
    assert (done.returncode, done.stdout) == (2, "")


# --- notes ----------------------------------------------------------------------------------------------------------


def noted(monkeypatch, model_type: str = "qwen3_vl_moe") -> str:
    """What it prints in this process, in which a test has changed the host."""
    return diagnosis.render(diagnosis.diagnose(model_type))


def test_a_host_that_takes_images_is_noted(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx_lm.processors", SimpleNamespace(PROCESSORS={"qwen3_vl_moe": object}))
    note = (
        "Note: mlx-lm's own qwen3_vl_moe takes images, but mlx-lm-qwen3vlmoe, which serves in its place, is text-only. "
        "To use images, set MLX_LM_PLUGINS=0."
    )
    assert noted(monkeypatch).splitlines()[-1] == note
    assert "Note" not in noted(monkeypatch, "qwen3_vl_moe_text")


def test_a_host_that_takes_no_images_is_not(monkeypatch):
    assert "Note" not in noted(monkeypatch)


def test_a_type_that_the_host_renames_by_the_class_of_a_checkpoint_is_noted(monkeypatch):
    """As mlx-lm 0.32.2 does with bailing_hybrid."""
    renamed = {("qwen3_vl_moe", "NewerClass"): "qwen3_vl_moe_2", ("llama", "NewerClass"): "llama_2"}
    monkeypatch.setattr(utils, "MODEL_ARCHITECTURE_REMAPPING", renamed, raising=False)
    line = noted(monkeypatch).splitlines()[-1]
    assert (
        line
        == "Note: mlx-lm takes qwen3_vl_moe of the class NewerClass for qwen3_vl_moe_2 before it asks for a plug-in"
    )


@pytest.mark.parametrize(("classes", "module"), [(["No", "OnlyThis"], "llama"), ("OnlyThis", "llama"), (["No"], None)])
def test_a_type_that_the_host_knows_by_the_class_alone_is_its_own(monkeypatch, classes, module):
    monkeypatch.setattr(utils, "MODEL_ARCHITECTURE_REMAPPING", {("my_type", "OnlyThis"): "llama"}, raising=False)
    assert own_module("my_type", classes) == module


# --- the log --------------------------------------------------------------------------------------------------------


def test_one_record_at_info_names_the_winner_when_the_type_resolves(installed):
    done = installed.run(
        "import importlib, logging\n"
        "logging.basicConfig(level='INFO', format='%(levelname)s %(name)s %(message)s')\n"
        "for _ in range(2): importlib.import_module('mlx_lm.models.qwen3_vl_moe')"
    )
    (line,) = (line for line in done.stderr.splitlines() if "qwen3" in line)
    assert line.startswith("INFO mlx_lm_qwen3vlmoe.registry Model type 'qwen3_vl_moe' is served by qwen3_vl_moe = ")
