"""``sentiment-worker schema``: prints the schema of results, or that of the headers of dead letters."""

import sys

from worker.core.schemas import SCHEMAS, indented
from worker.settings.commands import SchemaSettings


def run(settings: SchemaSettings) -> int:
    """Prints the schema that the settings name. Returns the exit code; raises OSError of the output."""
    sys.stdout.write(indented(SCHEMAS[settings.record, settings.format]()))
    return 0
