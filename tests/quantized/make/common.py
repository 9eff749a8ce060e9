"""What the scripts of this folder share: the base models, the paths, and the per-expert split.

Weights are named in one canonical way throughout: per expert, [out, in], float32.
"""

import copy
import json
import os
import shutil
from pathlib import Path

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
WORK = Path(os.environ.get("FIXTURE_WORK", "fixture-work")).resolve()

# No two axes of an expert's matrices are equal, and 2 * moe_intermediate_size is not hidden_size.
# small:  groups of 16 and 32, three layers with a dense one in the middle.
# wide:   every axis is a multiple of 128: groups of 64 and 128, whole blocks.
# ragged: the last 128 x 128 block of most matrices is partial, and in the fused gate|up one block
#         straddles the boundary between gate and up.
# short:  one layer, and a vocabulary of whole words of 32: a head that can be quantized.
# narrow: for tools that leave the experts in 16 bits: small experts, every other axis a multiple of 64.
# tiny:   one layer of small, for all that is a variant of a format.
# uneven: the last group of 128 columns is a partial one in every matrix but one.
BASES = {
    "small": {
        "hidden_size": 96,
        "moe_intermediate_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "mrope_section": [6, 5, 5],
    },
    "wide": {
        "hidden_size": 128,
        "moe_intermediate_size": 256,
        "intermediate_size": 384,
        "num_hidden_layers": 1,
        "mlp_only_layers": [],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "mrope_section": [12, 10, 10],
    },
    "ragged": {
        "hidden_size": 160,
        "moe_intermediate_size": 96,
        "intermediate_size": 224,
        "num_hidden_layers": 2,
        "mlp_only_layers": [1],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "mrope_section": [6, 5, 5],
    },
    "short": {
        "hidden_size": 64,
        "moe_intermediate_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 1,
        "mlp_only_layers": [],
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "mrope_section": [6, 5, 5],
        "vocab_size": 96,
    },
    "narrow": {
        "hidden_size": 64,
        "moe_intermediate_size": 24,
        "intermediate_size": 320,
        "num_hidden_layers": 2,
        "mlp_only_layers": [1],
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "mrope_section": [6, 5, 5],
    },
    "uneven": {
        "hidden_size": 192,
        "moe_intermediate_size": 160,
        "intermediate_size": 384,
        "num_hidden_layers": 1,
        "mlp_only_layers": [],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "mrope_section": [6, 5, 5],
    },
    "tiny": {
        "hidden_size": 96,
        "moe_intermediate_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 1,
        "mlp_only_layers": [],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "mrope_section": [6, 5, 5],
    },
}
VOCAB = 80  # where a base does not say
EXPERTS = 3


def config(base):
    """The config of a base model, field for field like the official release."""
    text = dict(BASES[base])
    section = text.pop("mrope_section")
    text |= {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "decoder_sparse_step": 1,
        "dtype": "bfloat16",
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_vl_moe_text",
        "norm_topk_prob": True,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "mrope_interleaved": True,
            "mrope_section": section,
            "rope_type": "default",
        },
        "rope_theta": 5000000,
        "use_cache": True,
        "vocab_size": text.get("vocab_size", VOCAB),
    }
    vision = {
        "deepstack_visual_indexes": [0],
        "depth": 1,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 8,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 16,
        "model_type": "qwen3_vl_moe",
        "num_heads": 1,
        "num_position_embeddings": 16,
        "out_hidden_size": text["hidden_size"],
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return copy.deepcopy(
        {
            "architectures": ["Qwen3VLMoeForConditionalGeneration"],
            "image_token_id": 75,
            "model_type": "qwen3_vl_moe",
            "text_config": dict(sorted(text.items())),
            "tie_word_embeddings": False,
            "transformers_version": "4.57.0.dev0",
            "video_token_id": 76,
            "vision_config": vision,
            "vision_end_token_id": 74,
            "vision_start_token_id": 73,
        }
    )


def base_path(base):
    return WORK / f"base-{base}"


def base_weights(base):
    from safetensors.torch import load_file

    return load_file(base_path(base) / "model.safetensors")


def split_experts(weights, official=True):
    """Fused experts -> one [out, in] matrix per expert and projection.

    The official layout is [E, H, 2I] and [E, I, H]; that of transformers >= 5.2 has the axes swapped.
    """
    out = {}
    for key, value in weights.items():
        prefix, _, name = key.rpartition(".")
        if name not in ("gate_up_proj", "down_proj"):
            out[key] = value
            continue
        for expert, matrix in enumerate(value):
            matrix = matrix.T if official else matrix
            if name == "down_proj":
                parts = {"down_proj": matrix}
            else:
                parts = dict(zip(("gate_proj", "up_proj"), matrix.chunk(2, 0), strict=True))
            for proj, part in parts.items():
                out[f"{prefix}.{expert}.{proj}.weight"] = part.contiguous()
    return out


def is_quantized(key):
    """True for the weights that the hand-assembled fixtures quantize: attention, dense MLP, experts."""
    return ".language_model.layers." in key and key.endswith("_proj.weight")


def weights_of(folder):
    """All tensors of a checkpoint folder."""
    from safetensors.torch import load_file

    out = {}
    for file in sorted(Path(folder).glob("model*.safetensors")):
        out |= load_file(file)
    return out


def new_fixture(name):
    """An empty folder for a fixture."""
    path = FIXTURES / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def keep(source, name):
    """Copy what a loader reads from a tool's output folder into the fixture."""
    path = new_fixture(name)
    for pattern in ("config.json", "hf_quant_config.json", "quantize_config.json", "model*.safetensors*"):
        for file in Path(source).glob(pattern):
            shutil.copyfile(file, path / file.name)
    return path


def save_config(path, cfg):
    (path / "config.json").write_text(json.dumps(cfg, indent=1) + "\n")


def save_dequantized(name, base, weights, worst=0.3):
    """Hand a fixture's dequantized float32 weights over to golden.py, which refuses a relative error above `worst`."""
    from safetensors.torch import save_file

    (WORK / "dequantized").mkdir(parents=True, exist_ok=True)
    weights = {k: v.float().contiguous() for k, v in weights.items() if ".visual." not in k}
    save_file(weights, WORK / "dequantized" / f"{name}.safetensors", metadata={"base": base, "worst": str(worst)})
