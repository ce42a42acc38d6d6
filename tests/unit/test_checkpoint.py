"""Which files a checkpoint is read from, what it is called after them, and the sentence for each that is wrong."""

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from tests.support.checkpoint import LABELS, PANICKING, TOKENIZER, Oracle, with_pattern
from tests.support.process import forked
from worker.model import tokenizer as tokenizing
from worker.model.checkpoint import BUILTIN, WEIGHTS, Checkpoint, ModelError, find_in, folder_of
from worker.model.library_errors import as_model_error
from worker.model.sentiment_model import SentimentModel
from worker.model.tokenizer import normalize_text

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
Edit = Callable[[Path], None]


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def load(folder: Path | str, **options: Any) -> SentimentModel:
    return SentimentModel.load(str(folder), backend="torch", cpu_threads=1, max_batch_tokens=512, **options)


def examined(folder: Path) -> Checkpoint:
    return Checkpoint(str(folder), find_in(folder))


def identity(folder: Path) -> str:
    return examined(folder).identity()


def edit(file: str, **entries: Any) -> Edit:
    def change(folder: Path) -> None:
        known = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(known | entries))

    return change


def cut(file: str) -> Edit:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:5_000][:-100])  # type: ignore[func-returns-value]


def written(file: str, content: str) -> Edit:
    return lambda folder: (folder / file).write_text(content)  # type: ignore[func-returns-value]


def sharded(folder: Path, *shards: str) -> None:
    """The weights in shards, the first of them by these names."""
    network = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    network.save_pretrained(folder, max_shard_size="50KB")
    index = folder / "model.safetensors.index.json"
    known = json.loads(index.read_text())
    files = sorted(set(known["weight_map"].values()))
    names = dict(zip(files, [*shards, *files[len(shards) :]], strict=True))
    for file, name in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / file, folder / name)
    known["weight_map"] = {weight: names[file] for weight, file in known["weight_map"].items()}
    index.write_text(json.dumps(known))
    (folder / "model.safetensors").unlink(missing_ok=True)


# --- Which one is meant ---


@pytest.mark.parametrize("name", ["models", "org/models"])
def test_a_folder_does_not_take_the_place_of_a_name_on_the_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shutil.copytree(folder, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=re.escape(f"write ./{name} if that is meant")):
        load(name)
    assert load(f"./{name}").name == f"./{name}@{identity(folder)}"


def test_folders_are_named_by_their_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "in")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("./here", "../in/here", "~/in/here", str(tmp_path / "in" / "here"), "../in/../in/here"):
        found = folder_of(name, None)
        assert found is not None
        assert found.samefile(tmp_path / "in" / "here"), name
    assert folder_of("builtin", None) == BUILTIN
    assert folder_of("org/name", "v2") is None
    for name in ("./nothing", "~/nothing", "/no/thing", "..nothing", "a/b/c"):
        with pytest.raises(ModelError, match="no such folder"):
            folder_of(name, None)


@pytest.mark.parametrize("name", ["builtin", "./model", "../model", "/model", "~/model"])
def test_a_revision_is_of_the_hub_whoever_loads(name: str) -> None:
    with pytest.raises(ModelError, match="revision is of the hub"):
        SentimentModel.load(name, revision="v2")


def test_a_checkpoint_of_the_hub_s_cache_is_read_through_its_links(folder: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        shutil.move(file, repository / "blobs" / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    cache = str(tmp_path / "hub")
    done = forked("classify", "--model", "org/name", "--max-batch-tokens", "512", "да", HF_HUB_CACHE=cache)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == f"org/name@{commit}"


# --- The name in results ---


def test_the_identity_is_what_sha256sum_says_of_the_files(folder: Path) -> None:
    (folder / "README.md").write_text("not one of them")
    names = sorted({"config.json", "model.safetensors", *(file.name for file in TOKENIZER.iterdir())})
    command = ["sh", "-c", 'sha256sum "$@" | sha256sum | cut -c1-12', "sh", *names]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    assert identity(folder) == said.strip()


@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"]
)
def test_each_file_that_is_read_is_in_the_identity(folder: Path, file: str) -> None:
    before = identity(folder)
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[:-1] if file.endswith("s") else content + b"\n")
    assert identity(folder) != before
    (folder / file).write_bytes(content)
    assert identity(folder) == before


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_what_was_written_since_it_was_found_has_no_identity(folder: Path, file: str) -> None:
    checkpoint = examined(folder)
    assert checkpoint.identity()
    replaced = folder / "replaced"
    shutil.copy(folder / file, replaced)
    replaced.replace(folder / file)
    with pytest.raises(ModelError, match=f"'{file}' was written while it was read; load it again"):
        checkpoint.identity()


def test_what_is_not_read_is_not_in_the_identity(folder: Path) -> None:
    before = identity(folder)
    (folder / "README.md").write_text("notes")
    (folder / "pytorch_model.bin").write_bytes(b"not read where there is a .safetensors")
    (folder / ".hidden.json").write_text("{}")
    (folder / "folder.json").mkdir()
    assert identity(folder) == before


def test_a_setting_that_changes_results_is_in_the_name(folder: Path) -> None:
    name = f"{folder}@{identity(folder)}"
    assert load(folder).name == name
    assert load(folder, normalize="none").name == f"{name}+normalize=none"
    assert load(folder, activation="softmax", normalize="none").name == f"{name}+activation=softmax+normalize=none"


def test_shards_are_in_the_identity_and_give_the_same_results(folder: Path) -> None:
    wanted = load(folder).get_sentiment("да", "proba")
    sharded(folder, "first.safetensors", "inside/second.safetensors")
    model = load(folder)
    np.testing.assert_allclose(model.get_sentiment("да", "proba"), wanted, atol=1e-6)
    before = identity(folder)
    assert model.name.endswith(before)
    part = folder / "inside" / "second.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"\x01")
    assert identity(folder) != before
    assert hashlib.sha256(b"").hexdigest()[:12] not in (before, identity(folder))


@pytest.mark.parametrize("place", ["../outside.safetensors", "inside/../../outside.safetensors", "absolute"])
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_that_names_files_elsewhere_is_refused(folder: Path, index: str, place: str) -> None:
    shutil.move(folder / "model.safetensors", folder.parent / "outside.safetensors")
    named = str(folder.parent / "outside.safetensors") if place == "absolute" else place
    (folder / "inside").mkdir()
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": {"classifier.bias": named}}))
    with pytest.raises(ModelError, match="only files of its own folder are read"):
        load(folder)


@pytest.mark.parametrize("weight_map", [None, {}, [], {"classifier.bias": 5}, {"classifier.bias": "gone.safetensors"}])
def test_an_index_that_names_no_files_is_refused(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        examined(folder)


# --- What is wrong with it ---

WRONG: dict[str, tuple[Edit, str]] = {
    "no maximum": (edit("tokenizer_config.json", model_max_length=0), "model_max_length in tokenizer_config.json is 0"),
    "a word": (edit("tokenizer_config.json", model_max_length="x"), "model_max_length in tokenizer_config.json is 'x'"),
    "true": (edit("tokenizer_config.json", model_max_length=True), "model_max_length in tokenizer_config.json is True"),
    "below zero": (
        edit("tokenizer_config.json", model_max_length=-5),
        "model_max_length in tokenizer_config.json is -5",
    ),
    "no positions": (edit("config.json", max_position_embeddings=0), "max_position_embeddings in config.json is 0"),
    "odd positions": (
        edit("config.json", max_position_embeddings="x"),
        "max_position_embeddings in config.json is 'x'",
    ),
    "no width": (edit("config.json", hidden_size=0), "hidden_size in config.json is 0"),
    "no heads": (edit("config.json", num_attention_heads=-1), "num_attention_heads in config.json is -1"),
    "no layers": (edit("config.json", num_hidden_layers=0), "num_hidden_layers in config.json is 0"),
    "endless layers": (
        edit("config.json", num_hidden_layers=10**7),
        "num_hidden_layers in config.json is 10000000; it should be 1,000 at most",
    ),
    "endless layers by another name": (edit("config.json", n_layers=10**7), "it should be 1,000 at most"),
    "endless labels": (edit("config.json", id2label=None, num_labels=10**9), "it should be 100,000 at most"),
    "a tokenizer that is a list": (written("tokenizer.json", "[]"), "tokenizer.json should be an object with a model"),
    "a tokenizer without a model": (written("tokenizer.json", "{}"), "tokenizer.json should be an object with a model"),
    "odd rows": (edit("config.json", vocab_size=1.5), "vocab_size in config.json is 1.5"),
    "padding beyond": (edit("config.json", pad_token_id=10**9), "pad_token_id in config.json is 1000000000"),
    "labels in a list": (edit("config.json", id2label=list(LABELS)), "id2label in config.json"),
    "labels by letter": (edit("config.json", id2label={"a": "negative"}), "id2label in config.json"),
    "labels of numbers": (edit("config.json", id2label={"0": 1, "1": 2, "2": 3}), "id2label in config.json"),
    "more labels": (edit("config.json", num_labels=5), "num_labels and id2label in config.json"),
    "a tokenizer elsewhere": (
        edit("tokenizer_config.json", fast_tokenizer_files=["../x/tokenizer.1.0.json"]),
        "only files of its own folder",
    ),
    "weights elsewhere": (edit("config.json", transformers_weights="../x.safetensors"), "only files of its own folder"),
    "a cut config": (written("config.json", '{"model_type": "be'), "config.json is no valid JSON"),
    "a cut tokenizer": (
        cut("tokenizer.json"),
        "tokenizer.json is no valid JSON (unexpected end of data)",
    ),
    "a config that is a list": (written("config.json", "[]"), "config.json is JSON, and no object"),
    "a list": (written("tokenizer_config.json", "[1]"), "tokenizer_config.json is JSON, and no object"),
    "weights by pointer": (written("model.safetensors", POINTER), "model.safetensors is a pointer of Git LFS"),
    "a tokenizer by pointer": (written("tokenizer.json", POINTER), "tokenizer.json is a pointer of Git LFS"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "it has no config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), f"it has none of {WEIGHTS[0]}"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_with_its_file(folder: Path, name: str) -> None:
    change, words = WRONG[name]
    change(folder)
    with pytest.raises(ModelError) as refusal:
        examined(folder)
    assert refusal.value.exit_code == 2
    sentence = str(refusal.value)
    assert sentence.startswith(f"model {folder} cannot be loaded: ")
    assert words in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("length", [None, 3, 512.0, 10**30, 1e30])
def test_a_maximum_that_fits_is_taken(folder: Path, length: float | None) -> None:
    edit("tokenizer_config.json", model_max_length=length)(folder)
    assert load(folder).max_tokens == (3 if length == 3 else 512)


def test_a_maximum_without_room_for_a_token_is_refused(folder: Path) -> None:
    edit("tokenizer_config.json", model_max_length=2)(folder)
    with pytest.raises(ModelError, match="leaves room for 2 tokens, and the shortest text has 3"):
        load(folder)


def test_labels_and_a_librarys_words_are_cut(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(
        "config.json",
        id2label={str(number): f"label {number}" + "x" * 1_000 for number in range(20_000)},
        problem_type="regression",
    )(folder)
    with pytest.raises(ModelError, match="there are 20,000, and each result would have all") as refusal:
        load(folder)
    assert len(str(refusal.value)) < 2_500
    with pytest.raises(ModelError) as refusal, as_model_error("a/b", "loaded"):
        raise ValueError("x" * 1_000_000)
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize(("name", "code"), [("a/b", 1), ("./b", 2), ("builtin", 2)])
def test_only_a_name_of_the_hub_can_be_away_for_a_while(name: str, code: int) -> None:
    with pytest.raises(ModelError) as refusal, as_model_error(name, "loaded"):
        raise TimeoutError("too slow")
    assert refusal.value.exit_code == code


def without_a_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "vocab.txt"):
        (folder / name).unlink()


def test_a_checkpoint_that_knows_no_word_is_refused(folder: Path) -> None:
    without_a_tokenizer(folder)
    with pytest.raises(ModelError, match=r"knows no word of the shipped reviews; is its tokenizer\.json"):
        load(folder)


def few_words(folder: Path) -> None:
    """One that knows letters alone, and so no word of two."""
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    known = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {word: number for word, number in known.items() if len(word) == 1 or word[0] == "["}
    file.write_text(json.dumps(tokenizer))


def test_a_checkpoint_that_knows_few_words_is_doubted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load(folder).warning is None
    few_words(folder)
    warning = load(folder).warning
    assert warning is not None
    assert re.search(r"\d\d% of the tokens of the shipped Russian reviews are unknown", warning)
    assert warning in caplog.text


def test_a_decoder_without_padding_is_refused(folder: Path) -> None:
    labels = dict(enumerate(LABELS))
    config = GPT2Config(
        vocab_size=29_564, n_positions=64, n_embd=8, n_layer=1, n_head=2, id2label=labels, pad_token_id=None
    )
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"set pad_token_id in its config\.json"):
        load(folder)


def test_a_tokenizer_that_always_panics_is_refused(folder: Path) -> None:
    with_pattern(folder, PANICKING.replace("x", "(?:слово)"))  # on one of the texts that tokenizers are compared with
    with pytest.raises(ModelError, match=r"cannot be (loaded|used): TokenizerPanicked"):
        load(folder)


# --- normalize ---


def test_none_gives_what_the_card_gives_for_every_text(folder: Path, oracle: Oracle) -> None:
    texts = ["и\u0306од, е\u0308ж", "за\u0301мок", "cafe\u0301", "обычный текст", "и" + "\u0306" * 100]
    wanted = [oracle.probabilities(text, composed=False) for text in texts]
    np.testing.assert_allclose(load(folder, normalize="none").get_sentiment(texts, "proba"), wanted, atol=2e-5)


def test_nfc_scores_decomposed_letters_and_stressed_ones_as_composed(folder: Path) -> None:
    model = load(folder)
    written = ["йод, ёж", "замок", "обычный текст"]
    otherwise = ["и\u0306од, е\u0308ж", "за\u0301мок", "обы\u0301чный текст"]
    assert model.get_sentiment(otherwise, "score") == model.get_sentiment(written, "score")
    assert load(folder, normalize="none").get_sentiment(otherwise, "score") != model.get_sentiment(written, "score")


def test_nfc_gives_what_the_card_gives_for_texts_that_are_normalized(folder: Path, oracle: Oracle) -> None:
    texts = ["йод, ёж", "café", "обычный текст", "👍🏽", "и" + "\u0306" * 100]
    wanted = [oracle.probabilities(text, composed=False) for text in texts]
    np.testing.assert_allclose(load(folder).get_sentiment(texts, "proba"), wanted, atol=2e-5)


def test_only_the_beginning_of_a_long_text_is_composed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    composed: list[str] = []
    monkeypatch.setattr(tokenizing, "normalize_text", lambda text: composed.append(text) or normalize_text(text))
    model = load(folder)
    composed.clear()
    (ids,) = model.tokenize(["и\u0306од и е\u0308ж, " * 10_000]).ids
    assert sum(map(len, composed)) < 20_000
    assert ids.tolist() == model.tokenize(["йод и ёж, " * 10_000]).ids[0].tolist()
