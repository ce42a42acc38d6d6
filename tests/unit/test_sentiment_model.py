"""Checkpoints of every kind that loads, those that must not, and the card's numbers."""

import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from huggingface_hub import try_to_load_from_cache
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
)

from tests.support.checkpoint import LABELS, POISON, TOKENIZER, Oracle, make_checkpoint
from worker.core.sentiment import LabelSet
from worker.model.checkpoint import ModelError
from worker.model.sentiment_model import SentimentModel
from worker.settings.shared import DEFAULT_MODEL

CARD_TEXT = "Какая гадость эта ваша заливная рыба!"
CARD_IDS = [2, 7063, 3261, 4192, 4823, 2242, 13786, 2085, 2506, 25263, 1545, 328, 700, 2593, 5, 3]
CARD_PROBABILITIES = [0.7870447, 0.4947824, 0.19755007]
CARD_SCORE = -0.5894946

Edit = Callable[..., Path]


def load(folder: Path, **options: Any) -> SentimentModel:
    """Loads a checkpoint without measuring this machine first."""
    return SentimentModel.load(str(folder), cpu_threads=1, max_batch_tokens=512, **options)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> SentimentModel:
    """The checkpoint as it is loaded by default, with what is measured on this machine."""
    return SentimentModel.load(str(checkpoint))


@pytest.fixture
def edited(checkpoint: Path, tmp_path: Path) -> Edit:
    """A copy of the checkpoint with other entries in its config."""

    def edit(**config: Any) -> Path:
        folder = tmp_path / "edited"
        shutil.copytree(checkpoint, folder)
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return folder

    return edit


def own_network(checkpoint: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float32)


def texts_of_every_length() -> Iterator[str]:
    words = [
        "товар",
        "очень",
        "плохой",
        ",",
        "не",
        "советую",
        "никому",
        ";",
        "цвет",
        "другой",
        "и",
        "пахнет",
        "краской",
    ]
    for length in (1, 2, 3, 5, 8, 13, 40, 150, 480, 700):
        yield " ".join(words[index % len(words)] for index in range(length))


def test_the_card_on_its_own_weights() -> None:
    folder = os.environ.get("SENTIMENT_CARD_MODEL")
    cached = any(
        isinstance(try_to_load_from_cache(DEFAULT_MODEL, file), str)
        for file in ("model.safetensors", "pytorch_model.bin")
    )
    if not folder and not cached:
        pytest.skip(f"the weights of {DEFAULT_MODEL} are neither in the hub's cache nor in $SENTIMENT_CARD_MODEL")
    model = SentimentModel.load(folder or DEFAULT_MODEL)
    assert model.get_sentiment(CARD_TEXT) == "negative"
    assert model.get_sentiment(CARD_TEXT, "score") == pytest.approx(CARD_SCORE, abs=1e-5)
    assert model.get_sentiment(CARD_TEXT, "proba") == pytest.approx(CARD_PROBABILITIES, abs=1e-5)


def test_the_card_s_token_ids(model: SentimentModel) -> None:
    assert model.tokenize([CARD_TEXT]).ids[0].tolist() == CARD_IDS


def test_the_card_s_arithmetic(model: SentimentModel, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = np.array(CARD_PROBABILITIES)
    logits = np.log(wanted / (1 - wanted)).astype(np.float32)[None]
    monkeypatch.setattr(model, "logits", lambda ids: logits)
    assert model.get_sentiment(CARD_TEXT) == "negative"
    assert model.get_sentiment(CARD_TEXT, "score") == pytest.approx(CARD_SCORE, abs=1e-6)
    assert model.get_sentiment(CARD_TEXT, "proba") == pytest.approx(wanted, abs=1e-6)


def test_a_string_gives_a_value_and_a_list_gives_a_list(model: SentimentModel) -> None:
    assert isinstance(model.get_sentiment("да"), str)
    assert isinstance(model.get_sentiment("да", "score"), float)
    assert model.get_sentiment("да", "proba").shape == (3,)
    assert model.get_sentiment(["да", "нет"]) == [model.get_sentiment("да"), model.get_sentiment("нет")]
    assert model.get_sentiment(["да", "нет"], "proba").shape == (2, 3)
    assert model.get_sentiment([], "label") == []
    with pytest.raises(ValueError, match="label, score or proba"):
        model.get_sentiment("да", "logits")  # type: ignore[arg-type]


def test_padding_and_company_change_nothing(model: SentimentModel, oracle: Oracle) -> None:
    texts = list(texts_of_every_length())
    alone = np.array([oracle.probabilities(text) for text in texts])
    assert model.get_sentiment(texts, "proba") == pytest.approx(alone, abs=1e-5)
    assert model.get_sentiment(texts[::-1], "proba") == pytest.approx(alone[::-1], abs=1e-5)


def test_the_oracle_of_other_tests_says_what_transformers_does(checkpoint: Path, oracle: Oracle) -> None:
    """Other tests compare the worker with it, and need not import transformers for that."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float64).eval()
    for text in [*texts_of_every_length(), CARD_TEXT, "", POISON]:
        tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=512)
        with torch.inference_mode():
            wanted = torch.sigmoid(model(**tokens).logits[0]).numpy()
        np.testing.assert_allclose(oracle.probabilities(text), wanted, atol=1e-9)
        assert oracle.is_truncated(text) is (len(tokenizer(text, verbose=False)["input_ids"]) > 512)


def test_texts_are_cut_at_512_tokens_as_the_tokenizer_cuts_them(model: SentimentModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    texts = [
        "слово " * 509 + "слово",
        "слово " * 511,
        "очень длинный отзыв, " * 4_000,
        "й" * 20_000,
        "," * 20_000,
        " " * 6_000 + "хорошо",
        "\u200b" * 6_000 + "хорошо " * 600,
    ]
    tokens = model.tokenize(texts)
    assert [ids.tolist() for ids in tokens.ids] == tokenizer(texts, truncation=True, max_length=512)["input_ids"]
    lengths = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    assert tokens.truncated == [length > 512 for length in lengths]


@pytest.mark.parametrize("beginning", ["😀" * 5_000, "\u0301" * 30_000, "а" * 101 + " ", "ab " * 50])
def test_a_long_text_that_has_few_tokens_at_first_is_cut_as_the_library_cuts(
    model: SentimentModel, beginning: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    text = beginning + " слово за словом" * 1_500
    tokens = model.tokenize(["да", text])
    assert list(tokens.ids[1]) == tokenizer(text, truncation=True, max_length=512)["input_ids"]
    assert tokens.truncated == [False, True]


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ("очень длинный отзыв, " * 50_000, 20_000),
        ("слово" * 200_000, 125_000),
        ("\u200b" * 1_000_000, 125_000),
        ("да" + " " * 1_000_000 + "нет", 125_000),
    ],
    ids=["words", "one word", "nothing", "two words"],
)
def test_only_a_prefix_of_a_long_text_is_looked_at(
    model: SentimentModel, monkeypatch: pytest.MonkeyPatch, text: str, most: int
) -> None:
    seen = 0
    encode = model._tokenizer.encode

    def counting(texts: list[str], max_length: int | None = None) -> Any:
        nonlocal seen
        seen += sum(map(len, texts))
        return encode(texts, max_length)

    monkeypatch.setattr(model._tokenizer, "encode", counting)
    assert model.tokenize([text]).truncated == [True]
    assert seen < most


def test_what_fills_no_maximum_is_not_cut_before_its_bound(model: SentimentModel) -> None:
    for text in ("да" + " " * 99_990 + "нет", "\u200b" * 100_000):
        assert model.tokenize([text]).truncated == [False]
    assert list(model.tokenize(["да" + " " * 99_990 + "нет"]).ids[0]) == list(model.tokenize(["да нет"]).ids[0])


def test_labels_are_matched_by_name_without_regard_to_case(edited: Edit, model: SentimentModel) -> None:
    folder = edited(id2label={"0": "POSITIVE", "1": "Negative", "2": "neutral"})
    permuted = load(folder).get_sentiment("да", "proba")
    negative, neutral, positive = model.get_sentiment("да", "proba")
    assert permuted == pytest.approx([neutral, positive, negative], abs=1e-6)


def softmax(logits: Any) -> Any:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def test_labels_without_names_have_those_that_transformers_gives_them(edited: Edit, oracle: Oracle) -> None:
    folder = edited(id2label=None, num_labels=3)
    plain = load(folder)
    assert plain.labels == LabelSet(("LABEL_0", "LABEL_1", "LABEL_2"), "softmax", None)
    assert plain.get_sentiment("да", "proba") == pytest.approx(softmax(oracle.logits("да")), abs=1e-5)
    with pytest.raises(ValueError, match="no score; load it with label_scores"):
        plain.get_sentiment("да", "score")
    (scored,) = plain.score(["да"])
    assert scored[0] is not None
    assert scored[0].score is None

    names = dict(zip(plain.labels.names, LABELS, strict=True))
    model = pickle.loads(pickle.dumps(load(folder, model_labels=names)))
    assert model.get_sentiment("да") == Oracle.label(oracle.logits("да"))
    assert model.get_sentiment("да", "score") == pytest.approx(Oracle.score(softmax(oracle.logits("да"))), abs=1e-5)
    assert model.name.endswith("+model_labels=LABEL_0=negative,LABEL_1=neutral,LABEL_2=positive")
    assert model.revision == model.name.removeprefix(f"{folder}@")


@pytest.fixture(scope="module", params=[1, 2, 5, 40])
def of_classes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A checkpoint of so many labels, and their names."""
    names = [f"класс {number}" for number in range(request.param)]
    folder = tmp_path_factory.mktemp("classes")
    return make_checkpoint(folder, labels=names, problem_type="multi_label_classification"), names


@pytest.mark.parametrize("backend", ["onnx", "torch"])
def test_any_number_of_labels_is_computed(of_classes: tuple[Path, list[str]], backend: str) -> None:
    folder, names = of_classes
    model, oracle = load(folder, backend=backend, threshold=0.5), Oracle(folder)
    assert model.labels == LabelSet(tuple(names), "sigmoid", None, 0.5)
    texts = ["да", "Какая гадость эта ваша заливная рыба!"]
    wanted = [oracle.probabilities(text) for text in texts]
    np.testing.assert_allclose(model.get_sentiment(texts, "proba"), wanted, atol=1e-5)
    assert model.get_sentiment(texts) == [names[int(np.argmax(row))] for row in wanted]


def test_a_checkpoint_without_a_trained_head_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    BertForMaskedLM(own_network(checkpoint).config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no finished classifier"):
        load(tmp_path)


def as_bin(checkpoint: Path, folder: Path, content: Any) -> Path:
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    (folder / "model.safetensors").unlink()
    if isinstance(content, bytes):
        (folder / "pytorch_model.bin").write_bytes(content)
    else:
        torch.save(content, folder / "pytorch_model.bin")
    return folder


def test_a_bin_is_read_without_running_code_and_that_is_said(
    checkpoint: Path, model: SentimentModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = as_bin(checkpoint, tmp_path, own_network(checkpoint).state_dict())
    with caplog.at_level(logging.WARNING):
        loaded = load(folder)
    assert loaded.get_sentiment("да", "score") == model.get_sentiment("да", "score")
    assert [record.message for record in caplog.records if "runs no code" in record.message]
    assert len(loaded.name.rpartition("@")[2]) == 12


class Malicious:
    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._trace,)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_bin_that_would_run_code_is_refused(checkpoint: Path, tmp_path: Path, form: str) -> None:
    trace = tmp_path / "it-ran"
    evil = {"bert.embeddings.word_embeddings.weight": Malicious(trace)}
    folder = as_bin(checkpoint, tmp_path / "evil", evil if form == "torch" else pickle.dumps(evil))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(folder)
    assert not trace.exists()


def test_code_in_a_checkpoint_is_never_run(edited: Edit, tmp_path: Path) -> None:
    folder = edited(
        model_type="surprise",
        auto_map={"AutoConfig": "code.Config", "AutoModelForSequenceClassification": "code.Model"},
    )
    trace = tmp_path / "it-ran"
    (folder / "code.py").write_text(f"import pathlib\npathlib.Path({str(trace)!r}).touch()\n")
    with pytest.raises(ModelError, match="never run"):
        load(folder)
    assert not trace.exists()


def test_half_precision_weights_are_computed_in_float32(
    model: SentimentModel, checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    own_network(checkpoint).half().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"
    loaded = load(tmp_path)
    assert loaded.dtype == "float32"
    assert loaded.get_sentiment("да", "proba") == pytest.approx(model.get_sentiment("да", "proba"), abs=0.05)


def test_the_revision_of_a_folder_follows_its_weights(checkpoint: Path, model: SentimentModel, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    again = load(tmp_path)
    assert again.name.rpartition("@")[2] == model.name.rpartition("@")[2]
    network = own_network(checkpoint)
    with torch.no_grad():
        network.classifier.bias += 1
    network.save_pretrained(tmp_path)
    assert load(tmp_path).name.rpartition("@")[2] != model.name.rpartition("@")[2]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/no/such/folder", "no such folder"),
        ("./nothing", "no such folder"),
        ("nobody/nothing-at-all", "cannot be loaded"),
    ],
)
def test_a_model_that_is_not_there(name: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=words):
        SentimentModel.load(name)


def test_a_device_that_is_not_there(checkpoint: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(ModelError, match="cpu works everywhere"):
        SentimentModel.load(str(checkpoint), device="cuda")


def make_albert(folder: Path) -> Path:
    """A tiny ALBERT with a SentencePiece model trained here."""
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(texts_of_every_length()) + "\nхорошо и плохо\n", encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "spiece"), vocab_size=60, hard_vocab_limit=False, pad_id=0, unk_id=1,
        bos_id=-1, eos_id=-1, control_symbols=["[CLS]", "[SEP]", "[MASK]"], minloglevel=2,
    )  # fmt: skip
    symbols = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    symbols |= {"mask_token": "[MASK]", "bos_token": "[CLS]", "eos_token": "[SEP]"}
    tokenizer = {"tokenizer_class": "AlbertTokenizer", "model_max_length": 64, **symbols}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    config = AlbertConfig(
        vocab_size=64, embedding_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64, pad_token_id=0, id2label=dict(enumerate(LABELS)),
    )  # fmt: skip
    AlbertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    model = load(make_albert(tmp_path))
    tokens = model.tokenize(["хорошо и плохо", "плохо " * 100])
    assert tokens.truncated == [False, True]
    assert len(tokens.ids[1]) == 64
    assert 3 < len(tokens.ids[0]) < 20
    texts = list(texts_of_every_length())
    alone = np.array([model.get_sentiment(text, "proba") for text in texts])
    assert model.get_sentiment(texts, "proba") == pytest.approx(alone, abs=1e-5)
