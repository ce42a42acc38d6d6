"""Labelled texts: reading CSV sources, the held-out rule, balancing sources and classes. Pure: no torch, no network."""

import csv
import hashlib
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

CLASSES = ("negative", "neutral", "positive")
"""The three classes; a class's place here is its id everywhere."""

HELD_OUT_BELOW = 26
DEVELOPMENT_BELOW = 52


@dataclass(frozen=True)
class Source:
    """One labelled CSV file (UTF-8, comma, with a header line)."""

    name: str
    """What the tables call it."""
    path: Path
    text_column: str = "text"
    label_column: str = "label"
    label_map: Mapping[str, str] = field(default_factory=dict)
    """Raw label -> class name. Empty: the labels are the class names themselves."""


@dataclass(frozen=True)
class Example:
    """One labelled text. `label` is an index into `CLASSES`."""

    source: str
    text: str
    label: int


def part_of(text: str) -> str:
    """The part of a corpus a text belongs to, by the last byte of its SHA-256 (UTF-8, the text as it is in the file).

    `held-out` (below 26, a tenth): only ever measured on. `development` (26 to 51, a tenth): training rows that may be
    set aside to choose a recipe by. `training`: the rest.
    """
    last = hashlib.sha256(text.encode()).digest()[-1]
    if last < HELD_OUT_BELOW:
        return "held-out"
    return "development" if last < DEVELOPMENT_BELOW else "training"


def is_held_out(text: str) -> bool:
    """Whether nothing may be trained on this text or chosen by it."""
    return part_of(text) == "held-out"


def parse_sources(
    sources: Sequence[str],
    label_maps: Sequence[str] = (),
    text_column: str = "text",
    label_column: str = "label",
) -> list[Source]:
    """Sources from command-line words: `NAME=PATH` (or a bare path, named by its stem) and `NAME:RAW=CLASS`.

    Called by the command line; reads no file. ValueError says which word is wrong and what would be right.
    """
    maps: dict[str, dict[str, str]] = {}
    for word in label_maps:
        name, raw, wanted = _parse_label_map(word)
        maps.setdefault(name, {})[raw] = wanted
    parsed: list[Source] = []
    for word in sources:
        name, equals, path = word.partition("=")
        if not equals:
            name, path = Path(word).stem, word
        if not name or not path:
            raise ValueError(f"--source {word!r} is not NAME=PATH, such as reviews=reviews.csv")
        if any(name == other.name for other in parsed):
            raise ValueError(f"--source names {name!r} twice; give each source its own name")
        parsed.append(Source(name, Path(path), text_column, label_column, maps.pop(name, {})))
    if not parsed:
        raise ValueError("no source; give at least one --source NAME=PATH")
    if maps:
        known = ", ".join(source.name for source in parsed)
        raise ValueError(f"--label-map names {min(maps)!r}, which is no --source; there is {known}")
    return parsed


def _parse_label_map(word: str) -> tuple[str, str, str]:
    name, colon, rest = word.partition(":")
    raw, equals, wanted = rest.rpartition("=")
    if not (name and colon and equals):
        raise ValueError(f"--label-map {word!r} is not NAME:RAW=CLASS, such as reviews:-1=negative")
    if wanted not in CLASSES:
        raise ValueError(f"--label-map {word!r} maps to no class; the classes are {', '.join(CLASSES)}")
    return name, raw, wanted


def read_source(source: Source) -> list[Example]:
    """All rows of a source whose text is not blank, in the file's order. Blocks on the disk.

    ValueError, one sentence that names the source and never quotes a text: the file cannot be read, a column is
    missing, a label is unknown, no row is left.
    """
    mapping = _label_ids(source)
    examples = []
    for line, row in _rows(source):
        text, raw = row.get(source.text_column), row.get(source.label_column)
        if text is None or raw is None:
            raise ValueError(f"source {source.name!r}: the row that ends on line {line} has too few columns")
        if raw not in mapping:
            known = ", ".join(repr(label) for label in mapping)
            raise ValueError(
                f"source {source.name!r}: the label that ends on line {line} of column {source.label_column!r} "
                f"({raw[:20]!r}) is none of {known}; map it with --label-map {source.name}:RAW=CLASS"
            )
        if text.strip():
            examples.append(Example(source.name, text, mapping[raw]))
    if not examples:
        raise ValueError(f"source {source.name!r}: there is no row with a text; it needs at least one")
    return examples


def _label_ids(source: Source) -> dict[str, int]:
    if not source.label_map:
        return {name: index for index, name in enumerate(CLASSES)}
    unknown = sorted(set(source.label_map.values()) - set(CLASSES))
    if unknown:
        raise ValueError(
            f"source {source.name!r}: the label map names {unknown[0]!r}; the classes are {', '.join(CLASSES)}"
        )
    return {raw: CLASSES.index(name) for raw, name in source.label_map.items()}


def _rows(source: Source) -> Iterable[tuple[int, dict[str, str | None]]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        with source.path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            header = list(reader.fieldnames or [])
            for column in (source.text_column, source.label_column):
                if column not in header:
                    there = ", ".join(header) or "none"
                    raise ValueError(f"source {source.name!r}: the file has no column {column!r}; it has {there}")
            for row in reader:
                yield reader.line_num, row
    except OSError as error:
        raise ValueError(f"source {source.name!r}: {source.path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ValueError(f"source {source.name!r}: {source.path} is not UTF-8; save it as UTF-8 CSV") from None
    except csv.Error as error:
        raise ValueError(f"source {source.name!r}: {source.path} is not a CSV file: {error}") from None


def require_classes(examples: Iterable[Example]) -> None:
    """ValueError when one of the three classes has no example."""
    missing = set(range(len(CLASSES))) - {example.label for example in examples}
    if missing:
        name = CLASSES[min(missing)]
        raise ValueError(f"no training row has the class {name!r}; each of the three classes needs some")


def balance(examples: Sequence[Example], rng: random.Random, per_class: int | None = None) -> list[Example]:
    """Up- and downsampled examples: each class as often as the others, within a class each source as often.

    `per_class` is the number of examples of each class (default: a third of all there are, so the total stays). A
    source that lacks a class leaves its share of it to the others. Upsampling repeats all rows of a source and class
    equally often, but for one. ValueError when a class has no row at all.
    """
    require_classes(examples)
    cells: dict[int, dict[str, list[Example]]] = {label: {} for label in range(len(CLASSES))}
    for example in examples:
        cells[example.label].setdefault(example.source, []).append(example)
    wanted = per_class or max(1, len(examples) // len(CLASSES))
    balanced = []
    for of_class in cells.values():
        share, extra = divmod(wanted, len(of_class))
        for place, rows in enumerate(of_class.values()):
            balanced += _resample(rows, share + (place < extra), rng)
    return balanced


def _resample(rows: Sequence[Example], count: int, rng: random.Random) -> list[Example]:
    times, rest = divmod(count, len(rows))
    return list(rows) * times + rng.sample(rows, rest)


def sample_held_out(examples: Sequence[Example], per_class: int) -> list[Example]:
    """A fixed sample of the held-out examples: of each class the first `per_class` by SHA-256, in that order.

    Made for the package's `builtin/demo.csv`. ValueError when a class has too few.
    """
    held_out = [example for example in examples if is_held_out(example.text)]
    chosen = []
    for label, name in enumerate(CLASSES):
        of_class = sorted((example for example in held_out if example.label == label), key=_digest)[:per_class]
        if len(of_class) < per_class:
            raise ValueError(f"only {len(of_class)} held-out rows have the class {name!r}; {per_class} were asked for")
        chosen += of_class
    return sorted(chosen, key=_digest)


def _digest(example: Example) -> bytes:
    return hashlib.sha256(example.text.encode()).digest()
