"""Draw top-1 against scheme from the recorded accuracy results, as one SVG.

python benchmarks/draw_accuracy.py docs/accuracy.svg
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

from harness import RESULTS

SCHEMES = ("W8A8", "W6A6", "W4A8", "W4A4")
SERIES = {
    "balanced": ("#5a3fa0", "--effort balanced, all quantized"),
    "fast": ("#8a1c5b", "--effort fast, all quantized"),
    "deploy": ("#0b6e4f", "deploy (attention in float)"),
    "repq_vit": ("#1f5fa8", "repq_vit (strict)"),
    "repq_vit_paper": ("#b8860b", "repq_vit_paper"),
}
MODELS = {"deit_tiny": "DeiT-Tiny", "vit_tiny": "ViT-Tiny"}
WIDTH, HEIGHT, LEFT, TOP, GAP = 330, 220, 46, 50, 40


def read() -> tuple[dict[tuple[str, str, str], float], dict[str, float]]:
    """Return mean top-1 by model, recipe and scheme, and the float top-1 by model.

    Runs with the most calibration images count.
    """
    found: dict[tuple[str, str, str], dict[int, list[float]]] = defaultdict(dict)
    floats: dict[str, float] = {}
    for path in sorted(RESULTS.glob("accuracy-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if entry["recipe"] == "float":
                floats[entry["model"]] = entry["captured_top1_percent"]
            elif not entry["overrides"]:
                recipe = entry["recipe"].removesuffix("_narrow")  # one effort, two recipes
                key = entry["model"], recipe, entry["scheme"]
                found[key].setdefault(entry.get("samples", 32), []).append(
                    entry["top1_percent"]
                )
    means = {key: statistics.mean(runs[max(runs)]) for key, runs in found.items()}
    return means, floats


def panel(
    model: str, origin: int, means: dict[tuple[str, str, str], float], top: float
) -> str:
    """Return one chart as SVG elements."""

    def x(index: int) -> float:
        return origin + LEFT + (index + 0.5) * WIDTH / len(SCHEMES)

    def y(value: float) -> float:
        return TOP + HEIGHT * (1 - value / 100)

    parts = [f'<text x="{origin + LEFT}" y="{TOP - 14}" class="title">{MODELS[model]}</text>']
    for value in range(0, 101, 20):
        parts.append(
            f'<line x1="{origin + LEFT}" x2="{origin + LEFT + WIDTH}" y1="{y(value):.1f}" '
            f'y2="{y(value):.1f}" class="grid"/><text x="{origin + LEFT - 6}" '
            f'y="{y(value) + 4:.1f}" class="end">{value}</text>'
        )
    parts.append(
        f'<line x1="{origin + LEFT}" x2="{origin + LEFT + WIDTH}" y1="{y(top):.1f}" '
        f'y2="{y(top):.1f}" class="float"/><text x="{origin + LEFT + WIDTH}" '
        f'y="{y(top) - 5:.1f}" class="end">float {top:.1f}</text>'
    )
    for index, scheme in enumerate(SCHEMES):
        parts.append(
            f'<text x="{x(index):.1f}" y="{TOP + HEIGHT + 18}" class="mid">{scheme}</text>'
        )
    for recipe, (colour, _) in SERIES.items():
        points = [
            (x(index), y(means[model, recipe, scheme]))
            for index, scheme in enumerate(SCHEMES)
            if (model, recipe, scheme) in means
        ]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        parts += [
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="{colour}"/>' for px, py in points
        ]
    return "".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    means, floats = read()
    step = LEFT + WIDTH + GAP
    panels = [
        panel(m, i * step, means, floats[m]) for i, m in enumerate(MODELS) if m in floats
    ]
    legend = ""
    for i, (colour, label) in enumerate(SERIES.values()):
        left, below = LEFT + 8 + i % 3 * 250, TOP + HEIGHT + 44 + i // 3 * 20
        legend += f'<circle cx="{left}" cy="{below}" r="4" fill="{colour}"/>'
        legend += f'<text x="{left + 10}" y="{below + 4}">{label}</text>'
    total_width, total_height = 2 * step, TOP + HEIGHT + 84
    style = (
        "text{font:12px system-ui,sans-serif;fill:#222}.title{font-weight:600;font-size:14px}"
        ".end{text-anchor:end}.mid{text-anchor:middle}.grid{stroke:#ddd}"
        ".float{stroke:#888;stroke-dasharray:4 3}"
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total_width} {total_height}" '
        f'role="img" aria-label="Top-1 accuracy by scheme and recipe"><style>{style}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(panels)}{legend}</svg>\n',
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
