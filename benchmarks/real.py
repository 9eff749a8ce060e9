"""The 30B itself: checkpoints of Qwen3-VL-30B-A3B's true shapes, converted and run. For a whole machine and an hour.

One checkpoint after the other, with as many of the 48 layers as 60 GB of disk, or what is free, hold. Every step is a
process of its own; peaks are the operating system's (RSS). Fails on memory, never on time.

python benchmarks/real.py                                             # everything; writes the table, the plot, the JSON
python benchmarks/real.py --quick                                     # 4 layers and a few minutes; writes nothing
python benchmarks/real.py --only convert-official-12 convert-fp8-fused-12 --write          # some, instead of all
python benchmarks/real.py --only convert-official-12 --layers 4                            # some; writes nothing
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import plot
from machine import ALL, PAGE, described, fill_in, sentence
from true_size import VOCABULARY, Sizes, size_of, tensors, write

from mlx_lm_qwen3vlmoe.inspection.report import inspect

HERE = Path(__file__).resolve().parent
LAYERS, BUDGET, MARGIN = 48, 60e9, 4e9  # of the 30B; bytes of disk; what is left free
BY_HOST = "by mlx-lm's own class"
ROUNDS = 2  # of what is timed against mlx-lm's own class
# Layouts and layers, at most. By mlx-lm's own class, which loads only that one, too: the official one.
CONVERTED = (("official", 12), ("official", 48), ("per-expert", 12), ("fp8 fused", 12), ("fp8", 48))
LOADED = (
    *(("awq", 12), ("gptq", 12), ("awq", 48), ("gptq", 48)),
    *(("compressed-tensors", 12), ("mxfp4", 12), ("awq gemv_fast", 12), ("nvfp4", 6)),
)
PARTS = {
    f"{kind}-{layout.replace(' ', '-')}-{layers}": (kind, layout, layers)
    for kind, part in (("convert", CONVERTED), ("load", LOADED))
    for layout, layers in part
}
QUICK = ("convert-official-12", "convert-fp8-fused-12", "load-awq-12")


@dataclass
class Run:
    """The rows of the table, and what missed its bound."""

    folder: Path
    rows: list[dict] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def add(self, step: str, layers: int, size: int, **values: float) -> dict:
        row = {"step": step, "layers": layers, "file": size / 1e9} | values
        if "inspect" in values:
            row["compared"] = values["peak"] / values["inspect"]
            if values["peak"] > 1.2 * values["inspect"] + 0.3:  # with Python, which weighs where layers are few
                self.failed.append(f"{step}: {values['peak']:.2f} GB, and inspect says {values['inspect']:.2f}")
        print(
            " ".join(f"{name} {value:.3g}" if isinstance(value, float) else str(value) for name, value in row.items()),
            flush=True,
        )
        for other in self.rows:
            if (other["step"], other["layers"]) == (step, layers):  # of another round: the better time counts
                other["seconds"] = min(other["seconds"], row["seconds"])
                other["peak"] = max(other["peak"], row["peak"])
                return other
        self.rows.append(row)
        return row

    def convert(self, layout: str, layers: int, host: bool = False) -> dict:
        """``mlx_lm.convert -q`` of what stands in ``source``."""
        source, target = self.folder / "source", self.folder / "converted"
        shutil.rmtree(target, ignore_errors=True)
        size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        command = ["-m", "mlx_lm", "convert", "--hf-path", str(source), "--mlx-path", str(target), "-q"]
        seconds, peak = timed(command, {"MLX_LM_PLUGINS": "0"} if host else {})
        name = BY_HOST if host else ""
        expected = {} if host else {"inspect": inspect(str(source), bits=4)["convert_bytes"] / 1e9}
        return self.add(f"`convert -q`, {layout} {name}".strip(), layers, size, seconds=seconds, peak=peak, **expected)

    def compare(self) -> None:
        """With mlx-lm's own class, which converts the official layout of as many layers."""
        hosts = {row["layers"]: row for row in self.rows if row["step"].endswith(BY_HOST)}
        for row in self.rows:
            host = hosts.get(row["layers"])
            if host and row is not host and row["step"].startswith("`convert"):
                row["time of the host's"] = row["seconds"] / host["seconds"]
                row["peak of the host's"] = row["peak"] / host["peak"]
                if row["step"] == "`convert -q`, official" and row["peak of the host's"] > 0.8:
                    self.failed.append(f"{row['step']}: {row['peak']:.2f} GB, and {BY_HOST} {host['peak']:.2f}")

    def load(self, layout: str, layers: int, folder: str) -> None:
        """Load a checkpoint, and take a few tokens."""
        source = self.folder / folder
        size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        done = subprocess.run(
            [sys.executable, HERE / "measure.py", "tokens", "ours", source], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{layout}: {done.stderr[-2000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        expected = inspect(str(source))["weights_bytes"] / 1e9
        row = self.add(
            f"load, {layout}", layers, size, seconds=found["load"], peak=found["rss"] / 1e9, inspect=expected
        )
        row |= {"first": found["first_token"], "token": found["token"]}


def timed(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Wall time and the peak in GB of a Python of its own."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], env=os.environ | environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)}: exit status {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def layers_that_fit(layout: str, folder: Path, most: int, converted: bool) -> int:
    """How many layers of a layout, and of what ``convert -q`` makes of them, the disk holds."""
    room = min(BUDGET, shutil.disk_usage(folder).free - MARGIN)
    outside, layer = (
        sum(size_of(entry) for entry in part.values()) for part in tensors(Sizes(1, vocab=VOCABULARY), layout)
    )
    # 4 bits and the scales of 64 are 0.28 of 16 bits.
    small = [0.28 * 2 * parameters for parameters in (2 * VOCABULARY * 2048, 628e6)] if converted else [0, 0]
    return max(0, min(most, int((room - outside - small[0]) // (layer + small[1]))))


def measure(options: argparse.Namespace, folder: Path) -> Run:
    run = Run(folder)
    for name in QUICK if options.quick else options.only or PARTS:
        kind, layout, layers = PARTS[name]
        most = min(layers, 4 if options.quick else options.layers)
        layers = layers_that_fit(layout, folder, most, converted=kind == "convert")
        started = time.perf_counter()
        write(folder / "source", Sizes(layers, vocab=VOCABULARY), layout)
        if kind == "load":
            run.load(layout, layers, "source")
        else:
            for _ in range(ROUNDS if layers <= 12 and layout in ("official", "fp8 fused") else 1):
                run.convert(layout, layers)
                if layout == "official":
                    run.convert(layout, layers, host=True)
        if (kind, layout, layers) == ("convert", "fp8", LAYERS):
            run.load("MLX's 4 bits, which came of it", layers, "converted")
        clear(folder)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    run.compare()
    return run


def clear(folder: Path) -> None:
    for child in folder.iterdir():
        shutil.rmtree(child)


HEADS = {
    "step": "",
    "layers": "layers",
    "file": "checkpoint, GB",
    "seconds": "seconds",
    "peak": "peak, GB",
    "inspect": "`inspect` says, GB",
    "compared": "peak / that",
    "time of the host's": "seconds / mlx-lm's own",
    "peak of the host's": "peak / mlx-lm's own",
    "first": "first token, s",
    "token": "each further, s",
}


def shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


FEW = ("step", "layers", "file", "seconds", "peak", "time of the host's", "peak of the host's", "token")


def table(rows: list[dict], fields: Iterable[str] = HEADS) -> str:
    lines = [f"| {' | '.join(HEADS[field] for field in fields)} |", "|---" * len(list(fields)) + "|"]
    lines += [f"| {' | '.join(shown(row.get(field, '')) for field in fields)} |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 layers, three parts: a few minutes; writes nothing")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the 48 at most")
    parser.add_argument("--write", action="store_true", help="the table, the plot and the JSON, of some parts too")
    options = parser.parse_args()
    os.environ.pop("MLX_LM_PLUGINS", None)
    with tempfile.TemporaryDirectory() as temporary:
        run = measure(options, Path(temporary))
    about = described()
    text = f"{sentence(about)}\n\n{table(run.rows)}"
    print("", text, sep="\n")
    if options.write or not (options.quick or options.only or options.layers < LAYERS):
        (HERE / "real.json").write_text(json.dumps(about | {"rows": run.rows}, indent=1) + "\n")
        fill_in(ALL, "real size", text)
        fill_in(PAGE, "real size", f"{sentence(about)}\n\n{table(run.rows, FEW)}")
        plot.main()
    sys.exit("\n".join(run.failed) or None)


if __name__ == "__main__":
    main()
