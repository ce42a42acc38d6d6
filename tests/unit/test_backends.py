"""ONNX Runtime gives the logits of BertClassifier; which forward is taken, kept and refused."""

import csv
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AlbertConfig, AlbertForSequenceClassification

from tests.unit.test_bert import NETWORKS, SIZES, bert, differences, longest
from worker.model import onnx_export as exported
from worker.model.checkpoint import BUILTIN
from worker.model.onnx_export import ExportedModel, export
from worker.model.sentiment_model import SentimentModel
from worker.model.torch import backends as backend
from worker.model.torch.backends import BackendError, choose_forward
from worker.model.torch.bert import BertClassifier


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of these tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "sentiment-worker" / "onnx"


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_runtime_gives_the_same_logits(name: str) -> None:
    torch.manual_seed(3)
    network = NETWORKS[name]()
    forward = ExportedModel(export(network, is_int8=False))
    lengths = [*range(1, 40), 64, 100, 255, 256, longest(network)]
    assert max(differences(network, forward, [length]) for length in lengths) < 1e-5
    draw = np.random.default_rng(5)
    for bound in (2, 60, longest(network)):
        assert differences(network, forward, draw.integers(1, bound + 1, 9).tolist()) < 1e-5


@pytest.mark.parametrize("has_it", [True, False])
def test_a_number_type_that_the_cpu_lacks_is_slow_and_said_to_be(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, has_it: bool
) -> None:
    monkeypatch.setattr(backend, "has_bfloat16", lambda: has_it)
    choose_forward(bert(num_hidden_layers=1).bfloat16(), backend="torch", is_int8=False)
    assert ("slower here than float32" in caplog.text) != has_it


def test_int8_agrees_on_real_texts() -> None:
    """On the reviews that ship with the package; benchmarks/engine.py measures it on all."""
    with (BUILTIN / "demo.csv").open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    exact = SentimentModel.load("builtin", backend="torch")
    quantized = SentimentModel.load("builtin", dtype="int8")
    assert quantized.dtype == "int8"
    labels = zip(exact.get_sentiment(texts), quantized.get_sentiment(texts), strict=True)
    assert sum(one == other for one, other in labels) >= 0.99 * len(texts)


def test_an_export_is_kept_for_the_same_weights_alone(cache: Path) -> None:
    torch.manual_seed(4)
    network = bert(num_hidden_layers=1)
    file = export(network, is_int8=False)
    written = file.stat().st_mtime_ns
    assert file.parent == cache
    assert export(network, is_int8=False) == file
    assert file.stat().st_mtime_ns == written
    with torch.no_grad():
        network.classifier.bias += 1
    assert export(network, is_int8=False) != file
    assert not [left for left in cache.iterdir() if left.is_dir()]


def test_a_cache_that_cannot_be_written_costs_an_export_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    network = bert(num_hidden_layers=1)
    forward = ExportedModel(export(network, is_int8=False))
    assert differences(network, forward, [7, 3]) < 1e-5
    assert "cannot be written" in caplog.text


@pytest.mark.parametrize(("faster", "kind"), [("torch", BertClassifier), ("onnx", ExportedModel)])
def test_auto_takes_the_faster_one(faster: str, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    is_fast = {"torch": BertClassifier, "onnx": ExportedModel}[faster]
    monkeypatch.setattr(backend, "shortest_run_s", lambda forward, *_: 1.0 if isinstance(forward, is_fast) else 2.0)
    assert isinstance(choose_forward(bert(), backend="auto", is_int8=False), kind)


@pytest.mark.parametrize(("full", "kind"), [(1.9, BertClassifier), (2.1, ExportedModel)])
def test_auto_weighs_a_single_text_and_a_full_pass_alike(
    full: float, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Onnx takes twice as long for one text; torch takes ``full`` times as long for many, and a neighbour disturbs once."""
    noise = [9.0]

    def seconds(forward: object, ids: torch.Tensor, _: object) -> float:
        is_onnx = isinstance(forward, ExportedModel)
        if len(ids) == 1:
            return 0.002 if is_onnx else 0.001
        return (noise.pop() if noise else 0.010) if is_onnx else 0.010 * full

    monkeypatch.setattr(backend, "shortest_run_s", seconds)
    assert isinstance(choose_forward(bert(), backend="auto", is_int8=False), kind)


def test_an_export_that_fails_leaves_torch(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(exported, "export", fail)
    assert isinstance(choose_forward(bert(), backend="auto", is_int8=False), BertClassifier)
    assert "cannot be exported" in caplog.text


def test_without_the_extra_auto_is_torch_and_the_rest_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exported, "is_installed", lambda: False)
    assert isinstance(choose_forward(bert(), backend="auto", is_int8=False), BertClassifier)
    for asked in ({"backend": "onnx", "is_int8": False}, {"backend": "auto", "is_int8": True}):
        with pytest.raises(BackendError, match=r"sentiment-worker\[onnx\]"):
            choose_forward(bert(), **asked)  # type: ignore[arg-type]


def test_what_cannot_be_done_is_refused_in_a_sentence() -> None:
    with pytest.raises(BackendError, match="backend is torch"):
        choose_forward(bert(), backend="torch", is_int8=True)
    with pytest.raises(BackendError, match="float32 or int8"):
        choose_forward(bert().bfloat16(), backend="onnx", is_int8=False)
    albert = AlbertForSequenceClassification(AlbertConfig(**SIZES, embedding_size=8)).eval()
    with pytest.raises(BackendError, match="BERT and RoBERTa classifiers alone"):
        choose_forward(albert, backend="onnx", is_int8=False)
    with pytest.raises(BackendError, match="dtype int8 covers"):
        choose_forward(albert, backend="auto", is_int8=True)


def planted(network: torch.nn.Module, cache: Path, mode: int) -> Path:
    """What a neighbour leaves under the name that the next export will have."""
    file = export(network, is_int8=False)
    file.write_bytes(b"planted")
    file.chmod(mode)
    return file


@pytest.mark.parametrize("mode", [0o666, 0o620, 0o602])
def test_a_file_that_others_may_have_written_is_not_loaded(cache: Path, mode: int) -> None:
    torch.manual_seed(11)
    network = bert(num_hidden_layers=1)
    file = planted(network, cache, mode)
    with pytest.raises(PermissionError):
        ExportedModel(file)
    assert export(network, is_int8=False) == file
    assert file.read_bytes() != b"planted"
    assert file.stat().st_mode & 0o777 == 0o600
    ExportedModel(file)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another user, which root alone can")
def test_a_file_of_another_user_is_not_loaded(cache: Path) -> None:
    torch.manual_seed(12)
    file = planted(bert(num_hidden_layers=1), cache, 0o600)
    os.chown(file, 12_345, 12_345)
    with pytest.raises(PermissionError):
        ExportedModel(file)


def test_a_folder_that_others_may_write_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "sentiment-worker" / "onnx"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    file = export(bert(num_hidden_layers=1), is_int8=False)
    assert file.parent != folder
    assert not list(folder.iterdir())
    assert "others may write there" in caplog.text
    ExportedModel(file)


def test_the_cache_folder_is_this_users_alone(cache: Path) -> None:
    export(bert(num_hidden_layers=1), is_int8=False)
    assert cache.stat().st_mode & 0o777 == 0o700
