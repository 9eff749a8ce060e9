"""Tokens a second of llama.cpp on the CPU beside this package: the same random layers, in 4 bits, on the same cores.

python benchmarks/llama_cpp.py    # a minute, 3 GB of disk; needs the extra "bench"; writes nothing
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
from checkpoints import Sizes, write

HERE = Path(__file__).resolve().parent
OUTSIDE = {"model.language_model.embed_tokens": "token_embd", "model.language_model.norm": "output_norm"}
LAYER = {
    **{f"self_attn.{p}_proj": f"attn_{p}" for p in "qkv"},
    **{f"self_attn.{p}_norm": f"attn_{p}_norm" for p in "qk"},
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}
FLOAT = ("_norm.weight", "ffn_gate_inp.weight")  # as llama.cpp keeps them


def as_gguf(name: str, array: mx.array) -> dict[str, mx.array]:
    """A tensor of the official layout under llama.cpp's names, in its shapes."""
    if ".visual." in name:
        return {}
    path = name.removesuffix(".weight")
    if path in OUTSIDE or path == "lm_head":
        return {f"{OUTSIDE.get(path, 'output')}.weight": array}
    number, _, rest = path.removeprefix("model.language_model.layers.").partition(".")
    if rest == "mlp.experts.gate_up_proj":
        gate, up = mx.split(array.swapaxes(-1, -2), 2, -2)
        return {f"blk.{number}.ffn_gate_exps.weight": gate, f"blk.{number}.ffn_up_exps.weight": up}
    if rest == "mlp.experts.down_proj":
        return {f"blk.{number}.ffn_down_exps.weight": array.swapaxes(-1, -2)}
    return {f"blk.{number}.{LAYER[rest]}.weight": array}


def write_gguf(source: Path, sizes: Sizes, file: Path) -> None:
    """The official layout as llama.cpp's qwen3moe in Q4_0, with a vocabulary of numbers."""
    writer = gguf.GGUFWriter(file, "qwen3moe")
    text = json.loads((source / "config.json").read_text())["text_config"]
    writer.add_block_count(sizes.layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(sizes.hidden)
    writer.add_feed_forward_length(sizes.width)
    writer.add_expert_feed_forward_length(sizes.width)
    writer.add_expert_count(sizes.experts)
    writer.add_expert_used_count(text["num_experts_per_tok"])
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.kv_heads)
    writer.add_key_length(sizes.head_dim)
    writer.add_value_length(sizes.head_dim)
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_rope_freq_base(text["rope_theta"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", *(f"t{n}" for n in range(1, sizes.vocab))])
    writer.add_token_scores([0.0] * sizes.vocab)
    writer.add_token_types([2, *[1] * (sizes.vocab - 1)])
    q4 = gguf.GGMLQuantizationType.Q4_0
    for path in sorted(source.glob("*.safetensors")):
        for stored, whole in mx.load(str(path)).items():
            for name, array in as_gguf(stored, whole).items():
                values = np.array(array.astype(mx.float32))
                if name.endswith(FLOAT):
                    writer.add_tensor(name, values)
                else:
                    writer.add_tensor(name, gguf.quantize(values, q4), raw_dtype=q4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp(file: Path, cores: int, length: int) -> dict[str, float]:
    """Rates by its own clock: of a prompt, and of 32 tokens after it."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.n_parallel, parameters.verbosity = 2048, 1, 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = cores
    server = xllamacpp.Server(parameters)
    request = {"n_predict": 32, "ignore_eos": True, "cache_prompt": False, "temperature": 0}
    prompt = np.random.default_rng(0).integers(3, 4000, length).tolist()
    best = {"prefill": 0.0, "decode": 0.0}
    for _ in range(3):
        timings = server.handle_completions(request | {"prompt": prompt})["timings"]
        assert timings["prompt_n"] == length, timings
        best["prefill"] = max(best["prefill"], timings["prompt_per_second"])
        best["decode"] = max(best["decode"], timings["predicted_per_second"])
    return best


def ours(folder: Path, length: int) -> dict[str, float]:
    command = [sys.executable, HERE / "measure.py", "rates", "ours", folder, str(length)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--length", type=int, default=128, help="of the prompt, in tokens")
    options = parser.parse_args()
    sizes = Sizes(options.layers, options.experts)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(folder / "source", sizes)
        write_gguf(folder / "source", sizes, folder / "model.gguf")
        command = ["-m", "mlx_lm", "convert", "--hf-path", folder / "source", "--mlx-path", folder / "4bit", "-q"]
        subprocess.run([sys.executable, *map(str, command)], check=True, stdout=subprocess.DEVNULL)
        before = ours(folder / "4bit", options.length)
        theirs = llama_cpp(folder / "model.gguf", cores, options.length)
        after = ours(folder / "4bit", options.length)
    print(f"{cores} cores, {sizes.layers} layers of {sizes.experts} experts, MLX {mx.__version__}, ", end="")
    print(f"xllamacpp {version('xllamacpp')}, tokens a second:")
    for rate in ("prefill", "decode"):
        mine = max(before[rate], after[rate])
        print(f"{rate}: this package {mine:.1f}, llama.cpp {theirs[rate]:.1f}, {theirs[rate] / mine:.1f} times as many")


if __name__ == "__main__":
    main()
