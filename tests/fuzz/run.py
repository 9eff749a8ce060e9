"""Mutants of every fixture: right numbers, or one error. ``python tests/fuzz/run.py``; see CONTRIBUTING.md.

The exit status is 1 after any failure: other numbers without a word, an exception that is not a `CheckpointError`, a
process that dies, hangs or takes too much memory.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import multiprocessing
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from checkpoints import family, fixtures

WORKERS = 2
HANG = 300  # seconds
MEMORY = 2 * 2**30  # bytes of a worker, which has 0.5 GB by itself
ADDRESSES = 8 * 2**30  # bytes that a worker can ask for, where the system has such a limit
EXAMPLES = 3


def work(pipe: Any) -> None:
    """Judge what comes through a pipe, in a process of its own."""
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    os.dup2(sys.stderr.fileno(), 2)
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    from judge import FAILED, judge, peak, prepare

    prepare()
    while identifier := pipe.recv():
        try:
            outcome = judge(identifier)
        except BaseException as error:
            outcome = FAILED, f"the fuzzer itself: {error!r}"
        if peak() > MEMORY:
            pipe.send((FAILED, "takes too much memory"))
            return
        pipe.send(outcome)


class Worker:
    """A process that is started anew when it dies."""

    def __init__(self) -> None:
        self.process = None

    def judge(self, identifier: str) -> tuple[str, str]:
        if self.process is None or not self.process.is_alive():
            context = multiprocessing.get_context("spawn")
            self.pipe, other = context.Pipe()
            self.process = context.Process(target=work, args=(other,), daemon=True)
            self.process.start()
            other.close()
            limit = HANG + 30
        else:
            limit = HANG
        self.pipe.send(identifier)
        try:
            if self.pipe.poll(limit):
                outcome = self.pipe.recv()
                if outcome[1] == "takes too much memory":
                    self.process.join()
                return outcome
            cause = f"no end after {HANG} seconds"
        except EOFError:
            self.process.join(5)
            code = self.process.exitcode or 0
            cause = f"the process dies: {signal.Signals(-code).name if code < 0 else code}"
        self.process.kill()
        self.process.join()
        return "FAILED", cause


def identifiers(names: list[str], seed: int, most: int | None, seconds: float | None) -> Iterator[str]:
    """Mutant 0 of every fixture, then 1 of every fixture, to ``most`` of each or for so many seconds."""
    start = time.monotonic()
    for number in range(most) if most else itertools.count():
        for name in names:
            if seconds and time.monotonic() - start > seconds:
                return
            yield f"{name}:{seed}:{number}"


def report(results: dict[str, tuple[str, str]], seconds: float) -> None:
    from judge import FAILED, OUTCOMES
    from mutations import mutant

    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    causes: dict[str, list[str]] = collections.defaultdict(list)
    for identifier, (outcome, cause) in results.items():
        for group in (family(identifier.split(":")[0]), "all"):
            counts[group][outcome] += 1
        if outcome == FAILED:
            causes[cause].append(identifier)
    print(f"| fixtures | mutants | {' | '.join(OUTCOMES)} |\n|---|---:|{'---:|' * len(OUTCOMES)}")
    for group in [*sorted(counts.keys() - {"all"}), "all"]:
        numbers = [counts[group].total(), *(counts[group][outcome] for outcome in OUTCOMES)]
        print(f"| {group} | {' | '.join(map(str, numbers))} |")
    print(f"\n{len(results)} mutants in {seconds:.0f} seconds, {len(results) / max(seconds, 1e-9):.0f} a second")
    for cause, found in sorted(causes.items(), key=lambda item: -len(item[1])):
        print(f"\n{len(found)} of {cause}")
        for identifier in sorted(found, key=lambda i: (len(mutant(i)[1]), i))[:EXAMPLES]:
            print(f"  {identifier}  {' AND '.join(map(str, mutant(identifier)[1]))[:300]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, help="how long to go on")
    parser.add_argument("--mutants", type=int, help="how many of every fixture")
    parser.add_argument("--only", metavar="FIXTURE", help="a regular expression for the names of fixtures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replay", metavar="ID", help="show one mutant and what comes of it")
    arguments = parser.parse_args()
    if arguments.replay:
        from judge import explain

        explain(arguments.replay)
        return 0
    names = [name for name in fixtures() if re.search(arguments.only or "", name)]
    most = arguments.mutants or (None if arguments.seconds else 100)
    queue = identifiers(names, arguments.seed, most, arguments.seconds)
    lock, results = threading.Lock(), {}

    def drive() -> None:
        worker = Worker()
        while True:
            with lock:
                identifier = next(queue, None)
            if identifier is None:
                return
            results[identifier] = worker.judge(identifier)

    start = time.monotonic()
    threads = [threading.Thread(target=drive) for _ in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report(dict(sorted(results.items())), time.monotonic() - start)
    return int(any(outcome == "FAILED" for outcome, _ in results.values()))


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    os.environ.pop("MLX_LM_PLUGINS", None)
    sys.exit(main())
