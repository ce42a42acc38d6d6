"""The reviews that ship with the package, to measure and compare models and tokenizers on; see builtin/README.md."""

import csv
from functools import cache
from pathlib import Path

FILE = Path(__file__).parent / "builtin" / "demo.csv"


@cache
def read_reviews() -> tuple[str, ...]:
    """Some 700 texts. Blocks for some milliseconds."""
    with FILE.open(encoding="utf-8", newline="") as file:
        return tuple(row["text"] for row in csv.DictReader(file))
