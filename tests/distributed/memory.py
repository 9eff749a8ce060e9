"""One rank: load a checkpoint in both modes with the host's `sharded_load`, and write down the memory it took.

``python memory.py REPORTS CHECKPOINT…``: the report of rank R is ``REPORTS/R.json``, one entry a checkpoint and mode.
"""

from __future__ import annotations

import gc
import json
import re
import sys
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, sharded_load

SPLIT = re.compile(
    r"\.(?:[qkvo]_proj|gate_proj|up_proj|down_proj)\."
)  # by tensor parallelism; the rest is on all ranks


def share(path: Path, mode: str, layers: range, ranks: int) -> dict[str, float]:
    """The bytes of the whole model, of its first layer, and those that one rank has."""
    model, _ = load_model(path, lazy=True)
    total, first, own = 0, 0, 0.0
    for name, array in tree_flatten(model.parameters()):
        total += array.nbytes
        first += array.nbytes if ".layers.0." in name else 0
        layer = re.search(r"\.layers\.(\d+)\.", name)
        if mode == "tensor":
            own += array.nbytes / (ranks if SPLIT.search(name) else 1)
        elif layer is None or int(layer[1]) in layers:
            own += array.nbytes
    return {"total": total, "layer": first, "own": own}


def main() -> None:
    reports, *paths = map(Path, sys.argv[1:])
    group = mx.distributed.init()
    report = {}
    for path in paths:
        for mode in ("tensor", "pipeline"):
            gc.collect()
            mx.clear_cache()
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            model, _ = sharded_load(path, **{f"{mode}_group": group})
            active, peak = mx.get_active_memory() - before, mx.get_peak_memory() - before
            count, start = len(model.layers), model.model.start_idx
            del model
            figures = share(path, mode, range(start, start + count), group.size())
            report[f"{path.name} {mode}"] = {"active": active, "peak": peak, **figures}
    Path(reports, f"{group.rank()}.json").write_text(json.dumps(report))


main()
