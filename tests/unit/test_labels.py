"""Which labels a checkpoint has, by its config.json and the settings."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.checkpoint import TOKENIZER
from worker.core.sentiment import CARD, LabelSet
from worker.model.checkpoint import BUILTIN, ModelError
from worker.model.labels import MAX_LABELS, CheckpointLabels, LabelOptions, checkpoint_labels
from worker.settings.values import pairs, pairs_text

STARS = ["1 star", "2 stars", "3 stars", "4 stars", "5 stars"]
MULTI = {"problem_type": "multi_label_classification"}


def labels_of(names: list[str], config: dict[str, Any] | None = None, **options: Any) -> CheckpointLabels:
    given = {"model_labels": {}, "label_scores": None, "activation": "auto", "threshold": None, **options}
    named = {"id2label": {str(number): name for number, name in enumerate(names)}}
    return checkpoint_labels("m", {**named, **(config or {})}, LabelOptions(**given))


def refusal(names: list[str], config: dict[str, Any] | None = None, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        labels_of(names, config, **options)
    return str(caught.value)


@pytest.mark.parametrize("problem", [None, "single_label_classification", "multi_label_classification", "regression"])
@pytest.mark.parametrize("names", [["negative", "neutral", "positive"], ["POSITIVE", " Negative", "neutral"]])
def test_the_cards_labels_are_sigmoid_whatever_config_says(problem: str | None, names: list[str]) -> None:
    found = labels_of(names, {"problem_type": problem})
    assert found.labels == CARD
    assert [names[column].strip().lower() for column in found.columns] == list(CARD.names)
    assert found.identity == ""


@pytest.mark.parametrize("folder", [TOKENIZER, BUILTIN])
def test_the_default_model_and_the_builtin_one_are_sigmoid_although_their_configs_say_otherwise(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config.get("problem_type") != "multi_label_classification"
    assert labels_of([], config) == (CARD, [0, 1, 2], "")


@pytest.mark.parametrize(
    ("config", "activation"),
    [({}, "softmax"), ({"problem_type": "single_label_classification"}, "softmax"), (MULTI, "sigmoid")],
)
def test_other_labels_follow_problem_type_in_the_order_of_the_logits(config: dict[str, Any], activation: str) -> None:
    assert labels_of(STARS, config) == (LabelSet(tuple(STARS), activation, None), [0, 1, 2, 3, 4], "")
    numbered = {"id2label": {"1": "b", "0": "a", "2": "c"}}
    assert labels_of([], {**config, **numbered}).labels.names == ("a", "b", "c")


def test_labels_without_names_have_those_that_transformers_gives_them() -> None:
    assert labels_of([], {"id2label": None, "num_labels": 3}).labels.names == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert labels_of([], {"id2label": None}).labels.names == ("LABEL_0", "LABEL_1")


def test_names_are_given_and_the_activation_stays_the_checkpoints() -> None:
    renames = {"LABEL_2": "positive", "LABEL_0": "negative", "LABEL_1": "neutral"}
    found = labels_of(["LABEL_0", "LABEL_1", "LABEL_2"], model_labels=renames)
    assert found.labels == LabelSet(("negative", "neutral", "positive"), "softmax", (-1, 0, 1))
    assert found.identity == "+model_labels=LABEL_0=negative,LABEL_1=neutral,LABEL_2=positive"
    swapped = labels_of(["a", "b"], model_labels={"a": "b", "b": "a"})
    assert (swapped.labels.names, swapped.columns) == (("b", "a"), [0, 1])
    assert labels_of(["a", "b"], model_labels={"a": "a"}).identity == "", "a name that stays is no change"


def test_the_cards_labels_may_have_other_names_and_are_still_the_cards() -> None:
    for key in ("negative", "NEGATIVE"):
        found = labels_of(["NEGATIVE", "NEUTRAL", "POSITIVE"], model_labels={key: "плохо"})
        assert found.labels == LabelSet(("плохо", "neutral", "positive"), "sigmoid", None)
        assert found.identity == "+model_labels=negative=плохо"


def test_weights_are_those_that_are_given_or_known() -> None:
    assert labels_of(["NEGATIVE", "POSITIVE"]).labels.weights == (-1, 1)
    assert labels_of(["negative", "positive", "skip"]).labels.weights is None
    given = labels_of(STARS, label_scores={"1 star": -1, "5 stars": 1, "2 stars": -0.5})
    assert given.labels.weights == (-1, -0.5, 0, 0, 1)
    assert given.identity == "+label_scores=1 star=-1,2 stars=-0.5,3 stars=0,4 stars=0,5 stars=1"
    card = ["negative", "neutral", "positive"]
    assert labels_of(card, label_scores={"negative": -1.0, "positive": 1}).identity == "", "as by default"
    renamed = labels_of(["LABEL_0", "LABEL_1"], model_labels={"LABEL_0": "bad"}, label_scores={"bad": -1})
    assert renamed.labels.weights == (-1, 0), "weights go by the new names"


def test_what_is_not_by_default_is_in_the_models_name() -> None:
    card = ["negative", "neutral", "positive"]
    assert labels_of(card, activation="sigmoid").identity == ""
    assert labels_of(card, activation="softmax").identity == "+activation=softmax"
    assert labels_of(STARS, activation="softmax").identity == ""
    assert labels_of(STARS, activation="sigmoid", threshold=0.5).identity == "+activation=sigmoid+threshold=0.5"
    assert labels_of(STARS, MULTI, threshold=0.25).labels.threshold == 0.25
    assert labels_of(STARS, model_labels={"1 star": "a,b=c\\"}).identity == "+model_labels=1 star=a\\,b\\=c\\\\"


@pytest.mark.parametrize(
    ("names", "options", "parts"),
    [
        (STARS, {"model_labels": {"1star": "x"}}, ["model_labels", "1star", "it has: 1 star, 2 stars"]),
        (STARS, {"model_labels": {"1 star": "3 stars"}}, ["model_labels", "two labels", "3 stars", "each its own"]),
        (STARS, {"label_scores": {"6 stars": 1}}, ["label_scores", "6 stars", "it has: 1 star"]),
        (
            ["LABEL_0", "b"],
            {"model_labels": {"LABEL_0": "a"}, "label_scores": {"LABEL_0": 1}},
            ["label_scores", "it has: a, b"],
        ),
        (
            STARS,
            {"label_scores": {"1 star": float("nan")}},
            ["label_scores", "1 star", "nan", "from -1,000,000 to 1,000,000"],
        ),
        (STARS, {"label_scores": {"1 star": -1e305}}, ["label_scores", "1 star", "-1e+305", "from -1,000,000 to"]),
        (
            STARS,
            {"model_labels": {"1 star": "\udcff"}},
            ["model_labels", "1 star", "\\udcff, which cannot be a label's"],
        ),
        (STARS, {"model_labels": {"1 star": "x" * 301}}, ["model_labels", "1 star", "1 to 300 characters"]),
        (
            ["NEGATIVE", "neutral", "positive"],
            {"model_labels": {"negative": "a", "NEGATIVE": "b"}},
            ["model_labels", "NEGATIVE and negative", "one label"],
        ),
        (STARS, {"threshold": 0.5}, ["threshold", "activation sigmoid", "softmax", "leave threshold out"]),
        (["score"], {}, ["a number (regression)", "set activation to sigmoid"]),
        (["score"], {"activation": "softmax"}, ["activation softmax", "always 1", "set activation to sigmoid"]),
        ([f"l{n}" for n in range(MAX_LABELS + 1)], {}, ["1,001", "1,000 at most"]),
        (["a", "a"], {}, ["id2label", "a is there twice"]),
        (["a", " "], {}, ["id2label", "'' is no name"]),
        (["a", "b\n" * 2 + "c"], {}, ["id2label", "no control characters"]),
        (["a", "\ud800"], {}, ["id2label", "\\ud800 is no name"]),
        (["a", "x" * 301], {}, ["id2label", "1 to 300 characters"]),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(names: list[str], options: dict[str, Any], parts: list[str]) -> None:
    sentence = refusal(names, **options)
    assert [part for part in parts if part not in sentence] == [], sentence
    assert "\n" not in sentence


def test_labels_have_to_be_numbered_without_gaps() -> None:
    assert "numbered 0 to 1, and are: 0, 2" in refusal([], {"id2label": {"0": "a", "2": "b"}})


def test_a_regression_of_several_numbers_has_no_labels_either() -> None:
    assert "regression" in refusal(["a", "b"], {"problem_type": "regression"})
    assert labels_of(["a", "b"], {"problem_type": "regression"}, activation="softmax").labels.activation == "softmax"


def test_one_label_is_read_by_sigmoid_where_that_is_known() -> None:
    assert labels_of(["toxic"], MULTI).labels == LabelSet(("toxic",), "sigmoid", None)
    assert labels_of(["toxic"], activation="sigmoid", threshold=0.5).labels.activation == "sigmoid"


# --- The words of the settings ---

WORD = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1).filter(
    lambda word: word == word.strip()
)


@given(st.lists(st.tuples(WORD, WORD)))
def test_pairs_of_any_words_are_read_as_they_were_written(words: list[tuple[str, str]]) -> None:
    assert pairs(pairs_text(words)) == words
    assert pairs(" , ".join(f" {pairs_text([word])} " for word in words)) == words, "spaces do not matter"


@given(st.text())
def test_any_text_is_pairs_or_refused(text: str) -> None:
    try:
        found = pairs(text)
    except ValueError:
        return
    assert pairs(pairs_text(found)) == found


@given(st.lists(WORD, min_size=1, max_size=8, unique=True), st.data())
def test_any_renaming_keeps_the_order_and_the_number_of_labels(names: list[str], data: st.DataObject) -> None:
    renames = data.draw(st.dictionaries(st.sampled_from(names), WORD))
    try:
        found = labels_of(names, MULTI, model_labels=renames)
    except ModelError:
        wanted = [renames.get(name, name) for name in names]
        assert len(set(wanted)) < len(wanted)
        return
    if sorted(map(str.lower, names)) != sorted(CARD.names):
        assert found.labels.names == tuple(renames.get(name, name) for name in names)
    assert sorted(found.columns) == list(range(len(names)))
    written = found.identity.removeprefix("+model_labels=")
    assert dict(pairs(written)) == {name: new for name, new in renames.items() if name != new}
