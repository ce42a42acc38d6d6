"""What the Makefile's targets install, with stand-ins for uv, Python and the worker that only note how they were called."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOCKS = ROOT / "requirements"


class Environment:
    """A folder in the place of .venv. Its commands do nothing but append their arguments to a log."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        (folder / "bin").mkdir(parents=True)
        for name in ("uv", "python", "sentiment-worker"):
            command = folder / "bin" / name
            command.write_text(f'#!/bin/sh\necho "{name} $*" >>{self.log}\n')
            command.chmod(0o755)

    def make(self, *arguments: str) -> list[str]:
        """The locks that make installs from, in their order."""
        self.log.write_text("")
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "TORCH"))}
        subprocess.run(
            ["make", f"VENV={self.folder}", *arguments],
            cwd=ROOT, env=variables, check=True, timeout=60, capture_output=True,
        )  # fmt: skip
        return re.findall(r"-r requirements/(\S+)\.txt", self.log.read_text())


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "venv")


def test_the_demo_installs_the_light_set_alone_and_once(environment: Environment) -> None:
    assert environment.make("demo") == ["demo"]
    assert environment.make("demo") == []


def test_tests_after_the_demo_install_the_full_set(environment: Environment) -> None:
    environment.make("demo")
    assert environment.make("unit") == ["dev", "torch"]
    assert environment.make("unit", "demo") == []


def test_the_demo_after_tests_installs_nothing(environment: Environment) -> None:
    assert environment.make("test") == ["dev", "torch"]
    assert environment.make("demo") == []


def test_the_demo_says_what_it_downloads_and_keeps() -> None:
    measured = json.loads((ROOT / "benchmarks" / "results" / "install.json").read_text())["megabytes"]
    said = re.findall(r"demo needs .* (\d+) MB to download, (\d+) MB on disk", (ROOT / "Makefile").read_text())[0]
    assert [int(number) for number in said] == [
        round(measured[what], -1) for what in ("make_demo_downloads", "make_demo_keeps")
    ]


def pins(lock: str) -> set[tuple[str, str]]:
    """The packages of a lock with their versions."""
    text = (LOCKS / f"{lock}.txt").read_text()
    return set(re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE))


@pytest.mark.parametrize("lock", ["demo", "runtime", "runtime-torch", "aws", "build"])
def test_a_smaller_set_has_the_versions_of_the_full_one(lock: str) -> None:
    assert pins(lock)
    assert pins(lock) <= pins("dev") | pins("torch")


@pytest.mark.parametrize("lock", ["demo", "runtime"])
def test_the_sets_for_a_cpu_have_neither_torch_nor_what_belongs_to_it(lock: str) -> None:
    packages = {package for package, _ in pins(lock)}
    assert {"onnxruntime", "tokenizers"} <= packages
    assert not packages & {"torch", "transformers", "sentencepiece", "sympy", "triton"}
    assert not [package for package in packages if package.startswith(("nvidia", "cuda"))]
