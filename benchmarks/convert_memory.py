"""Peak memory of `mlx_lm.convert -q` on an FP8 checkpoint, against the bfloat16 size of its weights.

    python benchmarks/convert_memory.py [--layers 8] [--experts 32]

Makes a checkpoint with the layer shapes of Qwen3-VL-30B-A3B (fewer layers and experts, random values, block FP8, one
tensor an expert, one file a layer), converts it in a process of its own, and prints that process's peak memory.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx

TINY = Path(__file__).resolve().parents[1] / "examples" / "tiny-qwen3-vl-moe"
HIDDEN, WIDTH, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 2048, 768, 32, 4, 128, 4096


def fp8(out: int, inputs: int) -> tuple[mx.array, mx.array]:
    """Random e4m3 codes (no NaN) and the scales of blocks of 128 by 128."""
    codes = mx.random.randint(0, 120, (out, inputs)).astype(mx.uint8)
    return codes, mx.random.uniform(1e-4, 2e-4, (out // 128, inputs // 128))


def linears(n: int, experts: int) -> dict[str, tuple[int, int]]:
    """Names and shapes, ``(out, in)``, of what layer ``n`` stores in FP8."""
    prefix = f"model.language_model.layers.{n}"
    shapes = {f"{prefix}.self_attn.{p}_proj": (KV_HEADS * HEAD_DIM, HIDDEN) for p in "kv"}
    shapes[f"{prefix}.self_attn.q_proj"] = HEADS * HEAD_DIM, HIDDEN
    shapes[f"{prefix}.self_attn.o_proj"] = HIDDEN, HEADS * HEAD_DIM
    for e in range(experts):
        shapes |= {f"{prefix}.mlp.experts.{e}.{p}_proj": (WIDTH, HIDDEN) for p in ("gate", "up")}
        shapes[f"{prefix}.mlp.experts.{e}.down_proj"] = HIDDEN, WIDTH
    return shapes


def layer(n: int, experts: int) -> dict[str, mx.array]:
    """What layer ``n`` stores in bfloat16."""
    prefix = f"model.language_model.layers.{n}"
    return {
        **{f"{prefix}.{p}_layernorm.weight": mx.ones((HIDDEN,)) for p in ("input", "post_attention")},
        **{f"{prefix}.self_attn.{p}_norm.weight": mx.ones((HEAD_DIM,)) for p in "qk"},
        f"{prefix}.mlp.gate.weight": mx.random.normal((experts, HIDDEN)),
    }


def write(folder: Path, layers: int, experts: int) -> tuple[int, int]:
    """Write the checkpoint; return its size and the size of its weights in bfloat16."""
    for file in TINY.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    config = json.loads((TINY / "config.json").read_text())
    config["text_config"] |= {
        "hidden_size": HIDDEN,
        "moe_intermediate_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
    }
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    floats = {
        "model.language_model.embed_tokens.weight": mx.random.normal((VOCAB, HIDDEN)),
        "model.language_model.norm.weight": mx.ones((HIDDEN,)),
        "lm_head.weight": mx.random.normal((VOCAB, HIDDEN)),
    }
    stored = full = 0
    for n in range(-1, layers):
        weights = {name: array.astype(mx.bfloat16) for name, array in (layer(n, experts) if n >= 0 else floats).items()}
        full += sum(array.nbytes for array in weights.values())
        for name, (out, inputs) in linears(n, experts).items() if n >= 0 else ():
            weights[f"{name}.weight"], weights[f"{name}.weight_scale_inv"] = fp8(out, inputs)
            full += 2 * out * inputs
        stored += sum(array.nbytes for array in weights.values())
        mx.save_safetensors(str(folder / f"model-{n + 1:05d}.safetensors"), weights, {"format": "pt"})
    return stored, full


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=32)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        source, target = Path(temporary) / "fp8", Path(temporary) / "4bit"
        source.mkdir()
        stored, full = write(source, arguments.layers, arguments.experts)
        convert = [Path(sys.executable).parent / "mlx_lm.convert", "--hf-path", source, "--mlx-path", target, "-q"]
        subprocess.run(list(map(str, convert)), check=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        written = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    print(f"{arguments.layers} layers of {arguments.experts} experts")
    for name, size in (("FP8 file", stored), ("in bfloat16", full), ("4-bit file", written), ("peak memory", peak)):
        print(f"{name:>12} {size / 1e9:6.2f} GB  {size / full:5.2f} of bfloat16")


if __name__ == "__main__":
    main()
