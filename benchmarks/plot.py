"""Draw docs/benchmarks.svg, tokens a second and the memory of converting, from results.json and real.json.

python benchmarks/plot.py    # `make bench` and `make bench-real` do it, too
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

HERE = Path(__file__).resolve().parent
WIDTH, BAR, GAP = 700, 30, 6  # a phone shows half of this width: so the letters are twice as large as usual
RATES = ("Decode, 4 bits", "Prefill, 4 bits", "Decode, 8 bits", "Prefill, 8 bits")
OTHERS = {"native": "mlx-lm's qwen3_moe", "mlx-vlm": "mlx-vlm"}
STYLE = """
text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; fill: #6e7781 }
.title { font-size: 28px; font-weight: 600 } .label { font-size: 25px } .value { font-size: 24px }
.caption { font-size: 18px }
.ours { fill: #2f81d0 } .first { fill: #8c959f } .second { fill: #b6bdc5 }
@media (prefers-color-scheme: dark) { text { fill: #9da7b1 } .first { fill: #7d8590 } .second { fill: #555d66 } }
"""


@dataclass
class Drawing:
    """Lines of SVG from top to bottom."""

    y: int = 0
    lines: list[str] = field(default_factory=list)

    def text(self, text: str, kind: str, size: int, x: int = 0) -> None:
        self.y += size
        self.lines.append(f'<text x="{x}" y="{self.y - size // 4}" class="{kind}">{escape(text)}</text>')

    def bars(self, values: dict[str, float], largest: float) -> None:
        """One below the other, from zero."""
        for kind, value in values.items():
            width = max(2, round((WIDTH - 90) * value / largest))
            self.lines.append(f'<rect y="{self.y}" width="{width}" height="{BAR}" rx="3" class="{kind}"/>')
            self.lines.append(f'<text x="{width + 10}" y="{self.y + BAR - 6}" class="value">{value:.3g}</text>')
            self.y += BAR + GAP

    def legend(self, names: dict[str, str]) -> None:
        x = 0
        for kind, name in names.items():
            self.lines.append(f'<rect x="{x}" y="{self.y + 8}" width="22" height="22" rx="3" class="{kind}"/>')
            self.lines.append(f'<text x="{x + 30}" y="{self.y + 28}" class="value">{escape(name)}</text>')
            x += 60 + 14 * len(name)
        self.y += 46

    def panel(
        self, title: str, names: dict[str, str], groups: dict[str, dict[str, float]], about: dict, of: str
    ) -> None:
        self.text(title, "title", 40)
        self.legend(names)
        largest = max(value for values in groups.values() for value in values.values())
        for label, values in groups.items():
            self.text(label, "label", 36)
            self.bars(values, largest)
            self.y += GAP
        for line in _caption(about, of):
            self.text(line, "caption", 26)
        self.y += 30


def _caption(about: dict, of: str) -> tuple[str, str]:
    versions, machine = about["versions"], about["machine"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("mlx-lm-qwen3vlmoe", "mlx-lm", "mlx"))
    return f"{about['date']}: {named}", f"{of}; {machine['cores']} CPU cores, {machine['memory']}"


def rates(report: dict) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """What stands in the legend, and tokens a second by what is measured."""
    rows = {row["figure"]: row["values"] for row in report["figures"] if row["figure"] in RATES}
    kinds = {"ours": "ours"} | dict(zip(OTHERS, ("first", "second"), strict=True))
    names = {"ours": "this package"} | {kinds[who]: name for who, name in OTHERS.items()}
    groups = {label: {kinds[who]: rows[label][who] for who in kinds if who in rows[label]} for label in RATES}
    used = {kind for values in groups.values() for kind in values}
    return {kind: name for kind, name in names.items() if kind in used}, groups


def memory(real: dict) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """The same for the peaks of converting the release in 16 bits and the one in FP8, with as many layers as ran."""
    groups: dict[str, dict[str, float]] = {}
    for layouts, name in ((["official"], "BF16 release"), (["fp8", "fp8 fused"], "FP8 release")):
        steps = [f"`convert -q`, {layout}" for layout in layouts]
        best = max((row for row in real["rows"] if row["step"] in steps), key=lambda row: row["layers"])
        values = {"ours": best["peak"]}
        for row in real["rows"]:
            if row["step"] == f"{steps[0]} by mlx-lm's own class" and row["layers"] == best["layers"]:
                values["first"] = row["peak"]
        groups[f"{name}, {best['layers']} layers: {best['file']:.0f} GB of files"] = values
    return {"ours": "this package", "first": "mlx-lm's own class"}, groups


def draw(report: dict, real: dict) -> str:
    drawing = Drawing()
    drawing.panel(
        "Tokens a second (more is better)", *rates(report), report, "One layer of the 30B's widths, random weights"
    )
    drawing.panel("GB of memory for mlx_lm.convert -q", *memory(real), real, "The 30B's layers, random weights")
    title = "Tokens a second, and the memory that converting takes, of this package and others"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {drawing.y}" role="img" aria-label="{title}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *drawing.lines, "</svg>", ""])


def main() -> None:
    report, real = (json.loads((HERE / name).read_text()) for name in ("results.json", "real.json"))
    (HERE.parent / "docs" / "benchmarks.svg").write_text(draw(report, real))


if __name__ == "__main__":
    main()
