"""The chart shows the figures beside it."""

from xml.etree import ElementTree

from benchmarks.chart import Bar, Group, drawn, groups, machine
from benchmarks.common import RESULTS


def test_the_committed_chart_is_drawn_from_the_committed_results() -> None:
    chart = (RESULTS / "chart.svg").read_text(encoding="utf-8")
    assert chart == drawn(list(groups()), machine()), "draw it anew: python -m benchmarks.chart"


def test_bars_are_as_long_as_their_values() -> None:
    chart = drawn([Group("speed", [Bar("ours & theirs", 200, True), Bar("other", 50, False)])], "a machine")
    lengths = [
        float(bar.attrib["width"]) for bar in ElementTree.fromstring(chart).iter("{http://www.w3.org/2000/svg}rect")
    ]
    assert lengths[0] == 4 * lengths[1]
