"""Configurations and paths shared by every script here (standard library only)."""

import copy
import json
import os
import shutil
import tempfile
from pathlib import Path

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
WORK = Path(os.environ.get("FIXTURE_WORK", Path(tempfile.gettempdir()) / "qwen3vlmoe_fixtures"))

# The field set of the official release; every size is made small by `MODELS`.
TEXT = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "decoder_sparse_step": 1,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 40,
    "initializer_range": 0.02,
    "intermediate_size": 56,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [1],
    "model_type": "qwen3_vl_moe_text",
    "moe_intermediate_size": 28,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "mrope_interleaved": True,
        "mrope_section": [4, 2, 2],
        "rope_type": "default",
    },
    "rope_theta": 5000000,
    "use_cache": True,
    "vocab_size": 96,
}
VISION = {
    "deepstack_visual_indexes": [0],
    "depth": 1,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 16,
    "in_channels": 3,
    "initializer_range": 0.02,
    "intermediate_size": 24,
    "model_type": "qwen3_vl_moe",
    "num_heads": 2,
    "num_position_embeddings": 16,
    "out_hidden_size": 40,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
CONFIG = {
    "architectures": ["Qwen3VLMoeForConditionalGeneration"],
    "image_token_id": 94,
    "model_type": "qwen3_vl_moe",
    "text_config": TEXT,
    "tie_word_embeddings": False,
    "transformers_version": "4.57.0.dev0",
    "video_token_id": 95,
    "vision_config": VISION,
    "vision_end_token_id": 93,
    "vision_start_token_id": 92,
}
TOKENS = range(3, 92)  # ordinary text: no image, video or vision token

# Changes to text_config. "a" has no two equal expert axes; in "square_gate" 2 * I == H,
# in "square_down" I == H; every axis of "b" is a multiple of 32, so MLX can quantize it.
MODELS = {
    "a": {},
    "b": {
        "hidden_size": 64,
        "head_dim": 32,
        "moe_intermediate_size": 96,
        "intermediate_size": 128,
        "num_experts": 4,
        "num_hidden_layers": 2,
        "mlp_only_layers": [0],
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [8, 4, 4], "rope_type": "default"},
    },
    "square_gate": {"hidden_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 2, "mlp_only_layers": []},
    "square_down": {"hidden_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 2, "mlp_only_layers": []},
}
# With this theta the original length changes the frequencies; with the official one and so few of them it does not.
YARN = {
    "max_position_embeddings": 192,
    "rope_theta": 20000,
    "rope_scaling": {
        "factor": 3.0,
        "mrope_interleaved": True,
        "mrope_section": [4, 2, 2],
        "original_max_position_embeddings": 64,
        "rope_type": "yarn",
    },
}


def config(model="a", **text):
    """The official-style config of one of `MODELS`, with more changes to its text_config."""
    c = copy.deepcopy(CONFIG)
    c["text_config"].update(copy.deepcopy(MODELS[model]), **copy.deepcopy(text))
    c["vision_config"]["out_hidden_size"] = c["text_config"]["hidden_size"]
    return c


def write_config(folder, c):
    (Path(folder) / "config.json").write_text(json.dumps(c, indent=2) + "\n")


def fresh(name, root=FIXTURES):
    """An empty folder of this name."""
    folder = root / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def keep_only_model(folder):
    """Remove what a tool writes besides the config and the weights (all fixtures have no tokenizer)."""
    for path in Path(folder).iterdir():
        if path.name != "config.json" and not path.name.startswith("model"):
            path.unlink()
