"""transformers 5.0.0, 5.10.2 and 5.23.0: load a checkpoint and save it again; run once in each environment."""

import shutil

import torch
import transformers
from common import FIXTURES, config, fresh, keep_only_model
from torch_common import (
    Qwen3VLMoeForConditionalGeneration,
    build,
    difference,
    golden,
    join_experts,
    logits_and_margin,
    model_class_config,
    read,
    same,
    swap,
)

version = transformers.__version__
assert version in ("5.0.0", "5.10.2", "5.23.0")


def in_memory(source, c):
    """A model of this version that holds the source's weights in its own orientation."""
    model = Qwen3VLMoeForConditionalGeneration(model_class_config(c)).to(torch.bfloat16)
    model.load_state_dict(swap(read(source)), strict=True)
    return model


def save(model, name, source, decode):
    folder = fresh(name)
    model.save_pretrained(folder)
    keep_only_model(folder)
    same(decode(read(folder)), read(source))  # the content is all there
    shutil.copy(source / "golden.safetensors", folder)
    return folder


official = FIXTURES / "official"
ids, logits = golden(official)
c = config()
if version == "5.0.0":
    # Without this field 5.0.0 raises an AttributeError; with it, from_pretrained refuses the official
    # expert tensors (their axes are not those it keeps in memory).
    c["text_config"]["pad_token_id"] = None
    model = in_memory(official, c)
    save(model, "resave_5_0_0", official, lambda weights: join_experts(weights, broken=True))
else:
    model, info = Qwen3VLMoeForConditionalGeneration.from_pretrained(
        official, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info.values()), info
    folder = save(model, f"resave_{version.replace('.', '_')}", official, swap)
    again, info = Qwen3VLMoeForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    print(f"  read back by {version}:", difference(logits_and_margin(again.eval(), ids)[0], logits))
print(f"official, {version} against 4.57.6:", difference(logits_and_margin(build(c, read(official)), ids)[0], logits))

if version == "5.23.0":
    for name in ("square_gate", "square_down"):
        source = FIXTURES / name
        # Not from_pretrained: it tells the orientations apart by the shape alone, so it would take the
        # square tensor of an official checkpoint as it is, that is, the wrong way around.
        save(in_memory(source, config(name)), f"{name}_v5", source, swap)
        ids, logits = golden(source)
        wrong = Qwen3VLMoeForConditionalGeneration.from_pretrained(
            source, dtype=torch.float32, attn_implementation="eager"
        )
        off = difference(logits_and_margin(wrong.eval(), ids)[0], logits)
        print(f"  {name}: from_pretrained of the official layout is off by {off:.2f}")
        right = Qwen3VLMoeForConditionalGeneration.from_pretrained(
            FIXTURES / f"{name}_v5", dtype=torch.float32, attn_implementation="eager"
        )
        print(f"  {name}_v5: read back by {version}:", difference(logits_and_margin(right.eval(), ids)[0], logits))
