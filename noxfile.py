"""The built wheel on every mlx-lm from 0.28.2 on, and on every Python: `make matrix`, or `nox -s 'hosts(0.30.7)'`."""

from __future__ import annotations

from pathlib import Path

import nox

nox.options.default_venv_backend = "uv"  # seconds where pip takes half a minute, eighteen times
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False  # the hosts run on the Python at hand, the others where there are any

# mlx-lm → what it ran with when it was new. On Linux mlx needs a backend.
OLD = ["transformers==4.57.6", "huggingface-hub<1.0", "datasets<5"]
HOSTS = {
    "0.28.2": ["mlx==0.29.2", "mlx[cpu]==0.29.2; sys_platform == 'linux'", *OLD],
    "0.28.3": ["mlx==0.29.2", "mlx[cpu]==0.29.2; sys_platform == 'linux'", *OLD],
    "0.29.1": ["mlx==0.29.4", "mlx[cpu]==0.29.4; sys_platform == 'linux'", *OLD],
    "0.30.2": ["mlx==0.30.1", "mlx[cpu]==0.30.1; sys_platform == 'linux'"],
    "0.30.7": ["mlx==0.30.6", "mlx[cpu]==0.30.6; sys_platform == 'linux'"],
    "0.31.3": ["mlx==0.31.2", "mlx[cpu]==0.31.2; sys_platform == 'linux'"],
    "newest": ["mlx", "mlx[cpu]; sys_platform == 'linux'"],
}
WHOLE = {"0.28.2", "0.30.7"}  # where what stands beside loading is tested, too; `make test-all` has the newest
# What a host cannot do, for any model: tests by name, and the last mlx-lm that cannot.
LIMITS = {
    "test_what_convert_saves_gives_the_same_logits_in_the_unchanged_host": "0.28.2",  # it has no type of its own
    "test_what_is_saved_gives_the_same_logits_in_the_unchanged_host": "0.28.2",
    "test_mlx_lm_convert_writes_what_the_unchanged_host_loads": "0.28.2",
    "test_the_commands_take_it_and_what_they_save_loads_in_the_unchanged_host": "0.28.2",
    "test_input_embeddings_stand_in_for_token_ids": "0.28.2",
    "test_benchmark_runs": "0.28.3",  # it looks for vocab_size outside text_config
    "test_gradients_pass_through_them": "0.28.2",  # no input_embeddings
    "test_lora_of_experts": "0.28.2",  # adapters of experts do not run
    "test_serving": "0.29.1",  # it leaves thoughts and calls in the answer
    "test_arguments_of_a_template_come_with_a_request": "0.30.2",
    "test_lora_trains_on_a_packed_base_and_fuses": "0.28.3",  # adapters of experts do not run, then do not dequantize
    "test_nvfp4_experts_stay_packed": "0.31.3",  # the second scale is dropped
    # Its qwen3_moe has a head of its own always, and takes layers for dense if the first one is.
    "test_floats_become_the_layout_of_the_official_text_model[tied": "0.30.7",
    "test_floats_become_the_layout_of_the_official_text_model[mlx_lm_float": "0.31.3",
}
# What the MLX of its time cannot do, in the same way.
MLX_LIMITS = {
    "test_other_modes_are_dequantized[nvfp4]": "0.30.2",  # MLX has no such mode, or multiplies wrongly
    "test_what_mlx_cannot_express_is_float_with_one_notice[fp8-cast": "0.30.2",  # MLX decodes float8 while it loads
    # The same, or it has no mxfp8.
    "((stays_packed or memory_of_the_file) and (mxfp6 or mxfp8))": "0.30.2",
    "test_what_another_tool_packed_is_packed_as_loading_packs_it[autoround-mxfp8": "0.30.2",
    "(little_more_than_a_layer and (fp8 or nvfp4))": "0.30.2",  # the same
    "fp8-perexpert-ue8m0": "0.31.3",  # MLX cannot load the dtype
    "test_a_broken_quantized_checkpoint_names_the_tensor[fp8-perexpert-change0": "0.30.2",  # the same
    "test_small_floats_are_what_mlx_has": "0.31.3",  # MLX gives no NaN
    "test_nothing_is_evaluated_while_loading_lazily": "0.31.3",  # walks through all fixtures
}
# What an old host cannot do with the MLX that pip takes today, in the same way.
TODAY_LIMITS = {
    # Training of a mixture of experts: "[gather_axis] Cannot calculate VJP with respect to indices."
    "test_lora_trains": "0.31.3",
    # The server's own thread: "There is no Stream(cpu, 0) in current thread."; 0.28.2's has none, and works.
    "test_server_completes": "0.30.7",
}
# Old hosts with the MLX and the transformers that pip takes today, or that docs/hosts.md says to take.
TODAY = {"0.28.2": ["transformers<5"], "0.29.1": ["transformers<5"], "0.30.7": [], "0.31.3": []}
# Every Python that the hosts allow, with the newest host that allows it.
PYTHONS = {"3.10": "0.31.3", **dict.fromkeys(("3.12", "3.13", "3.14", "3.14t"), "newest")}


WHEELS: list[Path] = []


def built(session: nox.Session) -> Path:
    """The wheel, which the first session builds for all."""
    if not WHEELS:
        folder = Path(session.create_tmp()) / "wheel"
        session.run("uv", "build", "-q", "--wheel", "--out-dir", str(folder), external=True)
        WHEELS.extend(folder.glob("*.whl"))
    return WHEELS[0]


def run_on(session: nox.Session, host: str, packages: list[str], selection: list[str], *files: str) -> None:
    """Install the wheel beside a host, and run the tests of these files that the host can pass."""
    session.install(f"{built(session)}[test]", "mlx-lm" if host == "newest" else f"mlx-lm=={host}", *packages)
    session.chdir("tests")  # away from the sources: the wheel is tested
    expression = ["-k", " and ".join(selection)] if selection else []
    options = ["-q", "-p", "no:cacheprovider", "-n", "auto", "--maxprocesses=8", "--dist", "worksteal"]
    session.run("python", "-m", "pytest", *options, "-m", "not thorough", *files, *expression)


def without(host: str, limits: dict[str, str]) -> list[str]:
    """What leaves the tests out that a host cannot pass."""
    ordered = list(HOSTS)
    return [f"not {test}" for test, last in limits.items() if ordered.index(host) <= ordered.index(last)]


@nox.session
@nox.parametrize("host", [nox.param(host, id=host) for host in HOSTS])
def hosts(session: nox.Session, host: str) -> None:
    """All layouts and formats, and the real commands, on one mlx-lm with the MLX of its time."""
    subjects = ("layouts", "quantized", "sanitize", "backend", "config", "commands", "text_alone")
    if host in WHOLE:
        subjects += ("serving", "lazy", "adapters", "adapters_commands", "restore", "export", "way_back")
    selection = without(host, LIMITS | MLX_LIMITS)
    run_on(session, host, HOSTS[host], selection, *(f"test_{subject}.py" for subject in subjects))


@nox.session
@nox.parametrize("host", [nox.param(host, id=host) for host in TODAY])
def today(session: nox.Session, host: str) -> None:
    """All layouts, each format's numbers, and the real commands, on an old mlx-lm with the MLX of today."""
    packages = [*HOSTS["newest"], *TODAY[host]]
    numbers = "not (test_quantized and not (test_logits_equal or test_what_mlx_can_express))"
    selection = [numbers, *without(host, LIMITS | TODAY_LIMITS)]
    run_on(session, host, packages, selection, "test_layouts.py", "test_quantized.py", "test_commands.py")


@nox.session
@nox.parametrize("python,host", [nox.param(python, host, id=f"{python}-{host}") for python, host in PYTHONS.items()])
def pythons(session: nox.Session, host: str) -> None:
    """All layouts and formats on another Python."""
    run_on(session, host, HOSTS[host], without(host, LIMITS | MLX_LIMITS), "test_layouts.py", "test_quantized.py")
