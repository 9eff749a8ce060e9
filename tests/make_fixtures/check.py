"""transformers 5.23.0: compute every golden a second time, from the files as they are."""

import json
import re

from common import FIXTURES, WORK, YARN, config
from torch_common import (
    Qwen3VLMoeForConditionalGeneration,
    build,
    difference,
    from_mlx,
    golden,
    join_experts,
    logits_and_margin,
    read,
    swap,
    torch,
    transformers,
)

assert transformers.__version__ == "5.23.0"


def prefixed(text, head="lm_head."):
    def decode(weights):
        table = {text: "model.language_model.", "visual.": "model.visual.", head: "lm_head."}
        return {next(k.replace(a, b, 1) for a, b in table.items() if k.startswith(a)): v for k, v in weights.items()}

    return decode


def per_expert(weights):
    return join_experts({k: v for k, v in weights.items() if not k.endswith("mlp.gate.bias")})


def same_names(weights):
    return weights


# Fixture: (base model, how to read it back). The rest are in the official layout.
LAYOUTS = {
    "resave_5_0_0": ("a", lambda weights: join_experts(weights, broken=True)),
    "resave_5_10_2": ("a", swap),
    "resave_5_23_0": ("a", swap),
    "per_expert": ("a", per_expert),
    "per_expert_projection_first": ("a", per_expert),
    "mlx_vlm": ("a", from_mlx),
    "legacy_prefix": ("a", prefixed("language_model.model.", "language_model.lm_head.")),
    "bare_prefix": ("a", prefixed("model.")),
    "square_gate": ("square_gate", same_names),
    "square_gate_v5": ("square_gate", swap),
    "square_down": ("square_down", same_names),
    "square_down_v5": ("square_down", swap),
    "official_b": ("b", same_names),
    "mlx_lm_float": ("b", from_mlx),
    "mlx_vlm_4bit": ("b", from_mlx),
    "mlx_lm_4bit": ("b", from_mlx),
}
# What transformers 5.23.0 itself reads right, through from_pretrained.
DIRECT = (
    "official", "official_sharded", "resave_4_57_6", "resave_5_10_2", "resave_5_23_0", "tied", "yarn",
    "square_gate_v5", "square_down_v5", "official_b",
)  # fmt: skip

vision = {m: read(FIXTURES / n) for m, n in (("a", "official"), ("b", "official_b"))}
total = 0
for folder in sorted(p for p in FIXTURES.iterdir() if (p / "golden.safetensors").exists()):
    name = folder.name
    if (
        name != "official"
        and name not in LAYOUTS
        and not re.match("official_sharded|resave_4|flat|tied|no_vision|yarn", name)
    ):
        continue  # another maker's
    base, decode = LAYOUTS.get(name, ("a", same_names))
    c = config(base, **(YARN if name == "yarn" else {}))
    if name == "tied":
        c["tie_word_embeddings"] = True
    quantized = "quantization" in json.loads((folder / "config.json").read_text())
    weights = decode(read(WORK / name if quantized else folder))
    ids, logits = golden(folder)
    model = build(c, weights, vision.get(base))
    assert logits.shape == (*ids.shape, c["text_config"]["vocab_size"])
    out, margin = logits_and_margin(model, ids)
    error, line = difference(out, logits), ""
    assert error < 1e-5, (name, error)
    if name in DIRECT:
        loaded, info = Qwen3VLMoeForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
        )
        assert not any(info.values()), (name, info)
        direct = difference(logits_and_margin(loaded.eval(), ids)[0], logits)
        assert direct < 1e-5, (name, direct)
        line = f", from_pretrained {direct:.1e}"
    size = sum(p.stat().st_size for p in folder.iterdir())
    total += size
    print(
        f"{name:28} {size / 1000:4.0f} kB  margin {margin.min():.3f}  std {logits.std():.2f}  error {error:.1e}{line}"
    )
print(f"{total / 1e6:.2f} MB")
