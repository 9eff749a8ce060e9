"""Fixtures of bitsandbytes, torchao, HQQ and `metal`: loaded, quantized and saved by transformers.

All of them quantize `nn.Linear` only, so that the experts stay fused and in 16 bits, in the official orientation when
transformers 4.57 saves them and with the axes swapped when transformers 5 does. The router is a linear layer in 4.57.
"""

import json
import shutil
import sys

import torch
from common import WORK, base_path, keep, save_dequantized, split_experts
from safetensors import safe_open
from transformers import BitsAndBytesConfig, Qwen3VLMoeForConditionalGeneration, __version__

BASE = "narrow"
SMALL = ("lm_head", "model.visual")  # the tiny vision tower has no whole group


def quantize(name, quantization):
    torch.manual_seed(0)
    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(
        base_path(BASE), quantization_config=quantization, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    shutil.rmtree(WORK / name, ignore_errors=True)
    model.save_pretrained(WORK / name)
    return keep(WORK / name, name)


def read(folder):
    with safe_open(folder / "model.safetensors", "pt") as f:
        return {key: f.get_tensor(key) for key in list(f.keys())}, f.metadata()


def modules_of(tensors):
    """Module -> tensor name in it -> tensor. Names may have dots: `weight.quant_state.bitsandbytes__nf4`."""
    out = {}
    for key, value in tensors.items():
        module, found, name = key.partition(".weight")
        if found:
            out.setdefault(module, {})[f"weight{name}"] = value
        else:
            module, _, name = key.rpartition(".")
            out.setdefault(module, {})[name] = value
    return out


def bitsandbytes_4bit(tensors):
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state = QuantState.from_dict({k: v for k, v in tensors.items() if k != "weight"}, torch.device("cpu"))
    state.dtype = torch.float32
    return dequantize_4bit(tensors["weight"], state)


def bitsandbytes_8bit(tensors):
    from bitsandbytes.functional import int8_vectorwise_dequant

    return int8_vectorwise_dequant(tensors["weight"], tensors["SCB"])


def metal(tensors, config):
    from transformers.integrations.metal_quantization import _affine_dequantize_tensor

    return _affine_dequantize_tensor(
        tensors["weight"], tensors["scales"], tensors["qbiases"], config["group_size"], config["bits"]
    )


def hqq(tensors):
    from hqq.core.quantize import _META_TYPE, Quantizer
    from hqq.core.utils import decode_safetensor_type

    meta = {k: decode_safetensor_type(v, _META_TYPE[k]) for k, v in tensors.items() if k in _META_TYPE}
    meta |= {"compute_dtype": torch.float32, "scale": meta["scale"].float(), "zero": meta["zero"].float()}
    return Quantizer.dequantize(tensors["W_q"], meta)


def torchao(tensors, metadata):
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    # The dtype that its tensors decode to, which not all of them take as an argument.
    metadata = {k: v.replace('"_data": "bfloat16"', '"_data": "float32"') for k, v in metadata.items()}
    whole, left = unflatten_tensor_state_dict(tensors, metadata)
    assert not left, left.keys()
    out = {k: v if type(v) is torch.Tensor else v.dequantize() for k, v in whole.items()}
    assert all(v.dtype == torch.float32 for k, v in out.items() if type(whole[k]) is not torch.Tensor)
    return out


def dequantize(folder):
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors, metadata = read(folder)
    if config["quant_method"] == "torchao":
        return torchao(tensors, metadata)
    out = {}
    for module, own in modules_of(tensors).items():
        if ".visual." in module:
            continue
        if "SCB" in own:
            weight = bitsandbytes_8bit(own)
        elif "weight.quant_map" in own:
            weight = bitsandbytes_4bit(own)
        elif "qbiases" in own:
            weight = metal(own, config)
        elif "W_q" in own:
            weight = hqq(own)
        else:
            out |= {f"{module}.{k}": v for k, v in own.items()}
            continue
        out[f"{module}.weight"] = weight
    return out


def make_metal(bits, group_size):
    from transformers import MetalConfig
    from transformers.quantizers.quantizer_metal import MetalHfQuantizer

    MetalHfQuantizer.validate_environment = lambda self, *args, **kwargs: None  # it asks for an Apple GPU
    return MetalConfig(bits=bits, group_size=group_size, modules_to_not_convert=list(SMALL))


def make_torchao(config, **options):
    import torchao.quantization as ao
    from transformers import TorchAoConfig

    return TorchAoConfig(getattr(ao, config)(**options), modules_to_not_convert=list(SMALL))


def per_group(size):
    from torchao.quantization import PerGroup

    return PerGroup(size)


def make_hqq(**options):
    from transformers import HqqConfig

    return HqqConfig(skip_modules=list(SMALL), **options)


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
MAKE = {
    "bnb-int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bnb-nf4": lambda: BitsAndBytesConfig(**NF4),
    "bnb-nf4-double": lambda: BitsAndBytesConfig(**NF4, bnb_4bit_use_double_quant=True),
    "bnb-fp4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "torchao-int8": lambda: make_torchao("Int8WeightOnlyConfig"),
    "torchao-float8": lambda: make_torchao("Float8WeightOnlyConfig"),
    "torchao-int4-g32": lambda: make_torchao(
        "IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=per_group(32)
    ),
    "metal-q4-g64": lambda: make_metal(4, 64),
    "metal-q4-g16": lambda: make_metal(4, 16),
    "metal-q8-g32": lambda: make_metal(8, 32),
}
MAKE_457 = {
    "bnb457-int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "hqq-4bit-g32": lambda: make_hqq(nbits=4, group_size=32),  # 64: the router's 3 groups, which HQQ cannot read again
    "hqq-8bit-g64": lambda: make_hqq(nbits=8, group_size=64),
    "hqq-4bit-axis0": lambda: make_hqq(nbits=4, group_size=64, axis=0),
}

OFFICIAL = __version__.startswith("4.")
todo = MAKE_457 if OFFICIAL else MAKE
for name in sys.argv[1:] or todo:
    weights = dequantize(quantize(name, todo[name]()))
    save_dequantized(name, BASE, split_experts(weights, official=OFFICIAL))
    print("made", name)
