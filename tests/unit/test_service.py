"""What the process sets before anything else is loaded."""

import os
from typing import Any

import pytest

from worker import service
from worker.model import SentimentModel


@pytest.mark.parametrize(("set_by_user", "used"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_without_spinning_unless_told_to(
    set_by_user: str | None, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", set_by_user or "")
    if set_by_user is None:
        del os.environ["OMP_WAIT_POLICY"]
    monkeypatch.setattr(SentimentModel, "load_as_set", lambda _: None)
    unused: Any = None
    service._loaded(unused)
    assert os.environ["OMP_WAIT_POLICY"] == used
