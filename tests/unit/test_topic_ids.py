"""A topic's id in a commit's metadata, and when another id means another topic."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.core.topic_ids import TopicIds, TopicRecreated, with_topic_id, without_topic_id

ID, OTHER_ID = "a-_0aaaaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbbbbbbbb"


@given(st.text(), st.sampled_from([ID, OTHER_ID]))
def test_metadata_and_id_are_read_back(metadata: str, topic_id: str) -> None:
    assert without_topic_id(with_topic_id(topic_id, metadata)) == (topic_id, metadata)


@pytest.mark.parametrize(
    "metadata", ["", "invalid_json=3-5;*=7-9", "topic_id=", "topic_id=short", f"topic_id={ID};x", f"xtopic_id={ID}"]
)
def test_metadata_without_an_id_stays_as_it_is(metadata: str) -> None:
    assert without_topic_id(metadata) == ("", metadata)
    assert with_topic_id("", metadata) == metadata


def topic_ids_after(*answers: dict[str, str]) -> TopicIds:
    ids = TopicIds()
    for answer in answers:
        ids.update(answer)
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
def test_the_topic_is_still_the_same(answers: list[dict[str, str]]) -> None:
    ids = topic_ids_after(*answers)
    assert (ids.get("t"), ids.is_confirmed("t")) == (ID, True)


def test_one_answer_with_another_id_is_a_doubt() -> None:
    ids = topic_ids_after({"t": ID, "u": ID}, {"t": OTHER_ID, "u": ID})
    assert (ids.is_confirmed("t"), ids.is_confirmed("u"), ids.is_confirmed("v")) == (False, True, False)


@pytest.mark.parametrize("between", [[], [{}], [{"t": ""}]])
def test_two_answers_with_the_same_new_id_raise(between: list[dict[str, str]]) -> None:
    ids = topic_ids_after({"t": ID}, {"t": OTHER_ID}, *between)
    with pytest.raises(
        TopicRecreated, match=f"topic t was deleted and created again: its id was {ID} and is {OTHER_ID}"
    ):
        ids.update({"t": OTHER_ID})


def test_a_topic_without_an_id_is_confirmed_too() -> None:
    ids = topic_ids_after({"t": ""})
    assert (ids.get("t"), ids.is_confirmed("t")) == ("", True)


def test_an_invalidated_id_is_confirmed_by_the_next_answer() -> None:
    ids = topic_ids_after({"t": ID, "u": ID})
    ids.invalidate(["t"])
    assert (ids.is_confirmed("t"), ids.is_confirmed("u")) == (False, True)
    ids.update({"t": ID})
    assert ids.is_confirmed("t")
