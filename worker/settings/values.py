"""What the values of settings mean: lists in one word, moments, patterns, addresses, the names of models."""

import ipaddress
import re
import time
from collections.abc import Iterable
from datetime import UTC, datetime

from pydantic import SecretStr

DEFAULT_TEXT_FIELD = "text"
DEFAULT_INPUT_FORMAT = "json"
AGO = re.compile(r"([0-9]{1,6})([smhd])")
PAIR = re.compile(r"((?:\\[\\,=]|[^\\,=])+)=((?:\\[\\,=]|[^\\,=])+)")
SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


def revealed(secret: SecretStr | None) -> str | None:
    return secret.get_secret_value() if secret else None


def split_names(value: str) -> tuple[str, ...]:
    """``"a, b"`` → ``("a", "b")``."""
    return tuple(name.strip() for name in value.split(",") if name.strip())


def text_fields(value: str) -> tuple[str, dict[str, str]]:
    """``"text, reviews=data.body"`` → ``("text", {"reviews": "data.body"})``: the path of all other topics, and by topic."""
    return _by_topic(value, DEFAULT_TEXT_FIELD)


def input_formats(value: str) -> tuple[str, dict[str, str]]:
    """``"avro, posts=text"`` → ``("avro", {"posts": "text"})``: the format of all other topics, and by topic."""
    return _by_topic(value, DEFAULT_INPUT_FORMAT)


def _by_topic(value: str, default: str) -> tuple[str, dict[str, str]]:
    words = split_names(value)
    others = [word for word in words if "=" not in word]
    by_topic = [(name.strip(), of.strip()) for name, _, of in (word.partition("=") for word in words if "=" in word)]
    return others[0] if others else default, dict(by_topic)


def pairs(value: str) -> list[tuple[str, str]]:
    r"""``"a=b, c\,d=e"`` → ``[("a", "b"), ("c,d", "e")]``. Raises ValueError for a word that is no pair."""
    found = []
    for word in filter(str.strip, re.findall(r"(?:\\.|[^,])+", value)):
        pair = PAIR.fullmatch(word)
        names = [re.sub(r"\\(.)", r"\1", each).strip() for each in pair.groups()] if pair else []
        if not all(names) or not names:
            raise ValueError(f"{word.strip()!r} is no pair")
        found.append((names[0], names[1]))
    return found


def pairs_text(pairs: Iterable[tuple[str, str]]) -> str:
    """The opposite of ``pairs``."""
    return ",".join("=".join(re.sub(r"([\\,=])", r"\\\1", each) for each in pair) for pair in pairs)


def whole_name(pattern: str) -> re.Pattern[str]:
    """For names that match from their first character to their last. Raises re.error."""
    re.compile(pattern)  # by itself: a fault in it should not be hidden by the parentheses
    return re.compile(rf"(?:{pattern})\Z")


def moment_ms(value: str) -> int:
    """``2026-11-23T10:00Z`` (without a zone: UTC), or how long ago (``30m``), in ms since 1970. Raises ValueError.

    What is before 1970 counts as its begin, for Kafka has no earlier times, and takes −1 and −2 for the ends of a log.
    """
    ago = AGO.fullmatch(value)
    if ago:
        return max(0, int((time.time() - int(ago[1]) * SECONDS[ago[2]]) * 1000))
    moment = datetime.fromisoformat(value)
    return max(0, int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000))


def ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """None for a name. An IPv6 address may stand in brackets."""
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


def is_folder(model: str) -> bool:
    """Whether ``model`` names a folder, by its beginning: any other is a name on the hub, or ``builtin``."""
    return model in (".", "..") or model.startswith(("/", "./", "../", "~"))


def revision_fault(model: str, revision: str | None) -> str | None:
    """Why a model cannot have this revision; None if it can."""
    if revision and (model == "builtin" or is_folder(model)):
        return f"revision is of the hub, and model {model} is not from there; leave it out"
    return None
