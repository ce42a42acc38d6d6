"""Windows against truncation on long texts: `python -m benchmarks.long_texts REVIEWS.csv`.

Writes benchmarks/results/long_texts.{json,md}. The texts are made of held-out reviews of the file (columns text and label,
held out as for the builtin checkpoint), by a fixed seed:

- joined: reviews of one class, one after another, until the text has so many tokens;
- opinion at the end: neutral reviews until the text has so many tokens, and then a single review of the text's class;
- opinion in the second half: the same, but half of the tokens are of the text's class.

Both models are the same checkpoint, and differ in `long_text` alone. The interval is that of the difference over paired
bootstrap samples of the texts (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).
"""

import argparse
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import machine, write
from worker.model.sentiment_model import SentimentModel
from worker.training.dataset import CLASSES, LabelledFile, is_held_out, read_source
from worker.training.evaluate import macro_f1

NEUTRAL: Final = CLASSES.index("neutral")
SAMPLES: Final = 2_000  # of the bootstrap
MODES: Final = ("truncate", "windows")


class LongText(NamedTuple):
    """A text made of reviews, and the id of its class."""

    text: str
    label: int


class Reviews:
    """Held-out reviews by class, each with its tokens; drawn again and again in random order."""

    def __init__(self, path: Path, model: SentimentModel, seed: int) -> None:
        self._random = random.Random(seed)
        rows = [row for row in read_source(LabelledFile(path.stem, path)) if is_held_out(row.text)]
        lengths = map(len, model.tokenize([row.text for row in rows]).ids)
        self._by_label: dict[int, list[tuple[str, int]]] = {label: [] for label in range(len(CLASSES))}
        for row, length in zip(rows, lengths, strict=True):
            self._by_label[row.label].append((row.text.strip(), length - 2))

    def of(self, label: int, tokens: int) -> list[str]:
        """Reviews of one class, one at least, until there are so many tokens."""
        drawn: list[str] = []
        while tokens > 0 or not drawn:
            text, length = self._random.choice(self._by_label[label])
            drawn.append(text)
            tokens -= length
        return drawn


Make = Callable[[Reviews, int, int], list[str]]
KINDS: dict[str, Make] = {
    "joined": lambda reviews, label, tokens: reviews.of(label, tokens),
    "opinion at the end": lambda reviews, label, tokens: reviews.of(NEUTRAL, tokens) + reviews.of(label, 0),
    "opinion in the second half": (
        lambda reviews, label, tokens: reviews.of(NEUTRAL, tokens // 2) + reviews.of(label, tokens // 2)
    ),
}


def main() -> None:
    options = parsed_options()
    models = {mode: SentimentModel.load(options.model, long_text=mode, cpu_threads=1) for mode in MODES}
    reviews = Reviews(options.reviews, models["windows"], options.seed)
    figures: dict[str, Any] = {"machine": machine(None), "models": {mode: models[mode].name for mode in MODES}}
    figures["cases"] = [
        {"kind": kind, "tokens": tokens, **measured(models, made(reviews, make, tokens, options.texts), options.seed)}
        for kind, make in KINDS.items()
        for tokens in options.tokens
    ]
    write("long_texts", figures, table(figures))


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reviews", type=Path, help="CSV file with the columns text and label")
    parser.add_argument("--model", default="builtin", help="checkpoint (default: builtin)")
    parser.add_argument("--texts", type=int, default=1_500, help="texts of each kind and length (default: 1,500)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[200, 400, 800, 1_600], help="tokens of a text")
    parser.add_argument("--seed", type=int, default=1, help="of the draw and of the bootstrap (default: 1)")
    return parser.parse_args()


def made(reviews: Reviews, make: Make, tokens: int, count: int) -> list[LongText]:
    """So many long texts, the classes in turn."""
    labels = [number % len(CLASSES) for number in range(count)]
    return [LongText("\n".join(make(reviews, label, tokens)), label) for label in labels]


def measured(models: dict[str, SentimentModel], texts: Sequence[LongText], seed: int) -> dict[str, Any]:
    truth = np.array([text.label for text in texts])
    answers, figures = {}, {}
    for mode, model in models.items():
        began = time.perf_counter()
        scored = model.score([text.text for text in texts])
        took_s = time.perf_counter() - began
        answers[mode] = np.array([CLASSES.index(each.sentiment.label) for each in scored if each.sentiment])
        figures[mode] = {
            "macro_f1": round(f1_of(truth, answers[mode]), 4),
            "truncated": round(float(np.mean([each.truncated for each in scored])), 4),
            "texts_per_s": round(len(texts) / took_s, 1),
        }
    figures["windows"]["windows_per_text"] = round(float(np.mean([each.windows for each in scored])), 2)
    return {"texts": len(texts), **figures, "difference": difference(truth, answers, seed)}


def f1_of(truth: NDArray[np.int64], predicted: NDArray[np.int64]) -> float:
    """Macro-F1 of N predicted class ids."""
    classes = len(CLASSES)
    return macro_f1(np.bincount(classes * truth + predicted, minlength=classes**2).reshape(classes, classes))


def difference(truth: NDArray[np.int64], answers: dict[str, NDArray[np.int64]], seed: int) -> dict[str, float]:
    """Macro-F1 of windows less that of truncation, with the bounds of 95 of 100 bootstrap samples."""
    generator = np.random.default_rng(seed)

    def gain(rows: NDArray[np.int64]) -> float:
        cut, whole = (f1_of(truth[rows], answers[mode][rows]) for mode in MODES)
        return whole - cut

    samples = [gain(generator.integers(len(truth), size=len(truth))) for _ in range(SAMPLES)]
    low, high = np.quantile(samples, [0.025, 0.975]).tolist()
    return {"macro_f1": round(gain(np.arange(len(truth))), 4), "low": round(low, 4), "high": round(high, 4)}


def table(figures: dict[str, Any]) -> str:
    lines = [
        "| texts | tokens | truncate | windows | difference (95 of 100 samples) | windows a text | texts/s, truncate "
        "| texts/s, windows |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in figures["cases"]:
        cut, whole, gain = case["truncate"], case["windows"], case["difference"]
        lines.append(
            f"| {case['kind']} | {case['tokens']:,} | {cut['macro_f1']:.4f} | {whole['macro_f1']:.4f} | "
            f"{gain['macro_f1']:+.4f} ({gain['low']:+.4f} to {gain['high']:+.4f}) | {whole['windows_per_text']} | "
            f"{cut['texts_per_s']:,.0f} | {whole['texts_per_s']:,.0f} |"
        )
    return "Macro-F1 on texts made of held-out reviews, with the builtin checkpoint.\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
