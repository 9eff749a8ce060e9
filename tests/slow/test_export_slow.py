"""What `export` writes, in programs that read Qwen3-MoE: transformers 4.57.6 and 5.23.0, and llama.cpp.

Each is installed from PyPI. llama.cpp's own converter comes with the sources of llama-cpp-python, and llama.cpp itself
with xllamacpp. And the memory that an export takes at true shapes.
"""

from __future__ import annotations

import json
import sys
import tarfile
import venv
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.utils import load
from support import FIXTURES, TINY
from support.commands import run
from support.documents import blocks
from support.hollow import AWQ, MIDDLING, MLX, awq, bf16, mlx, swapped, tensors, write, write_config
from support.tuned import converted

from mlx_lm_qwen3vlmoe.exporting.export import export

IN_TRANSFORMERS = """
import json, sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
found = {}
for name in sys.argv[2:]:
    options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    model, info = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{name}/out", **options)
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    assert not any(info.values()), info
    golden = load_file(f"{sys.argv[1]}/{name}/golden.safetensors")
    with torch.no_grad():
        logits = model(input_ids=golden["ids"].long()).logits
    found[name] = ((logits - golden["logits"]).abs().max() / golden["logits"].abs().max()).item()
print(json.dumps(found))
"""
# It knows the tokenizers of models on the hub, by what they make of a text, and not that of the tiny model.
CONVERT = """
import runpy, sys
converter, *sys.argv = sys.argv[1:]
sys.path[:0] = [converter, f"{converter}/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
runpy.run_path(f"{converter}/convert_hf_to_gguf.py", run_name="__main__")
"""
# Without flash attention, which computes in 16 bits.
IN_LLAMA_CPP = """
import json, sys, xllamacpp
model, prompts, question = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = model, 512, 1, False
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
found = []
for ids in json.loads(prompts):
    options = {"max_tokens": 1, "temperature": 0.0, "logprobs": 384, "cache_prompt": False}
    choice = server.handle_completions({"prompt": ids, **options})["choices"][0]
    found.append({each["id"]: each["logprob"] for each in choice["logprobs"]["content"][0]["top_logprobs"]})
messages = [{"role": "user", "content": question}]
chat = server.handle_chat_completions({"messages": messages, "max_tokens": 64, "temperature": 0.0})
print(json.dumps([found, chat["choices"][0]["message"]["content"]]))
"""
LAYOUTS = ("official", "resave_5_0_0", "resave_5_23_0", "per_expert", "mlx_vlm", "text_5_23_0", "tied", "yarn")


@pytest.mark.parametrize("version", ["4.57.6", "5.23.0"])
def test_transformers_gives_the_golden_logits_in_every_layout(version, torch, tmp_path):
    """YaRN, too."""
    for name in LAYOUTS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "golden.safetensors").symlink_to(FIXTURES / name / "golden.safetensors")
        export(str(FIXTURES / name), str(tmp_path / name / "out"))
    (tmp_path / "converted").mkdir()  # what mlx_lm.convert wrote of it, in between
    source = converted(FIXTURES / "official", tmp_path / "converted" / "in")
    export(str(source), str(tmp_path / "converted" / "out"))
    (tmp_path / "converted" / "golden.safetensors").symlink_to(FIXTURES / "official" / "golden.safetensors")
    python, environment = torch[version]
    names = (*LAYOUTS, "converted")
    found = json.loads(run(python, "-c", IN_TRANSFORMERS, tmp_path, *names, env=environment).stdout)
    assert found.keys() == set(names)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("version", ["4.57.6", "5.23.0"])
def test_the_program_in_the_docs_prints_the_answer(version, torch, tiny_questions, tmp_path):
    ((_, program),) = [block for block in blocks("other-tools.md") if block[0] == "python"]
    export(str(TINY), str(tmp_path / "text-model"))
    python, environment = torch[version]
    answer = run(python, "-c", program, cwd=tmp_path, env=environment).stdout.strip()
    assert tiny_questions[0]["question"] in program
    assert answer == tiny_questions[0]["answer"]


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory) -> tuple[Path, Path]:
    """The folder of llama.cpp's converter, and a Python with llama.cpp."""
    home = tmp_path_factory.mktemp("llama_cpp")
    venv.create(home / "venv", symlinks=True, with_pip=True)
    python = home / "venv" / "bin" / "python"
    run(python, "-m", "pip", "-q", "install", "xllamacpp==2026.10.11549", timeout=900)
    package = "llama-cpp-python"
    options = ("--no-deps", "--no-binary", package, "--dest", home)
    run(python, "-m", "pip", "-q", "download", *options, f"{package}==0.3.36", timeout=900)
    (archive,) = home.glob("*.tar.gz")
    with tarfile.open(archive) as sources:
        parts = (
            "/vendor/llama.cpp/conversion/",
            "/vendor/llama.cpp/gguf-py/",
            "/vendor/llama.cpp/convert_hf_to_gguf.py",
        )
        wanted = [each for each in sources.getmembers() if any(part in each.name for part in parts)]
        sources.extractall(home, wanted, filter="data")
    (converter,) = home.glob("*/vendor/llama.cpp")
    return converter, python


def test_llama_cpp_converts_it_and_has_the_same_numbers_and_the_same_answer(torch, llama_cpp, tiny_questions, tmp_path):
    converter, python = llama_cpp
    export(str(TINY), str(tmp_path / "text-model"))
    with_torch, environment = torch["5.23.0"]
    arguments = (tmp_path / "text-model", "--outfile", tmp_path / "model.gguf", "--outtype", "f32")
    run(with_torch, "-c", CONVERT, converter, "convert", *arguments, env=environment)
    model, tokenizer = load(str(TINY))
    model.set_dtype(mx.float32)
    pair = tiny_questions[0]
    messages = [{"role": "user", "content": pair["question"]}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    prompts = [ids[:3], ids[:7], ids]
    done = run(python, "-c", IN_LLAMA_CPP, tmp_path / "model.gguf", json.dumps(prompts), pair["question"])
    found, answer = json.loads(done.stdout)
    for prompt, theirs in zip(prompts, found, strict=True):
        logits = model(mx.array([prompt]))[0, -1]
        ours = (logits - mx.logsumexp(logits)).tolist()
        assert len(theirs) == len(ours) == 384  # the whole vocabulary
        assert max(abs(ours[int(token)] - value) for token, value in theirs.items()) < 1e-4
    assert answer == pair["answer"]


MEASURE = """
import resource, sys
from mlx_lm_qwen3vlmoe.exporting.export import export
export(*sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""
KINDS = {  # entries of the file, fields of the config, and the most memory in bytes; 0.15 GB of it is Python with MLX
    "fused": (lambda sizes: bf16(tensors(sizes)), {}, 0.4e9),
    "swapped": (lambda sizes: swapped(tensors(sizes)), {}, 0.4e9),
    "per expert": (lambda sizes: bf16(tensors(sizes, per_expert=True)), {}, 0.4e9),
    "packed by MLX": (lambda sizes: mlx(tensors(sizes)), MLX, 0.5e9),
    "packed by AWQ": (lambda sizes: awq(tensors(sizes, per_expert=True)), AWQ, 1.2e9),
}


@pytest.mark.parametrize("kind", KINDS)
def test_some_rows_of_floats_are_in_memory_and_a_layer_of_what_another_tool_packed(kind, tmp_path):
    """Of two layers of Qwen3-VL-30B-A3B with its vocabulary: 3.7 GB in floats."""
    entries, fields, most = KINDS[kind]
    sizes = MIDDLING | {"num_hidden_layers": 2}
    source = tmp_path / "source"
    source.mkdir()
    write(source, entries(sizes), holes=True)
    write_config(source, sizes, **fields)
    peak = int(run(sys.executable, "-c", MEASURE, source, tmp_path / "out").stdout)
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert written > (1e9 if fields else 3.7e9)
    assert peak < most, peak
