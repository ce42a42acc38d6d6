"""The model as a Python program uses it: what it takes and answers, and what it leaves as it was."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging

from tests.support.waiting import wait_for
from worker.model import tokenizer as tokenizing
from worker.model.checkpoint import BUILTIN
from worker.model.sentiment_model import SentimentModel

TEXTS = [f"Хорошо, но дорого, {number}. " * (1 + number % 30) for number in range(200)]
HALF = "Плохо \ud83d"  # of an emoji, as a text that was cut in UTF-16
ENGINE: dict[str, Any] = {"cpu_threads": 2, "max_batch_tokens": 512}


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["onnx", "torch"])
def model(request: pytest.FixtureRequest) -> SentimentModel:
    return SentimentModel.load("builtin", backend=request.param, **ENGINE)


class Column:
    """What of a pandas Series differs from a list: no truth value, items by the labels of its index, dimensions."""

    def __init__(self, *items: object, ndim: int = 1) -> None:
        self._items = items
        self.ndim = ndim

    def __bool__(self) -> bool:
        raise ValueError("the truth value of a Series is ambiguous")

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[object]:
        return iter(self._items)

    def __getitem__(self, label: object) -> object:
        raise KeyError(label)


@pytest.mark.parametrize(
    "make", [tuple, np.array, lambda texts: np.array(texts, dtype=object), lambda texts: Column(*texts)]
)
def test_any_sequence_of_strings_is_as_a_list(model: SentimentModel, make: Callable[[list[str]], Any]) -> None:
    texts = ["Хорошо", "Отвратительно, не берите", ""]
    assert model.get_sentiment(make(texts)) == model.get_sentiment(texts)
    assert model.get_sentiment(make(texts), "score") == model.get_sentiment(texts, "score")
    assert np.array_equal(model.get_sentiment(make(texts), "proba"), model.get_sentiment(texts, "proba"))


@pytest.mark.parametrize("make", [list, tuple, np.array, lambda texts: Column(*texts)])
def test_a_sequence_of_nothing_has_no_answers(model: SentimentModel, make: Callable[[list[str]], Any]) -> None:
    assert model.get_sentiment(make([])) == model.get_sentiment(make([]), "score") == []
    assert model.get_sentiment(make([]), "proba").shape == (0, 3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (0, "of type int"),
        (None, "of type NoneType"),
        (False, "of type bool"),
        (b"", "of type bytes"),
        (b"text", "of type bytes"),
        ({}, "of type dict"),
        ({"text": 1}, "of type dict"),
        (set(), "of type set"),
        (["да", 7, "нет"], "item 1, counted from 0, is of type int"),
        (Column("да", "нет", float("nan")), "item 2, counted from 0, is of type float"),
        ([["да"]], "item 0, counted from 0, is of type list"),
        (np.array([["да"]]), "of type ndarray, of 2 dimensions"),
        (np.array("да"), "of type ndarray, of 0 dimensions"),
        (Column("name", "text", ndim=2), "of type Column, of 2 dimensions"),
    ],
)
def test_what_is_no_text_is_named_with_its_place(model: SentimentModel, given: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        model.get_sentiment(given)


def test_a_lone_surrogate_is_that_text_s_own_failure(model: SentimentModel) -> None:
    texts = ["Хорошо", HALF, "Плохо"]
    good = [texts[0], texts[2]]
    labels, scores, rows = (model.get_sentiment(texts, kind) for kind in ("label", "score", "proba"))  # type: ignore[call-overload]
    assert [labels[0], labels[2]] == model.get_sentiment(good)
    assert [scores[0], scores[2]] == pytest.approx(model.get_sentiment(good, "score"))
    assert rows[[0, 2]] == pytest.approx(model.get_sentiment(good, "proba"))
    assert labels[1] is None
    assert np.isnan(scores[1])
    assert rows.shape == (3, 3)
    assert np.isnan(rows[1]).all()
    assert [scored.sentiment is None for scored in model.score(texts)] == [False, True, False]


def test_a_lone_surrogate_alone(model: SentimentModel) -> None:
    assert model.get_sentiment(HALF) is None
    assert np.isnan(model.get_sentiment(HALF, "score"))
    assert np.isnan(model.get_sentiment(HALF, "proba")).all()


def test_a_number_that_is_none_still_raises_beside_a_surrogate(
    model: SentimentModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "logits", lambda ids: np.full((len(ids), 3), np.inf, dtype=np.float32))
    with pytest.raises(FloatingPointError, match="not finite"):
        model.get_sentiment([HALF, "да"])


def threads_of_another_thread() -> int:
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


def test_torch_s_threads_stay_as_they_were(model: SentimentModel) -> None:
    SentimentModel.load("builtin", backend="torch")
    model.get_sentiment(TEXTS)
    model.get_sentiment("да")
    assert torch.get_num_threads() == threads_of_another_thread() == 2


@pytest.mark.parametrize("has_bars", [True, False])
def test_progress_bars_stay_as_they_were(has_bars: bool) -> None:
    transformers_logging.enable_progress_bar()
    (enable_progress_bars if has_bars else disable_progress_bars)()
    try:
        SentimentModel.load("builtin", **ENGINE)
        assert transformers_logging.is_progress_bar_enabled()
        assert are_progress_bars_disabled() is not has_bars
    finally:
        enable_progress_bars()


def in_a_child(work: Callable[[], bool]) -> bool:
    """Whether ``work`` answers True in a process that is forked from this one, within two minutes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of forks beside threads from 3.12 on
        child = os.fork()
    if not child:
        try:
            os._exit(0 if work() else 1)
        except BaseException:  # noqa: BLE001 - the parent learns no more than that it failed
            traceback.print_exc()
        finally:
            os._exit(2)
    ended: list[int] = []

    def has_ended() -> bool:
        pid, status = os.waitpid(child, os.WNOHANG)
        ended.extend([status] if pid else [])
        return bool(ended)

    try:
        wait_for(has_ended, "the child")
    finally:
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return ended == [0]


@pytest.mark.parametrize("is_fast", [True, False])
def test_a_child_scores_after_a_fork(is_fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_fast:  # the library tokenizers has threads of its own
        monkeypatch.setattr(tokenizing.importlib.util, "find_spec", lambda name: None)
    model = SentimentModel.load("builtin", backend="onnx", **ENGINE)
    wanted = model.get_sentiment(TEXTS)
    (torch.randn(512, 512) @ torch.randn(512, 512)).exp().sum()  # the parent's own work on torch's threads
    assert in_a_child(lambda: model.get_sentiment(TEXTS) == wanted)


def test_a_pickle_loads_again_by_name_and_arguments(model: SentimentModel) -> None:
    other = SentimentModel.load("builtin", activation="softmax", normalize="none", **ENGINE)
    pickled = pickle.dumps(other)
    assert len(pickled) < 1_000
    again = pickle.loads(pickled)
    assert again.name == other.name != model.name
    assert (again.passes, again.max_batch_tokens) == (2, other.max_batch_tokens)
    assert np.array_equal(again.get_sentiment("да", "proba"), other.get_sentiment("да", "proba"))
    program = "import pickle, sys; print(*pickle.load(sys.stdin.buffer).get_sentiment(['да', 'нет']))"
    elsewhere = subprocess.run(
        [sys.executable, "-c", program], input=pickled, check=False, capture_output=True, timeout=99
    )
    assert (elsewhere.stdout.decode().split(), elsewhere.stderr) == (other.get_sentiment(["да", "нет"]), b"")


def test_a_pickle_names_the_hub_s_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    (tmp_path / "models--org--name" / "refs").mkdir(parents=True)
    (tmp_path / "models--org--name" / "refs" / "main").write_text(commit)
    shutil.copytree(BUILTIN, tmp_path / "models--org--name" / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pickled = pickle.dumps(SentimentModel.load("org/name", **ENGINE))
    (tmp_path / "models--org--name" / "refs" / "main").write_text("f" * 40)  # a newer one
    assert pickle.loads(pickled).name == f"org/name@{commit}"
