"""What a fresh machine waits for, downloads and keeps: `python -m benchmarks.install`.

Writes benchmarks/results/install.{json,md}. Clones the last commit into an empty folder and runs `make demo` there, with an
empty home and empty caches of uv and pip. MB are millions of bytes of files.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import machine, write

ROOT = Path(__file__).parents[1]
DEMO_LOCKS = ("uv", "demo", "build")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = [measured() for _ in range(parser.parse_args().rounds)]
    figures = {
        "machine": machine(None),
        "load_before": [one["load_before"] for one in rounds],
        "seconds": {part: [one["seconds"][part] for one in rounds] for part in rounds[0]["seconds"]},
        "megabytes": rounds[-1]["megabytes"],
    }
    write("install", figures, table(figures))


def measured() -> dict[str, Any]:
    """Seconds of each part and megabytes of each set, in folders that are deleted afterwards."""
    load = round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clone = folder / "clone"
        fresh = Fresh(folder / "home")
        seconds = {
            "clone": fresh.run("git", "clone", "--quiet", ROOT, clone),
            "install": fresh.run("make", "-C", clone, ".venv/.installed-demo"),
            "demo": fresh.run("make", "-C", clone, "demo"),
        }
        megabytes = {"make_demo_keeps": size(clone / ".venv")}
        locks = [word for lock in DEMO_LOCKS for word in ("-r", clone / "requirements" / f"{lock}.txt")]
        python = clone / ".venv" / "bin" / "python"
        fresh.run(
            python, "-m", "pip", "download", "-q", "--no-deps", "--require-hashes", "-d", folder / "wheels", *locks
        )
        megabytes["make_demo_downloads"] = size(folder / "wheels")
        megabytes |= installed(clone, fresh, folder / "environment")
    return {
        "load_before": load,
        "seconds": {part: round(value, 1) for part, value in seconds.items()},
        "megabytes": megabytes,
    }


class Fresh:
    """Runs commands as a user who has just come: an empty home, and so no cache."""

    def __init__(self, home: Path) -> None:
        home.mkdir()
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PYTHON", "MAKE", "XDG_"))
        }
        self._environment = kept | {"HOME": str(home), "PIP_CACHE_DIR": str(home / "pip"), "TMPDIR": str(home)}

    def run(self, *command: str | Path) -> float:
        """The seconds that the command took. Raises if it failed."""
        start = time.monotonic()
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return time.monotonic() - start


def installed(clone: Path, fresh: Fresh, environment: Path) -> dict[str, float]:
    """Megabytes of `pip install sentiment-worker` without extras, before and after every module was compiled."""
    uv, python = clone / ".venv" / "bin" / "uv", environment / "bin" / "python"
    fresh.run(uv, "venv", "--python", clone / ".venv" / "bin" / "python", environment)
    locked = (
        "--constraint",
        clone / "requirements" / "demo.txt",
        "--build-constraints",
        clone / "requirements" / "build.txt",
    )
    fresh.run(uv, "pip", "install", "--python", python, *locked, clone)
    files = size(environment)
    shutil.rmtree(clone / "build", ignore_errors=True)
    fresh.run(uv, "pip", "install", "--python", python, *locked, "--compile-bytecode", "--reinstall", clone)
    return {"worker": files, "worker_compiled": size(environment)}


def size(folder: Path) -> float:
    return round(sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6, 1)


def table(figures: dict[str, Any]) -> str:
    seconds, megabytes = figures["seconds"], figures["megabytes"]
    whole = [sum(parts) for parts in zip(*seconds.values(), strict=True)]
    rows = [
        *(
            (part, f"{statistics.median(values):.1f} s ({min(values)} to {max(values)})")
            for part, values in seconds.items()
        ),
        (
            "from the clone to the end of the demo",
            f"{statistics.median(whole):.1f} s ({min(whole):.1f} to {max(whole):.1f})",
        ),
        ("`make demo` downloads, uv included", f"{megabytes['make_demo_downloads']} MB"),
        ("`make demo` keeps in `.venv`, uv and pip included", f"{megabytes['make_demo_keeps']} MB"),
        ("the worker without extras", f"{megabytes['worker']} MB"),
        ("the same with every module compiled, as pip leaves it", f"{megabytes['worker_compiled']} MB"),
    ]
    where = figures["machine"]
    head = [
        f"Machine: {where['cpu']}, {where['cores']} cores, Python {where['python']}. Empty caches. "
        f"Medians of {len(whole)} rounds; in brackets minimum and maximum. "
        f"The machine's load before each was {', '.join(map(str, figures['load_before']))}.",
        "",
        "| | |",
        "| --- | --- |",
    ]
    return "\n".join([*head, *(f"| {name} | {value} |" for name, value in rows), ""])


if __name__ == "__main__":
    main()
