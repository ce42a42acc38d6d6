"""A topic's id in a commit's metadata, and when another id is a verdict."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.core.topic_ids import TopicIds, TopicRecreated, with_topic_id, without_topic_id

ID, OTHER_ID = "a-_0aaaaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbbbbbbbb"


@given(st.text(), st.sampled_from([ID, OTHER_ID]))
def test_metadata_says_what_it_said_and_the_id(metadata: str, topic_id: str) -> None:
    assert without_topic_id(with_topic_id(topic_id, metadata)) == (topic_id, metadata)


@pytest.mark.parametrize(
    "metadata", ["", "invalid_json=3-5;*=7-9", "topic_id=", "topic_id=short", f"topic_id={ID};x", f"xtopic_id={ID}"]
)
def test_metadata_without_an_id_stays_as_it_is(metadata: str) -> None:
    assert without_topic_id(metadata) == ("", metadata)
    assert with_topic_id("", metadata) == metadata


def noted(*answers: dict[str, str]) -> TopicIds:
    ids = TopicIds()
    for answer in answers:
        ids.note(answer)
    return ids


@pytest.mark.parametrize(
    "answers",
    [
        [{"t": ID}],
        [{"t": ID}, {}],  # the topic is unknown for a moment
        [{"t": ID}, {"t": ""}],  # a broker without ids
        [{"t": ""}, {"t": ID}],  # the brokers are new enough from now on
        [{"t": ID}, {"t": OTHER_ID}, {"t": ID}],  # a broker was behind
        [{"t": ID}, {"t": OTHER_ID}, {"t": ID}, {"t": OTHER_ID}, {"t": ID}],
    ],
)
def test_no_verdict(answers: list[dict[str, str]]) -> None:
    ids = noted(*answers)
    assert (ids.of("t"), ids.is_certain("t")) == (ID, True)


def test_one_answer_alone_is_a_doubt() -> None:
    ids = noted({"t": ID, "u": ID}, {"t": OTHER_ID, "u": ID})
    assert (ids.is_certain("t"), ids.is_certain("u"), ids.is_certain("v")) == (False, True, False)


@pytest.mark.parametrize("between", [[], [{}], [{"t": ""}]])
def test_two_answers_that_agree_are_a_verdict(between: list[dict[str, str]]) -> None:
    ids = noted({"t": ID}, {"t": OTHER_ID}, *between)
    with pytest.raises(TopicRecreated, match=f"topic t was deleted and made again: its id was {ID} and is {OTHER_ID}"):
        ids.note({"t": OTHER_ID})


def test_no_id_is_certain_too() -> None:
    ids = noted({"t": ""})
    assert (ids.of("t"), ids.is_certain("t")) == ("", True)


def test_after_a_rebalance_it_is_asked_again() -> None:
    ids = noted({"t": ID, "u": ID})
    ids.ask_again(["t"])
    assert (ids.is_certain("t"), ids.is_certain("u")) == (False, True)
    ids.note({"t": ID})
    assert ids.is_certain("t")
