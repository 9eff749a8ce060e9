"""What happens on hosts that lack something, older or newer than those tested: one clear error, no deep traceback."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import mlx.core as mx
import pytest
from mlx_lm.models import qwen3_moe
from mlx_lm.utils import does_model_support_input_embeddings, load_config, load_model
from support import FIXTURES, ROOT, TINY
from support.commands import run

from mlx_lm_qwen3vlmoe import HostError, Model, ModelArgs

OFFICIAL = FIXTURES / "official"
RUN = (
    "import sys, pathlib\n"
    "from mlx_lm.models import qwen3_moe, rope_utils, switch_layers\n"
    "{change}\n"
    "from mlx_lm.utils import load_model, does_model_support_input_embeddings\n"
    "model, _ = load_model(pathlib.Path(sys.argv[1]), lazy=True)\n"
    "{question}\n"
)


def on_a_host_with(change: str, question: str = "", check: bool = True):
    return run(sys.executable, "-c", RUN.format(change=change, question=question), OFFICIAL, check=check)


@pytest.mark.parametrize("symbol", ["qwen3_moe", "rope_utils.initialize_rope", "switch_layers.SwitchLinear"])
def test_a_symbol_that_a_newer_host_has_dropped_is_named(symbol):
    gone = "import mlx_lm.models as m; del m.qwen3_moe; sys.modules['mlx_lm.models.qwen3_moe'] = None"
    change = f"del {symbol}" if "." in symbol else gone
    error = on_a_host_with(change, check=False).stderr.splitlines()[-1]
    assert "PluginError: The plug-in qwen3_vl_moe = mlx_lm_qwen3vlmoe.model" in error
    assert symbol.rpartition(".")[2] in error


def test_a_field_that_a_newer_host_wants_is_named(monkeypatch):
    @dataclass
    class NewerArgs:
        model_type: str
        from_the_future: int

    monkeypatch.setattr(qwen3_moe, "ModelArgs", NewerArgs)
    args = ModelArgs.from_dict(load_config(OFFICIAL))
    with pytest.raises(HostError, match=r"mlx-lm \S+ is not what .* its qwen3_moe needs the field from_the_future"):
        Model(args)


def test_a_layer_that_a_newer_host_has_renamed_is_named():
    model = Model(ModelArgs.from_dict(load_config(OFFICIAL)))
    layer = model.layers[0]
    layer.renamed = layer.pop("self_attn")
    weights = mx.load(str(OFFICIAL / "model.safetensors"))
    with pytest.raises(HostError, match=r"its qwen3_moe has no language_model\.model\.layers\.0\.self_attn\.\w+"):
        model.sanitize(weights)


def test_a_host_without_tensor_parallelism_is_not_offered_it():
    change = "if hasattr(qwen3_moe.Model, 'shard'): del qwen3_moe.Model.shard"
    question = "assert not hasattr(model, 'shard')\nmodel.shard()"
    error = on_a_host_with(change, question, check=False).stderr.splitlines()[-1]
    assert error == "AttributeError: shard: tensor parallelism needs mlx-lm 0.32.0 or newer"


def test_a_host_without_input_embeddings_is_not_offered_them():
    change = (
        "call = qwen3_moe.Model.__call__\n"
        "qwen3_moe.Model.__call__ = lambda self, inputs, cache=None: call(self, inputs, cache)"
    )
    question = (
        "import mlx.core as mx\n"
        "assert not does_model_support_input_embeddings(model)\n"
        "mx.eval(model(mx.array([[1, 2]])))\n"
        "model(mx.array([[1]]), input_embeddings=None)"
    )
    error = on_a_host_with(change, question, check=False).stderr.splitlines()[-1]
    assert error == "TypeError: input_embeddings: input_embeddings needs mlx-lm 0.28.3 or newer"


def test_what_the_host_has_is_offered():
    model, _ = load_model(OFFICIAL, lazy=True)
    assert hasattr(model, "shard") == hasattr(qwen3_moe.Model, "shard")
    assert hasattr(model.model, "pipeline") == hasattr(qwen3_moe.Qwen3MoeModel, "pipeline")
    assert does_model_support_input_embeddings(model) == does_model_support_input_embeddings(model.language_model)


def test_commands_run_where_start_up_files_do_not():
    """`python -S` runs no .pth file; the run command installs the finder by hand."""
    path = ":".join(str(entry) for entry in sys.path if entry)
    arguments = ("--model", TINY, "--prompt", "What is this package?", "--temp", 0, "--max-tokens", 64)
    environment = {"PYTHONPATH": f"{ROOT}:{path}"}
    command = (sys.executable, "-S", "-m", "mlx_lm_qwen3vlmoe", "run", "generate", *arguments)
    assert "A plug-in for MLX LM" in run(*command, env=environment).stdout
    without = run(sys.executable, "-S", "-m", "mlx_lm", "generate", *arguments, env=environment, check=False)
    assert "A plug-in for MLX LM" not in without.stdout
