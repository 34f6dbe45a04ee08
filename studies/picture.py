"""The result of learned eviction as a picture and a table: what each method keeps of a context's worth.

python studies/picture.py    write docs/studies/learned-eviction.svg, and the first table of the README

From the committed scores of studies/learned.py and studies/joint.py: SQuAD's test split, the share of the way from no
context to the full one in gold_nll, with 95% intervals over contexts.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import joint
import learned
import methods
from parts import table

from lceval.stats.estimates import Stratum, recovery

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs" / "studies" / "learned-eviction.svg"
README = ROOT / "README.md"
BEGIN, END = "<!-- the result, written by studies/picture.py -->\n", "<!-- end of the result -->\n"
TASK = "lc_squad_ao_1k"
BUDGETS = (0.1, 0.25, 0.5)
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 400, 56, 236, 16, 48
LOWEST = -15
STYLE = """
text{font:13px system-ui,sans-serif;fill:#1b1f24}.soft{fill:#59636e}.grid{stroke:#d5d9de}
@media(prefers-color-scheme:dark){text{fill:#e4e7eb}.soft{fill:#9aa4af}.grid{stroke:#3a4048}}
"""
Point = tuple[float, float, float, float]  # budget, middle, lower and upper bound in %


def of_pilot(model: str, method: str) -> list[Point]:
    """The points of a method in studies/learned.py. method: a recipe with `{}` for the budget."""
    scores, none = learned.reported(f"nll-{model}", TASK), learned.reported(f"none-{model}", TASK)["full"]
    points = []
    for budget in BUDGETS:
        of = {name: scores[name] for name in ("full", method.format(budget))}
        gains = [[none[key]["gold_nll"] - rows[key]["gold_nll"] for key in scores["full"]] for rows in of.values()]
        clusters = [row["cluster"] for row in scores["full"].values()]
        points.append(point(budget, gains[1], gains[0], clusters))
    return points


def of_joint(arm: str, scorer: str) -> list[Point]:
    """The points of an arm of studies/joint.py, mean over its seeds; none before all are measured."""
    if (arm, scorer, len(joint.SEEDS)) not in joint.measured():
        return []
    none, full = joint.values(arm, "none", TASK, "full"), joint.values(arm, scorer, TASK, "full")
    points = []
    for budget in BUDGETS:
        rows = joint.values(arm, scorer, TASK, f"kvzap:{budget}")
        gains = [[none[key][1] - of[key][1] for key in rows] for of in (rows, full)]
        points.append(point(budget, gains[0], gains[1], [cluster for cluster, _ in rows.values()]))
    return points


def point(budget: float, gains: Sequence[float], full: Sequence[float], clusters: Sequence[str]) -> Point:
    share = recovery([Stratum(gains, full, clusters)])
    assert share.value is not None
    assert share.lo is not None
    assert share.hi is not None
    return budget, 100 * share.value, 100 * share.lo, 100 * share.hi


def picture(lines: Sequence[tuple[str, str, list[Point]]]) -> str:
    """An SVG of lines: name, colour, points."""

    def x(budget: float) -> float:
        low, high = math.log(BUDGETS[0]), math.log(BUDGETS[-1])
        return LEFT + 14 + (math.log(budget) - low) / (high - low) * (WIDTH - LEFT - RIGHT - 28)

    def y(share: float) -> float:
        return HEIGHT - BOTTOM - (max(share, LOWEST) - LOWEST) / (102 - LOWEST) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    parts.append("<title>What eviction keeps of a context's worth</title>" + f"<style>{STYLE}</style>")
    for share in (0, 25, 50, 75, 100):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(share):.1f}" y2="{y(share):.1f}"/>')
        parts.append(f'<text class="soft" text-anchor="end" x="{LEFT - 8}" y="{y(share) + 4:.1f}">{share}%</text>')
    for budget in BUDGETS:
        anchor = f'text-anchor="middle" x="{x(budget):.1f}" y="{HEIGHT - BOTTOM + 20}"'
        parts.append(f'<text class="soft" {anchor}>{100 * budget:g}%</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="soft" text-anchor="middle" x="{middle}" y="{HEIGHT - 8}">share of the KV cache</text>')
    ends = sorted(((points[-1][1], name, colour) for name, colour, points in lines), reverse=True)
    labels: list[float] = []
    for share, _, _ in ends:
        labels.append(max(y(share) + 4, labels[-1] + 17 if labels else 0))
    for _, colour, points in lines:
        places = " ".join(f"{x(budget):.1f},{y(share):.1f}" for budget, share, _, _ in points)
        parts.append(f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for budget, share, low, high in points:
            parts.append(f'<path d="M{x(budget):.1f} {y(low):.1f}V{y(high):.1f}" stroke="{colour}" opacity=".5"/>')
            parts.append(f'<circle cx="{x(budget):.1f}" cy="{y(share):.1f}" r="3.5" fill="{colour}"/>')
    for (_, name, colour), place in zip(ends, labels, strict=True):
        parts.append(f'<circle cx="{WIDTH - RIGHT + 10}" cy="{place - 4:.1f}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 20}" y="{place:.1f}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def prefills() -> float:
    """The time of kvzip in prefills, as measured by studies/methods.py."""
    times = methods.seconds()
    return times["kvzip:0.25"] / times["full"]


def lines() -> list[tuple[str, str, list[Point]]]:
    """All lines for which there are scores."""
    every = [
        ("trained together, kvzap", "#b3261e", of_joint("joint", "own")),
        ("adapter, then kvzap", "#2f7bd9", of_joint("ao", "start")),
        ("base, kvzap", "#7fb0ea", of_pilot("base", "kvzap:{}")),
        (f"base, kvzip ({prefills():.1f} prefills)", "#2a9d8f", of_pilot("base", "kvzip:{}")),
        ("base, expected_attention", "#d98a1f", of_pilot("base", "expected_attention:{}")),
        ("base, snapkv", "#9b6bdf", of_pilot("base", "snapkv:{}")),
        ("base, random", "#7d8896", of_pilot("base", "random:{}:sinks=4:recent=64")),
    ]
    return [line for line in every if line[2]]


def result() -> str:
    """The table of the README: the same shares as in the picture, and SubEM where answers were generated."""
    rows = []
    for name, _, points in lines():
        cells = [f"{middle:.0f} [{low:.0f}, {high:.0f}]" for _, middle, low, high in reversed(points)]
        rows.append([name, *cells])
    return table(["", *(f"{100 * budget:g}% of the cache" for budget in reversed(BUDGETS))], rows) + "\n"


def with_result(readme: str) -> str:
    """A README with the current table."""
    before, _, rest = readme.partition(BEGIN)
    return before + BEGIN + result() + END + rest.partition(END)[2]


if __name__ == "__main__":
    if sys.argv[1:]:
        raise SystemExit(__doc__)
    FILE.write_text(picture(lines()))
    README.write_text(with_result(README.read_text()))
