"""The README's table of checkpoints and machines: true shapes, planned by `inspect` for a GPU from headers alone.

`python tests/test_machines.py` prints the table anew.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from support import ROOT, thorough
from support.hollow import AWQ, BIG, FP8, MIDDLING, MLX, awq, bf16, fp8, mlx, tensors, vision, write, write_config

from mlx_lm_qwen3vlmoe.inspection.report import inspect

SIZES = {"30B": MIDDLING, "235B": BIG}
MACHINES = (24, 32, 64, 128, 512)  # gigabytes of 2^30 bytes, as Macs are sold
SHARE = 3 / 4  # of the memory, for the model and its cache
LONGEST = 256  # of 1024 tokens, what the models were trained for
CHECKPOINTS = {
    "official, bfloat16": (bf16, False, {}),
    "official, FP8": (fp8, False, FP8),
    "AWQ, 4 bits": (awq, True, AWQ),
    "MLX, 4 bits": (mlx, False, MLX),
}


def row(size: str, sizes: dict, name: str) -> str:
    """What one checkpoint takes on a disk and in memory, and the context that each machine has room for."""
    form, per_expert, config = CHECKPOINTS[name]
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), sizes, **config)
        download = write(Path(folder), form(tensors(sizes, per_expert) | vision(sizes["hidden_size"])))
        report = inspect(folder, context=4096, on="gpu")
    assert report["error"] is None, report
    memory = report["needs_bytes"]
    rooms = []
    for machine in MACHINES:
        left = machine * 2**30 * SHARE - report["weights_bytes"]
        thousands = int(left / report["cache_bytes"] * 4)
        rooms.append(f"{min(thousands, LONGEST)}k" if thousands >= 4 else "no")
    return f"| {size} {name} | {download / 1e9:.0f} GB | {memory / 1e9:.1f} GB | {' | '.join(rooms)} |"


def head() -> str:
    names = " | ".join(f"{machine} GB" for machine in MACHINES)
    return f"| checkpoint | download | memory | {names} |\n|---|--:|--:|" + "--:|" * len(MACHINES)


def table(size: str) -> str:
    return "\n".join(row(size, SIZES[size], name) for name in CHECKPOINTS)


@pytest.mark.parametrize("size", ["30B", *thorough("235B")])
def test_the_table_of_machines_is_what_inspect_plans(size):
    assert table(size) in (ROOT / "README.md").read_text()


if __name__ == "__main__":
    print(head(), *map(table, SIZES), sep="\n")
