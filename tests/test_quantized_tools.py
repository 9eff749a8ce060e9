"""bitsandbytes, torchao, HQQ and metal where the fixtures of tests/quantized do not reach: odd sizes and bad input."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_config
from support import QUANTIZED

from mlx_lm_qwen3vlmoe import CheckpointError, ModelArgs, quantization
from mlx_lm_qwen3vlmoe.config import linear_shape
from mlx_lm_qwen3vlmoe.errors import MissingTensorError
from mlx_lm_qwen3vlmoe.inspection.report import inspect
from mlx_lm_qwen3vlmoe.model import Model

RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def the_same_numbers_in_any_order_of_tests():
    RANDOM.bit_generator.state = np.random.default_rng(0).bit_generator.state


def decode(tensors, shape, lead=(), **settings):
    """A float weight, and the parameters that MLX has it packed by."""
    layer = quantization.Layer("layer", tensors, settings, mx.float32, lead, host_shape=shape)
    found, parameters, _ = quantization.decode(layer)
    if parameters is None:
        return found["weight"], None
    assert all(array.dtype == mx.uint32 for suffix, array in found.items() if suffix == "weight")
    return quantization.dequantize(found, parameters, mx.float32), parameters


def codes(*shape, most=256, dtype="u1"):
    return RANDOM.integers(0, most, shape).astype(dtype)


def floats(*shape):
    return RANDOM.uniform(0.5, 2, shape).astype("f4")


def arrays(tensors):
    return {suffix: mx.array(array) for suffix, array in tensors.items()}


def nf4(shape=(6, 32), block=64, storage="u1", **fields):
    """Tensors of a layer, and its weight."""
    size = shape[0] * shape[1]
    packed, table, scales = codes(size // 2), floats(16), floats(-(-size // block))
    state = json.dumps({"quant_type": "nf4", "blocksize": block, "shape": shape, **fields}).encode()
    tensors = {
        "weight": packed.view(storage).reshape(-1, 1),
        "weight.absmax": scales,
        "weight.quant_map": table,
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(state, "u1"),
    }
    nibbles = np.stack([packed >> 4, packed & 15], -1).reshape(-1)
    return arrays(tensors), (table[nibbles] * np.repeat(scales, block)[:size]).reshape(shape)


def test_four_bits_of_bitsandbytes_may_end_in_a_short_block():
    tensors, weight = nf4((5, 20))
    assert mx.allclose(decode(tensors, (5, 20), quant_method="bitsandbytes")[0], mx.array(weight))


def test_four_bits_of_bitsandbytes_may_be_stored_as_another_type():
    """What FSDP shards has the type of the other parameters."""
    tensors, weight = nf4(storage="f2")
    settings = {"quant_method": "bitsandbytes", "bnb_4bit_quant_storage": "float16"}
    assert mx.allclose(decode(tensors, (6, 32), **settings)[0], mx.array(weight))


STATE = "weight.quant_state.bitsandbytes__nf4"
TEXT = mx.array(list(b"[" * 4000), mx.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight.absmax": None}, r"layer\.weight\.absmax: expected this tensor beside"),
        ({"weight.absmax": mx.ones(4)}, r"layer\.weight\.absmax: expected the shape \[3\]"),
        ({"weight.absmax": mx.zeros(3, mx.uint8)}, r"layer\.weight\.nested_absmax: expected this tensor beside"),
        (
            {"weight.nested_absmax": mx.ones(1)},
            r"a positive integer for nested_blocksize|nested_quant_map: expected this tensor beside",
        ),
        ({"weight.quant_map": mx.ones(15)}, r"layer\.weight\.quant_map: expected the shape \[16\]"),
        ({"weight": mx.zeros((96, 1))}, r"layer\.weight: expected uint8, according to bnb_4bit_quant_storage"),
        ({"weight": mx.zeros((6, 16), mx.uint8)}, r"layer\.weight: expected the shape \[96, 1\]"),
        ({STATE: None}, r"quant_state\.bitsandbytes__nf4: expected this tensor beside"),
        ({STATE: TEXT}, r"quant_state\.bitsandbytes__nf4: expected JSON"),
        ({STATE: mx.zeros(5000, mx.uint8)}, r"expected at most 4096 bytes"),
    ],
)
def test_four_bits_of_bitsandbytes_that_contradict_each_other_are_refused(change, message):
    tensors = nf4()[0] | change
    tensors = {suffix: array for suffix, array in tensors.items() if array is not None}
    with pytest.raises(CheckpointError, match=message):
        decode(tensors, (6, 32), quant_method="bitsandbytes")


@pytest.mark.parametrize("fields", [{"shape": [32, 6]}, {"blocksize": 0}, {"blocksize": "64"}])
def test_what_bitsandbytes_says_of_a_layer_has_to_fit_the_config(fields):
    with pytest.raises(CheckpointError, match=r"quant_state\.bitsandbytes__nf4: expected"):
        decode(nf4(**fields)[0], (6, 32), quant_method="bitsandbytes")


@pytest.mark.parametrize("suffix", ["weight", "SCB"])
def test_int8_of_bitsandbytes_names_the_missing_tensor(suffix):
    tensors = {"weight": mx.zeros((4, 32), mx.int8), "SCB": mx.ones(4), "weight_format": mx.array(0, mx.uint8)}
    del tensors[suffix]
    with pytest.raises(MissingTensorError, match=rf"layer\.{suffix}: expected this tensor beside"):
        decode(tensors, (4, 32), quant_method="bitsandbytes")


@pytest.mark.parametrize("suffix", ["W_q", "scale", "zero", "shape", "packing"])
def test_a_part_of_an_hqq_layer_is_missing_tensors(suffix):
    """A stage of a pipeline reads files, which end in the middle of a layer."""
    tensors = {suffix: hqq((8, 128), 64, 4)[0][suffix]}
    assert quantization.is_foreign(tensors)
    with pytest.raises(MissingTensorError):
        decode(tensors, (8, 128), quant_method="hqq")


def test_int8_of_bitsandbytes_in_another_order_than_rows_is_refused():
    tensors = {"weight": mx.zeros((4, 32), mx.int8), "SCB": mx.ones(4), "weight_format": mx.array(1, mx.uint8)}
    with pytest.raises(CheckpointError, match=r"layer\.weight_format: expected 0 \(rows\)"):
        decode(tensors, (4, 32), quant_method="bitsandbytes")


def test_flat_weights_in_stacks_are_refused():
    tensors = {suffix: mx.stack([array, array]) for suffix, array in nf4()[0].items()}
    with pytest.raises(CheckpointError, match=r"expected a linear layer outside of the experts"):
        decode(tensors, (6, 32), (2,), quant_method="bitsandbytes")


def intx(bits, zeros, groups=2):
    q, s = codes(6, 64, most=2**bits).astype("i4") - 2 ** (bits - 1), floats(6, groups)
    z = zeros(6, groups)
    weight = (q - np.repeat(z.astype("f4"), 64 // groups, 1)) * np.repeat(s, 64 // groups, 1)
    return arrays({"_weight_qdata": q.astype("i1"), "_weight_scale": s, "_weight_zero_point": z}), mx.array(weight)


def described(dtype, **granularity):
    data = {"weight_dtype": {"_data": dtype, "_type": "torch.dtype"}, "granularity": granularity}
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": "IntxWeightOnlyConfig", "_data": data}}}


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("zeros", [floats, lambda *shape: codes(*shape, most=3, dtype="i1") - 1])
def test_every_width_of_torchao_is_packed(bits, zeros):
    tensors, weight = intx(bits, zeros)
    found, parameters = decode(tensors, None, **described(f"int{bits}"))
    assert mx.allclose(found, weight, rtol=1e-5, atol=2e-4)  # of products of up to 512, in float32
    assert parameters == {"group_size": 32, "bits": {1: 2, 7: 8}.get(bits, bits)}


def test_torchao_without_a_description_of_the_width_is_8_bits():
    tensors, weight = intx(4, floats)
    found, parameters = decode(tensors, None, quant_method="torchao", quant_type={"default": {"_type": "FqnToConfig"}})
    assert mx.allclose(found, weight, rtol=1e-5, atol=2e-4)  # of products of up to 512, in float32
    assert parameters == {"group_size": 32, "bits": 8}


@pytest.mark.parametrize(
    ("change", "description", "message"),
    [
        (
            {},
            described("int4", _type="PerGroup", _data={"group_size": 64}),
            r"_weight_scale: expected the shape \[6, 1\]",
        ),
        ({}, described("int4", _type="PerAxis", _data={"axis": 0}), r"_weight_scale: expected the shape \[6, 1\]"),
        ({"_weight_zero_point": mx.zeros((6, 1))}, described("int4"), r"_weight_zero_point: expected the shape"),
        ({"_weight_qdata": mx.zeros((6, 64), mx.int32)}, described("int4"), r"_weight_qdata: expected int8 or e4m3"),
        (
            {"_weight_qdata": mx.zeros((6, 64), mx.uint8)},
            described("int4"),
            r"_weight_qdata: expected Intx, according to",
        ),
        (
            {"_weight_act_pre_scale": mx.ones(64)},
            described("int4"),
            r"_weight_act_pre_scale: expected only the tensors of torchao",
        ),
    ],
)
def test_torchao_that_contradicts_its_description_is_refused(change, description, message):
    with pytest.raises(CheckpointError, match=message):
        decode(intx(4, floats)[0] | change, None, **description)


PLANES = {8: (8, "u1"), 4: (8, "u1"), 2: (8, "u1"), 3: (30, "i4")}


def hqq(shape, group, bits, axis=1):
    """Packed as HQQ packs, and the weight; `bits` 5 and 6 are stored one a byte."""
    size = shape[0] * shape[1]
    width = 8 if bits in (5, 6) else bits
    rows, columns = (size // group, group) if axis else (group, size // group)
    scales = (rows, 1) if axis else (1, columns)
    q, s, z = codes(rows, columns, most=2**bits), floats(*scales), floats(*scales)
    total, dtype = PLANES[width]
    parts = total // width
    padded = np.zeros((-(-rows // parts) * parts, columns), "u4")
    padded[:rows] = q
    packed = sum(part << (total - width * (n + 1)) for n, part in enumerate(np.split(padded, parts)))
    tensors = {"W_q": packed.astype(dtype), "scale": s, "zero": z, "shape": np.array(shape), "axis": np.array(axis)}
    tensors |= {"nbits": np.array(bits), "group_size": np.array(group), "packing": np.frombuffer(b"text", "u1")}
    return arrays(tensors), mx.array(((q - z) * s).reshape(shape))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize(("group", "packed"), [(32, True), (64, True), (16, False), (256, True)])
def test_every_width_of_hqq_is_packed_where_the_groups_allow(bits, group, packed):
    """A group of 256 takes two rows of 128, each of which is then a group."""
    tensors, weight = hqq((8, 128), group, bits)
    found, parameters = decode(tensors, (8, 128), quant_method="hqq")
    assert mx.allclose(found, weight, rtol=1e-5, atol=1e-5)
    width = 8 if bits in (5, 6) else bits
    assert parameters == ({"group_size": min(group, 128), "bits": width} if packed else None)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_width_of_hqq_along_the_other_axis_is_float(bits):
    tensors, weight = hqq((8, 128), 64, bits, axis=0)
    found, parameters = decode(tensors, (8, 128), quant_method="hqq")
    assert mx.allclose(found, weight, rtol=1e-5, atol=1e-5)
    assert parameters is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": mx.array([128, 8])}, r"layer\.shape: expected \[8, 128\]"),
        ({"nbits": mx.array(2)}, r"layer\.nbits: expected 4"),
        ({"axis": mx.array(0)}, r"layer\.axis: expected 1"),
        ({"group_size": mx.array(32)}, r"layer\.group_size: expected 64"),
        ({"zero": mx.ones((8, 1))}, r"layer\.zero: expected the shape \[16, 1\]"),
        ({"scale": mx.ones((3, 1)), "zero": mx.ones((3, 1))}, r"layer\.scale: expected as many scales as divide 1024"),
        ({"W_q": mx.zeros((2, 64), mx.uint8)}, r"layer\.W_q: expected 16 rows of 8 bits"),  # 1 bit
        ({"W_q": mx.zeros((8, 64), mx.float16)}, r"layer\.W_q: expected uint8"),  # view_as_float
        ({"bias": mx.zeros(8)}, r"layer\.bias: expected only the tensors of hqq"),
    ],
)
def test_hqq_that_contradicts_itself_is_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        decode(hqq((8, 128), 64, 4)[0] | change, (8, 128), quant_method="hqq")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, r"expected 2, 4 or 8 bits"),
        ({"bits": 8, "group_size": 32}, r"layer\.scales: expected the shape \[4, 1\]"),
        ({"bits": 4, "group_size": 48}, r"expected groups of 16, 32, 64 or 128"),
    ],
)
def test_metal_that_contradicts_its_description_is_refused(settings, message):
    tensors = {"weight": mx.zeros((4, 8), mx.uint32), "scales": mx.ones((4, 2)), "qbiases": mx.ones((4, 2))}
    with pytest.raises(CheckpointError, match=message):
        decode(tensors, None, quant_method="metal", **settings)


def test_the_config_tells_the_shape_of_every_linear_layer():
    args = ModelArgs.from_dict(load_config(QUANTIZED / "bnb-nf4"))
    found = 0
    for path, module in Model(args).named_modules():
        shape = module.weight.shape if "weight" in module and module.weight.ndim == 2 else None
        if shape:
            assert linear_shape(path, args.text_config) == shape, path
            found += 1
    assert found > 10


@pytest.mark.parametrize("name", ["bnb-nf4-double", "bnb-int8", "hqq-4bit-axis0", "hqq-4bit-g32", "torchao-float8"])
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_inspect_plans_without_any_value(name, device):
    report = inspect(str(QUANTIZED / name), on=device)
    assert report["error"] is None
    assert report["quantization"] in ("bitsandbytes", "hqq", "torchao")
