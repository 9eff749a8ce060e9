"""Other authors' plug-ins: the example package beside this one and alone, and what docs/plugins.md tells its reader."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from support import OURS, ROOT, TINY
from support.commands import run
from support.environments import Environment, build

EXAMPLE = ROOT / "examples" / "mlx-lm-example-plugin"
DOCS = (ROOT / "docs" / "plugins.md").read_text()
EXAMPLES = "mlx_lm_example_plugin.example_llama"
HOSTS = "mlx_lm.models.qwen3_vl_moe"
UNSUPPORTED = "ValueError: Model type example_llama not supported."
WHO = """
import sys
from mlx_lm.utils import _get_classes
for model_type in sys.argv[1:]:
    print(_get_classes({"model_type": model_type})[0].__module__)
"""
FINDERS = """
import sys
print(*(type(finder).__module__ for finder in sys.meta_path if hasattr(finder, "mlx_lm_models_finder")))
"""


def documented(after: str) -> str:
    """The first block of code in the docs after some words."""
    (text,) = re.findall(r"(?s)^```\w+\n(.*?)^```$", DOCS.split(after, 1)[1], re.MULTILINE)[:1]
    return text


def served_by(environment: Environment, *model_types: str, **options) -> list[str]:
    return environment.run(WHO, *model_types, **options).stdout.split()


def finders(environment: Environment) -> str:
    return environment.run(FINDERS).stdout.strip()


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Path:
    """The wheel of the example."""
    return build("wheel", tmp_path_factory.mktemp("example"), EXAMPLE)


@pytest.fixture(scope="module")
def example_with_finder(tmp_path_factory) -> Path:
    """The wheel of the example with a finder of its own, made in the steps of the docs."""
    tree = tmp_path_factory.mktemp("with_finder") / "tree"
    shutil.copytree(EXAMPLE, tree, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mlx_lm_qwen3vlmoe" / "registry.py", tree / "mlx_lm_example_plugin")
    (tree / "startup").mkdir()
    for suffix in ("pth", "start"):
        name = f"startup/mlx_lm_example_plugin_startup.{suffix}"
        (tree / name).write_text(documented(after=f"`{name}`"))
    project = (tree / "pyproject.toml").read_text()
    assert ', "mlx-lm-qwen3vlmoe"]' in project
    project = project.replace(', "mlx-lm-qwen3vlmoe"]', "]")
    (tree / "pyproject.toml").write_text(f"{project}\n{documented(after='root of site-packages')}")
    return build("wheel", tree / "dist", tree)


@pytest.fixture(scope="module")
def both(wheel, example, tmp_path_factory) -> Environment:
    """This package and the example side by side."""
    environment = Environment(tmp_path_factory.mktemp("both") / "venv")
    environment.pip("install", "--no-deps", wheel, example)
    return environment


@pytest.fixture
def clean(tmp_path) -> Environment:
    return Environment(tmp_path / "venv")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> tuple[Path, Path]:
    """The same random weights and tokenizer as a llama and, with its logits doubled, as the example's type."""
    mx.random.seed(0)
    folder = tmp_path_factory.mktemp("checkpoints")
    config = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": json.loads((TINY / "config.json").read_text())["text_config"]["vocab_size"],
    }
    model = llama.Model(llama.ModelArgs(model_type="llama", **config))
    for model_type, scale in (("llama", 1.0), ("example_llama", 2.0)):
        path = folder / model_type
        shutil.copytree(TINY, path, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
        (path / "config.json").write_text(json.dumps(config | {"model_type": model_type, "logit_scale": scale}))
        mx.save_safetensors(str(path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    return folder / "llama", folder / "example_llama"


# --- beside this package --------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_both_model_types_resolve(both):
    assert served_by(both, "qwen3_vl_moe", "example_llama", "llama") == [OURS, EXAMPLES, "mlx_lm.models.llama"]


@pytest.mark.thorough
def test_the_variable_chooses_between_them(both):
    only = {"MLX_LM_PLUGINS": "mlx-lm-example-plugin"}
    assert served_by(both, "qwen3_vl_moe", "example_llama", env=only) == [HOSTS, EXAMPLES]


def test_a_checkpoint_of_the_examples_type_loads_and_gives_its_own_logits(both, checkpoints):
    done = both.run(
        "import sys, mlx.core as mx\n"
        "from mlx_lm import load\n"
        "(plain, tokenizer), (example, _) = load(sys.argv[1]), load(sys.argv[2])\n"
        "ids = mx.array([tokenizer.encode('What is a plug-in?')])\n"
        "assert ids.size > 3 and mx.array_equal(example(ids), plain(ids) * 2)\n"
        "print(type(plain).__module__, type(example).__module__)",
        *checkpoints,
    )
    assert done.stdout.split() == ["mlx_lm.models.llama", EXAMPLES]


def test_the_generate_command_runs_a_checkpoint_of_the_examples_type(both, checkpoints):
    done = run(both.python, "-m", "mlx_lm", "generate", "--model", checkpoints[1], "--prompt", "Hi", "--max-tokens", 3)
    assert re.search(r"Generation: [123] tokens", done.stdout)


@pytest.mark.thorough
def test_when_this_package_is_uninstalled_the_example_is_unsupported_in_the_hosts_own_words(
    wheel, example, clean, checkpoints
):
    clean.pip("install", "--no-deps", wheel, example)
    clean.pip("uninstall", "-y", "mlx-lm-qwen3vlmoe")
    command = (clean.python, "-m", "mlx_lm", "generate", "--model", checkpoints[1], "--prompt", "Hi")
    done = run(*command, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == UNSUPPORTED


# --- with a copy of the finder --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(example_with_finder, tmp_path_factory) -> Environment:
    """The example with a finder of its own, without this package."""
    environment = Environment(tmp_path_factory.mktemp("alone") / "venv")
    environment.pip("install", "--no-deps", example_with_finder)
    return environment


def test_with_a_copy_of_the_finder_the_example_works_alone(alone):
    assert served_by(alone, "qwen3_vl_moe", "example_llama") == [HOSTS, EXAMPLES]


@pytest.mark.thorough
def test_the_documented_start_file_of_python_3_15_is_enough(alone):
    """As there, where the import line of the .pth file is ignored."""
    start = (alone.site / "mlx_lm_example_plugin_startup.start").read_text().strip()
    without_pth = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if not hasattr(f, 'mlx_lm_models_finder')]\n"
    )
    assert UNSUPPORTED in alone.run(without_pth + WHO, "example_llama", check=False).stderr
    done = alone.run(f"{without_pth}import pkgutil; pkgutil.resolve_name({start!r})()\n{WHO}", "example_llama")
    assert done.stdout.strip() == EXAMPLES


@pytest.mark.thorough
def test_of_two_copies_one_finder_serves_both_types_and_the_other_takes_over(clean, wheel, example_with_finder):
    clean.pip("install", "--no-deps", wheel, example_with_finder)
    assert finders(clean) == "mlx_lm_example_plugin.registry"
    assert served_by(clean, "qwen3_vl_moe", "example_llama") == [OURS, EXAMPLES]
    clean.pip("uninstall", "-y", "mlx-lm-example-plugin")
    assert finders(clean) == "mlx_lm_qwen3vlmoe.registry"
    assert served_by(clean, "qwen3_vl_moe") == [OURS]


# --- the docs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["mlx_lm_example_plugin/example_llama.py", "pyproject.toml"])
def test_the_docs_show_the_files_of_the_example(file):
    assert documented(after=f"`{file}`") == (EXAMPLE / file).read_text()


def test_the_recipe_of_the_docs_makes_a_checkpoint_that_commands_run_on(both, tmp_path):
    shutil.copy(EXAMPLE / "make_tiny.py", tmp_path)
    commands = documented(after="## A tiny random checkpoint")
    shown = ""
    for words in map(shlex.split, commands.splitlines()):
        if words[0].startswith("mlx_lm."):  # this environment has no commands of mlx-lm's
            words[:1] = "python", "-m", "mlx_lm", words[0].removeprefix("mlx_lm.")
        assert words[0] == "python"
        shown += run(both.python, *words[1:], cwd=tmp_path).stdout
    assert len(re.findall(r"Generation: \d tokens", shown)) == 2
    config = json.loads((tmp_path / "tiny-random-4bit" / "config.json").read_text())
    assert (config["model_type"], config["quantization"]["bits"]) == ("example_llama", 4)


@pytest.mark.thorough
def test_a_host_can_read_the_group_with_the_snippet_of_the_docs(both):
    code = documented(after="Read the group in a host") + (
        "for model_type in ('qwen3_vl_moe', 'example_llama', 'llama'):\n"
        "    print(*{each.__module__ for each in model_classes(model_type)})\n"
    )
    for setting in ({"MLX_LM_PLUGINS": "0"}, {}):  # without the finder and with it
        assert both.run(code, env=setting).stdout.split() == [OURS, EXAMPLES, "mlx_lm.models.llama"]


def test_the_snippet_of_the_docs_reports_a_conflict(both, tmp_path):
    rival = tmp_path / "rival-1.0.dist-info"
    rival.mkdir()
    (rival / "METADATA").write_text("Metadata-Version: 2.1\nName: rival\nVersion: 1.0\n")
    (rival / "entry_points.txt").write_text("[mlx_lm.models]\nexample_llama = json\n")
    code = f"{documented(after='Read the group in a host')}model_classes('example_llama')"
    error = both.run(code, check=False, env={"PYTHONPATH": str(tmp_path)}).stderr.splitlines()[-1]
    assert error == "RuntimeError: example_llama is claimed by rival and mlx-lm-example-plugin"


@pytest.mark.thorough
def test_the_commands_of_the_docs_say_what_they_should(both):
    commands = documented(after="## Test it").splitlines()
    assert commands.pop(0) == "pip install -e ."
    shown = run("bash", "-c", "\n".join(commands), env={"PATH": f"{both.bin}:/usr/bin:/bin"}).stdout
    assert shown.splitlines() == [EXAMPLES, "not mlx-lm's"]
