"""What a process sets before anything else is loaded."""

import os

import pytest

from worker import cli


@pytest.mark.parametrize(("set_by_user", "used"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_without_spinning_unless_told_to(
    set_by_user: str | None, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", set_by_user or "")
    if set_by_user is None:
        del os.environ["OMP_WAIT_POLICY"]
    seen = []
    monkeypatch.setitem(cli.COMMANDS, "run", lambda _: seen.append(os.environ["OMP_WAIT_POLICY"]) or 0)
    monkeypatch.setattr(cli, "_end", lambda _: None)
    cli.main(["run"])
    assert seen == [used]
