"""Adapters as real PEFT saves them; run once in each environment, which tells by its versions what to make."""

import sys

import peft
import torch
import transformers
from base import base, fill, fresh, merged, save_golden, text_base
from peft import LoraConfig, get_peft_model
from torch_common import logits_and_margin

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
VERSION = tuple(int(part) for part in peft.__version__.split(".")[:2])

MADE = {  # transformers, PEFT → fixture → LoraConfig
    ("5", "0.21"): {
        "attention": {"r": 4, "lora_alpha": 10, "target_modules": ATTENTION},
        "experts": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "target_parameters": EXPERTS},
        "everything": {
            "r": 3,
            "lora_alpha": 4,
            "target_modules": [*ATTENTION, "gate_proj", "up_proj", "mlp.down_proj", "lm_head", "embed_tokens"],
            "target_parameters": [*EXPERTS, "mlp.gate.weight"],
            "rank_pattern": {r"layers\.0\.mlp\.experts\.gate_up_proj": 4, "mlp.experts.down_proj": 1, "k_proj": 5},
            "alpha_pattern": {r".*\.mlp\.experts\.gate_up_proj": 7, "mlp.gate.weight": 2, "^lm_head": 9},
        },
        "gate_up_alone": {"r": 2, "target_modules": [], "target_parameters": EXPERTS[:1]},
        "rslora_layers": {
            "r": 4,
            "lora_alpha": 3,
            "use_rslora": True,
            "target_modules": [*ATTENTION, "up_proj"],
            "exclude_modules": ["v_proj"],
            "layers_to_transform": [0, 2],
            "layers_pattern": "layers",
        },
        "dora": {
            "r": 3,
            "lora_alpha": 5,
            "use_dora": True,
            "target_modules": [*ATTENTION, "gate_proj", "up_proj", "mlp.down_proj", "lm_head"],
            "rank_pattern": {"o_proj": 2},
        },
        "vision_too": {"r": 2, "target_modules": "all-linear", "exclude_modules": ["lm_head"]},
    },
    ("5", "0.18"): {"experts_transformers5_peft018": {"r": 2, "target_modules": [], "target_parameters": EXPERTS}},
    ("4", "0.17"): {"experts_transformers4_peft017": {"r": 2, "target_modules": [], "target_parameters": EXPERTS}},
    ("4", "0.18"): {
        "experts_transformers4_peft018": {
            "r": 2,
            "target_modules": ["mlp.gate", "v_proj"],
            "target_parameters": EXPERTS,
            "rank_pattern": {"mlp.gate": 3},
        },
        "separate_experts": {
            "r": 2,
            "target_modules": ["gate_proj", "up_proj", "down_proj", "mlp.gate", "k_proj"],
            "rank_pattern": {r"experts\.3\.down_proj": 4, "mlp.gate": 1},
            "alpha_pattern": {r"experts\.[01]\.up_proj": 5},
        },
        "separate_experts_some": {"r": 2, "target_modules": r".*\.experts\.[13]\.(gate|down)_proj"},
        "dora_transformers4": {"r": 2, "use_dora": True, "target_modules": ["mlp.gate", "q_proj", "gate_proj"]},
    },
    ("4", "0.19"): {
        "experts_transformers4_peft019": {"r": 2, "target_modules": ["o_proj"], "target_parameters": EXPERTS[1:]}
    },
}


def make(name, options, seed):
    model, ids = text_base() if name.startswith("separate") else base()
    plain = logits_and_margin(model, ids)[0]
    model = get_peft_model(model, LoraConfig(**options)).eval()
    fill(model, seed)
    folder = fresh(name)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    save_golden(folder, ids, merged(model, ids), plain)


torch.manual_seed(0)
key = transformers.__version__[0], ".".join(peft.__version__.split(".")[:2])
for number, (name, options) in enumerate(MADE[key].items()):
    if len(sys.argv) < 2 or name in sys.argv[1:]:
        make(name, options, number)
