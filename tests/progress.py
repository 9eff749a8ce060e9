"""How far the tests are, what runs, and how long the rest takes: one line on a terminal, a line a file elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator

import pytest

# Seconds that a test of a file takes, on average. Only what they are to each other counts.
SECONDS = {
    "test_activations.py": 0.3,
    "test_claims.py": 2.8,
    "test_commands.py": 11,
    "test_distributed.py": 1,
    "test_docs.py": 0.5,
    "test_doctor.py": 3.5,
    "test_host.py": 2.3,
    "test_images.py": 0.8,
    "test_inspection.py": 0.4,
    "test_machines.py": 17,
    "test_plugins.py": 1.8,
    "test_properties.py": 4,
    "test_registry.py": 3.5,
    "test_security.py": 0.8,
}
OTHERS = 0.05


class Progress:
    """In place of pytest's dots, which tell neither."""

    def __init__(self, config: pytest.Config):
        self.writer = config.get_terminal_writer()
        self.line = self.writer.hasmarkup  # a terminal, on which a line can be written over
        self.left: Counter[str] = Counter()  # file → tests
        self.done = 0
        self.all = 0
        self.first = 0.0
        config.pluginmanager.getplugin("terminalreporter").showfspath = False

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.left = Counter(item.nodeid.partition("::")[0] for item in session.items)
        self.all = len(session.items)
        self.first = self.weight()
        self.start = self.file_start = time.monotonic()

    def weight(self) -> float:
        """Of the tests that are left, in seconds of the machine where SECONDS were measured."""
        return sum(SECONDS.get(file.rpartition("/")[2], OTHERS) * count for file, count in self.left.items())

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if self.line:
            self.over(f"{self.standing()}  {nodeid.rpartition('/')[2]}")

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        file = nodeid.partition("::")[0]
        self.left[file] -= 1
        self.done += 1
        if not self.left[file] and not self.line:
            seconds = time.monotonic() - self.file_start
            self.writer.line(f"{self.standing()}  {file} took {clock(seconds)}", flush=True)
            self.file_start = time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.over("")
            self.writer.line(f"FAILED {report.nodeid}", red=True)

    def pytest_sessionfinish(self) -> None:
        self.over("")

    @pytest.hookimpl(wrapper=True)
    def pytest_report_teststatus(self) -> Generator[None, tuple, tuple]:
        category, _, word = yield
        return category, "", word  # no letter

    def standing(self) -> str:
        """How far, and how long still: as long as so far, for what is left."""
        left = self.weight()
        passed = self.first - left
        rest = (time.monotonic() - self.start) * left / passed if passed else left
        bar = "#" * round(20 * passed / self.first)
        return f"[{bar:<20}] {self.done}/{self.all}, {clock(rest)} left"

    def over(self, text: str) -> None:
        """Write over the line of a terminal."""
        if self.line:
            self.writer.write(f"\r{text[: self.writer.fullwidth - 1]}\x1b[K", flush=True)


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
