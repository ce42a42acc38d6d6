"""The recipe deploy/recipes/postgresql: connector and table fit what the worker writes, and each other."""

import json
import re
from typing import Any

import orjson

from tests.deploy.manifests import DEPLOY, read
from tests.support.outcomes import GOOD, outcome
from worker.core.encoder import result_fields
from worker.core.sentiment import CARD

RECIPE = DEPLOY / "recipes" / "postgresql"
CONFIG: dict[str, str] = json.loads((RECIPE / "sink.json").read_text())["config"]
SCHEMA: dict[str, Any] = json.loads(CONFIG["value.converter.schema.content"])
SQL = (RECIPE / "schema.sql").read_text()
PYTHON_TYPES = {"string": str, "double": float, "boolean": bool, "int32": int, "int64": int}
COLUMN_TYPES = {
    "string": "text",
    "double": "double precision",
    "boolean": "boolean",
    "int32": "integer",
    "int64": "bigint",
}
TIME = "io.debezium.time.ZonedTimestamp"


def fields(schema: dict[str, Any], before: str = "") -> dict[str, dict[str, Any]]:
    """The fields of a Connect schema, flattened as the connector flattens them."""
    found = {}
    for field in schema["fields"]:
        name = before + field["field"]
        found |= fields(field, f"{name}_") if field["type"] == "struct" else {name: field}
    return found


def flattened(value: dict[str, Any], before: str = "") -> dict[str, Any]:
    found = {}
    for name, inner in value.items():
        found |= flattened(inner, f"{before}{name}_") if isinstance(inner, dict) else {before + name: inner}
    return found


def test_the_connector_knows_each_field_of_a_result() -> None:
    published = outcome(1).producer_record
    assert published
    assert published.record.value
    result = flattened(orjson.loads(published.record.value))
    assert result.keys() == fields(SCHEMA).keys()
    for name, value in result.items():
        assert type(value) is PYTHON_TYPES[fields(SCHEMA)[name]["type"]], name
    assert fields(SCHEMA)["score"]["optional"]
    assert fields(SCHEMA)["event_time"]["optional"]


def test_only_these_fields_are_left_out() -> None:
    place = {"topic": "t", "partition": 0, "offset": 0}
    labels = CARD._replace(threshold=0.5)
    result = result_fields("1", GOOD, False, "m@0", place, None, "now", labels=labels, windows=2)
    assert flattened(result).keys() - fields(SCHEMA).keys() == {"labels", "windows"}


def test_the_table_has_a_column_for_each_field() -> None:
    columns = dict(
        re.findall(r"^    (\w+) (text|integer|bigint|double precision|boolean|timestamptz)\b", SQL, re.MULTILINE)
    )
    expected = {
        name: "timestamptz" if field.get("name") == TIME else COLUMN_TYPES[field["type"]]
        for name, field in fields(SCHEMA).items()
    }
    assert columns == {**expected, "record_key": "text", "minute": "timestamptz"}
    required = set(re.findall(r"^    (\w+) [a-z ]+ NOT NULL", SQL, re.MULTILINE))
    assert required == {name for name, field in fields(SCHEMA).items() if not field["optional"]} | {"minute"}


def test_connector_and_table_have_one_key() -> None:
    (key,) = re.findall(r"PRIMARY KEY \((.*)\)", SQL)
    assert (
        CONFIG["primary.key.fields"].split(",")
        == key.split(", ")
        == ["source_topic", "source_partition", "source_offset"]
    )


def test_compose_gives_the_recipe_what_it_asks_for() -> None:
    properties = re.sub(r"^#.*\n", "", (RECIPE / "worker.properties").read_text(), flags=re.MULTILINE)
    text = properties + json.dumps(CONFIG)
    asked = set(re.findall(r"\$\{env:(\w+)\}", text))
    (allowed,) = re.findall(r"^config\.providers\.env\.param\.allowlist\.pattern=(.*)$", text, re.MULTILINE)
    assert asked
    assert [name for name in asked if not re.fullmatch(allowed, name)] == []
    services = read(DEPLOY / "compose.yaml")["services"]
    assert asked <= services["connect"]["environment"].keys()
    assert services["connect"]["build"]["context"] == "recipes/postgresql"


def test_each_image_of_compose_has_a_version_that_is_not_latest() -> None:
    for name, service in read(DEPLOY / "compose.yaml")["services"].items():
        image = re.fullmatch(r"\$\{\w+:-(.*)\}", service["image"])
        assert image, name
        assert re.search(r":(?!latest$)[\w.-]+$", image[1]), name
