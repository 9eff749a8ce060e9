"""Checkpoints of random values with any layer shapes, in the layouts that the benchmarks compare."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

TINY = Path(__file__).resolve().parents[1] / "examples" / "tiny-qwen3-vl-moe"


@dataclass(frozen=True)
class Sizes:
    """The layer shapes of Qwen3-VL-30B-A3B, with few layers and a small vocabulary, unless said otherwise."""

    layers: int = 2
    experts: int = 128
    hidden: int = 2048
    width: int = 768
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128
    vocab: int = 4096

    def text_config(self) -> dict:
        return {
            "hidden_size": self.hidden,
            "moe_intermediate_size": self.width,
            "intermediate_size": self.width,
            "num_experts": self.experts,
            "num_experts_per_tok": min(8, self.experts),
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "tie_word_embeddings": False,  # official configs lack it here, which mlx-lm's own module needs
        }

    def parameters(self) -> int:
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        experts = self.experts * (3 * self.hidden * self.width + self.hidden)
        return 2 * self.vocab * self.hidden + self.layers * (attention + experts)


def linears(sizes: Sizes, n: int, experts: bool) -> dict[str, tuple[int, int]]:
    """Names and shapes, ``(out, in)``, of layer ``n``'s linear layers, with one for each expert or without experts."""
    prefix = f"model.language_model.layers.{n}"
    shapes = {f"{prefix}.self_attn.{p}_proj": (sizes.kv_heads * sizes.head_dim, sizes.hidden) for p in "kv"}
    shapes[f"{prefix}.self_attn.q_proj"] = sizes.heads * sizes.head_dim, sizes.hidden
    shapes[f"{prefix}.self_attn.o_proj"] = sizes.hidden, sizes.heads * sizes.head_dim
    for e in range(sizes.experts if experts else 0):
        shapes |= {f"{prefix}.mlp.experts.{e}.{p}_proj": (sizes.width, sizes.hidden) for p in ("gate", "up")}
        shapes[f"{prefix}.mlp.experts.{e}.down_proj"] = sizes.hidden, sizes.width
    return shapes


def floats(sizes: Sizes, n: int) -> dict[str, mx.array]:
    """What layer ``n`` stores besides its linear layers; for -1, what stands outside the layers."""
    if n < 0:
        vision = {k: v for k, v in mx.load(str(TINY / "model.safetensors")).items() if "visual" in k}
        return vision | {
            "model.language_model.embed_tokens.weight": random(sizes.vocab, sizes.hidden),
            "model.language_model.norm.weight": mx.ones((sizes.hidden,)),
            "lm_head.weight": random(sizes.vocab, sizes.hidden),
        }
    prefix = f"model.language_model.layers.{n}"
    return {
        **{f"{prefix}.{p}_layernorm.weight": mx.ones((sizes.hidden,)) for p in ("input", "post_attention")},
        **{f"{prefix}.self_attn.{p}_norm.weight": mx.ones((sizes.head_dim,)) for p in "qk"},
        f"{prefix}.mlp.gate.weight": random(sizes.experts, sizes.hidden),
    }


def random(*shape: int) -> mx.array:
    return mx.random.uniform(-0.04, 0.04, shape)


def write(folder: Path, sizes: Sizes, layout: str = "official", dtype: str = "bfloat16") -> None:
    """Write a checkpoint, a file a layer.

    Layouts: ``official`` (fused experts), ``per_expert``, and ``fp8`` (per expert, e4m3 in blocks of 128 by 128).
    """
    mx.random.seed(0)
    folder.mkdir()
    for file in TINY.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    config = json.loads((TINY / "config.json").read_text())
    config["text_config"] |= sizes.text_config() | {"dtype": dtype}
    if layout == "fp8":
        config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    for n in range(-1, sizes.layers):
        weights = floats(sizes, n)
        shapes = linears(sizes, n, experts=layout != "official") if n >= 0 else {}
        if layout == "official" and n >= 0:
            experts = f"model.language_model.layers.{n}.mlp.experts"
            weights[f"{experts}.gate_up_proj"] = random(sizes.experts, sizes.hidden, 2 * sizes.width)
            weights[f"{experts}.down_proj"] = random(sizes.experts, sizes.width, sizes.hidden)
        if layout != "fp8":
            weights |= {f"{name}.weight": random(*shape) for name, shape in shapes.items()}
        weights = {name: array.astype(getattr(mx, dtype)) for name, array in weights.items()}
        for name, (out, inputs) in shapes.items() if layout == "fp8" else ():
            weights[f"{name}.weight"] = mx.random.randint(0, 120, (out, inputs)).astype(mx.uint8)  # 127 is NaN
            weights[f"{name}.weight_scale_inv"] = mx.random.uniform(1e-4, 2e-4, (out // 128, inputs // 128))
        mx.save_safetensors(str(folder / f"model-{n + 1:05d}.safetensors"), weights, {"format": "pt"})


def as_qwen3_moe(folder: Path) -> None:
    """Turn a checkpoint converted by MLX, in place, into one of mlx-lm's text model ``qwen3_moe``: the same tensors."""
    config = json.loads((folder / "config.json").read_text())
    config |= config.pop("text_config") | {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
    for field in {"quantization", "quantization_config"} & config.keys():
        config[field] = {path.removeprefix("language_model."): value for path, value in config[field].items()}
    (folder / "config.json").write_text(json.dumps(config))
    for path in folder.glob("*.safetensors"):
        with path.open("r+b") as file:  # the header of the file shrinks, and is filled up with blanks
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length).replace(b'"language_model.', b'"')
            file.seek(8)
            file.write(header.ljust(length))


def awq_tensors(sizes: Sizes) -> tuple[dict, dict[str, mx.array]]:
    """Config and tensors, none of them evaluated, of a checkpoint in AWQ: nine tensors an expert."""
    config = json.loads((TINY / "config.json").read_text())
    config["text_config"] |= sizes.text_config()
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}
    weights: dict[str, mx.array] = {}
    for n in range(-1, sizes.layers):
        weights |= floats(sizes, n)
        for name, (out, inputs) in linears(sizes, n, experts=True).items() if n >= 0 else ():
            weights[f"{name}.qweight"] = mx.zeros((inputs, out // 8), mx.int32)
            weights[f"{name}.qzeros"] = mx.zeros((inputs // 128, out // 8), mx.int32)
            weights[f"{name}.scales"] = mx.zeros((inputs // 128, out), mx.float16)
    return config, weights
