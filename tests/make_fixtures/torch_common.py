"""Helpers that need torch and transformers (4.57.6 or any 5.x).

"Official" weights below are a dict with the keys and shapes of the official release:
`experts.gate_up_proj [E, H, 2I]`, `experts.down_proj [E, I, H]`.
"""

import json
import random
import re
from pathlib import Path

import torch
import transformers
from common import TOKENS
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

torch.set_num_threads(2)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
V5 = int(transformers.__version__.split(".")[0]) >= 5
FUSED = ("experts.gate_up_proj", "experts.down_proj")
HEAD, EMBEDDINGS = "lm_head.weight", "model.language_model.embed_tokens.weight"


def read(folder):
    weights = {}
    for path in sorted(Path(folder).glob("model*.safetensors")):
        part = load_file(path)
        assert not weights.keys() & part.keys()
        weights.update(part)
    return weights


def write(folder, weights, name="model.safetensors"):
    save_file({k: v.contiguous() for k, v in weights.items()}, Path(folder) / name, metadata={"format": "pt"})


def json_index(folder):
    return json.loads((Path(folder) / "model.safetensors.index.json").read_text())["weight_map"]


def swap(weights):
    """From the official orientation of the fused experts to that of transformers 5, and back."""
    return {k: v.transpose(1, 2).contiguous() if k.endswith(FUSED) else v for k, v in weights.items()}


def split_experts(weights):
    """Official to per-expert, `[out, in]`."""
    out = {}
    for k, v in weights.items():
        if not k.endswith(FUSED):
            out[k] = v
            continue
        prefix, _, kind = k.rpartition(".")
        parts = v.chunk(2, dim=2) if kind == "gate_up_proj" else (v,)
        for name, part in zip(("gate_proj", "up_proj") if len(parts) == 2 else ("down_proj",), parts, strict=True):
            for e, w in enumerate(part):
                out[f"{prefix}.{e}.{name}.weight"] = w.T.contiguous()
    return out


def join_experts(weights, broken=False):
    """Per-expert back to official; `broken` reads the content transformers 5.0.0 writes."""
    out, experts = {}, {}
    for k, v in weights.items():
        m = re.match(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight$", k)
        n = re.match(r"(.*\.experts)\.(gate|up|down)_proj\.(\d+)\.weight$", k)
        if m:
            experts.setdefault(m[1], {})[int(m[2]), m[3]] = v
        elif n:
            experts.setdefault(n[1], {})[int(n[3]), n[2]] = v
        else:
            out[k] = v
    for prefix, ws in experts.items():
        count = 1 + max(e for e, _ in ws)
        if broken:  # gate and up are the upper and lower half of the official [H, 2I]; down is [I, H]
            up = [torch.cat([ws[e, "gate"], ws[e, "up"]], 0) for e in range(count)]
            down = [ws[e, "down"] for e in range(count)]
        else:
            up = [torch.cat([ws[e, "gate"], ws[e, "up"]], 0).T for e in range(count)]
            down = [ws[e, "down"].T for e in range(count)]
        out[f"{prefix}.gate_up_proj"] = torch.stack(up).contiguous()
        out[f"{prefix}.down_proj"] = torch.stack(down).contiguous()
    return out


def from_mlx(weights):
    """Float weights of an MLX conversion back to official (vision left out)."""
    out = {}
    for k, v in weights.items():
        if k.startswith("vision_tower."):
            continue
        k = k.replace("language_model.lm_head", "lm_head").replace("language_model.model", "model.language_model")
        m = re.match(r"(.*)\.switch_mlp\.(\w+_proj)\.weight$", k)
        if m:
            for e, w in enumerate(v):
                out[f"{m[1]}.experts.{e}.{m[2]}.weight"] = w
        else:
            out[k] = v
    return join_experts(out)


def model_class_config(c):
    c = Qwen3VLMoeConfig(**c)
    c._attn_implementation = "eager"
    return c


def build(c, weights, vision=None):
    """The torch model of these official weights, in float32. Nothing may be missing or left over.

    `vision` lends the vision tower's tensors where the checkpoint has none; they play no part in text.
    """
    model = Qwen3VLMoeForConditionalGeneration(model_class_config(c)).float()
    weights = {k: v.float() for k, v in (swap(weights) if V5 else weights).items()}
    if vision is not None:
        weights.update({k: v.float() for k, v in vision.items() if k.startswith("model.visual.")})
    if c["tie_word_embeddings"]:
        weights[HEAD] = weights[EMBEDDINGS]
    model.load_state_dict(weights, strict=True)
    assert model.config.text_config._attn_implementation == "eager"
    assert {b.dtype for n, b in model.named_buffers() if n.endswith("inv_freq")} == {torch.float32}
    return model.eval()


def new_model(c, seed):
    """A bfloat16 model whose layers all matter: wide weights, uneven norms, logits of std above 1."""
    torch.manual_seed(seed)
    model = Qwen3VLMoeForConditionalGeneration(model_class_config(c)).float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "visual" in name:
                p.normal_(0, 0.1)
            elif "norm" in name:
                p.copy_(1 + 0.25 * torch.randn_like(p))
            elif name.endswith("mlp.gate.weight"):
                p.normal_(0, 0.5)
            elif name in (HEAD, EMBEDDINGS):
                p.normal_(0, 0.35)
            else:
                p.normal_(0, p.shape[-1] ** -0.5 if p.dim() == 2 else p.shape[1] ** -0.5)
    return model.to(torch.bfloat16)


def logits_and_margin(model, ids):
    """Logits, and per token the least gap between the last chosen and the first unchosen expert."""
    logits, margin, _ = run(model, ids)
    return logits, margin


@torch.no_grad()
def run(model, ids):
    """As above, with the experts chosen in each layer."""
    top, gaps, chosen = model.config.text_config.num_experts_per_tok, [], []

    def hook(gate, inputs, _):
        router = torch.nn.functional.linear(inputs[0].reshape(-1, inputs[0].shape[-1]), gate.weight)
        ordered, order = router.sort(-1, descending=True)
        chosen.append(order[:, :top].flatten().tolist())
        gaps.append((ordered[:, top - 1] - ordered[:, top]).reshape(ids.shape))

    hooks = [m.register_forward_hook(hook) for n, m in model.named_modules() if n.endswith("mlp.gate")]
    logits = model(input_ids=ids).logits.float()
    for h in hooks:
        h.remove()
    return logits, torch.stack(gaps).amin(0), chosen


def pick_ids(model, length, seed):
    """Random ids, each the one of 6 draws that leaves the router the clearest choice."""
    rng, ids = random.Random(seed), torch.zeros(1, 0, dtype=torch.long)
    for _ in range(length):
        draws = torch.tensor(rng.sample(list(TOKENS), 6))[:, None]
        tries = torch.cat([ids.expand(6, -1), draws], 1)
        _, margin = logits_and_margin(model, tries)
        best = int(margin[:, -1].argmax())
        ids = tries[best : best + 1]
    return ids


def write_golden(folder, model, ids):
    logits, margin, chosen = run(model, ids)
    assert all(len(set(layer)) == model.config.text_config.num_experts for layer in chosen), "an expert is never chosen"
    assert logits.std() > 1, float(logits.std())
    assert margin.min() > 0.02, float(margin.min())
    save_file(
        {"ids": ids.to(torch.int32), "logits": logits.contiguous()},
        Path(folder) / "golden.safetensors",
        # One entry: the order of several is not the same in every run.
        metadata={"reference": f"transformers {transformers.__version__}, float32; router margin {margin.min():.4f}"},
    )
    print(f"{Path(folder).name:26} std {logits.std():.2f}, router margin {margin.min():.4f}, {ids.shape[1]} tokens")
    return logits


def golden(folder):
    g = load_file(Path(folder) / "golden.safetensors")
    return g["ids"].long(), g["logits"]


def same(a, b, but=()):
    """Assert two dicts of weights are equal, bit for bit."""
    assert a.keys() - set(but) == b.keys() - set(but), a.keys() ^ b.keys()
    for k in a.keys() - set(but):
        assert a[k].dtype == b[k].dtype, k
        assert torch.equal(a[k], b[k]), k


def text_only(weights):
    return {k: v for k, v in weights.items() if not k.startswith("model.visual.")}


def difference(a, b):
    return float((a - b).norm() / b.norm())
