"""Which backend loads a checkpoint on a CPU, what is refused, and what is said where torch is missing."""

import csv
import ctypes
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AlbertConfig, AlbertForSequenceClassification

from tests.support.checkpoint import LABELS, TOKENIZER
from tests.support.classifiers import SIZES, bert
from worker.model import device, loading
from worker.model.checkpoint import BUILTIN, ModelError, NeedsTorch
from worker.model.device import device_of, unused_device_warning
from worker.model.runner import BackendError
from worker.model.sentiment_model import SentimentModel
from worker.model.torch import backends
from worker.model.torch.backends import choose_forward


@pytest.fixture(scope="module")
def albert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that the ONNX graph does not cover."""
    folder = tmp_path_factory.mktemp("albert")
    for file in TOKENIZER.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    sizes = {**SIZES, "vocab_size": 29_564, "embedding_size": 8, "id2label": dict(enumerate(LABELS))}
    AlbertForSequenceClassification(AlbertConfig(**sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (device, loading):
        monkeypatch.setattr(module, "has_torch", lambda: False)


def load(name: object, **settings: Any) -> SentimentModel:
    return SentimentModel.load(str(name), **{"cpu_threads": 1, "max_batch_tokens": 512, **settings})


@pytest.mark.parametrize(
    ("asked", "backend", "dtype"),
    [
        ({}, "onnx", "float32"),
        ({"dtype": "float32"}, "onnx", "float32"),
        ({"backend": "onnx"}, "onnx", "float32"),
        ({"dtype": "int8"}, "onnx", "int8"),
        ({"backend": "torch"}, "torch", "float32"),
        ({"dtype": "bfloat16"}, "torch", "bfloat16"),
    ],
)
def test_a_cpu_takes_onnx_unless_torch_is_asked_for(asked: dict[str, Any], backend: str, dtype: str) -> None:
    model = load("builtin", **asked)
    assert (model.device, model.backend, model.dtype) == ("cpu", backend, dtype)


def test_what_the_graph_does_not_cover_is_computed_by_torch(albert: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert load(albert).backend == "torch"
    assert "torch computes this model" in caplog.text


@pytest.mark.parametrize("dtype", ["auto", "int8"])
def test_a_tokenizer_that_only_transformers_reads_leaves_the_network_to_onnx(tmp_path: Path, dtype: str) -> None:
    model = load(with_tokenizer_class(tmp_path, "ElectraTokenizer"), dtype=dtype)
    assert model.backend == "onnx"
    texts = ["Очень хорошо", "Всё плохо, никому не советую"]
    assert model.get_sentiment(texts, "proba") == pytest.approx(
        load("builtin", dtype=dtype).get_sentiment(texts, "proba"), abs=1e-6
    )


@pytest.mark.usefixtures("no_torch")
def test_without_torch_a_tokenizer_that_needs_it_says_why(tmp_path: Path) -> None:
    with pytest.raises(NeedsTorch, match=r"class ElectraTokenizer; pip install 'sentiment-worker\[torch\]'"):
        load(with_tokenizer_class(tmp_path, "ElectraTokenizer"))


@pytest.mark.parametrize("name", ["bert.encoder.layer.0.attention.self.query.bias", "bert.pooler.dense.weight"])
def test_weights_that_are_stored_as_integers_are_read_as_numbers(tmp_path: Path, name: str) -> None:
    folder = with_tokenizer_class(tmp_path, "BertTokenizer")
    weights = load_file(folder / "model.safetensors")
    whole = np.rint(8 * weights[name].astype(np.float32))
    answers = []
    for dtype in (np.int8, np.int64, np.float32):
        save_file(weights | {name: whole.astype(dtype)}, folder / "model.safetensors", {"format": "pt"})
        answers.append(load(folder).get_sentiment("Очень хорошо", "proba").tolist())
    assert answers[0] == answers[1] == answers[2]


def test_int8_refuses_weights_that_are_not_finite(tmp_path: Path) -> None:
    """As bytes they would be other numbers, and a text that float32 has no result for would get one."""
    folder = with_tokenizer_class(tmp_path, "BertTokenizer")
    weights = load_file(folder / "model.safetensors")
    words = "bert.embeddings.word_embeddings.weight"
    weights[words][500, 3] = np.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BackendError, match=f"int8 cannot .*: {words} holds numbers that are not finite; set dtype"):
        load(folder, dtype="int8")
    assert load(folder).get_sentiment("Очень хорошо") == load("builtin").get_sentiment("Очень хорошо")


def with_tokenizer_class(folder: Path, kind: str) -> Path:
    """The shipped checkpoint, whose tokenizer is of another class of transformers."""
    for file in BUILTIN.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_class": kind}))
    return folder


@pytest.mark.usefixtures("no_torch")
@pytest.mark.parametrize("asked", [{"backend": "torch"}, {"dtype": "bfloat16"}])
def test_without_torch_a_setting_that_needs_it_says_what_to_install(asked: dict[str, Any]) -> None:
    with pytest.raises(NeedsTorch, match=r"without torch: .*; pip install 'sentiment-worker\[torch\]' installs it"):
        load("builtin", **asked)


@pytest.mark.usefixtures("no_torch")
def test_without_torch_a_checkpoint_that_needs_it_says_why(albert: Path) -> None:
    with pytest.raises(NeedsTorch, match=r"model_type is 'albert'.*pip install 'sentiment-worker\[torch\]'"):
        load(albert)


@pytest.mark.usefixtures("no_torch")
def test_a_gpu_that_is_left_unused_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_nvidia_device", lambda: True)
    assert device_of("auto") == "cpu"
    assert "lets it use the NVIDIA GPU" in str(unused_device_warning("auto"))
    assert unused_device_warning("cpu") is None
    with pytest.raises(ModelError, match=r"device is cuda, which needs torch; pip install .* installs it"):
        device_of("cuda")
    warning = load("builtin").warning  # as `check` shows it
    assert warning
    assert "NVIDIA GPU" in warning
    monkeypatch.setattr(device, "has_nvidia_device", lambda: False)
    assert unused_device_warning("auto") is None


@pytest.mark.parametrize(
    ("started", "counted", "devices", "has_one"),
    [(0, 0, 1, True), (0, 0, 0, False), (100, 0, 1, False), (0, 100, 1, False)],
)
def test_the_driver_says_whether_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch, started: int, counted: int, devices: int, has_one: bool
) -> None:
    class Driver:
        def cuInit(self, _: int) -> int:  # noqa: N802 - the driver's name
            return started

        def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802 - the driver's name
            count._obj.value = devices
            return counted

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Driver())
    assert device.has_nvidia_device() is has_one


def test_another_library_of_the_driver_s_name_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert not device.has_nvidia_device()


@pytest.mark.parametrize("has_it", [True, False])
def test_a_number_type_that_the_cpu_lacks_is_slow_and_said_to_be(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, has_it: bool
) -> None:
    monkeypatch.setattr(backends, "has_bfloat16", lambda: has_it)
    choose_forward(bert(num_hidden_layers=1).bfloat16())
    assert ("slower here than float32" in caplog.text) != has_it


def test_backends_and_int8_agree_on_real_texts() -> None:
    """On the reviews that ship with the package; benchmarks/engine.py measures it on all."""
    with (BUILTIN / "demo.csv").open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    exact, onnx, quantized = (load("builtin", **asked) for asked in ({"backend": "torch"}, {}, {"dtype": "int8"}))
    assert onnx.get_sentiment(texts, "proba") == pytest.approx(exact.get_sentiment(texts, "proba"), abs=1e-5)
    labels = zip(exact.get_sentiment(texts), quantized.get_sentiment(texts), strict=True)
    assert sum(one == other for one, other in labels) >= 0.99 * len(texts)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"backend": "torch", "dtype": "int8"}, "backend is torch"),
        ({"backend": "onnx", "dtype": "bfloat16"}, "float32 or int8"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(BackendError, match=words):
        load("builtin", **asked)


@pytest.mark.parametrize(
    ("asked", "words"), [({"backend": "onnx"}, "backend onnx cannot"), ({"dtype": "int8"}, "dtype int8 cannot")]
)
def test_what_onnx_cannot_compute_is_refused(albert: Path, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(BackendError, match=f"{words} compute this checkpoint: its model_type is 'albert'"):
        load(albert, **asked)


def test_torch_is_left_with_its_threads_after_a_load() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        load("builtin", backend="torch")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
