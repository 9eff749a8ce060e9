"""Fixtures by auto-round 0.16.1, rounded to nearest (`iters=0`) and decoded by its own layers (autoround_decode.py).

It writes one set of tensors per expert. Given a path instead of a model, and no optimization, it works on the files
alone ("model free") and cuts the official fused experts along the wrong axis.
"""

import copy
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from auto_round import AutoRound
from auto_round.compressors import model_free
from autoround_decode import dequantize
from common import VOCAB, WORK, base_path, keep, save_dequantized
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen3VLMoeForConditionalGeneration

LAYERS = "model.language_model.layers"


def widths(**table):
    """For `layer_config`: bits -> the layers that have them, as names without the common prefix."""
    names = {(name if name == "lm_head" else f"{LAYERS}.{name}"): b for b, part in table.items() for name in part}
    return {name: {"bits": int(bits.strip("w"))} for name, bits in names.items()}


ALL_WIDTHS = widths(
    w2=["0.self_attn.v_proj", "1.mlp.down_proj"],
    w3=["0.self_attn.k_proj", "1.mlp.up_proj", *(f"2.mlp.experts.{e}.up_proj" for e in range(3))],
    w4=["0.self_attn.o_proj"],
    w5=["1.self_attn.q_proj"],
    w6=["1.self_attn.k_proj", *(f"2.mlp.experts.{e}.gate_proj" for e in range(3))],
    w7=["1.self_attn.v_proj"],
    w8=["0.self_attn.q_proj", "1.mlp.gate_proj", *(f"2.mlp.experts.{e}.down_proj" for e in range(3))],
)
AWQ_WIDTHS = widths(
    w4=["1.self_attn.k_proj"],
    w5=["0.self_attn.q_proj", "1.mlp.down_proj", *(f"2.mlp.experts.{e}.up_proj" for e in range(3))],
    w7=["1.mlp.up_proj", *(f"2.mlp.experts.{e}.down_proj" for e in range(3))],
)
MIXED_EXPERTS = widths(
    w16=["0.mlp.experts.1.gate_proj", "0.self_attn.v_proj"],
    w8=["0.mlp.experts.2.up_proj", "0.mlp.experts.0.down_proj", "0.self_attn.q_proj", "lm_head"],
)
REST_IN_8 = widths(
    w8=[
        *(f"{layer}.self_attn.{p}_proj" for layer in range(3) for p in "qkvo"),
        *(f"1.mlp.{p}_proj" for p in ("gate", "up", "down")),
    ]
)
ASYM = {"sym": False}
G32 = {"group_size": 32}

# name: (base, scheme, format, options)
RUNS = {
    "autoround-w4-g32": ("small", "W4A16", "auto_round", G32),
    "autoround-w4-g128": ("wide", "W4A16", "auto_round", {}),
    "autoround-w4-channel": ("short", "W4A16", "auto_round", {"group_size": -1}),
    "autoround-widths-sym": ("small", "W4A16", "auto_round", {**G32, "layer_config": ALL_WIDTHS}),
    "autoround-widths-asym": ("small", "W3A16", "auto_round", {**G32, **ASYM, "layer_config": ALL_WIDTHS}),
    "autoround-gptqmodel-asym": ("small", "W4A16", "auto_round:gptqmodel", {**G32, **ASYM, "layer_config": ALL_WIDTHS}),
    "autoround-awq-asym": ("short", "W4A16", "auto_round", {**G32, **ASYM}),
    "autoround-awq-sym": ("wide", "W4A16", "auto_round:auto_awq", {"group_size": 64}),
    "autoround-awq-widths": ("small", "W6A16", "auto_round:auto_awq", {**G32, **ASYM, "layer_config": AWQ_WIDTHS}),
    "autoround-mixed-experts": (
        "short",
        "W4A16",
        "auto_round",
        {**G32, "quant_lm_head": True, "layer_config": MIXED_EXPERTS},
    ),
    "autoround-head": (
        "short",
        "W4A16",
        "auto_round",
        {**G32, "disable_opt_rtn": False, "quant_lm_head": True, "layer_config": widths(w8=["lm_head"])},
    ),
    "autoround-gate-up-projs": ("small", "W4A16", "auto_round", {**G32, "layer_config": REST_IN_8}),
    "autoround-ragged-asym": ("ragged", "W3A16", "auto_round", ASYM),
    "autoround-export-gptq-ragged": ("ragged", "W4A16", "auto_gptq", {}),
    "autoround-export-awq": ("short", "W4A16", "auto_awq", {**G32, **ASYM}),
    "autoround-export-ct": ("short", "W4A16", "llm_compressor", {**G32, **ASYM}),
    "autoround-export-mlx": (
        "short",
        "W4A16",
        "mlx",
        {**G32, "layer_config": widths(w16=["0.mlp.experts.1.gate_proj"], w8=["0.self_attn.k_proj"])},
    ),
    "autoround-mlx-w3-asym": ("short", "W3A16", "auto_round:mlx", {**G32, **ASYM}),
    "autoround-mxint4": ("short", "MXINT4", "auto_round", {}),
    "autoround-mxfp4": ("short", "MXFP4", "auto_round", {}),
    "autoround-mxfp8": ("short", "MXFP8", "auto_round", {}),
    "autoround-nvfp4": ("short", "NVFP4", "auto_round", {}),
    "autoround-nvfp4-e5m3": ("short", "NVFP4_E5M3", "auto_round", {}),
    "autoround-fp8-static": ("short", "FP8_STATIC", "auto_round", {}),
    "autoround-fp8-tensor": ("short", "FPW8A16", "auto_round", {}),
    "autoround-fp8-block": ("ragged", "FP8_BLOCK", "fp8", {}),
    "autoround-modelfree-w4": ("short", "W4A16", "auto_round", G32),
    "autoround-modelfree-mxfp4": ("short", "MXFP4", "auto_round", {}),
}
# Without calibration nothing outside of the layers is quantized, whatever the config then says of `lm_head`.
CALIBRATED = ("autoround-nvfp4", "autoround-fp8-static", "autoround-head")
TWO_BITS = {"autoround-widths-sym": 0.9, "autoround-widths-asym": 0.6, "autoround-gptqmodel-asym": 0.6}


def tokenizer():
    words = {str(i): i for i in range(VOCAB)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="0")), unk_token="0", pad_token="1"
    )


def calibration():
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(3, 70, (1, 32), generator=generator) for _ in range(16)]
    batches = [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]
    # Text only: the processor is asked for and not used.
    return {"dataset": batches, "nsamples": 16, "seqlen": 32, "batch_size": 1, "processor": Processor()}


class Processor:
    image_processor = object()

    def save_pretrained(self, *args, **kwargs):
        pass


def run(name):
    base, scheme, fmt, options = RUNS[name]
    torch.manual_seed(0)
    options = {"scheme": scheme, "iters": 0, "disable_opt_rtn": True, **copy.deepcopy(options)}
    out = WORK / name
    shutil.rmtree(out, ignore_errors=True)
    if "modelfree" in name:
        autoround = AutoRound(str(base_path(base)), model_free=True, enable_torch_compile=False, **options)
    else:
        model = Qwen3VLMoeForConditionalGeneration.from_pretrained(base_path(base), dtype=torch.bfloat16)
        options |= calibration() if name in CALIBRATED else {}
        autoround = AutoRound(model, tokenizer(), **options)
    autoround.quantize_and_save(str(out), format=fmt)
    (file,) = out.rglob("config.json")
    folder = keep(file.parent, name)
    weights = dequantize(folder)
    if "modelfree" in name:
        weights = mend_cut(weights)
    save_dequantized(name, base, weights, TWO_BITS.get(name, 0.3))
    if name == "autoround-gate-up-projs":
        rename_as_older(folder / "model.safetensors")


def rename_as_older(file):
    """One linear layer for gate and up, the projection before the index: the names of Intel's int4-mixed releases.

    Rows are quantized each on their own and are the columns of GPTQ's tensors, so that joining these is exact.
    """
    tensors, out = load_file(file), {}
    for key, value in tensors.items():
        prefix, found, rest = key.partition(".experts.")
        if not found:
            out[key] = value
            continue
        expert, projection, name = rest.split(".")
        if projection == "down_proj":
            out[f"{prefix}.experts.down_projs.{expert}.{name}"] = value
        elif projection == "gate_proj":
            up = tensors[f"{prefix}.experts.{expert}.up_proj.{name}"]
            out[f"{prefix}.experts.gate_up_projs.{expert}.{name}"] = torch.cat([value, up], 1)
    save_file(out, file, metadata={"format": "pt"})


def mend_cut(weights):
    """Undo the cut along H of the official [H, 2I] and the missing transposition of [I, H]."""
    for key in [k for k in weights if k.endswith(".gate_proj.weight") and ".experts." in k]:
        up, down = (key.replace("gate_proj", p) for p in ("up_proj", "down_proj"))
        gate_up = torch.cat([weights[key], weights[up]], 0)
        weights[key], weights[up] = (half.T for half in gate_up.chunk(2, 1))
        weights[down] = weights[down].T
    return weights


if __name__ == "__main__":
    # One small file: no need for a process of its own.
    model_free.ProcessPoolExecutor = lambda max_workers, mp_context: ThreadPoolExecutor(max_workers)
    for name in sys.argv[1:] or RUNS:
        run(name)
        print("made", name, flush=True)
