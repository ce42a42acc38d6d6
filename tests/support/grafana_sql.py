"""What Grafana makes of a query for PostgreSQL before it sends it: its macros, and the variables of the dashboard."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

BOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "sentiment-analysts.json"


@dataclass(frozen=True)
class View:
    """What somebody looks at: a range of time, the width of a point in it, and what was chosen on top."""

    start: datetime
    end: datetime
    interval: str = "1m"
    variables: Mapping[str, str | Sequence[str]] = field(default_factory=dict)

    def expand(self, query: str) -> str:
        """The SQL that reaches the server; KeyError for a variable that there is not."""
        start, end = (quoted(at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")) for at in (self.start, self.end))
        query = re.sub(r"\$__timeFilter\((\w+)\)", rf"\1 BETWEEN {start} AND {end}", query)
        query = query.replace("$__timeFrom()", start).replace("$__timeTo()", end).replace("$__interval", self.interval)
        return re.sub(r"\$\{(\w+):sqlstring\}", lambda match: sql_string(self.variables[match[1]]), query)


def sql_string(value: str | Sequence[str]) -> str:
    return ", ".join(map(quoted, [value] if isinstance(value, str) else value))


def quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def queries(board: Path = BOARD) -> dict[str, str]:
    """The query of each panel of a dashboard, by its title."""
    panels = json.loads(board.read_text(encoding="utf-8"))["panels"]
    return {panel["title"]: panel["targets"][0]["rawSql"] for panel in panels if panel["type"] != "row"}
