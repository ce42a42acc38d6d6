"""Labelled texts: reads CSV files, decides which rows are held out, balances sources and classes. Needs no torch."""

import csv
import hashlib
import random
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

CLASSES = ("negative", "neutral", "positive")
"""The three classes that train teaches; a class's place is its id. Evaluation has those of the model that it measures."""

HELD_OUT_BELOW = 26
DEVELOPMENT_BELOW = 52
SAME_LETTERS = str.maketrans({"ё": "е", "\u0308": None, "\u0301": None})  # the dots of a decomposed ё, and stress marks

HoldOutBy = Literal["normalized", "exact"]


@dataclass(frozen=True)
class LabelledFile:
    """One labelled CSV file (UTF-8, comma, with a header line)."""

    name: str
    """As in tables of results."""
    path: Path
    text_column: str = "text"
    label_column: str = "label"
    label_map: Mapping[str, str] = field(default_factory=dict)
    """Label in the file → class name, or "" to drop its rows. If it names no class, the labels are the class names."""
    classes: Sequence[str] = CLASSES


@dataclass(frozen=True)
class Example:
    """One labelled text. `label` is an index into the classes of its file."""

    source: str
    text: str
    label: int


def near_copy_key(text: str) -> str:
    """A form that near copies of a text share: case, ё for е, stress marks, a decomposed й and spaces make no difference."""
    return " ".join(text.casefold().replace("и\u0306", "й").translate(SAME_LETTERS).split())


def part_of(text: str, by: HoldOutBy = "exact") -> str:
    """The part of a corpus a text belongs to, by the last byte of the SHA-256 (UTF-8) of the text.

    ``exact`` takes the text as it is in the file, as for the `builtin` checkpoint; ``normalized`` keeps near copies
    together. `held-out` (below 26, a tenth): only ever measured on. `development` (26 to 51, a tenth): training rows that
    may be set aside to choose a recipe by. `training`: the rest.
    """
    last = hashlib.sha256((text if by == "exact" else near_copy_key(text)).encode()).digest()[-1]
    if last < HELD_OUT_BELOW:
        return "held-out"
    return "development" if last < DEVELOPMENT_BELOW else "training"


def is_held_out(text: str, by: HoldOutBy = "exact") -> bool:
    """Whether a text is only measured on: nothing is trained on it or chosen by it."""
    return part_of(text, by) == "held-out"


def parse_sources(
    sources: Sequence[str],
    label_maps: Sequence[str] = (),
    text_columns: Sequence[str] = (),
    label_columns: Sequence[str] = (),
    classes: Sequence[str] = CLASSES,
) -> list[LabelledFile]:
    """The labelled files that the flags of the command line describe; reads none of them.

    `sources`: `NAME=PATH`, or a path, named by its stem. `label_maps`: `NAME:RAW=CLASS`, without a class to drop the rows.
    Columns: `NAME=COLUMN`, or one for all others. Raises ValueError, which says what is wrong and what would be right.
    """
    paths: dict[str, str] = {}
    for word in sources:
        name, equals, path = word.partition("=")
        if not equals:
            name, path = Path(word).stem, word
        if not name or not path:
            raise ValueError(f"--source {word!r} is not NAME=PATH, such as reviews=reviews.csv")
        if name in paths:
            raise ValueError(f"--source names {name!r} twice; give each source its own name")
        paths[name] = path
    if not paths:
        raise ValueError("no source; give at least one --source NAME=PATH")
    maps: dict[str, dict[str, str]] = {name: {} for name in paths}
    for word in label_maps:
        name, raw, wanted = _parse_label_map(word, classes)
        _require_source("--label-map", name, paths)
        maps[name][raw] = wanted
    texts, labels = _columns("--text-column", text_columns, paths), _columns("--label-column", label_columns, paths)
    return [
        LabelledFile(name, Path(path), texts.get(name, "text"), labels.get(name, "label"), maps[name], classes)
        for name, path in paths.items()
    ]


def _columns(flag: str, words: Sequence[str], sources: Iterable[str]) -> dict[str, str]:
    """The column of each source that the values of a flag give one to."""
    pairs = [(name, column) for name, equals, column in (word.partition("=") for word in words) if equals]
    others = [word for word in words if "=" not in word]
    for name, column in pairs:
        _require_source(flag, name, sources)
        if not column:
            raise ValueError(f"{flag} {name}= names no column, as in {name}=body")
    if len(others) > 1 or len(pairs) > len(dict(pairs)):
        raise ValueError(f"{flag} names two columns of the same source; give each its own, as NAME=COLUMN")
    return {name: others[0] for name in sources if others} | dict(pairs)


def _require_source(flag: str, name: str, sources: Iterable[str]) -> None:
    if name not in sources:
        raise ValueError(f"{flag} names {name!r}, which is no --source; there is {', '.join(sources)}")


def _parse_label_map(word: str, classes: Sequence[str]) -> tuple[str, str, str]:
    name, colon, rest = word.partition(":")
    raw, equals, wanted = rest.rpartition("=")
    if not (name and colon and equals):
        raise ValueError(
            f"--label-map {word!r} is not NAME:RAW=CLASS, such as reviews:-1=negative (or reviews:skip= to drop its rows)"
        )
    if wanted and wanted not in classes:
        raise ValueError(f"--label-map {word!r} maps to no class; the classes are {', '.join(classes)}")
    return name, raw, wanted


def read_source(source: LabelledFile) -> list[Example]:
    """All rows of a source whose text is not blank and whose label is not dropped, in the file's order. Blocks on the disk.

    Raises ValueError where the file cannot be read, a column is missing, a label is unknown or no row is left: one
    sentence that names the source and never quotes a text.
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
                f"({raw[:20]!r}) is none of {known}; map it with --label-map {source.name}:RAW=CLASS, or drop its rows with "
                f"--label-map {source.name}:RAW="
            )
        label = mapping[raw]
        if label is not None and text.strip():
            examples.append(Example(source.name, text, label))
    if not examples:
        raise ValueError(f"source {source.name!r}: there is no row with a text; it needs at least one")
    return examples


def _label_ids(source: LabelledFile) -> dict[str, int | None]:
    """The class of each label in the file; None for those whose rows are dropped."""
    classes = source.classes
    unknown = sorted(set(source.label_map.values()) - {*classes, ""})
    if unknown:
        raise ValueError(
            f"source {source.name!r}: the label map names {unknown[0]!r}; the classes are {', '.join(classes)}"
        )
    own = {} if any(source.label_map.values()) else {name: name for name in classes}
    return {raw: classes.index(name) if name else None for raw, name in (own | dict(source.label_map)).items()}


def _rows(source: LabelledFile) -> Iterable[tuple[int, dict[str, str | None]]]:
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
    """Raises ValueError when one of the three classes has no example."""
    missing = set(range(len(CLASSES))) - {example.label for example in examples}
    if missing:
        name = CLASSES[min(missing)]
        raise ValueError(f"no training row has the class {name!r}; each of the three classes needs some")


Counts = dict[tuple[str, int], int]
"""How many rows there are of a source (by its name) and a class."""


def balanced_counts(examples: Sequence[Example], max_repeats: int, per_class: int | None = None) -> Counts:
    """How many rows of each source and class make one epoch, so that classes, and sources within a class, have equally many.

    `per_class`: rows of each class; by default a third of all rows. No row is repeated more than `max_repeats` times: what
    a source lacks, the other sources of its class give, and if all of them lack rows, the class has fewer. Raises
    ValueError when a class has no row.
    """
    require_classes(examples)
    sizes = Counter((example.source, example.label) for example in examples)
    counts: Counts = {}
    for label in range(len(CLASSES)):
        left = per_class or max(1, len(examples) // len(CLASSES))
        smallest_first = sorted((cell for cell in sizes if cell[1] == label), key=sizes.__getitem__)
        for place, cell in enumerate(smallest_first):
            counts[cell] = min(sizes[cell] * max_repeats, left // (len(smallest_first) - place))
            left -= counts[cell]
    return counts


def draw(examples: Sequence[Example], counts: Counts, rng: random.Random) -> list[int]:
    """The places of one epoch's rows, as many of each source and class as `counts` says.

    Within a source and class, rows are taken equally often, some of them once more.
    """
    places: dict[tuple[str, int], list[int]] = {}
    for place, example in enumerate(examples):
        places.setdefault((example.source, example.label), []).append(place)
    drawn = []
    for cell, count in counts.items():
        times, rest = divmod(count, len(places[cell]))
        drawn += places[cell] * times + rng.sample(places[cell], rest)
    return drawn


def repetitions(examples: Iterable[Example]) -> tuple[int, int]:
    """How many rows are near copies of an earlier one, and how many texts have more than one label."""
    labels: dict[str, set[int]] = {}
    rows = 0
    for example in examples:
        labels.setdefault(near_copy_key(example.text), set()).add(example.label)
        rows += 1
    return rows - len(labels), sum(len(of_text) > 1 for of_text in labels.values())
