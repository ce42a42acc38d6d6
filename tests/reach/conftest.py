"""Fixtures for components that several of these files use."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.support.component import available
from tests.support.schema_registry import Registry, running_registry


@pytest.fixture(scope="session")
def schema_registry() -> Iterator[Registry]:
    """A schema registry that lets everyone in. Nobody stops it."""
    with ExitStack() as stack:
        yield available(lambda: stack.enter_context(running_registry()), "schema registry")
