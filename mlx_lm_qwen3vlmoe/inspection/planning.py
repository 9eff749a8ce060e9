"""What a model takes in memory, on one machine or many: the sizes of the arrays that it would evaluate."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_map_with_path
from mlx_lm.models import qwen3_moe
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import quantize_model

from ..errors import CheckpointError
from ..runtime import parallel

_LAYER = re.compile(r"language_model\.model\.layers\.(\d+)\.")


class Rank(NamedTuple):
    """A rank without a group: what the host asks of `mlx.core.distributed.Group` to cut a model."""

    number: int
    ranks: int

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return self.ranks


def quantized(model: Any, config: dict[str, Any], bits: int) -> Any:
    """What `mlx_lm.convert` does to a model with ``-q --q-bits``."""
    if isinstance(dtype := getattr(mx, str(config.get("torch_dtype")), None), mx.Dtype):
        takes = model.cast_predicate

        def cast(path: str, array: mx.array) -> mx.array:
            return array.astype(dtype) if takes(path) and mx.issubdtype(array.dtype, mx.floating) else array

        model.update(tree_map_with_path(cast, model.parameters()))
    with contextlib.redirect_stdout(io.StringIO()):  # the host's report
        model, _ = quantize_model(model, config, 64, bits, quant_predicate=model.quant_predicate)
    return model


def conversion_peak(before: dict[int, int], after: int, scattered: bool) -> int:
    """What ``mlx_lm.convert -q`` has in memory at most: the file that it saves, and the floats of some layers.

    As measured on the CPU, see docs/benchmarks.md: 1.0 to 1.1 of a layer, and 0.25 GB for Python and its modules; of
    quantized experts that are stored one by one up to 2.6, as their many small arrays leave holes in the memory.

    Args:
        before: layer → the bytes of its weights as they are loaded.
        after: the bytes of the weights that are saved, in files of at most 5 GiB.
        scattered: whether experts are stored one by one and quantized.
    """
    return min(after, 5 << 30) + max(before.values()) * (26 if scattered else 11) // 10 + 250_000_000


def by_layer(model: Any) -> dict[int, int]:
    """Layer → the bytes of its weights; -1 is what stands outside of layers."""
    sizes: dict[int, int] = defaultdict(int)
    for path, array, _ in _arrays(model):
        match = _LAYER.match(path + ".")
        sizes[int(match[1]) if match else -1] += array.nbytes
    return sizes


def memory(model: Any) -> dict[str, Any]:
    """The weights, and by their formats."""
    formats: dict[str, int] = defaultdict(int)
    for _, array, packed in _arrays(model):
        formats[format_name(packed) if packed else str(array.dtype).rpartition(".")[2]] += array.nbytes
    return {
        "weights_bytes": sum(formats.values()),
        "formats": dict(sorted(formats.items(), key=lambda item: -item[1])),
    }


def _arrays(model: Any) -> list[tuple[str, mx.array, dict[str, Any] | None]]:
    """The path of a layer, an array of it, and how it is packed; an array that a tied head shares comes once."""
    found: dict[int, tuple[str, mx.array, dict[str, Any] | None]] = {}
    for path, module in model.named_modules():
        packed = vars(module) if hasattr(module, "bits") else None
        for array in module.values():
            if isinstance(array, mx.array):
                found.setdefault(id(array), (path, array, packed))
    return list(found.values())


def cache_sizes(model: Any, context: int) -> list[int]:
    """The size of every layer's cache after a prompt, which is never computed.

    The host makes room for a number of tokens at a time, so that one such step tells, however long the context is.
    """
    cache = make_prompt_cache(model)
    step = getattr(cache[0], "step", 256)
    length = min(context, step)
    with parallel.without_global_scales(model):  # which a device that is not here may take
        model(mx.zeros((1, length), mx.int32), cache=cache)
    return [(layer.keys.nbytes + layer.values.nbytes) * -(-context // length) for layer in cache]


def shares(model: Any, ranks: int, cache: list[int]) -> dict[str, Any]:
    """What each of ``ranks`` machines holds, in both modes, or why it cannot. Cuts the model."""
    text = model.args.text_config
    plan: dict[str, Any] = {"ranks": ranks}
    for mode, sizes, share in (
        ("pipeline", {"num_hidden_layers": text["num_hidden_layers"]}, _stages),
        ("tensor", parallel.pieces(text, model.named_modules()), _parts),
    ):
        try:
            if not hasattr(model, "shard"):
                raise CheckpointError("more than one machine needs mlx-lm 0.32.0 or newer: update mlx-lm.")
            parallel.check(ranks, mode, sizes)
            plan[mode] = {"error": None, "ranks": share(model, ranks, cache)}
        except CheckpointError as e:
            plan[mode] = {"error": str(e), "ranks": []}
        plan[mode]["allowed"] = parallel.allowed(mode, sizes)
    return plan


def _stages(model: Any, ranks: int, cache: list[int]) -> list[dict[str, int]]:
    """Some of the layers each, and on every rank what is outside of layers."""
    sizes = by_layer(model)
    layers, others = [sizes[n] for n in range(len(cache))], sizes[-1]
    stages = []
    for number in range(ranks):
        decoder = SimpleNamespace(layers=list(range(len(layers))))
        qwen3_moe.Qwen3MoeModel.pipeline(decoder, Rank(number, ranks))
        own = slice(decoder.start_idx, decoder.end_idx)
        stages.append(
            {"layers": len(layers[own]), "weights_bytes": others + sum(layers[own]), "cache_bytes": sum(cache[own])}
        )
    return stages


def _parts(model: Any, ranks: int, cache: list[int]) -> list[dict[str, int]]:
    """A part of every layer each, which are all of one size."""
    parallel.cut(model.language_model, Rank(0, ranks))
    weights = sum(array.nbytes for _, array, _ in _arrays(model))
    return [{"layers": len(cache), "weights_bytes": weights, "cache_bytes": sum(cache) // ranks}] * ranks


def machine(device: mx.Device) -> dict[str, int | None]:
    """The memory of this machine, and what of it macOS gives the GPU; None where that is not known.

    It is that of a GPU that has its own, and no more than a container may take.
    """
    # Until: MLX 0.30.6. Older ones have it for Metal only.
    info = getattr(mx, "device_info", None) or (mx.metal.device_info if mx.metal.is_available() else dict)
    found: dict[str, Any] = info()
    own = [] if device == mx.cpu else ["total_memory"]
    sizes = [found[name] for name in ("memory_size", *own) if found.get(name)]
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sizes = sizes or [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(Path(limit).read_text()))
    gpu = found.get("max_recommended_working_set_size")
    return {"machine_bytes": min(sizes, default=None), "gpu_bytes": gpu}


def format_name(parameters: dict[str, Any]) -> str:
    return "{} {} bits, groups of {}".format(
        parameters.get("mode", "affine"), parameters.get("bits"), parameters.get("group_size")
    )
