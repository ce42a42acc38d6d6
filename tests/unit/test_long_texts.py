"""A real checkpoint that scores long texts in windows: by ONNX Runtime and by torch, from Python and for the worker."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose

from tests.support.checkpoint import POISON, Oracle, logits_of
from worker.model.sentiment_model import SentimentModel
from worker.pipeline.model_runner import WARM_UP_LENGTHS, ModelRunner
from worker.telemetry.metrics import Metrics

WORDS = ("день", "очень", "дом", "не", "год", "она", "цвет", "другой", "и", "время", "человек")  # a token each
SPECIAL = 2


def text_of(words: int, first: int = 0) -> str:
    return " ".join(WORDS[(first + place) % len(WORDS)] for place in range(words))


def load(checkpoint: Path, **wanted: Any) -> SentimentModel:
    return SentimentModel.load(str(checkpoint), cpu_threads=1, max_batch_tokens=1_024, **wanted)


@pytest.fixture(scope="module")
def truncating(checkpoint: Path) -> SentimentModel:
    return load(checkpoint)


@pytest.fixture(scope="module", params=["onnx", "torch"])
def model(request: pytest.FixtureRequest, checkpoint: Path) -> SentimentModel:
    return load(checkpoint, long_text="windows", backend=request.param)


def expected(oracle: Oracle, text: str, max_windows: int = 8) -> tuple[np.ndarray[Any, Any], int, bool]:
    """Probabilities, windows, and whether text was left out, each window computed by itself in float64."""
    cls, *own, sep = oracle._ids(text)
    begins = [0]
    while begins[-1] + 510 < len(own) and len(begins) < max_windows:
        begins.append(begins[-1] + 510 - 64)
    ends = [min(begin + 510, len(own)) for begin in begins]
    each = [
        1 / (1 + np.exp(-logits_of(oracle._weights, [cls, *own[begin:end], sep])))
        for begin, end in zip(begins, ends, strict=True)
    ]
    weights = np.diff([0, *ends])
    return np.average(each, axis=0, weights=weights), len(begins), ends[-1] < len(own)


@pytest.mark.parametrize("words", [1, 300, 510, 511, 956, 957, 1_700, 3_632, 3_633, 6_000])
def test_a_long_text_has_the_mean_of_its_windows(model: SentimentModel, oracle: Oracle, words: int) -> None:
    text = text_of(words)
    probabilities, windows, is_cut = expected(oracle, text)
    (scored,) = model.score([text])
    assert scored.sentiment is not None
    assert_allclose(scored.sentiment.probabilities, probabilities, atol=1e-5)
    assert (scored.windows, scored.truncated) == (windows, is_cut)
    assert_allclose(model.get_sentiment(text, "proba"), probabilities, atol=1e-5)
    assert model.get_sentiment(text) == oracle.label(probabilities)


def test_a_text_of_one_window_has_the_very_result_of_truncation(checkpoint: Path, truncating: SentimentModel) -> None:
    texts = [text_of(words, words) for words in range(1, 511, 37)] + ["", "\u200b" * 5_000, " " * 9_000 + "да"]
    whole, one = load(checkpoint, long_text="windows"), load(checkpoint, long_text="windows", max_windows=1)
    for text in texts:
        (cut,) = truncating.score([text])
        assert whole.score([text]) == [cut._replace(windows=1)]
    for text in [*texts, text_of(511), text_of(9_000)]:
        (cut,) = truncating.score([text])
        assert one.score([text]) == [cut._replace(windows=1)]


def test_texts_are_scored_together_as_each_alone(model: SentimentModel) -> None:
    texts = [text_of(words, words) for words in (3, 2_000, 40, 700, 511, 5_000)]
    together = model.score(texts)
    for text, scored in zip(texts, together, strict=True):
        (alone,) = model.score([text])
        assert alone.sentiment is not None
        assert scored.sentiment is not None
        assert_allclose(scored.sentiment.probabilities, alone.sentiment.probabilities, atol=1e-6)
        assert scored[1:] == alone[1:]


def test_one_window_that_is_no_number_leaves_the_text_without_an_answer(model: SentimentModel) -> None:
    scored = model.score([text_of(700) + f" {POISON}", text_of(700), "\ud800"])
    assert [each.sentiment is None for each in scored] == [True, False, True]
    with pytest.raises(FloatingPointError):
        model.get_sentiment(text_of(700) + f" {POISON}")


@pytest.mark.parametrize(
    ("wanted", "suffix"),
    [
        ({}, ""),
        ({"max_windows": 3}, ""),
        ({"long_text": "windows"}, "+long_text=windows"),
        ({"long_text": "windows", "max_windows": 3}, "+long_text=windows+max_windows=3"),
        ({"long_text": "windows", "normalize": "none"}, "+normalize=none+long_text=windows"),
    ],
)
def test_the_name_in_results_says_that_texts_are_scored_in_windows(
    checkpoint: Path, truncating: SentimentModel, wanted: dict[str, Any], suffix: str
) -> None:
    assert load(checkpoint, **wanted).name == truncating.name + suffix


def test_only_the_prefix_that_fills_the_windows_is_tokenized(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(checkpoint, long_text="windows", max_windows=3)
    seen = 0
    encode = model._tokenizer.encode

    def counting(texts: Sequence[str], max_length: int | None = None) -> Any:
        nonlocal seen
        seen += sum(map(len, texts))
        return encode(texts, max_length)

    monkeypatch.setattr(model._tokenizer, "encode", counting)
    (ids,), cut = model.tokenize(["очень длинный отзыв, " * 50_000])
    assert (len(ids), cut) == (512 + 2 * (510 - 64), [True])
    assert seen < 30_000  # of a million


def test_tokens_are_counted_without_special_ones(truncating: SentimentModel, model: SentimentModel) -> None:
    texts = [text_of(words) for words in (1, 20, 900)] + ["漢 漢"]
    for each, of_long in ((truncating, 510), (model, 900)):
        assert each.count_tokens(each.tokenize(texts).ids) == (1 + 20 + of_long + 2, 2)
    assert model.count_tokens([]) == (0, 0)


def test_all_of_a_text_is_read(model: SentimentModel, truncating: SentimentModel) -> None:
    """What stands at the end changes the answer, and with truncation it does not."""
    texts = [text_of(1_500) + " " + text_of(100, first) for first in range(5)]
    assert len({each.sentiment for each in truncating.score(texts)}) == 1
    assert all(one.sentiment != other.sentiment for one, other in pairwise(model.score(texts)))


def test_the_speed_of_micro_batches_is_measured_on_windows(model: SentimentModel) -> None:
    assert model.batch_seconds([text_of(600)], 0.001)
    assert [len(ids) for ids in model.pieces(model.tokenize([text_of(600), text_of(3)]).ids)] == [512, 156, 5]


def test_a_model_that_takes_few_tokens_warms_up_beside_another() -> None:
    model = SentimentModel.load("builtin", cpu_threads=1, max_batch_tokens=1_024, long_text="windows")
    assert model.max_tokens < max(WARM_UP_LENGTHS)
    runner = ModelRunner(model, Metrics("v"), tokenizer_progressed=lambda: None, model_progressed=lambda: None)
    runner.warm_up_beside_another()
