"""Draw docs/benchmarks.svg from results.json and real.json: ``python benchmarks/plot.py``."""

import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
GRAY, MET, MISSED, TARGET, OTHER = "#808890", "#2f9e6e", "#d9822b", "#d6409f", "#4a7fc1"  # on white and on black
NAMES = {"host": "mlx-lm's own class", "native": "qwen3_moe", "mlx-vlm": "mlx-vlm"}


def plot(report: dict, real: dict, file: Path) -> None:
    """Ratios as points on logarithmic axes, and the memory of the 30B as bars from zero."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    mpl.rcParams.update({"svg.hashsalt": "benchmarks", "font.size": 9})
    mpl.rcParams |= {f"{part}.color": GRAY for part in ("text", "xtick", "ytick")}
    mpl.rcParams |= {"axes.edgecolor": GRAY, "axes.labelcolor": GRAY}
    rows = [row for row in report["figures"] if row["against"]]
    panels = [[row for row in rows if row["higher"] is higher] for higher in (True, False)]
    sizes = [len(panel) + 1.5 for panel in (*panels, real["rows"])]
    figure, axes = plt.subplots(3, 1, figsize=(8, 2 + 0.25 * sum(sizes)), height_ratios=sizes, layout="constrained")
    titles = (
        "Rate, this package / other: more is better",
        "Time or memory, this package / other: less is better",
    )
    for axis, panel, title in zip(axes, panels, titles, strict=False):
        for place, row in enumerate(panel):
            color = {True: MET, False: MISSED, None: GRAY}[row.get("met")]
            axis.plot([row["compared"]], [place], "o", color=color, markersize=6)
            if row["target"] is not None:
                axis.plot([row["target"]], [place], "|", color=TARGET, markersize=11, markeredgewidth=2)
            axis.annotate(f"  {row['compared']:.2f}", (row["compared"], place), va="center", fontsize=8)
        axis.axvline(1, color=GRAY, linewidth=0.8, linestyle=":")
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="x", which="both", labelsize=7)
        axis.set_yticks(range(len(panel)), [f"{_plain(row['figure'])} / {NAMES[row['against']]}" for row in panel])
        axis.margins(x=0.15)
        _finish(axis, title)
    axis = axes[2]
    for place, row in enumerate(real["rows"]):
        axis.barh(place - 0.18, row["file"], height=0.34, color=GRAY, alpha=0.45)
        axis.barh(place + 0.18, row["peak"], height=0.34, color=OTHER)
        axis.annotate(f" {row['peak']:.1f}", (row["peak"], place + 0.2), va="center", fontsize=8)
    axis.set_yticks(
        range(len(real["rows"])), [f"{_plain(row['step'])}, {row['layers']} layers" for row in real["rows"]]
    )
    axis.margins(x=0.08)
    _finish(axis, "The 30B's true shapes: memory at its peak, GB")
    legend = [
        Line2D([], [], marker="o", color=MET, linestyle="", label="target met"),
        Line2D([], [], marker="o", color=MISSED, linestyle="", label="missed"),
        Line2D([], [], marker="o", color=GRAY, linestyle="", label="no target"),
        Line2D([], [], marker="|", color=TARGET, linestyle="", markersize=11, markeredgewidth=2, label="target"),
        Patch(color=OTHER, label="peak (resident)"),
        Patch(color=GRAY, alpha=0.45, label="the checkpoint"),
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    figure.suptitle("mlx-lm-qwen3vlmoe on a CPU", color=GRAY, fontsize=12, fontweight="bold")
    axis.set_xlabel(_caption(report, real), fontsize=7, labelpad=10, ha="right", x=1)
    figure.savefig(file, transparent=True, metadata={"Date": None})


def _finish(axis: object, title: str) -> None:
    axis.invert_yaxis()
    axis.set_title(title, loc="left", fontsize=9, color=GRAY)
    axis.spines[["top", "right"]].set_visible(False)


def _plain(text: str) -> str:
    return text.replace("`", "")


def _caption(report: dict, real: dict) -> str:
    def of(about: dict) -> str:
        versions, machine = about["versions"], about["machine"]
        named = ", ".join(f"{name} {versions[name]}" for name in ("mlx-lm-qwen3vlmoe", "mlx-lm", "mlx"))
        return f"{about['date']}: {named}; {machine['device']}, {machine['cores']} cores, {machine['memory']}"

    return f"ratios {of(report)}\nmemory {of(real)}. Metal and CUDA were not measured."


def main() -> None:
    report, real = (json.loads((HERE / name).read_text()) for name in ("results.json", "real.json"))
    plot(report, real, HERE.parent / "docs" / "benchmarks.svg")


if __name__ == "__main__":
    main()
