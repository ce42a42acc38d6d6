"""The README's chart: `python -m benchmarks.chart` draws benchmarks/results/chart.svg from the figures beside it.

One group of bars for each result that is there; a bar is the median over the rounds. Plain SVG, whose colours follow the
reader's light or dark page.
"""

import json
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple
from xml.etree import ElementTree

from benchmarks.common import RESULTS

WIDTH, NAMES, VALUES = 760, 190, 90
BAR, GAP, HEAD, MARGIN = 18, 8, 40, 16
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 14px }
.note { fill: #59636e; font-size: 12px }
.own { fill: #0969da }
.other { fill: #afb8c1 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc }
  .note { fill: #9198a1 }
  .own { fill: #4493f8 }
  .other { fill: #565e67 }
}
"""


class Bar(NamedTuple):
    name: str
    value: float
    is_own: bool


class Group(NamedTuple):
    """Bars that share a scale, which begins at 0."""

    title: str
    bars: list[Bar]


def main() -> None:
    chart = drawn(list(groups()), machine())
    (RESULTS / "chart.svg").write_text(chart, encoding="utf-8")


def groups() -> Iterator[Group]:
    engine, events = read("engine"), read("end_to_end")
    if engine:
        speeds = engine["texts_per_s"]
        bars = [Bar(name, statistics.median(each), name in engine["over_floor"]) for name, each in speeds.items()]
        yield Group("Engine without Kafka, texts/s", bars)
    titles = {
        "model": "Kafka to Kafka with a model of the card's architecture, events/s",
        "plumbing": "Kafka to Kafka with a model that costs nothing, events/s",
    }
    for name, case in (events or {"cases": {}})["cases"].items():
        speeds = case["events_per_s"]
        bars = [Bar(who, statistics.median(each), who == "worker") for who, each in speeds.items()]
        yield Group(titles[name], bars)


def read(name: str) -> Any:
    """A result; None where it was not measured."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def machine() -> str:
    """Of the last result that names one."""
    found = [figures["machine"] for name in ("engine", "end_to_end") if (figures := read(name))]
    return f"{found[-1]['cpu']}, {found[-1]['cores']} cores" if found else ""


def drawn(groups: list[Group], note: str) -> str:
    """The SVG's text."""
    height = 2 * MARGIN + 20 + sum(HEAD + len(group.bars) * (BAR + GAP) for group in groups)
    svg = ElementTree.Element(
        "svg", xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {WIDTH} {height}", width=str(WIDTH), role="img"
    )
    ElementTree.SubElement(svg, "title").text = "; ".join(group.title for group in groups)
    ElementTree.SubElement(svg, "style").text = STYLE
    y = MARGIN
    for group in groups:
        y = draw_group(svg, group, y)
    write_text(svg, MARGIN, y + 16, note, "note")
    ElementTree.indent(svg)
    return ElementTree.tostring(svg, encoding="unicode") + "\n"


def draw_group(svg: ElementTree.Element, group: Group, y: int) -> int:
    """Draws below ``y``, answers with where the group ends."""
    write_text(svg, MARGIN, y + 18, group.title, "title")
    y += HEAD - GAP
    most = max(bar.value for bar in group.bars)
    for bar in group.bars:
        length = max(1.0, (WIDTH - NAMES - VALUES - MARGIN) * bar.value / most)
        write_text(svg, NAMES - 10, y + 14, bar.name, "", anchor="end")
        shape = {"x": str(NAMES), "y": str(y), "width": f"{length:.1f}", "height": str(BAR), "rx": "2"}
        ElementTree.SubElement(svg, "rect", {**shape, "class": "own" if bar.is_own else "other"})
        write_text(svg, NAMES + length + 8, y + 14, f"{bar.value:,.0f}", "")
        y += BAR + GAP
    return y + GAP


def write_text(svg: ElementTree.Element, x: float, y: float, words: str, kind: str, anchor: str = "start") -> None:
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}
    ElementTree.SubElement(svg, "text", {**place, **({"class": kind} if kind else {})}).text = words


if __name__ == "__main__":
    main()
