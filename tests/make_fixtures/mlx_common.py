"""Shared by the two MLX environments."""

import json

import mlx.core as mx
from common import WORK, fresh, keep_only_model


class NoTokenizer:
    """Stands in for the tokenizer or processor, which the tiny checkpoints do not have."""

    def save_pretrained(self, folder):
        pass


def finish(folder):
    """Leave the config and the weights; store quantized weights in float32 for the torch model."""
    keep_only_model(folder)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    weights = mx.load(str(folder / "model.safetensors"))
    if "quantization" not in config:
        return
    default, out = config["quantization"], {}
    for k, v in weights.items():
        module = k.rpartition(".")[0]
        if k.endswith((".scales", ".biases")) and f"{module}.scales" in weights:
            continue
        if f"{module}.scales" in weights:
            how = default.get(module)
            how = {n: x for n, x in (how or default).items() if n in ("group_size", "bits")}
            scales, biases = (weights[f"{module}.{n}"].astype(mx.float32) for n in ("scales", "biases"))
            v = mx.dequantize(v, scales, biases, **how)
        out[k] = v.astype(mx.float32)
    mx.save_safetensors(str(fresh(folder.name, WORK) / "model.safetensors"), out)
