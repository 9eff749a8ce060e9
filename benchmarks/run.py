"""Measure this package against mlx-lm's own module, ``qwen3_moe`` and mlx-vlm: see docs/benchmarks.md.

python benchmarks/run.py                                 # everything; writes the figures, the plot and the JSON
python benchmarks/run.py --quick                         # small sizes; writes nothing
python benchmarks/run.py --only convert --layers 32      # one part, of another size; writes nothing
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import plot
from checkpoints import Sizes, as_qwen3_moe, write
from machine import ALL, PAGE, described, fill_in, sentence

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CONTENDERS = {"ours": "this package", "host": "mlx-lm's own", "native": "`qwen3_moe`", "mlx-vlm": "mlx-vlm"}
LAYERS = (4, 8, 16, 32)
Job = tuple[str, str, str, list[object]]  # key of the results, contender, kind of measurement, its arguments


@dataclass
class Part:
    """Checkpoints, and what is measured on them, round after round."""

    name: str
    prepare: Callable[[], object]
    jobs: list[Job]
    rounds: int = 1


@dataclass
class Figure:
    """A row of the table: the best of all rounds, compared with another contender or, without one, as it is."""

    label: str
    key: str
    metric: str
    unit: str
    best: Callable = min
    against: str | None = None
    bound: float | None = None  # at least, where the greatest is the best; else at most
    certain: float | None = None  # a bound that no noise excuses


def figures() -> list[Figure]:
    rows = [
        Figure("Load to first token, float32", "float32", "first_token", "s", min, "host", 0.8),
        Figure("Load to first token, bfloat16", "bfloat16", "first_token", "s"),
        Figure("Load, float32", "float32", "load", "s", min, "host"),
        Figure("Load, bfloat16", "bfloat16", "load", "s", min, "host", 1.8),
    ]
    packed = 6 if mx.default_device() == mx.cpu else 0.97  # whose kernels for packed weights want float32
    for precision, bound in (("float32", 0.97), ("4 bits", packed), ("8 bits", packed)):
        rows.append(Figure(f"Prefill, {precision}", precision, "prefill", "tokens/s", max, "native", bound))
        rows.append(Figure(f"Decode, {precision}", precision, "decode", "tokens/s", max, "native", bound))
    rows += [
        Figure("Decode, float32", "float32", "decode", "tokens/s", max, "host", 15),
        Figure("LoRA, 4 bits", "lora", "lora", "steps/s", max, "native"),
    ]
    for layout in ("official", "per_expert", "fp8"):
        wall, peak = (("host", 1.1), ("host", 0.8)) if layout == "official" else ((), ())
        rows.append(Figure(f"`convert -q`, {layout}", f"convert {layout}", "convert", "s", min, *wall))
        rows.append(Figure(f"`convert -q`, {layout}: peak", f"convert {layout}", "peak", "GB", min, *peak))
        rows.append(Figure(f"`convert -q`, {layout}: peak / 16 bits", f"convert {layout}", "peak_share", ""))
    for dtype in ("float32", "bfloat16"):
        for n in LAYERS:
            bound = (None, 0.15, 0.15) if n == 32 else ()
            label = f"Peak above the weights, loading {n} layers, {dtype}"
            rows.append(Figure(label, f"peak {n} {dtype}", "peak_above_weights", "", min, *bound))
        rows.append(Figure("… resident, with all of the process", f"peak {n} {dtype}", "rss_above_weights", ""))
    return [
        *rows,
        Figure("`sanitize`, 235B in AWQ, > 100,000 tensors: processor time", "sanitize", "cpu", "s", min, None, 1.6),
        Figure("… a tensor's time at the greatest size / the smallest", "sanitize", "growth", "", min, None, 1.25, 2.0),
        Figure("… nodes of the graph for each tensor", "sanitize", "nodes", ""),
        Figure("Start of the interpreter, added by the `.pth`", "start", "start", "ms", min, None, 1.0),
    ]


def plan(folder: Path, options: argparse.Namespace) -> list[Part]:
    quick = options.quick
    chosen = {field: value for field in ("layers", "experts") if (value := getattr(options, field))}
    base = Sizes(2, 32, hidden=512, width=256, heads=8, kv_heads=2, head_dim=64) if quick else Sizes(experts=64)
    sizes = replace(base, **chosen)
    rounds = options.rounds or 2
    contenders = ["ours", "host", *(["mlx-vlm"] if options.vlm_version else [])]

    def convert(source: str, target: str, *arguments: object) -> None:
        command = ["-m", "mlx_lm", "convert", "--hf-path", folder / source, "--mlx-path", folder / target, *arguments]
        subprocess.run([sys.executable, *map(str, command)], check=True, stdout=subprocess.DEVNULL)

    def float32() -> None:
        write(folder / "float32", sizes, dtype="float32")
        convert("float32", "native")
        as_qwen3_moe(folder / "native")

    def quantized() -> None:
        write(folder / "bfloat16", replace(sizes, layers=options.layers or 1))
        for bits in (4, 8):
            convert("bfloat16", f"{bits} bits", "-q", "--q-bits", bits)
            shutil.copytree(folder / f"{bits} bits", folder / f"{bits} bits native")
            as_qwen3_moe(folder / f"{bits} bits native")

    def environments() -> None:
        """One with this package and its start-up file, one with the package only."""
        for name in ("bare", "plugged"):
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / name], check=True)
            (site,) = (folder / name / "lib").glob("python*/site-packages")
            shutil.copytree(ROOT / "mlx_lm_qwen3vlmoe", site / "mlx_lm_qwen3vlmoe")
            if name == "plugged":
                shutil.copytree(ROOT / "startup", site, dirs_exist_ok=True)
            subprocess.run([folder / name / "bin/python", "-m", "compileall", "-qf", site], check=True)

    def rates(key: str, native: str | None, length: int) -> list[Job]:
        jobs: list[Job] = [(key, contender, "rates", [folder / key, length]) for contender in contenders]
        return jobs if native is None else [*jobs, (key, "native", "rates", [folder / native, length])]

    length = 32 if quick else 16  # layers quantized to 4 bits are slow on a CPU
    bits = rates("4 bits", "4 bits native", length) + rates("8 bits", "8 bits native", length)
    sources = {"ours": "4 bits", "host": "4 bits", "native": "4 bits native"}
    lora: list[Job] = [("lora", who, "lora", [folder / source, length // 4]) for who, source in sources.items()]
    parts = [
        Part("float32", float32, rates("float32", "native", 128), rounds),
        Part("bfloat16", lambda: write(folder / "bfloat16", sizes), rates("bfloat16", None, 128), rounds),
        Part("quantized", quantized, bits + lora, rounds),
    ]
    many = replace(base, **{"layers": 2 if quick else 8, "experts": 32} | chosen)
    for layout in ("official", "per_expert", "fp8"):
        arguments = ["convert", [folder / layout, 2 * many.parameters()]]
        jobs = [(f"convert {layout}", c, *arguments) for c in (("ours", "host") if layout == "official" else ("ours",))]
        parts.append(Part("convert", lambda layout=layout: write(folder / layout, many, layout), jobs, rounds))
    for dtype in ("float32", "bfloat16"):
        for n in LAYERS:
            source, few = folder / f"{n} {dtype}", replace(base, layers=n, experts=8)
            jobs = [(f"peak {n} {dtype}", contender, "load", [source]) for contender in contenders[:2]]
            parts.append(Part("peak", lambda s=source, few=few, d=dtype: write(s, few, "official", d), jobs))
    big = [128, 94, 188] if quick else [128, 94, 188, 376]
    parts.append(Part("sanitize", lambda: None, [("sanitize", "ours", "sanitize", big)], 1 if quick else 3))
    start = [*(folder / name / "bin/python" for name in ("bare", "plugged")), 60 if quick else 300]
    parts.append(Part("start", environments, [("start", "ours", "start", start)]))
    return [part for part in parts if options.only in (None, part.name)]


def run(contender: str, kind: str, arguments: list[object], options: argparse.Namespace) -> dict:
    environment = os.environ | ({"MLX_LM_PLUGINS": "0"} if contender == "host" else {})
    python = options.mlx_vlm if contender == "mlx-vlm" else sys.executable
    command = [python, HERE / "measure.py", kind, contender, *arguments]
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{contender} {kind}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> tuple[dict, list[str]]:
    """Results of every round by key and contender, and what failed."""
    results: dict[str, dict[str, list[dict]]] = {}
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        parts = plan(Path(temporary), options)
        total, k = sum(len(part.jobs) * part.rounds for part in parts), 0
        for part in parts:
            part.prepare()
            for _ in range(part.rounds):
                for key, contender, kind, arguments in part.jobs:
                    k += 1
                    print(f"{k}/{total} {key}: {contender}", end=" ", flush=True)
                    try:
                        result = run(contender, kind, arguments, options)
                    except RuntimeError as error:
                        failed.append(f"{key}: {error}")
                        print("failed", error)
                        continue
                    results.setdefault(key, {}).setdefault(contender, []).append(result)
                    print(" ".join(f"{n}={v:.3g}" for n, v in result.items() if isinstance(v, float)), flush=True)
            for path in Path(temporary).iterdir():
                shutil.rmtree(path)
    return results, failed


def tabulate(results: dict) -> list[dict]:
    """The figures of which there are results, with ratios and whether they meet their bounds."""
    rows = []
    for figure in figures():
        values = {}
        for contender, rounds in results.get(figure.key, {}).items():
            if found := [result[figure.metric] for result in rounds if figure.metric in result]:
                values[contender] = figure.best(found)
        if "ours" not in values or (figure.against and figure.against not in values):
            continue
        compared = values["ours"] / values[figure.against] if figure.against else values["ours"]
        row = {"figure": figure.label, "unit": figure.unit, "values": values, "against": figure.against}
        row |= {"compared": compared, "target": figure.bound, "certain": figure.certain, "higher": figure.best is max}
        if figure.bound is not None:
            shown = round(compared, 2)
            row["met"] = shown >= figure.bound if row["higher"] else shown <= figure.bound
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    lines = [f"| | {' | '.join(CONTENDERS.values())} | compared | target | met |", "|---" * 8 + "|"]
    for row in rows:
        values = [f"{row['values'][c]:.3g}" if c in row["values"] else "" for c in CONTENDERS]
        against = f"{row['compared']:.2f} of {CONTENDERS[row['against']]}" if row["against"] else ""
        sign = "≥" if row["higher"] else "≤"
        target = f"{sign} {row['target']:g}" if row["target"] is not None else ""
        met = {True: "yes", False: "no"}.get(row.get("met"), "")
        label = f"{row['figure']}, {row['unit']}" if row["unit"] else row["figure"]
        lines.append(f"| {' | '.join([label, *values, against, target, met])} |")
    return "\n".join(lines)


def compared(rows: list[dict]) -> str:
    """What is measured of another contender as well, and the ratio of the two."""
    lines = ["| | this package | other | ratio |", "|---|---|---|---|"]
    for row in rows:
        if row["against"]:
            mine, other = row["values"]["ours"], row["values"][row["against"]]
            label = f"{row['figure']}, {row['unit']}" if row["unit"] else row["figure"]
            other = f"{other:.3g} ({CONTENDERS[row['against']]})"
            lines.append(f"| {label} | {mine:.3g} | {other} | {row['compared']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, no mlx-vlm: a few minutes")
    parser.add_argument("--only", choices=["float32", "bfloat16", "quantized", "convert", "peak", "sanitize", "start"])
    parser.add_argument("--layers", type=int, help="layers of the rates and conversions")
    parser.add_argument("--experts", type=int, help="experts of the rates and conversions")
    parser.add_argument("--rounds", type=int, help="rounds of what is timed against another contender")
    parser.add_argument("--mlx-vlm", default=sys.executable, metavar="PYTHON", help="a Python that has mlx-vlm")
    options = parser.parse_args()
    os.environ.pop("MLX_LM_PLUGINS", None)
    ask = "from importlib.metadata import version; print(version('mlx-vlm'))"
    asked = subprocess.run([options.mlx_vlm, "-c", ask], capture_output=True, text=True)
    options.vlm_version = "" if options.quick else asked.stdout.strip()
    complete = not (options.quick or options.only or options.layers or options.experts)
    if not options.quick and not options.vlm_version:
        print("mlx-vlm is left out: it is not installed (pip install mlx-vlm)")
    results, failed = measure(options)
    rows = tabulate(results)
    about = described(**{"mlx-vlm": options.vlm_version or "left out"})
    report = about | {"command": "python benchmarks/run.py", "figures": rows, "results": results}
    text = f"{sentence(about)}\n\n{table(rows)}"
    print("", text, sep="\n")
    if complete:
        (HERE / "results.json").write_text(json.dumps(report, indent=1) + "\n")
        fill_in(ALL, "figures", text)
        fill_in(PAGE, "figures", f"{sentence(about)}\n\n{compared(rows)}")
        plot.main()
    certain = [row for row in rows if row["certain"] is not None and row["compared"] > row["certain"]]
    failed += [f"{row['figure']}: {row['compared']:.3g}, at most {row['certain']:g} allowed" for row in certain]
    sys.exit("\n".join(failed) or None)


if __name__ == "__main__":
    main()
