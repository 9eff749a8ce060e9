"""Fixtures by a whole run of GPTQModel 7.7.0: load, calibrate, quantize, save. Dequantized as in gptq.py."""

# ruff: noqa: E402  (the number of cores is read when GPTQModel is imported)

import json
import os
import shutil
import sys

os.cpu_count = os.process_cpu_count = lambda: 8  # its thread pools divide the cores and want several
os.sched_getaffinity = lambda pid: set(range(8))

import torch
from common import VOCAB, WORK, base_path, keep, save_dequantized, weights_of
from gptq import dequantize
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.models.definitions.base_qwen3_vl import BaseQwen3VLGPTQ
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoProcessor, PreTrainedTokenizerFast

RUNS = {
    "gptqmodel-w4": {"bits": 4, "group_size": 32},
    "gptqmodel-w4-actorder": {"bits": 4, "group_size": 32, "desc_act": True, "act_group_aware": False},
    "gptqmodel-w5": {"bits": 5, "group_size": 32, "base": "tiny"},
}


def run(name, base="small", **options):
    torch.manual_seed(0)
    source = WORK / f"{name}-base"
    shutil.copytree(base_path(base), source, dirs_exist_ok=True)
    words = {str(i): i for i in range(VOCAB)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="0")), unk_token="0", pad_token="1", eos_token="2"
    )
    tokenizer.save_pretrained(source)
    AutoProcessor.from_pretrained = classmethod(lambda cls, *args, **kwargs: tokenizer)
    # The prepared samples below are token ids already; there is no image processor to run them through.
    BaseQwen3VLGPTQ.prepare_dataset = lambda self, *args, calibration_dataset=None, **kwargs: (
        args[0] if calibration_dataset is None else calibration_dataset
    )
    model = GPTQModel.load(str(source), QuantizeConfig(sym=True, offload_to_disk=False, **options), device="cpu")
    generator = torch.Generator().manual_seed(5)
    samples = [
        {
            "input_ids": torch.randint(3, 70, (1, 32), generator=generator),
            "attention_mask": torch.ones(1, 32, dtype=torch.long),
        }
        for _ in range(48)
    ]
    model.quantize(samples, batch_size=1, tokenizer=tokenizer)
    shutil.rmtree(WORK / name, ignore_errors=True)
    model.save(str(WORK / name))
    folder = keep(WORK / name, name)
    cfg = json.loads((folder / "quantize_config.json").read_text())
    qcfg = QuantizeConfig(**{k: cfg[k] for k in ("bits", "group_size", "sym", "desc_act", "format")})
    weights, out = weights_of(folder), {}
    for key, value in weights.items():
        module, _, tensor = key.rpartition(".")
        if tensor == "qweight":
            parts = ("qweight", "qzeros", "scales", "g_idx")
            out[f"{module}.weight"] = dequantize({p: weights[f"{module}.{p}"] for p in parts}, qcfg)
        elif f"{module}.qweight" not in weights:
            out[key] = value
    save_dequantized(name, base, out)
    print("made", name)


for name in sys.argv[1:] or RUNS:
    run(name, **RUNS[name])
