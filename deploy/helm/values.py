"""Writes the chart's values.yaml from values.schema.json, which has each value's sentence and default.

`make dashboard` calls it; a test finds the file up to date.
"""

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHART = Path(__file__).with_name("sentiment-worker")
WIDTH = 120
HEAD = """\
# Written by `make dashboard` from values.schema.json: change that. deploy/README.md shows what most deployments set.
"""


def _lines(properties: dict[str, Any], indent: str) -> Iterator[str]:
    for name, value in properties.items():
        if name == "global":
            continue
        if not indent:
            yield ""
        yield from _comment(value["description"], indent)
        if "default" in value:
            yield from _default(name, value["default"], indent)
            for key, item in value.get("properties", {}).items():
                yield from _comment(f"{key}: {item['description']}", f"{indent}  ")
        else:
            yield f"{indent}{name}:"
            yield from _lines(value["properties"], f"{indent}  ")


def _comment(sentence: str, indent: str) -> Iterator[str]:
    yield from textwrap.wrap(sentence, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _default(name: str, default: Any, indent: str) -> Iterator[str]:
    if isinstance(default, dict) and default:
        yield f"{indent}{name}:"
        for key, item in default.items():
            yield f"{indent}  {key}: {json.dumps(item)}"
    else:
        yield f"{indent}{name}: {json.dumps(default)}"


def built() -> str:
    """The text of values.yaml."""
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    return HEAD + "\n".join(_lines(schema["properties"], "")) + "\n"


if __name__ == "__main__":
    (CHART / "values.yaml").write_text(built(), encoding="utf-8")
