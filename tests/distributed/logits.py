"""One rank: load checkpoints one after another with the host's `sharded_load`, and write down how far the logits are.

``python logits.py JOBS REPORTS``: JOBS is a JSON file of name → ``{"path", "mode", "golden", "dtype"}``. A path
may hold ``{rank}``; without a golden, the same checkpoint in one process is the measure; without a dtype, the model
computes in those that are stored. The report of rank R is ``REPORTS/R.json``, by the same names. A refusal of this
package is reported, not raised: all ranks go on with the next job.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model, sharded_load

from mlx_lm_qwen3vlmoe import CheckpointError


def run(group: mx.distributed.Group, path: Path, mode: str, golden: str | None, dtype: str | None) -> dict:
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    try:
        model, _ = sharded_load(path, **{f"{mode}_group": group})
    except CheckpointError as error:
        return {"refusal": str(error), "evaluated": mx.get_peak_memory() - before}
    # Tokens for which no router of the tiny model is so undecided that rounding to 16 bits picks another expert.
    expected = mx.load(golden) if golden else {"ids": mx.arange(36, 76).reshape(2, 20)}
    ids = expected["ids"]
    if golden is None:
        whole, _ = load_model(path, lazy=True)
        if dtype:
            whole.set_dtype(getattr(mx, dtype))
        expected["logits"] = whole(ids).astype(mx.float32)
    if dtype:
        model.set_dtype(getattr(mx, dtype))

    def distance(found: mx.array) -> float:
        logits = expected["logits"]
        return (mx.abs(found.astype(mx.float32) - logits).max() / mx.abs(logits).max()).item()

    at_once = distance(model(ids))
    cache = make_prompt_cache(model)
    steps = []
    for n in range(ids.shape[1]):
        steps.append(model(ids[:, n : n + 1], cache=cache))
        mx.eval(steps[-1])
    return {
        "class": type(model).__module__,
        "layers": len(model.layers),
        "at once": at_once,
        "token by token": distance(mx.concatenate(steps, axis=1)),
    }


def main() -> None:
    jobs, reports = sys.argv[1:]
    group = mx.distributed.init()
    report = {}
    for name, job in json.loads(Path(jobs).read_text()).items():
        path = Path(job["path"].replace("{rank}", str(group.rank())))
        report[name] = run(group, path, job["mode"], job["golden"], job["dtype"])
    Path(reports, f"{group.rank()}.json").write_text(json.dumps(report))


main()
