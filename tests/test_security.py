"""What SECURITY.md claims: start-up does next to nothing, and a checkpoint is data."""

from __future__ import annotations

import ast
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
from support import ROOT, TINY, thorough
from support.commands import run
from support.environments import Environment

SECURITY = (ROOT / "SECURITY.md").read_text()
PACKAGE = sorted((ROOT / "mlx_lm_qwen3vlmoe").rglob("*.py"))
# What happens in an interpreter, as audit events (PEP 578), of which the lists below pick.
AUDIT = """
import json, os, sys
events = []
def note(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        events.append((event, os.path.realpath(os.fsdecode(arguments[0]))))
    elif event in ("exec", "compile"):
        events.append((event, str(arguments[0].co_filename if event == "exec" else arguments[1])))
    else:
        events.append((event, arguments[0] if arguments and isinstance(arguments[0], str) else ""))
sys.addaudithook(note)
"""
LOAD = f"""{AUDIT}
from mlx_lm import generate, load
del events[:]
model, tokenizer = load(sys.argv[1])
prompt = tokenizer.apply_chat_template([{{"role": "user", "content": sys.argv[2]}}], add_generation_prompt=True)
answer = generate(model, tokenizer, prompt, max_tokens=64)
print(json.dumps([answer, events]))
"""
REACH = (
    "socket.",
    "urllib.",
    "http.",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.startfile",
)
READ = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("installed") / "venv")
    environment.pip("install", "--no-deps", wheel)
    return environment


@pytest.fixture
def fresh(wheel, tmp_path) -> Environment:
    """One to change."""
    environment = Environment(tmp_path / "venv")
    shutil.unpack_archive(wheel, environment.site, "zip")
    return environment


class Checkpoint:
    """A copy of the tiny model, with code in it that leaves a file behind if it ever runs."""

    def __init__(self, path: Path):
        shutil.copytree(TINY, path)
        self.path = path
        self.trace = path.parent / "it_ran"
        self.code = f"open({str(self.trace)!r}, 'w').close()\n"
        self.pickle = pickle.dumps(Bomb(self.code))
        for name in ("evil.py", "modeling_qwen3_vl_moe.py", "__init__.py", "sitecustomize.py"):
            (path / name).write_text(self.code)

    def update(self, name: str, **fields: object) -> None:
        file = self.path / name
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    def ran(self) -> bool:
        return self.trace.exists()


class Bomb:
    """Unpickling runs the code."""

    def __init__(self, code: str):
        self.code = code

    def __reduce__(self):
        return exec, (self.code,)


@pytest.fixture
def checkpoint(tmp_path) -> Checkpoint:
    return Checkpoint(tmp_path / "checkpoint")


def test_the_code_in_the_checkpoints_of_these_tests_would_leave_a_trace(checkpoint):
    assert not checkpoint.ran()
    pickle.loads(checkpoint.pickle)
    assert checkpoint.ran()


# --- a checkpoint ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session(installed, tiny_questions) -> list[tuple[str, str]]:
    """The audit events of loading the tiny model and generating an answer."""
    done = installed.run(LOAD, TINY, tiny_questions[0]["question"])
    answer, events = json.loads(done.stdout.splitlines()[-1])
    assert answer.strip() == tiny_questions[0]["answer"]
    return [tuple(event) for event in events]


def test_loading_and_generating_open_no_connection_and_start_no_process(session):
    assert [event for event, _ in session if event.startswith(REACH)] == []


def test_loading_and_generating_unpickle_nothing(session):
    assert [event for event, _ in session if event.startswith("pickle.")] == []


def test_these_files_of_a_checkpoint_are_read_and_no_others(session):
    """Beside the safetensors, which MLX reads by itself."""
    opened = {Path(file) for event, file in session if event == "open" and Path(file).parent == TINY}
    assert {file.name for file in opened} == READ


def test_no_code_object_comes_from_the_checkpoint(session):
    assert [file for event, file in session if event in ("exec", "compile") and str(TINY) in file] == []


def test_auto_map_is_not_followed(installed, checkpoint, tiny_questions):
    classes = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForCausalLM": "evil.Model"}
    checkpoint.update("config.json", auto_map=classes)
    checkpoint.update("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    done = installed.run(LOAD, checkpoint.path, tiny_questions[0]["question"], check=False, cwd=checkpoint.path.parent)
    assert done.returncode == 0 or "trust_remote_code" in done.stderr
    assert not checkpoint.ran()


def test_a_model_file_is_refused_by_the_host(installed, checkpoint):
    checkpoint.update("config.json", model_file="evil.py")
    done = installed.run(LOAD, checkpoint.path, "Hi", check=False)
    assert "trust_remote_code" in done.stderr.splitlines()[-1]
    assert not checkpoint.ran()


def test_pickles_beside_the_safetensors_are_not_opened(installed, checkpoint, tiny_questions):
    names = ("pytorch_model.bin", "model.pkl", "model.pt", "training_args.bin", "optimizer.pt")
    for name in names:
        (checkpoint.path / name).write_bytes(checkpoint.pickle)
    done = installed.run(LOAD, checkpoint.path, tiny_questions[0]["question"])
    assert not checkpoint.ran()
    assert not any(name in done.stdout for name in names)


def test_a_checkpoint_of_pickles_alone_is_refused(installed, checkpoint):
    (checkpoint.path / "model.safetensors").unlink()
    (checkpoint.path / "pytorch_model.bin").write_bytes(checkpoint.pickle)
    done = installed.run(LOAD, checkpoint.path, "Hi", check=False)
    assert "FileNotFoundError: No safetensors found" in done.stderr
    assert not checkpoint.ran()


def test_a_pickle_under_the_name_of_safetensors_is_refused(installed, checkpoint):
    (checkpoint.path / "model.safetensors").write_bytes(checkpoint.pickle)
    assert installed.run(LOAD, checkpoint.path, "Hi", check=False).returncode == 1
    assert not checkpoint.ran()


@pytest.mark.parametrize("name", ["adapters.safetensors", *thorough("adapters.bin", "adapters.pkl", "adapters.npz")])
def test_an_adapter_that_is_a_pickle_is_refused(installed, checkpoint, name):
    settings = {
        "fine_tune_type": "lora",
        "num_layers": 1,
        "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0},
    }
    adapters = checkpoint.path / "adapters"
    adapters.mkdir()
    (adapters / "adapter_config.json").write_text(json.dumps(settings))
    (adapters / name).write_bytes(checkpoint.pickle)
    code = "import sys, mlx_lm; mlx_lm.load(sys.argv[1], adapter_path=sys.argv[1] + '/adapters')"
    done = installed.run(code, checkpoint.path, check=False)
    assert "adapters.safetensors" in done.stderr.splitlines()[-1]
    assert not checkpoint.ran()


def test_a_chat_template_runs_in_a_sandbox(installed, checkpoint):
    template = f"{{{{ cycler.__init__.__globals__.os.system('touch {checkpoint.trace}') }}}}"
    (checkpoint.path / "chat_template.jinja").write_text(template)
    done = installed.run(LOAD, checkpoint.path, "Hi", check=False)
    assert "SecurityError" in done.stderr
    assert not checkpoint.ran()


def test_inspect_of_a_folder_runs_nothing_and_opens_no_connection(installed, checkpoint):
    checkpoint.update("config.json", model_file="evil.py", auto_map={"AutoConfig": "evil.Config"})
    (checkpoint.path / "pytorch_model.bin").write_bytes(checkpoint.pickle)
    code = f"{AUDIT}\nfrom mlx_lm_qwen3vlmoe.inspection import report\ndel events[:]\nreport.inspect(sys.argv[1])\n"
    done = installed.run(f"{code}print(json.dumps(events))", checkpoint.path)
    assert not [event for event, _ in json.loads(done.stdout.splitlines()[-1]) if event.startswith((*REACH, "pickle."))]
    assert not checkpoint.ran()


@pytest.mark.parametrize("file", PACKAGE, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_no_module_of_the_package_can_run_text_or_unpickle_or_connect(file):
    tree = ast.parse(file.read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    assert not {name.split(".")[0] for name in imported} & {
        *("ctypes", "http", "marshal", "multiprocessing", "pickle", "requests", "shelve", "socket", "subprocess"),
        *("torch", "transformers", "urllib"),
    }
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"eval", "exec", "compile", "__import__"}


# --- the start of Python --------------------------------------------------------------------------------------------

START = f"{AUDIT}\nimport site\nsite.main()\nprint(json.dumps(events))"


def start(environment: Environment) -> list[tuple[str, str]]:
    """The audit events of `site` alone, which runs the start-up files."""
    done = run(environment.python, "-S", "-c", START, cwd=environment.bin)
    return [tuple(event) for event in json.loads(done.stdout)]


@pytest.fixture
def started(fresh) -> dict[str, set[str]]:
    """Audit event → what of, for those that a start has with the start-up file only."""
    startup = fresh.site / "mlx_lm_qwen3vlmoe_startup.pth"
    start(fresh)  # which writes the .pyc files
    present = start(fresh)
    startup.rename(startup.with_suffix(".away"))
    extra = set(present) - set(start(fresh))
    return {event: {what.replace(f"{fresh.site}/", "") for each, what in extra if each == event} for event, _ in extra}


def test_the_start_up_file_opens_itself_and_two_modules(started):
    opened = {re.sub(r"__pycache__/(\w+)\..*", r"\1.py", file) for file in started["open"]}
    assert opened == {
        "mlx_lm_qwen3vlmoe_startup.pth",
        "mlx_lm_qwen3vlmoe/__init__.py",
        "mlx_lm_qwen3vlmoe/registry.py",
    }


def test_the_start_up_file_imports_two_modules(started):
    assert started["import"] == {"mlx_lm_qwen3vlmoe", "mlx_lm_qwen3vlmoe.registry"}


def test_the_start_up_file_does_nothing_but_import(started):
    """The import system lists the package's folder, and runs the line and the two modules."""
    assert set(started) <= {"open", "import", "os.listdir", "marshal.loads", "compile", "exec"}
    assert started.get("os.listdir", set()) <= {"mlx_lm_qwen3vlmoe"}


def test_start_up_reads_no_environment_variable_and_no_metadata(fresh):
    """They are read when a type of mlx_lm is asked for."""
    code = "import sys; print([f._scan for f in sys.meta_path if hasattr(f, 'mlx_lm_models_finder')])"
    assert fresh.run(code).stdout.strip() == "[None]"


def test_the_finder_imports_no_plugin_until_its_type_is_asked_for(fresh):
    fresh.add_distribution("loud", "[mlx_lm.models]\nloud_type = loud\n", {"loud": "print('loud')\n"})
    assert fresh.run("import mlx_lm.models.llama").stdout == ""


# --- SECURITY.md ----------------------------------------------------------------------------------------------------


def documented(after: str) -> str:
    """The first block after some words."""
    return re.search(r"(?s)```\w+\n(.*?)```", SECURITY.split(after, 1)[1])[1]


@pytest.mark.thorough
def test_the_check_of_the_hashes_passes_and_finds_a_changed_file(fresh):
    command = documented(after="hashes in `RECORD`")
    path = {"PATH": f"{fresh.bin}:/usr/bin:/bin"}
    assert run("bash", "-c", command, env=path).stdout == ""
    with (fresh.site / "mlx_lm_qwen3vlmoe_startup.pth").open("a") as startup:
        startup.write("import this\n")
    done = run("bash", "-c", command, env=path, check=False)
    assert (done.returncode, done.stderr) == (1, "mlx_lm_qwen3vlmoe_startup.pth is not as installed\n")


def test_the_listing_of_start_up_files_shows_this_one(fresh):
    done = run("bash", "-c", documented(after="Show every start-up file"), env={"PATH": f"{fresh.bin}:/usr/bin:/bin"})
    assert "import mlx_lm_qwen3vlmoe.registry; mlx_lm_qwen3vlmoe.registry.install()" in done.stdout
