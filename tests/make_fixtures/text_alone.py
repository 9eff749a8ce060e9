"""transformers 4.57.6 and 5.23.0: the text model alone, `qwen3_vl_moe_text`; run once in each environment.

transformers has the class of the backbone only, `Qwen3VLMoeTextModel`. `WithHead` is what people put around it: the
names that its `save_pretrained` writes are `model.layers.…` and `lm_head.weight`.
"""

import json
import shutil

import torch
import transformers
from common import FIXTURES, fresh, keep_only_model
from safetensors.torch import load_file
from torch_common import V5, Qwen3VLMoeForConditionalGeneration, difference, golden, read, swap
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import (
    Qwen3VLMoePreTrainedModel,
    Qwen3VLMoeTextConfig,
    Qwen3VLMoeTextModel,
)

version = transformers.__version__
assert version in ("4.57.6", "5.23.0")
OFFICIAL = FIXTURES / "official"
PREFIX = "model.language_model."


class WithHead(Qwen3VLMoePreTrainedModel):
    config_class = Qwen3VLMoeTextConfig
    _no_split_modules = None

    def __init__(self, config):
        super().__init__(config)
        self.model = Qwen3VLMoeTextModel(config)
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids):
        return self.lm_head(self.model(input_ids=input_ids).last_hidden_state)


def text_config():
    text = json.loads((OFFICIAL / "config.json").read_text())["text_config"]
    c = Qwen3VLMoeTextConfig(**text, tie_word_embeddings=False)
    c._attn_implementation = "eager"
    return c


def saved(model, name):
    folder = fresh(name)
    model.save_pretrained(folder)
    keep_only_model(folder)
    print(name, sorted(load_file(folder / "model.safetensors"))[:2], "…")
    return folder


weights = read(OFFICIAL)
weights = swap(weights) if V5 else weights
weights = {k.replace(PREFIX, "model."): v for k, v in weights.items() if k.startswith((PREFIX, "lm_head"))}
model = WithHead(text_config()).to(torch.bfloat16)
model.load_state_dict(weights, strict=True)
folder = saved(model, f"text_{version.replace('.', '_')}")
ids, logits = golden(OFFICIAL)
with torch.no_grad():
    again = WithHead(text_config()).float()
    stored = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
    again.load_state_dict(stored, strict=True)
    error = difference(again.eval()(ids), logits)
print("  against the whole model:", error)
assert error < 1e-5
shutil.copy(OFFICIAL / "golden.safetensors", folder)

# The backbone of the whole, untied model. 5.23.0 writes `tie_word_embeddings: true`, its class's default.
whole = Qwen3VLMoeForConditionalGeneration.from_pretrained(OFFICIAL, dtype=torch.bfloat16)
folder = saved(whole.model.language_model, f"backbone_{version.replace('.', '_')}")
assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] == V5
