"""Write golden.safetensors for the fixtures named on the command line (default: all that were dequantized).

`ids` and `logits` are those of transformers 4.57.6 in float32 on the weights that the quantizing tool's own
code dequantized. `weight.<module>` is the dequantized weight of a few modules, first rows only.
"""

import sys

import torch
from common import EXPERTS, FIXTURES, WORK, base_weights, config, split_experts
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

LENGTH = 12
LAYERS = "model.language_model.layers"
KEPT = [
    f"{LAYERS}.0.mlp.experts.0.gate_proj",
    f"{LAYERS}.0.mlp.experts.2.up_proj",
    f"{LAYERS}.0.mlp.experts.1.down_proj",
    f"{LAYERS}.0.self_attn.k_proj",
    f"{LAYERS}.1.mlp.down_proj",
]


def fuse(weights):
    """Per expert -> the official layout."""
    out = {k: v for k, v in weights.items() if ".experts." not in k}
    for prefix in {k.split(".experts.")[0] + ".experts" for k in weights if ".experts." in k}:

        def matrices(proj, prefix=prefix):
            return [weights[f"{prefix}.{e}.{proj}.weight"].T for e in range(EXPERTS)]

        pairs = zip(matrices("gate_proj"), matrices("up_proj"), strict=True)
        out[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat(pair, 1) for pair in pairs])
        out[f"{prefix}.down_proj"] = torch.stack(matrices("down_proj"))
    return out


def load(base, weights):
    model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(**config(base))).float().eval()
    result = model.load_state_dict(fuse(weights), strict=False)
    assert not result.unexpected_keys, result.unexpected_keys
    assert all("visual" in k for k in result.missing_keys), result.missing_keys
    return model


def router_margins(model, ids):
    """Logits, and for each row of ids the smallest gap between a chosen and a not chosen expert."""
    gaps, hooks = [], []

    def record(module, _, logits):
        top = logits.float().sort(-1, descending=True)[0]
        gaps.append((top[:, 1] - top[:, 2]).reshape(ids.shape).amin(1))

    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            hooks.append(module.register_forward_hook(record))
    logits = model(input_ids=ids).logits
    for hook in hooks:
        hook.remove()
    return logits, torch.stack(gaps).amin(0)


@torch.no_grad()
def golden(name):
    source = WORK / "dequantized" / f"{name}.safetensors"
    with safe_open(source, "pt") as f:
        base, limit = f.metadata()["base"], float(f.metadata().get("worst", 0.3))
    weights = load_file(source)
    reference = {k: v.float() for k, v in split_experts(base_weights(base)).items() if ".visual." not in k}
    assert weights.keys() == reference.keys(), weights.keys() ^ reference.keys()
    errors = {k: ((weights[k] - reference[k]).norm() / reference[k].norm()).item() for k in weights}
    worst = max(errors, key=errors.get)
    assert errors[worst] < limit, (worst, errors[worst])  # a transposed or misplaced matrix is off by more than 1

    model = load(base, weights)
    candidates = torch.randint(3, 70, (3000, LENGTH), generator=torch.Generator().manual_seed(7))
    margins = torch.cat([router_margins(model, part)[1] for part in candidates.split(500)])
    ids = candidates[margins.argmax()][None]
    logits, margin = router_margins(model, ids)
    assert logits.shape == (1, LENGTH, config(base)["text_config"]["vocab_size"])
    float_logits = load(base, reference)(input_ids=ids).logits
    distance = ((logits - float_logits).norm() / float_logits.norm()).item()

    out = {"ids": ids.to(torch.int32), "logits": logits.contiguous()}
    for module in KEPT:
        rows = 136 if base == "ragged" and module.endswith("1.down_proj") else 16  # into the second row of blocks
        if f"{module}.weight" in weights:
            out[f"weight.{module}"] = weights[f"{module}.weight"][:rows].contiguous()
    folder = FIXTURES / name
    save_file(out, folder / "golden.safetensors")
    size = sum(f.stat().st_size for f in folder.iterdir()) / 1e6
    print(
        f"{name:34s} {base:6s} {size:.2f} MB  margin {margin.item():.3f}  logits std {logits.std():.2f}"
        f"  from float {distance:.4f}  worst weight {errors[worst]:.4f} {worst}"
    )


for name in sys.argv[1:] or sorted(p.stem for p in (WORK / "dequantized").glob("*.safetensors")):
    golden(name)
