"""Tokenizer libraries against the one that checkpoints come with: `python -m benchmarks.tokenizers TEXTS.csv`.

Writes benchmarks/results/tokenizers.{json,md}. For the card's tokenizer and the builtin checkpoint's, every library that
is installed must give the same ids for every text of the file, and for as many fuzzed ones: texts that are cut and joined,
letters of all of Unicode, white space and control characters, marks that join, words without end, special tokens' names.
Speed is that of micro-batches of 512 of the file's texts, taken in turn; CPU counts all threads.

The last four libraries are in no extra: `pip install tokie==0.1.4 morpheme==0.5.0 kitoken==0.11.1 flash-tokenizer==1.2.0`.
flash-tokenizer has not been measured: 1.2.0 has no `batch_encode`, which is called here, and builtin's
checkpoint has no vocab.txt, which it needs.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.common import WINDOW, machine, ratio, read_texts, write
from tests.support.checkpoint import TOKENIZER
from worker.model.checkpoint import BUILTIN

Ids = Sequence[Sequence[int]]
Encode = Callable[[list[str]], Any]
MAX_TOKENS = 512
TURN = 8 * WINDOW
EXAMPLES = 5  # of differing texts that the figures show, as escapes
REFERENCE = "transformers"


def main() -> None:
    options = parsed_options()
    texts = read_texts(options.texts)
    figures: dict[str, Any] = {"machine": machine(None), "fuzzed": options.fuzzed, "checkpoints": {}}
    for name, folder in {"card": TOKENIZER, "builtin": BUILTIN}.items():
        encoders, refused = made_encoders(folder)
        figures["versions"] = {each: found_version(each) for each in LIBRARIES}
        figures["checkpoints"][name] = {
            "refused": refused,
            "differences": differences(encoders, texts, options.fuzzed),
            **speeds(encoders, texts, options.rounds),
        }
    write("tokenizers", figures, table(figures))


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="CSV file with a column text")
    parser.add_argument("--fuzzed", type=int, default=100_000, help="fuzzed texts (default: 100000)")
    parser.add_argument("--rounds", type=int, default=5, help="times that all take turns (default: 5)")
    return parser.parse_args()


# Libraries: each gives an encoder from a checkpoint's folder, special tokens and truncation included.


def transformers(folder: Path) -> Encode:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return lambda texts: tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]


def tokenizers(folder: Path) -> Encode:
    tokenizer = AutoTokenizer.from_pretrained(folder)._tokenizer
    tokenizer.enable_truncation(MAX_TOKENS)
    return lambda texts: [each.ids for each in tokenizer.encode_batch_fast(texts)]


def nanotoken(folder: Path) -> Encode:
    import nanotoken as library

    tokenizer = library.Tokenizer.from_json((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return lambda texts: tokenizer.encode_batch(texts, max_length=MAX_TOKENS)


def tokie(folder: Path) -> Encode:
    import tokie as library

    tokenizer = library.Tokenizer.from_json(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(max_length=MAX_TOKENS)
    return lambda texts: [each.ids for each in tokenizer.encode_batch(texts, add_special_tokens=True)]


def morpheme(folder: Path) -> Encode:
    import morpheme as library

    parts = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    parts["truncation"] = {"max_length": MAX_TOKENS, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    tokenizer = library.Tokenizer.from_str(json.dumps(parts))
    return lambda texts: [each.ids for each in tokenizer.encode_batch(texts)]


def flash_tokenizer(folder: Path) -> Encode:
    import flash_tokenizer as library

    vocabulary = folder / "vocab.txt"
    if not vocabulary.exists():
        raise ValueError("it needs a vocab.txt, and this checkpoint has none")
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer = library.BertTokenizerFlash(str(vocabulary), do_lower_case=bool(config.get("do_lower_case", True)))
    return lambda texts: tokenizer.batch_encode(texts, padding="longest", max_length=MAX_TOKENS)["input_ids"]


def kitoken(folder: Path) -> Encode:
    import kitoken as library

    tokenizer = library.Kitoken.from_file(str(folder / "tokenizer.json"))
    return lambda texts: [tokenizer.encode(text, True) for text in texts]


LIBRARIES: dict[str, Callable[[Path], Encode]] = {
    "transformers": transformers,
    "tokenizers": tokenizers,
    "nanotoken": nanotoken,
    "tokie": tokie,
    "morpheme": morpheme,
    "flash-tokenizer": flash_tokenizer,
    "kitoken": kitoken,
}


def made_encoders(folder: Path) -> tuple[dict[str, Encode], dict[str, str]]:
    """Those that load this checkpoint, and why the others do not."""
    encoders, refused = {}, {}
    for name, make in LIBRARIES.items():
        try:
            encoders[name] = make(folder)
            encoders[name](["Хорошо, спасибо."])
        except BaseException as error:  # noqa: BLE001 - pyo3's panics are no Exception
            encoders.pop(name, None)
            refused[name] = f"{type(error).__name__}: {error}"[:160]
    return encoders, refused


def found_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# The same ids?


def differences(encoders: dict[str, Encode], texts: list[str], fuzzed: int) -> dict[str, Any]:
    """For each library how many texts of the file, and of the fuzzed ones, get other ids."""
    counts: dict[str, Any] = {name: {"file": 0, "fuzzed": 0, "examples": []} for name in encoders if name != REFERENCE}
    for kind, batches in (("file", windows(texts)), ("fuzzed", windows(fuzz(texts, fuzzed)))):
        for batch in batches:
            wanted = encoders[REFERENCE](batch)
            for name, count in counts.items():
                for text, one, other in zip(batch, wanted, answered(encoders[name], batch), strict=True):
                    if other is None or list(one) != [int(token) for token in other]:
                        count[kind] += 1
                        if len(count["examples"]) < EXAMPLES:
                            count["examples"].append(ascii(text)[:120])
    return counts


def answered(encode: Encode, batch: list[str]) -> list[Any]:
    """The ids of each text; None for a text that the library fails on."""
    try:
        return list(encode(batch))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        if len(batch) == 1:
            return [None]
        half = len(batch) // 2
        return answered(encode, batch[:half]) + answered(encode, batch[half:])


def windows(texts: Sequence[str]) -> Iterator[list[str]]:
    for begin in range(0, len(texts), WINDOW):
        yield list(texts[begin : begin + WINDOW])


SPECIAL = ("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]", "[unk]", "##на", "[CLS", "SEP]")
SPACES = " \t\n\r\v\f\u00a0\u2003\u200b\u2028\ufeff\u0085\u180e\x1c\x00\ufffd\x7f\u00ad"
MARKS = "\u0301\u0306\u0308\u0327\u20e3\ufe0f\u200d\u0345"
RANGES = (
    (0x20, 0x7F), (0xA0, 0x250), (0x370, 0x530), (0x590, 0x700), (0x900, 0xE80), (0x1E00, 0x2C00),
    (0x3040, 0xA000), (0xAC00, 0xD7A4), (0xF900, 0xFFFF), (0x1F300, 0x1FB00), (0x20000, 0x2A6E0), (0x20, 0xD800),
)  # fmt: skip


def fuzz(texts: Sequence[str], count: int) -> list[str]:
    """So many texts, always the same ones."""
    random_ = random.Random(20_240_501)
    return ["".join(piece(random_, texts) for _ in range(random_.randint(1, 8))) for _ in range(count)]


def piece(random_: random.Random, texts: Sequence[str]) -> str:
    kind = random_.randrange(10)
    if kind < 3:
        text = random_.choice(texts)
        begin = random_.randrange(len(text))
        return text[begin : begin + random_.randint(1, 120)]
    if kind == 3:
        return "".join(random_.choice(SPACES) for _ in range(random_.randint(1, 6)))
    if kind == 4:
        return random_.choice(SPECIAL) + random_.choice(("", " ", "\t"))
    if kind == 5:
        return random_.choice("еёиЙoАñ가") + "".join(random_.choice(MARKS) for _ in range(random_.randint(1, 3)))
    if kind == 6:
        return random_.choice("аяЯbЩ1_-") * random_.choice((1, 2, 99, 100, 101, 250))
    if kind == 7:
        return "".join(
            random_.choice("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~«»—…№₽€") for _ in range(random_.randint(1, 9))
        )
    low, high = random_.choice(RANGES)
    return "".join(chr(random_.randrange(low, high)) for _ in range(random_.randint(1, 30)))


# How fast?


def speeds(encoders: dict[str, Encode], texts: list[str], rounds: int) -> dict[str, Any]:
    walls: dict[str, list[float]] = {name: [] for name in encoders}
    cpus: dict[str, list[float]] = {name: [] for name in encoders}
    for turn in range(rounds + 1):  # the first warms up
        begin = turn * TURN % (len(texts) - TURN)
        batches = list(windows(texts[begin : begin + TURN]))  # new ones: libraries remember words, and some whole texts
        for name, encode in encoders.items():
            cpu, wall = time.process_time(), time.perf_counter()
            for batch in batches:
                encode(batch)
            if turn:
                walls[name].append(TURN / (time.perf_counter() - wall))
                cpus[name].append((time.process_time() - cpu) / TURN * 1e6)
    return {
        "texts_per_s": {name: [round(value) for value in values] for name, values in walls.items()},
        "cpu_us_per_text": {name: [round(value, 2) for value in values] for name, values in cpus.items()},
        "over_transformers": {name: ratio(values, walls[REFERENCE]) for name, values in walls.items()},
    }


def table(figures: dict[str, Any]) -> str:
    lines = [
        f"Machine: {figures['machine']['cpu']}, {figures['machine']['cores']} cores. Micro-batches of {WINDOW} texts."
    ]
    for name, case in figures["checkpoints"].items():
        lines += [
            "",
            f"{name}: ids against transformers', on the file's texts and on {figures['fuzzed']:,} fuzzed ones.",
            "",
            "| library | texts/s | CPU µs per text | over transformers | other ids: file | fuzzed |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for library, values in case["texts_per_s"].items():
            over = case["over_transformers"][library]
            counts = case["differences"].get(library, {"file": "–", "fuzzed": "–"})
            lines.append(
                f"| {library} {figures['versions'][library]} | {statistics.median(values):,.0f} | "
                f"{statistics.median(case['cpu_us_per_text'][library]):.1f} | "
                f"{over['median']} ({over['min']} to {over['max']}) | {counts['file']} | {counts['fuzzed']} |"
            )
        lines += [f"| {library} | {why} | | | | |" for library, why in case["refused"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
