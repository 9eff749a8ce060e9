"""Fixtures by llm-compressor 0.14.0.1 (compressed-tensors 0.19.0, transformers 5.17.0), dequantized by it too.

`oneshot` after `linearize_moe` writes one set of tensors per expert. `model_free_ptq` works on the files alone
and cuts the official fused experts along the wrong axis.
"""

import importlib
import json
import re
import shutil
import sys

import torch
from common import VOCAB, WORK, base_path, keep, save_dequantized, weights_of
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from datasets import Dataset
from llmcompressor import model_free_ptq, oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.quantization import QuantizationModifier
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen3VLMoeForConditionalGeneration

IGNORE = ["re:.*visual.*", "re:.*lm_head", "re:.*mlp.gate$"]


def preset(name, **kwargs):
    return QuantizationModifier(targets="Linear", scheme=name, ignore=IGNORE, **kwargs)


def integer(bits, *targets, **weights):
    """A weight-only integer scheme."""
    if "group_size" in weights:
        weights["strategy"] = "group"
    return QuantizationScheme(
        targets=list(targets) or ["Linear"],
        weights=QuantizationArgs(num_bits=bits, type="int", **weights),
    )


def schemes(*groups, ignore=IGNORE):
    named = {f"group_{i}": group for i, group in enumerate(groups)}
    return QuantizationModifier(config_groups=named, ignore=ignore)


KV_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}

# name: (base, recipe, needs calibration data)
ONESHOT = {
    "ct-w4a16-g32": ("small", lambda: schemes(integer(4, group_size=32)), False),
    "ct-w4a16-asym-g32": ("small", lambda: schemes(integer(4, group_size=32, symmetric=False)), False),
    "ct-w4a16-asym-g128": ("wide", lambda: preset("W4A16_ASYM"), False),
    "ct-w8a16-channel": ("small", lambda: schemes(integer(8, strategy="channel")), False),
    "ct-w8a8-int8": ("small", lambda: preset("W8A8"), False),
    "ct-fp8-dynamic": ("small", lambda: preset("FP8_DYNAMIC"), False),
    "ct-fp8-static": ("small", lambda: preset("FP8", kv_cache_scheme=KV_CACHE), True),
    "ct-fp8-block": ("ragged", lambda: preset("FP8_BLOCK", bypass_divisibility_checks=True), False),
    "ct-nvfp4": ("small", lambda: preset("NVFP4"), True),
    "ct-nvfp4a16": ("small", lambda: preset("NVFP4A16"), False),
    "ct-mxfp4": ("small", lambda: preset("MXFP4"), False),
    "ct-mxfp8": ("small", lambda: preset("MXFP8"), False),
    "ct-w3a16-g32": ("small", lambda: schemes(integer(3, group_size=32)), False),
    "ct-mixed": (
        "small",
        lambda: schemes(
            integer(8, "re:.*self_attn.*", "re:.*lm_head", strategy="channel"),
            integer(4, "re:.*mlp.*_proj$", group_size=32),
            ignore=["re:.*visual.*", "re:.*mlp.gate$"],
        ),
        False,
    ),
}
MODEL_FREE = {
    "ct-modelfree-fp8-block": ("wide", "FP8_BLOCK"),
    "ct-modelfree-nvfp4a16": ("wide", "NVFP4A16"),
}


def calibration():
    words = {str(i): i for i in range(VOCAB)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="0")), unk_token="0", pad_token="1"
    )
    ids = torch.randint(3, 70, (64, 32), generator=torch.Generator().manual_seed(5)).tolist()
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 32] * len(ids)})
    return {
        "dataset": data,
        "max_seq_length": 32,
        "num_calibration_samples": len(ids),
        "pipeline": "basic",
        "processor": tokenizer,
    }


def run_oneshot(name):
    base, recipe, calibrate = ONESHOT[name]
    torch.manual_seed(0)
    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(base_path(base), dtype=torch.bfloat16)
    linearize_moe(model)
    oneshot(model=model, recipe=recipe(), **(calibration() if calibrate else {}))
    out = WORK / name
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out, save_compressed=True)
    return base, dequantize(keep(out, name))


def run_model_free(name):
    base, scheme = MODEL_FREE[name]
    out = WORK / name
    shutil.rmtree(out, ignore_errors=True)
    ignore = ["re:.*visual.*", "lm_head", "re:.*mlp.gate$", "re:.*embed_tokens$"]
    model_free_ptq(base_path(base), out, scheme=scheme, ignore=ignore, device="cpu")
    return base, mend_cut(dequantize(keep(out, name)))


def mend_cut(weights):
    """Undo the cut along H of the official [H, 2I] and the missing transposition of [I, H]."""
    for key in [k for k in weights if k.endswith(".gate_proj.weight") and ".experts." in k]:
        up, down = (key.replace("gate_proj", p) for p in ("up_proj", "down_proj"))
        gate_up = torch.cat([weights[key], weights[up]], 0)
        weights[key], weights[up] = (half.T for half in gate_up.chunk(2, 1))
        weights[down] = weights[down].T
    return weights


def decode_in_float32():
    """compressed-tensors decodes FP4 and E8M0 scales into bfloat16 unless told otherwise; nothing tells it."""

    def wrap(module, name, wrapper):
        module = importlib.import_module(f"compressed_tensors.compressors.{module}.base")
        if function := getattr(module, name, None):
            setattr(module, name, wrapper(function))

    for module in ("nvfp4", "mxfp4"):
        wrap(module, "unpack_fp4_from_uint8", lambda f: lambda a, m, n: f(a, m, n, torch.float32))
    wrap("mxfp8", "decompress_mx_scale", lambda f: lambda scale: f(scale).float())


def scheme_of(module, config):
    for scheme in config.config_groups.values():
        for target in scheme.targets:
            if target == "Linear" or re.match(target.removeprefix("re:"), module):
                return scheme
    raise KeyError(module)


def dequantize(folder):
    cfg = json.loads((folder / "config.json").read_text())["quantization_config"]
    skipped = ("sparsity_config", "transform_config", "version")
    config = QuantizationConfig.model_validate({k: v for k, v in cfg.items() if k not in skipped})
    modules, out = {}, {}
    for key, value in weights_of(folder).items():
        module, _, name = key.rpartition(".")
        modules.setdefault(module, {})[name] = value
    for module, tensors in modules.items():
        if "weight_scale" not in tensors:
            kept = {k: v for k, v in tensors.items() if not re.fullmatch("[qkv]_(scale|zero_point)", k)}
            out |= {f"{module}.{k}": v for k, v in kept.items()}
            continue
        if tensors["weight_scale"].dtype == torch.bfloat16:
            tensors["weight_scale"] = tensors["weight_scale"].float()
        scheme = scheme_of(module, config)
        fmt = scheme.format or config.format
        compressor = BaseCompressor.get_value_from_registry(getattr(fmt, "value", fmt))
        weight = compressor.decompress(tensors, scheme)["weight"]
        assert weight.dtype == torch.float32, (module, weight.dtype)
        out[f"{module}.weight"] = weight
    return out


if __name__ == "__main__":
    decode_in_float32()
    for name in sys.argv[1:] or [*ONESHOT, *MODEL_FREE]:
        base, weights = (run_oneshot if name in ONESHOT else run_model_free)(name)
        save_dequantized(name, base, weights)
        print("made", name, flush=True)
