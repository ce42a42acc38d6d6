"""Writes the chart's values.yaml from values.schema.json, and into that the names and kinds of the worker's settings.

`make dashboard` calls it; a test finds both files up to date.
"""

import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from worker.settings.run import RunSettings

CHART = Path(__file__).with_name("sentiment-worker")
SCHEMA = CHART / "values.schema.json"
ELSEWHERE = "(password|secret|token|file)$"  # _refuse.tpl says of these names where they belong
TEXT = {"$ref": "#/definitions/text"}
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
                if "description" in item:
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


def _values_of_a_setting(rule: dict[str, Any]) -> dict[str, Any]:
    """What a setting takes in values.yaml: each variable is text, so a number or a boolean may be written as text, too."""
    rule = next((each for each in rule.get("anyOf", ()) if each.get("type") != "null"), rule)
    if "enum" in rule:
        return {"enum": [*rule["enum"], None]}
    if rule["type"] == "boolean":
        return {"type": ["boolean", "integer", "string", "null"]}
    if rule["type"] in ("integer", "number"):
        limits = {key: limit for key, limit in rule.items() if key.lower().endswith(("minimum", "maximum"))}
        return {"type": [rule["type"], "string", "null"], **limits, "pattern": "^(auto$|[0-9.])"}
    return TEXT


def schema() -> str:
    """The text of values.schema.json, with a line for each of the worker's settings."""
    whole = json.loads(SCHEMA.read_text(encoding="utf-8"))
    rules = RunSettings.model_json_schema()["properties"]
    names = sorted(name for name in rules if not re.search(ELSEWHERE, name))
    settings = whole["properties"]["settings"]
    settings["properties"] = {name: name for name in names}
    settings["patternProperties"] = {ELSEWHERE: TEXT}
    text = json.dumps(whole, indent=1, ensure_ascii=False)
    for name in names:
        text = text.replace(f'"{name}": "{name}"', f'"{name}": {json.dumps(_values_of_a_setting(rules[name]))}')
    return f"{text}\n"


def built() -> str:
    """The text of values.yaml."""
    properties = json.loads(SCHEMA.read_text(encoding="utf-8"))["properties"]
    return HEAD + "\n".join(_lines(properties, "")) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(schema(), encoding="utf-8")
    (CHART / "values.yaml").write_text(built(), encoding="utf-8")
