"""One rank: generate with the host until somebody ends it. ``python endless.py CHECKPOINT MODE``."""

from __future__ import annotations

import os
import sys

import mlx.core as mx
from mlx_lm import stream_generate
from mlx_lm.utils import sharded_load

path, mode = sys.argv[1:]
group = mx.distributed.init()
model, tokenizer = sharded_load(path, **{f"{mode}_group": group})
tokenizer._eos_token_ids = set()  # as mlx_lm.benchmark does
print(f"rank {group.rank()} is process {os.getpid()}", flush=True)
for number, _ in enumerate(stream_generate(model, tokenizer, "Go on", max_tokens=1_000_000)):
    if number == 20:
        print(f"rank {group.rank()} generates", flush=True)
