"""Kafka's jars for a machine without a network, as small as they compress: `python benchmarks/gpu_jars.py FOLDER`.

They lie in FOLDER as tests look for them in their cache. The entries are stored, because the archive that they are brought
in compresses them better than they are; native libraries are left out but for those of Linux on x86-64.
"""

import re
import sys
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile

from tests.support.broker import kafka_jars

NATIVE = re.compile(r"\.(so|dll|dylib|jnilib)$")
NEEDED = re.compile(r"linux/(amd64|x86_64)/|Linux/x86_64/")
UNUSED = re.compile(r"^(scala-reflect|jspecify)-")


def main() -> None:
    source, target = kafka_jars(), Path(sys.argv[1])
    (target / source.name).mkdir(parents=True)
    for jar in sorted(source.glob("*.jar")):
        if not UNUSED.match(jar.name):
            repack(jar, target / source.name / jar.name)


def repack(source: Path, target: Path) -> None:
    with ZipFile(source) as old, ZipFile(target, "w", ZIP_STORED) as new:
        for entry in old.infolist():
            if not NATIVE.search(entry.filename) or NEEDED.search(entry.filename):
                new.writestr(entry.filename, old.read(entry))


if __name__ == "__main__":
    main()
