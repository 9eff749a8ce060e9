"""`mlx-lm-qwen3vlmoe doctor`, in environments that are well and in each of those in which mlx_lm misses the plug-in."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import OURS, ROOT, Environment, run

HOSTS = "mlx_lm.models.qwen3_vl_moe"
STARTUP = "mlx_lm_qwen3vlmoe_startup.pth"
CLAIM = "[mlx_lm.models]\nqwen3_vl_moe = rival_module\n"
MODEL = "class ModelArgs: pass\nclass Model: pass\n"


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


def doctor(environment: Environment, *options: str, env: dict[str, str] | None = None) -> dict:
    """What it reports. It never fails itself, and its exit status is 1 with a remedy of one line."""
    command = (environment.python, *options, "-m", "mlx_lm_qwen3vlmoe", "doctor", "--json")
    variables = {"PATH": f"{environment.bin}:/usr/bin:/bin"} | (env or {})
    done = run(*command, check=False, cwd=environment.bin, env=variables)
    assert "Traceback" not in done.stderr
    report = json.loads(done.stdout)
    assert done.returncode == (report["remedy"] is not None)
    assert "\n" not in (report["remedy"] or "")
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
    keys = "python versions backend hook host winner plugins skipped conflicts variable command error remedy"
    assert list(doctor(installed)) == keys.split()


def test_the_report_tells_versions_backend_and_what_the_host_can_do(installed):
    import mlx.core as mx
    from mlx_lm import __version__

    report = doctor(installed)
    assert report["versions"]["mlx-lm"] == __version__
    assert report["versions"]["mlx"] == mx.__version__
    assert report["backend"] in ("cpu", "cuda", "metal")
    assert set(report["host"]) == {"own_type", "shard", "pipeline", "input_embeddings"}
    assert (
        report["host"]["own_type"] == (Path(sys.modules["mlx_lm"].__file__).parent / "models/qwen3_vl_moe.py").exists()
    )


def test_the_command_prints_aligned_lines_of_which_the_last_is_the_remedy(installed):
    done = run(installed.bin / "mlx-lm-qwen3vlmoe", "doctor", env={"PATH": "/usr/bin:/bin"})
    lines = done.stdout.splitlines()
    assert lines[0].startswith("python     version 3.")
    assert lines[-1] == "remedy     none"
    assert all(line[10] == " " and line[11] != " " for line in lines)


def test_an_editable_install_is_active(tmp_path):
    environment = Environment(tmp_path / "venv")
    environment.pip("install", "--no-deps", "--no-build-isolation", "-e", ROOT)
    report = doctor(environment)
    assert (report["hook"]["how"], report["winner"], report["remedy"]) == (".pth", OURS, None)


def test_isolated_mode_is_fine(installed):
    assert doctor(installed, "-I")["remedy"] is None


def test_a_finder_that_other_code_installed_is_one_by_hand(fresh):
    (fresh.site / STARTUP).unlink()
    (fresh.site / "sitecustomize.py").write_text("import mlx_lm_qwen3vlmoe; mlx_lm_qwen3vlmoe.install()\n")
    report = doctor(fresh)
    assert (report["hook"]["how"], report["hook"]["file"], report["remedy"]) == ("by hand", None, None)


def test_the_start_file_is_what_python_3_15_reads(fresh):
    (fresh.site / STARTUP).unlink()
    done = fresh.run(
        "from mlx_lm_qwen3vlmoe import diagnosis, registry; registry.install()\n"
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
    assert report["hook"]["reason"] == "Python runs with -S, which reads no start-up files"
    assert report["remedy"].startswith("Python runs with -S, which reads no start-up files: leave it out, or ")
    assert report["winner"] != OURS


def test_a_deleted_start_up_file_is_missed_by_name(fresh):
    (fresh.site / STARTUP).unlink()
    report = doctor(fresh)
    assert report["hook"]["reason"] == f"{STARTUP} is missing from site-packages"
    assert "--force-reinstall --no-deps mlx-lm-qwen3vlmoe" in report["remedy"]


def test_a_start_up_file_without_effect_is_named(fresh):
    (fresh.site / STARTUP).write_text("# import mlx_lm_qwen3vlmoe.registry\n")
    assert doctor(fresh)["hook"]["reason"].startswith(f"{fresh.site / STARTUP} is there, but had no effect")


def test_a_folder_on_the_path_is_no_place_for_start_up_files(bare, wheel, tmp_path):
    run(sys.executable, "-m", "pip", "-q", "install", "--no-deps", "--target", tmp_path / "folder", wheel)
    reason = doctor(bare, env={"PYTHONPATH": str(tmp_path / "folder")})["hook"]["reason"]
    assert reason.startswith(f"{tmp_path / 'folder'} is on sys.path (PYTHONPATH, or a zip), but start-up files run in")


def test_a_zip_is_no_place_for_start_up_files(bare, wheel, tmp_path):
    shutil.copy(wheel, tmp_path / "application.zip")
    reason = doctor(bare, env={"PYTHONPATH": str(tmp_path / "application.zip")})["hook"]["reason"]
    assert reason.startswith(
        f"{tmp_path / 'application.zip'} is on sys.path (PYTHONPATH, or a zip), but start-up files"
    )


def test_the_users_site_packages_may_be_off(bare, wheel, tmp_path):
    base = {"PYTHONUSERBASE": str(tmp_path)}
    users = bare.run("import site; print(site.getusersitepackages())", env=base).stdout.strip()
    run(sys.executable, "-m", "pip", "-q", "install", "--no-deps", "--target", users, wheel)
    reason = doctor(bare, env=base | {"PYTHONPATH": users})["hook"]["reason"]
    assert reason == "the user's site-packages are off (PYTHONNOUSERSITE, -s, or a virtual environment)"


def test_sources_without_metadata_are_not_installed(bare):
    done = bare.run(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from mlx_lm_qwen3vlmoe import diagnosis, registry; registry.install(); print(diagnosis.diagnose()['remedy'])",
        ROOT,
    )
    assert done.stdout.startswith("mlx_lm_qwen3vlmoe is on sys.path, but not installed: ")


def test_an_object_on_the_meta_path_that_fails_costs_no_report(fresh):
    strange = (
        "class Strange:\n"
        "    def find_spec(self, *_): return None\n"
        "    @property\n"
        "    def mlx_lm_models_finder(self): raise AssertionError('strange')\n"
    )
    (fresh.site / STARTUP).unlink()
    (fresh.site / "sitecustomize.py").write_text(f"import sys\n{strange}sys.meta_path.append(Strange())\n")
    assert doctor(fresh)["remedy"].startswith("sys.meta_path has an object that fails (AssertionError: strange): ")


# --- the finder is there, and the plug-in is not the one ------------------------------------------------------------


@pytest.mark.parametrize("setting", ["0", "", "another"])
def test_the_variable_that_turns_the_plugin_off_is_named(installed, setting):
    report = doctor(installed, env={"MLX_LM_PLUGINS": setting})
    assert report["variable"] == setting
    assert report["plugins"][0]["skipped"]
    assert report["remedy"] == (
        f"MLX_LM_PLUGINS={setting!r} turns the plug-in off: unset it, or add mlx-lm-qwen3vlmoe to it"
    )


def test_every_plugin_is_listed_and_a_skipped_one_with_the_reason(fresh):
    fresh.add_distribution("plug-of-mine", "[mlx_lm.models]\nmy_type = my_module\n", {})
    report = doctor(fresh, env={"MLX_LM_PLUGINS": "mlx-lm-qwen3vlmoe"})
    assert [(plugin["distribution"], plugin["version"], plugin["skipped"]) for plugin in report["plugins"]] == [
        *[("mlx-lm-qwen3vlmoe", report["versions"]["mlx-lm-qwen3vlmoe"], None)] * 2,  # two types
        ("plug-of-mine", "1.0", "not listed in MLX_LM_PLUGINS"),
    ]
    assert report["remedy"] is None


def test_unreadable_metadata_is_listed_with_the_reason(fresh):
    fresh.add_distribution("malformed", "[a]\nb\n[a]\nb\n", {})
    (fresh.site / "malformed-1.0.dist-info" / "METADATA").write_bytes(b"\xff\xfe")
    report = doctor(fresh)
    assert report["remedy"] is None
    assert all("unreadable metadata" in reason for reason in report["skipped"].values())


def test_a_claim_on_a_helper_module_of_the_hosts_is_listed_with_the_reason_and_needs_no_remedy(fresh):
    fresh.add_distribution("rival", CLAIM.replace("qwen3_vl_moe", "base"), {"rival_module": MODEL})
    report = doctor(fresh)
    assert report["skipped"] == {
        "base = rival_module (rival 1.0)": "base is no model type, but a module that mlx-lm's models import"
    }
    assert (report["winner"], report["remedy"]) == (OURS, None)


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
    assert report["remedy"] == (
        "mlx-lm's own models serve, as distributions cannot be listed: OSError: no disk: repair what fails there"
    )


def test_a_plugin_that_spoils_what_this_package_builds_on_is_named(fresh):
    fresh.add_distribution("rival", CLAIM.replace("qwen3_vl_moe", "qwen3_moe"), {"rival_module": MODEL})
    remedy = doctor(fresh)["remedy"]
    assert remedy.startswith("qwen3_vl_moe cannot be imported: PluginError: The plug-in qwen3_moe = rival_module")


def test_two_claimants_are_a_conflict_which_the_variable_ends(fresh):
    fresh.add_distribution("rival", CLAIM, {"rival_module": MODEL})
    report = doctor(fresh)
    assert report["conflicts"] == {"qwen3_vl_moe": ["mlx-lm-qwen3vlmoe", "rival"]}
    assert report["remedy"] == ("rival claims qwen3_vl_moe too: uninstall it, or set MLX_LM_PLUGINS=mlx-lm-qwen3vlmoe")
    assert doctor(fresh, env={"MLX_LM_PLUGINS": "mlx-lm-qwen3vlmoe"})["remedy"] is None


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
        assert report["remedy"].startswith(f"qwen3_vl_moe is served by {HOSTS}, with the finder of old_plugin in force")


def test_a_plugin_that_fails_to_import_is_reported_with_the_cause(fresh):
    (fresh.site / "mlx_lm_qwen3vlmoe" / "model.py").write_text("import no_such_dependency\n")
    report = doctor(fresh)
    assert report["winner"] is None
    assert report["remedy"].startswith("qwen3_vl_moe cannot be imported: PluginError: ")
    assert "No module named 'no_such_dependency'" in report["remedy"]


def test_mlx_without_a_backend_is_reported_with_the_extra_that_brings_one(fresh):
    shared = fresh.site.parents[2] / "shared"
    original = (shared / "mlx").resolve()
    (shared / "mlx").unlink()
    shutil.copytree(original, shared / "mlx", ignore=shutil.ignore_patterns("lib", "include", "share", "*.so"))
    report = doctor(fresh)
    assert report["backend"] is None
    assert report["remedy"].startswith("mlx-lm, or a backend of MLX, cannot be imported (")
    what = "mlx-lm-qwen3vlmoe" if sys.platform == "darwin" else "'mlx-lm-qwen3vlmoe[cpu]' (or cuda12, cuda13)"
    assert report["remedy"].endswith(f"-m pip install {what}")


def test_a_missing_mlx_lm_is_reported(fresh):
    for entry in (fresh.site.parents[2] / "shared").glob("mlx_lm*"):
        entry.unlink()
    report = doctor(fresh)
    assert report["versions"]["mlx-lm"] is None
    assert "No module named 'mlx_lm'" in report["remedy"]


def test_a_command_of_another_environment_is_named_with_its_python(installed, tmp_path):
    command = tmp_path / "mlx_lm.generate"
    command.write_text("#!/elsewhere/bin/python3\n")
    command.chmod(0o755)
    report = doctor(installed, env={"PATH": str(tmp_path)})
    assert report["remedy"] == (
        f"{command} is of another environment: /elsewhere/bin/python3 -m pip install mlx-lm-qwen3vlmoe"
    )


def test_a_command_of_this_environment_is_no_other(installed, tmp_path):
    """Also through a link, as tools of their own are installed."""
    command = installed.bin.parent / "mlx_lm.generate"
    command.write_text(f"#!{installed.python}\n")
    command.chmod(0o755)
    (tmp_path / "mlx_lm.generate").symlink_to(command)
    report = doctor(installed, env={"PATH": str(tmp_path)})
    assert report["command"] == {"path": str(tmp_path / "mlx_lm.generate"), "python": str(installed.python)}
    assert report["remedy"] is None


# --- the log --------------------------------------------------------------------------------------------------------


def test_one_record_at_info_names_the_winner_when_the_type_resolves(installed):
    done = installed.run(
        "import importlib, logging\n"
        "logging.basicConfig(level='INFO', format='%(levelname)s %(name)s %(message)s')\n"
        "for _ in range(2): importlib.import_module('mlx_lm.models.qwen3_vl_moe')"
    )
    (line,) = (line for line in done.stderr.splitlines() if "qwen3" in line)
    assert line.startswith("INFO mlx_lm_qwen3vlmoe.registry Model type 'qwen3_vl_moe' is served by qwen3_vl_moe = ")
