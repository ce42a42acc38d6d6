"""Which topic an offset belongs to: a topic that is deleted and created again has the same name and another id. Pure.

A commit's metadata names the id, so that an offset of the old topic is never taken for one of the new.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Final

_NAMED: Final = re.compile(r"(?:(.*);)?topic_id=([A-Za-z0-9_-]{22})", re.DOTALL)


class TopicRecreated(Exception):
    """An input topic was deleted and made again while this process used it; the message names it. Exit code 1."""


def with_topic_id(topic_id: str, metadata: str = "") -> str:
    """A commit's metadata with the topic's id appended; unchanged if the id is empty, that is, not known."""
    return ";".join(filter(None, (metadata, topic_id and f"topic_id={topic_id}")))


def without_topic_id(metadata: str) -> tuple[str, str]:
    """The topic's id in a commit's metadata, empty if it names none, and the rest of the metadata."""
    found = _NAMED.fullmatch(metadata)
    return (found[2], found[1] or "") if found else ("", metadata)


def is_of(topic_id: str, metadata: str) -> bool:
    """Whether an offset with this metadata is of this topic: it names no other, as far as both ids are known."""
    named, _ = without_topic_id(metadata)
    return not topic_id or named in ("", topic_id)


class TopicIds:
    """The ids of the topics that this process reads, as they were when it first saw them; empty if brokers have none.

    A broker may be behind the others for a moment, so a topic counts as created again only when two answers in a row have
    the same new id.
    """

    def __init__(self) -> None:
        self._ids: dict[str, str] = {}
        self._others: dict[str, str] = {}
        self._certain: set[str] = set()

    def of(self, topic: str) -> str:
        return self._ids.get(topic, "")

    def is_certain(self, topic: str) -> bool:
        """Whether the last answer confirmed the id, and ``ask_again`` was not called since."""
        return topic in self._certain

    def ask_again(self, topics: Iterable[str]) -> None:
        """These topics are no longer certain; the caller then asks a broker and notes its answer."""
        self._certain.difference_update(topics)

    def note(self, answer: Mapping[str, str]) -> None:
        """Takes a broker's answer: ids by topic, empty for none, without topics that it does not know.

        Raises TopicRecreated.
        """
        for topic, topic_id in answer.items():
            known = self._ids[topic] = self._ids.get(topic) or topic_id
            if topic_id == known or not (topic_id or topic in self._others):
                self._certain.add(topic)
                self._others.pop(topic, None)
            elif topic_id and topic_id == self._others.get(topic):
                raise TopicRecreated(
                    f"the input topic {topic} was deleted and made again: its id was {known} and is {topic_id}. The next "
                    "start takes no offset of the old one, and begins in the new one as auto_offset_reset says"
                )
            elif topic_id:
                self._certain.discard(topic)
                self._others[topic] = topic_id
