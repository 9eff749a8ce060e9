"""transformers 4.57.6: the base models, its own re-save, tied, YaRN; other names for the same weights."""

import re
import shutil

import transformers
from common import WORK, YARN, config, fresh, keep_only_model, write_config
from torch_common import (
    HEAD,
    Qwen3VLMoeForConditionalGeneration,
    build,
    difference,
    golden,
    json_index,
    logits_and_margin,
    model_class_config,
    new_model,
    pick_ids,
    read,
    same,
    split_experts,
    text_only,
    torch,
    write,
    write_golden,
)

assert transformers.__version__ == "4.57.6"


def save(model, name, c, **how):
    """`save_pretrained`, with the config put back to the official field set."""
    folder = fresh(name)
    model.save_pretrained(folder, **how)
    keep_only_model(folder)
    write_config(folder, c)
    return folder


def base(name, kind, seed, length=24):
    c = config(kind)
    folder = save(new_model(c, seed), name, c)
    model = build(c, read(folder))
    write_golden(folder, model, pick_ids(model, length, seed))
    return folder


def renamed(name, weights, c=None):
    folder = fresh(name)
    write(folder, weights)
    write_config(folder, c or config())
    shutil.copy(official / "golden.safetensors", folder)


official = base("official", "a", 1)
weights = read(official)
ids, logits = golden(official)

loaded, info = Qwen3VLMoeForConditionalGeneration.from_pretrained(
    official, dtype=torch.bfloat16, output_loading_info=True
)
assert not any(info.values()), info
folder = fresh("resave_4_57_6")
loaded.save_pretrained(folder)
keep_only_model(folder)
same(read(folder), weights)
shutil.copy(official / "golden.safetensors", folder)

folder = save(loaded, "official_sharded", config(), max_shard_size="36KB")
same(read(folder), weights)
shutil.copy(official / "golden.safetensors", folder)
index = json_index(folder)
experts = {k: v for k, v in index.items() if "layers.2.mlp.experts" in k}
assert len(set(index.values())) >= 3
assert len(set(experts.values())) == 2

# Names used by other writers. No tool is needed (or left to install) for these: the tensors are the official ones.
one_each = split_experts(weights)
with_bias = dict(one_each)
for k in one_each:
    if k.endswith("mlp.gate.weight"):
        # Never zero, so that a loader that adds it is found out.
        with_bias[k[: -len("weight")] + "bias"] = torch.linspace(-4, 4, 5, dtype=torch.bfloat16)
renamed("per_expert", with_bias)
renamed(
    "per_expert_projection_first",
    {re.sub(r"experts\.(\d+)\.(\w+_proj)\.", r"experts.\2.\1.", k): v for k, v in one_each.items()},
)


def rename(text, visual, head):
    table = {"model.language_model.": text, "model.visual.": visual, "lm_head.": head}
    return {next(k.replace(a, b, 1) for a, b in table.items() if k.startswith(a)): v for k, v in weights.items()}


renamed("legacy_prefix", rename("language_model.model.", "visual.", "language_model.lm_head."))
renamed("bare_prefix", rename("model.", "visual.", "lm_head."))

flat = config()
flat = {**flat.pop("text_config"), **flat}  # the top level's model_type and tie_word_embeddings stay
renamed("flat_config", weights, flat)

bare = config()
del bare["vision_config"]
renamed("no_vision", text_only(weights), bare)

# Tied: the same model without its head.
c = config(tie_word_embeddings=True)
c["tie_word_embeddings"] = True
tied = Qwen3VLMoeForConditionalGeneration(model_class_config(c)).to(torch.bfloat16)
tied.load_state_dict({k: v for k, v in weights.items() if k != HEAD}, strict=False)
folder = save(tied, "tied", c)
same(read(folder), weights, but=[HEAD])
assert HEAD not in read(folder)
out = write_golden(folder, build(c, read(folder)), ids)
loaded, info = Qwen3VLMoeForConditionalGeneration.from_pretrained(
    folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
)
assert not any(info.values()), info
print("  tied, read by 4.57.6 itself:", difference(logits_and_margin(loaded.eval(), ids)[0], out))

# YaRN, beyond the original length.
c = config(**YARN)
folder = fresh("yarn")
write(folder, weights)
write_config(folder, c)
model = build(c, weights)
long_ids = pick_ids(model, 150, 2)
out = write_golden(folder, model, long_ids)
post = {**YARN["rope_scaling"], "original_max_position_embeddings": YARN["max_position_embeddings"]}
for what, text in (
    ("plain RoPE", {"rope_theta": YARN["rope_theta"]}),
    ("the default theta", {**YARN, "rope_theta": 5000000}),
    ("the extended length taken for the original", {**YARN, "rope_scaling": post}),
    ("no attention factor", {**YARN, "rope_scaling": {**YARN["rope_scaling"], "attention_factor": 1.0}}),
):
    off = difference(logits_and_margin(build(config(**text), weights), long_ids)[0], out)
    print(f"  YaRN against {what}: {off:.3f}")
    assert off > 0.05

base("square_gate", "square_gate", 3)
base("square_down", "square_down", 4)
folder = base("official_b", "b", 5)

# What mlx-lm's own loader can read: the same checkpoint, with the field it asks for.
copy = fresh("official_b_tie", WORK)
shutil.copy(folder / "model.safetensors", copy)
write_config(copy, config("b", tie_word_embeddings=False))
