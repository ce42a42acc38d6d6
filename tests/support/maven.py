"""Artefacts of Maven Central for the tests: fetched once with `mvn`, and kept in the user's cache."""

import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.support.component import UnavailableError

FETCH_SECONDS = 900


def kept(name: str, fill: Callable[[Path], None]) -> Path:
    """A folder of the cache. Where it is missing, `fill` makes it, and whatever that raises leaves nothing behind."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sentiment-worker"
    folder = cache / name
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = Path(scratch) / "made"
            fill(made)
            publish(made, folder)
    return folder


def publish(made: Path, folder: Path) -> None:
    """Another test run may have been quicker; what it fetched is the same."""
    try:
        made.rename(folder)
    except OSError:
        if not folder.exists():
            raise


def unpacked(artefact: str) -> Path:
    """The content of a tar.gz, named as Maven names it: `group:artefact:version:tar.gz` and, with a colon, a classifier.

    Raises UnavailableError where it cannot be fetched.
    """

    def fill(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as fetched:
            mvn("dependency:copy", f"-Dartifact={artefact}", f"-DoutputDirectory={fetched}")
            (archive,) = Path(fetched).iterdir()
            with tarfile.open(archive) as content:
                content.extractall(folder, filter="data")

    _, name, version, *_ = artefact.split(":")
    return kept(f"{name}-{version}", fill)


def jars(pom: Path, name: str) -> Path:
    """A folder of the cache with all jars that a pom.xml names, and those that they need. Raises UnavailableError."""
    return kept(name, lambda folder: fetch_jars(pom, folder))


def fetch_jars(pom: Path, folder: Path, *properties: str) -> None:
    """Copies the jars into `folder`; `properties` are more of Maven's arguments. Raises UnavailableError."""
    wanted = ("-DincludeScope=runtime", f"-DoutputDirectory={folder}", *properties)
    mvn("-f", str(pom), "dependency:copy-dependencies", *wanted)


def mvn(*arguments: str) -> None:
    if shutil.which("mvn") is None:
        raise UnavailableError("there is no mvn to fetch it from Maven Central")
    done = subprocess.run(
        ["mvn", "-q", "-B", *arguments],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=FETCH_SECONDS, check=False,
    )  # fmt: skip
    if done.returncode:
        raise UnavailableError(f"mvn could not fetch it: {done.stdout[-500:]}")
