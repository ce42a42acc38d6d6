"""What both dashboards have in common: how a chart looks, what colour a label has, and how rows of panels become JSON."""

from collections.abc import Callable, Iterable, Mapping
from itertools import count
from typing import Any, Final

from grafana_foundation_sdk.builders import common, dashboard, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, StackingMode, TooltipDisplayMode
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DynamicConfigValue

WIDTH: Final = 24
STAT_HEIGHT: Final = 4
COLOURS: Final = {"negative": "red", "neutral": "blue", "positive": "green"}

Rows = Mapping[str, Callable[[], Iterable[Any]]]  # title → panels


def lines(title: str, unit: str, says: str) -> timeseries.Panel:
    """A chart of series over time, without its queries."""
    return (
        timeseries.Panel()
        .title(title)
        .description(says)
        .unit(unit)
        .fill_opacity(10)
        .legend(common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).show_legend(True))
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    )


def stacked_by_label(panel: timeseries.Panel) -> timeseries.Panel:
    """The same chart with a series for each label, as shares of the whole and in the labels' colours."""
    panel = panel.stacking(common.StackingConfig().mode(StackingMode.PERCENT)).fill_opacity(60)
    for label, colour in COLOURS.items():
        panel = panel.override_by_name(label, [DynamicConfigValue("color", {"mode": "fixed", "fixedColor": colour})])
    return panel


def board(name: str, source_type: str) -> dashboard.Dashboard:
    """An empty dashboard, on top of which one chooses a data source of this type."""
    return (
        dashboard.Dashboard(name)
        .uid(name)
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type(source_type))
    )


def in_json(board: dashboard.Dashboard, rows: Rows) -> str:
    """The dashboard with these rows, as Grafana reads it."""
    ids = count(1)
    for title, panels in rows.items():
        board = board.with_row(dashboard.Row(title).id(next(ids)))
        for panel in panels():
            board = board.with_panel(panel.id(next(ids)))
    return JSONEncoder(sort_keys=True, indent=2, ensure_ascii=False).encode(board.build()) + "\n"
