"""The base model in torch, an adapter with weights that matter, and the logits of the two merged."""

import json
import shutil
import sys
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
FIXTURES = HERE.parent / "fixtures"
BASES = HERE.parents[1] / "fixtures"
sys.path.insert(0, str(HERE.parents[1] / "make_fixtures"))

from torch_common import build, golden, logits_and_margin, read, split_experts, text_only  # noqa: E402

V5 = transformers.__version__.startswith("5.")
VERSIONS = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"


def base(name="official"):
    """A fixture's model in float32, and its ids."""
    folder = BASES / name
    config = json.loads((folder / "config.json").read_text())
    return build(config, read(folder)), golden(folder)[0]


def text_base(name="official"):
    """The same model as transformers 4's Qwen3-MoE, which has the experts as modules of their own, and no vision."""
    folder = BASES / name
    config = json.loads((folder / "config.json").read_text())
    fields = {k: v for k, v in config["text_config"].items() if k not in ("model_type", "rope_scaling", "dtype")}
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**fields, attn_implementation="eager"))
    weights = {
        name.replace("model.language_model.", "model."): value.float()
        for name, value in split_experts(text_only(read(folder))).items()
    }
    model.load_state_dict(weights, strict=True)
    model.config.text_config = model.config  # where the helpers of the other fixtures look
    ids, logits = golden(folder)
    assert torch.allclose(logits_and_margin(model.eval(), ids)[0], logits, atol=1e-4)
    return model, ids


def fill(model, seed):
    """Give every tensor of an adapter values of a size that shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:  # of DoRA: the lengths of rows, each changed by itself
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
            elif ".lora_" in name:
                parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))


def merged(model, ids):
    """The logits with the adapter's weights merged, which are the logits of the adapter beside them."""
    with torch.no_grad():
        beside = model(input_ids=ids).logits
        whole = model.merge_and_unload().eval()
    logits, margin = logits_and_margin(whole, ids)
    assert (logits - beside).abs().max() < 1e-3, (logits - beside).abs().max()
    assert margin.min() > 1e-3, float(margin.min())
    return logits


def save_golden(folder, ids, logits, plain):
    """Logits, and of which versions; those of the base model alone are far from them."""
    change = float((logits - plain).abs().mean())
    assert change > 0.1, change
    save_file(
        {"ids": ids.to(torch.int32), "logits": logits.contiguous()},
        folder / "golden.safetensors",
        metadata={"reference": VERSIONS},
    )
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder.name:28} mean change {change:.2f}, {size / 1000:.0f} KB")


def fresh(name):
    folder = FIXTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


__all__ = ["V5", "base", "fill", "fresh", "load_file", "merged", "save_golden", "text_base"]
