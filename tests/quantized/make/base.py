"""Make the bf16 base models in the official layout (transformers 4.57.6)."""

import torch
from common import BASES, SEEDS, base_path, config, save_config
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration


def fill(model):
    """Random weights whose rows, columns and experts all have scales and offsets of their own.

    A scale or a zero point on the wrong axis, in the wrong group or of the wrong expert then shows.
    """
    for name, p in model.named_parameters():
        if p.dim() == 1:
            p.copy_(p + 0.1 * torch.randn_like(p))
        elif "visual" in name:
            p.normal_(0, 0.05)
        elif name.endswith("mlp.gate.weight"):
            p.normal_(0, 0.25)
        elif "embed_tokens" in name or "lm_head" in name:
            p.normal_(0, 0.15)
        else:
            rows = torch.randn(*p.shape[:-1], 1)
            columns = torch.randn(*p.shape[:-2], 1, p.shape[-1])
            whole = torch.randn(*p.shape[:-2], 1, 1)
            scale = 0.07 * torch.exp(0.3 * rows + 0.2 * columns + 0.3 * whole)
            p.copy_(scale * (torch.randn_like(p) + 0.3 * rows * columns))


for base in BASES:
    torch.manual_seed(SEEDS[base])
    model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(**config(base))).float()
    with torch.no_grad():
        fill(model)
    model.to(torch.bfloat16).save_pretrained(base_path(base))
    save_config(base_path(base), config(base))
    print(base, sum(p.numel() for p in model.parameters()))
