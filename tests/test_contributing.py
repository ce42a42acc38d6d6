"""The table in docs/contributing.md that says which test shows what has every file of tests, but for those of modules."""

import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_every_test_file_is_in_the_table() -> None:
    page = (TESTS.parent / "docs" / "contributing.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`tests/((?:\w+/)?test_\w+\.py)`", page))
    there = {str(path.relative_to(TESTS)) for path in TESTS.rglob("test_*.py")}
    assert named == {name for name in there if not name.startswith("unit/")}
