"""Ids of topics. A topic that is deleted and created again keeps its name, but has another id. Pure.

A commit's metadata names the id of its topic, so that an offset in the old topic is never taken for one in the new.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Final

_METADATA: Final = re.compile(r"(?:(.*);)?topic_id=([A-Za-z0-9_-]{22})", re.DOTALL)


class TopicRecreated(Exception):
    """An input topic was deleted and created again while this process used it; the message names it. Exit code 1."""


def with_topic_id(topic_id: str, metadata: str = "") -> str:
    """A commit's metadata with the topic's id appended; unchanged if the id is empty, that is, not known."""
    return ";".join(filter(None, (metadata, topic_id and f"topic_id={topic_id}")))


def without_topic_id(metadata: str) -> tuple[str, str]:
    """The topic's id in a commit's metadata, empty if it names none, and the rest of the metadata."""
    match = _METADATA.fullmatch(metadata)
    return (match[2], match[1] or "") if match else ("", metadata)


def is_of(topic_id: str, metadata: str) -> bool:
    """Whether a commit with this metadata is of the topic with this id. Where either id is not known, it is."""
    committed_id, _ = without_topic_id(metadata)
    return not topic_id or committed_id in ("", topic_id)


class TopicIds:
    """The ids of the topics that this process reads, as they were when it first saw them; empty if brokers have none.

    A broker may be behind the others for a moment. So a topic counts as created again only when two answers in a row have
    the same new id.
    """

    def __init__(self) -> None:
        self._ids: dict[str, str] = {}
        self._new_ids: dict[str, str] = {}  # that one answer had, and the next has not confirmed yet
        self._confirmed: set[str] = set()

    def get(self, topic: str) -> str:
        """The topic's id; empty where it is not known."""
        return self._ids.get(topic, "")

    def is_confirmed(self, topic: str) -> bool:
        """Whether the last answer had the known id, and ``invalidate`` has not been called since."""
        return topic in self._confirmed

    def invalidate(self, topics: Iterable[str]) -> None:
        """These topics are no longer confirmed; the caller asks a broker, and gives its answer to ``update``."""
        self._confirmed.difference_update(topics)

    def update(self, answer: Mapping[str, str]) -> None:
        """Takes a broker's answer: ids by topic, empty for none, without the topics that it does not know.

        Raises TopicRecreated.
        """
        for topic, topic_id in answer.items():
            known = self._ids[topic] = self._ids.get(topic) or topic_id
            if topic_id == known or not (topic_id or topic in self._new_ids):
                self._confirmed.add(topic)
                self._new_ids.pop(topic, None)
            elif topic_id and topic_id == self._new_ids.get(topic):
                raise TopicRecreated(
                    f"the input topic {topic} was deleted and created again: its id was {known} and is {topic_id}. The next "
                    "start takes no offset of the old one, and begins in the new one as auto_offset_reset says"
                )
            elif topic_id:
                self._confirmed.discard(topic)
                self._new_ids[topic] = topic_id
