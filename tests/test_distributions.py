"""The wheel and the sdist: what is in them, and that each works in an empty environment, where torch is not installed.

These tests ask the package index, or uv's cache, for what the worker needs. Without either they are skipped; with ``CI`` set
they fail.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORKER = ROOT / "worker"
UV = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
NO_INDEX = re.compile(
    "Failed to fetch|error sending request|dns error|Connection refused|operation timed out", re.IGNORECASE
)
HEAVY = ("torch", "transformers", "sentencepiece", "onnx", "triton")
SHIPPED = {
    path.relative_to(ROOT).as_posix()
    for path in WORKER.rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}

pytestmark = pytest.mark.skipif(UV is None, reason="needs uv, which `make test` installs")


def uv(*arguments: str | Path) -> None:
    """Runs uv; skips the test if what it asks for cannot be fetched, unless in CI."""
    done = subprocess.run([str(UV), *map(str, arguments)], capture_output=True, text=True, timeout=280, check=False)
    if done.returncode and NO_INDEX.search(done.stderr) and "CI" not in os.environ:
        pytest.skip(f"the package index cannot be reached: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist and the wheel that is made from it, of a copy of the sources, since a build writes beside them."""
    folder = tmp_path_factory.mktemp("distributions")
    sources = folder / "sources"
    sources.mkdir()
    shutil.copytree(WORKER, sources / "worker", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, sources)
    constraints = ROOT / "requirements" / "build.txt"
    uv("build", "--python", sys.executable, "--build-constraints", constraints, "--out-dir", folder / "dist", sources)
    (wheel,) = (folder / "dist").glob("*.whl")
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


def installed(distribution: Path, folder: Path) -> Path:
    """The scripts of a new environment that has the distribution with the extra ``demo``, at the locked versions."""
    uv("venv", "--python", sys.executable, folder)
    python = folder / "bin" / "python"
    locked = (
        "--constraint",
        ROOT / "requirements" / "demo.txt",
        "--build-constraints",
        ROOT / "requirements" / "build.txt",
    )
    uv("pip", "install", "--python", python, *locked, f"sentiment-worker[demo] @ {distribution.as_uri()}")
    return folder / "bin"


def run(command: Sequence[str | Path], folder: Path) -> str:
    """What the command prints, run where no checkout is at hand."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "WORKER_"))}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=150, check=False, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(distributions: dict[str, Path]) -> None:
    names = set(zipfile.ZipFile(distributions["wheel"]).namelist())
    assert {name for name in names if ".dist-info/" not in name} == SHIPPED
    notices = {Path(name).name for name in names if ".dist-info/licenses/" in name}
    assert notices == {"LICENSE", "NOTICE"}


def test_the_sdist_has_what_the_wheel_is_made_of(distributions: dict[str, Path]) -> None:
    with tarfile.open(distributions["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert SHIPPED | {"pyproject.toml", "README.md", "LICENSE", "NOTICE"} <= names


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_it_classifies_and_runs_the_demo_in_an_empty_environment_without_torch(
    distributions: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    scripts = installed(distributions[kind], tmp_path / "environment")
    look = f"import importlib.util as u, json; print(json.dumps([name for name in {HEAVY} if u.find_spec(name)]))"
    assert json.loads(run([scripts / "python", "-c", look], tmp_path)) == []

    line = run([scripts / "sentiment-worker", "classify", "--model", "builtin", "Очень довольна, спасибо!"], tmp_path)
    assert json.loads(line)["label"] == "positive"
    said = run([scripts / "sentiment-worker", "demo", "--events", "50", "--rate", "50"], tmp_path)
    assert "62 events in = 50 results + 9 dead letters + 2 tombstones forwarded + 1 record skipped" in said
