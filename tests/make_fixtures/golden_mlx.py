"""transformers 4.57.6: goldens of the MLX conversions, after the MLX environments have run."""

import shutil

import transformers
from common import FIXTURES, WORK, config
from torch_common import (
    build,
    difference,
    from_mlx,
    golden,
    logits_and_margin,
    pick_ids,
    read,
    same,
    text_only,
    write_golden,
)

assert transformers.__version__ == "4.57.6"

# Float: the very weights of the checkpoint they were made from, hence its golden.
for name, source in (("mlx_vlm", "official"), ("mlx_lm_float", "official_b")):
    same(from_mlx(read(FIXTURES / name)), text_only(read(FIXTURES / source)))
    shutil.copy(FIXTURES / source / "golden.safetensors", FIXTURES / name)

c, source = config("b"), read(FIXTURES / "official_b")
ids, logits = golden(FIXTURES / "official_b")
for name in ("mlx_vlm_4bit", "mlx_lm_4bit"):
    weights = from_mlx(read(WORK / name))  # as dequantized by MLX, in float32
    model = build(c, weights, vision=source)
    out = write_golden(FIXTURES / name, model, pick_ids(model, 24, 6))
    print("  quantization moved the logits by", difference(logits_and_margin(model, ids)[0], logits))
