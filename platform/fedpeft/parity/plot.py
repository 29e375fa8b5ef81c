"""The comparison as one SVG picture, written here: quality of each task by arm, and beside it what each arm costs.

No plotting library: three kinds of shapes, fonts that every browser has, colours that the colour-blind tell apart (Okabe and Ito 2008).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

from fedpeft.parity.said import ARMS, COLUMNS, count, size
from fedpeft.tasks.metrics import LESS

COLOURS = {"local": "#999999", "federated": "#0072b2", "central": "#e69f00"}
HEIGHT, TOP, BOTTOM = 420, 92, 368
"""Pixels: of the picture, and where the tallest bar ends and all begin."""
BAR, GAP, LEFT = 30, 26, 52
COST_WIDTH = 300
PANELS = (("bytes that left the sites", "bytes_up", size), ("seconds", "seconds", count), ("peak memory", "peak_bytes", size))


@dataclass(frozen=True)
class Group:
    """One task's bars: their label, the metric below it, the scores by arm."""

    label: str
    metric: str
    scores: Mapping[str, float]

    @property
    def top(self) -> float:
        """The score of a bar of full height: 1, or the largest score where one is above it (perplexity)."""
        return max(1.0, *self.scores.values())


def svg(found: Mapping[str, Any]) -> str:
    """The picture of a comparison's figures (`fedpeft.parity.figures.collect`)."""
    groups = groups_of(found)
    left = LEFT + len(groups) * (len(ARMS) * BAR + GAP) + GAP
    width = left + COST_WIDTH
    body = [*_head(found, width), *_quality(groups, left), *_costs(found, left)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT}" viewBox="0 0 {width} {HEIGHT}" '
            'font-family="system-ui, sans-serif" font-size="13" fill="#222222" role="img">',
            f"<title>Parity of {escape(str(found['federation']))}</title>",
            f'<rect width="{width}" height="{HEIGHT}" fill="#ffffff"/>',
            *body,
            "</svg>",
            "",
        ]
    )


def groups_of(found: Mapping[str, Any]) -> list[Group]:
    """The tasks by name, then their mean where there is one."""
    metrics = found["metrics"]
    groups = [Group(task, metric, {arm: found["scores"][arm][task] for arm in ARMS}) for task, metric in sorted(metrics.items())]
    return [*groups, Group("mean", "", found["mean"])] if found["mean"] else groups


def _head(found: Mapping[str, Any], width: int) -> Iterator[str]:
    sites, rounds, examples = len(found["sites"]), found["rounds"], count(found["examples"]["federated"])
    said = f"{found['federation']}: {sites} sites, {rounds} rounds; each way sees {examples} examples"
    yield _text(LEFT, 28, said, size=17, weight="bold")
    for place, arm in enumerate(ARMS):
        x = LEFT + 110 * place
        yield _rect((x, 44, 12, 12), COLOURS[arm])
        yield _text(x + 18, 55, COLUMNS[arm])
    yield _text(width - 16, 55, f"central engine: {found['engine']}", anchor="end", colour="#666666")


def _quality(groups: Sequence[Group], right: int) -> Iterator[str]:
    fractions = all(group.top == 1.0 for group in groups)
    for step in range(5 if fractions else 1):
        y = _height(step / 4)
        yield f'<line x1="{LEFT}" x2="{right - GAP}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>'
        if fractions:
            yield _text(LEFT - 8, y + 4, f"{step / 4:.2f}", anchor="end", colour="#666666", size=11)
    for place, group in enumerate(groups):
        yield from _group(group, LEFT + GAP // 2 + place * (len(ARMS) * BAR + GAP))


def _group(group: Group, x: int) -> Iterator[str]:
    for place, arm in enumerate(ARMS):
        y = _height(max(group.scores[arm], 0.0) / group.top)
        yield _rect((x + place * BAR + 2, y, BAR - 4, BOTTOM - y), COLOURS[arm])
        yield _text(x + (place + 0.5) * BAR, y - 5, _short(group.scores[arm]), anchor="middle", size=11)
    middle = x + len(ARMS) * BAR / 2
    yield _text(middle, BOTTOM + 20, _cut(group.label), anchor="middle", weight="bold")
    yield _text(
        middle, BOTTOM + 36, f"{group.metric} \u2193" if group.metric in LESS else group.metric, anchor="middle", colour="#666666", size=11
    )


def _costs(found: Mapping[str, Any], x: int) -> Iterator[str]:
    for panel, (title, key, said) in enumerate(PANELS):
        y, values = TOP + panel * 96, found[key]
        yield _text(x, y, title, weight="bold")
        top = max(*(values[arm] or 0 for arm in ARMS), 1)
        for place, arm in enumerate(ARMS):
            length = (values[arm] or 0) / top * (COST_WIDTH - 110)
            row = y + 10 + place * 22
            yield _rect((x, row, max(length, 1.0), 16), COLOURS[arm])
            yield _text(x + length + 6, row + 13, "not known" if values[arm] is None else said(values[arm]), size=12)


def _height(share: float) -> float:
    return BOTTOM - share * (BOTTOM - TOP)


def _short(score: float) -> str:
    return f"{score:.2f}".removeprefix("0") if abs(score) < 100 else f"{score:.0f}"


def _cut(label: str) -> str:
    return label if len(label) <= 14 else f"{label[:13]}\u2026"


def _rect(box: tuple[float, float, float, float], colour: str) -> str:
    x, y, width, height = box
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'


def _text(x: float, y: float, said: str, **style: Any) -> str:
    names = {"size": "font-size", "weight": "font-weight", "anchor": "text-anchor", "colour": "fill"}
    more = "".join(f' {names[key]}="{value}"' for key, value in style.items())
    return f'<text x="{x:.1f}" y="{y:.1f}"{more}>{escape(said)}</text>'
