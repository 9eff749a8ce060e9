"""What the figures are of: versions and the machine; and where they are written."""

import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

HERE = Path(__file__).resolve().parent
PAGE, ALL = HERE.parent / "docs" / "benchmarks.md", HERE / "figures.md"  # what readers ask for, and every figure


def described(**versions: str) -> dict:
    """The date, the versions and the machine."""
    device = mx.device_info()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("mlx-lm-qwen3vlmoe", "mlx-lm", "mlx")}
        | versions
        | {"Python": platform.python_version()},
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "device": f"{mx.default_device().type.name} {device.get('device_name', '')}",
            "cores": os.cpu_count(),
            "memory": f"{memory:.0f} GB",
        },
    }


def sentence(about: dict) -> str:
    parts = ", ".join(f"{name} {value}" for part in ("versions", "machine") for name, value in about[part].items())
    return f"{about['date']}: {parts}."


def fill_in(page: Path, mark: str, text: str) -> None:
    """Replace what stands between two marks on a page."""
    before, start, rest = page.read_text().partition(f"<!-- {mark} -->\n")
    _, end, after = rest.partition(f"<!-- /{mark} -->")
    assert start, mark
    assert end, mark
    page.write_text(f"{before}{start}{text}\n{end}{after}")
