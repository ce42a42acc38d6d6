"""What the package itself gives to those who import it."""

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import worker


def test_it_gives_the_model_and_the_version() -> None:
    from worker import SentimentModel, __version__
    from worker.model import sentiment_model

    assert SentimentModel is sentiment_model.SentimentModel
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert __version__ == project["version"]


def test_importing_it_imports_no_torch() -> None:
    code = "import sys, worker; worker.__version__; assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_clone_that_is_not_installed_has_an_unknown_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert worker.__version__ == "unknown"


def test_it_has_no_other_names() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_the_kind'"):
        worker.nothing_of_the_kind  # noqa: B018
