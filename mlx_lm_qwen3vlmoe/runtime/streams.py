"""The cores of the CPU: how a product is spread over as many of MLX's streams as this process may use cores.

MLX's CPU backend computes a product of packed weights on one thread, and each stream on a thread of its own. So a part
of the product runs on each stream. No part cuts a sum, so the result is that of one stream, to the bit.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from .backend import device, planning

_GRAIN = 1 << 18  # multiplications that are worth a stream: about a quarter of a millisecond


def side_by_side(product: Callable[[slice], mx.array], size: int, work: int, axis: int) -> mx.array:
    """``product(slice(0, size))``, of which parts are computed by several streams if it is large enough.

    Args:
        product: a range of what can be cut → its results.
        work: the multiplications of the whole.
        axis: where the results of the parts are joined.
    """
    parts = min(size, work // _GRAIN, count())
    if parts < 2:
        return product(slice(0, size))
    results = []
    for n in range(parts):
        with on(n):
            results.append(product(slice(size * n // parts, size * (n + 1) // parts)))
    return mx.concatenate(results, axis)


def count() -> int:
    """How many streams there are to compute on: one on a GPU, and where arrays have no values.

    And one in older MLX, in which threads share streams, and the stream in force: several that compute at a time would
    get wrong numbers. Until: MLX 0.31.2.
    """
    return _cores() if hasattr(mx, "new_thread_local_stream") and device() == mx.cpu and not planning() else 1


def on(number: int) -> contextlib.AbstractContextManager[Any]:
    """Compute on one of the streams, counted from 0, which is the one in force."""
    number %= count()
    return mx.stream(_others()[number - 1]) if number else contextlib.nullcontext()


def _others() -> list[Any]:
    """The other streams of this thread."""
    if not hasattr(_own, "lease"):
        _own.lease = _Lease()
    return _own.lease.streams


class _Lease:
    """Streams that one thread has for itself, and that the next one gets when it ends: MLX itself ends no stream.

    MLX does not guard a stream against a second thread; once it does, as https://github.com/ml-explore/mlx/pull/3578
    intends, all threads can share one set. Before MLX 0.32.0 a stream belongs to the thread that made it for ever, so
    each Python thread leaves the threads of its streams behind.
    """

    def __init__(self) -> None:
        try:
            self.streams = _free.pop()
        except IndexError:
            self.streams = [_new_stream(mx.cpu) for _ in range(_cores() - 1)]

    def __del__(self) -> None:
        if _REUSABLE:
            _free.append(self.streams)


_REUSABLE = hasattr(mx, "new_thread_unsafe_stream")
_new_stream: Any = mx.new_thread_unsafe_stream if _REUSABLE else mx.new_stream
_free: list[list[Any]] = []
_own = threading.local()


@functools.cache
def _cores() -> int:
    """The cores that this process may use: its affinity and its container's share, divided among ranks beside it."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux has it
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    for limit in _quotas():
        cores = min(cores, round(limit))
    return max(1, cores // _neighbors())


def _quotas() -> list[float]:
    """What the control group allows, in cores."""
    found = []
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = " ".join((_CGROUP / name).read_text() for name in files).split()
            if float(quota) > 0:  # "max", or -1: no limit
                found.append(float(quota) / float(period))
    return found


_CGROUP = Path("/sys/fs/cgroup")


def _neighbors() -> int:
    """The ranks of a distributed run on this machine, by what `mlx.launch` and MPI tell each of them."""
    if local := os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", ""):
        return max(1, int(local))
    with contextlib.suppress(KeyError, OSError, ValueError, IndexError):
        hosts = [_address(entry) for entry in json.loads(Path(os.environ["MLX_HOSTFILE"]).read_text())]
        return hosts.count(hosts[int(os.environ["MLX_RANK"])])
    return 1


def _address(entry: Any) -> str:
    """The host of a rank; the ring's file has a list of ``host:port`` for each."""
    return str(entry[0] if isinstance(entry, list) else entry).rpartition(":")[0]
